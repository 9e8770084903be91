"""What the entries of a menu will err, about, without solving them.

A search over thousands of candidates need not solve those that cannot win. So an entry's error in
the metric is foretold from what is cheap: rounding from some of the rows, an adapter from what it
can take of white noise and of the weight, a factorisation from where its solver starts.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from rabbet.core.plan import Term
from rabbet.forms import Aim, Form
from rabbet.grids.grid import Grid
from rabbet.jobs import Tensors
from rabbet.layers import Site
from rabbet.reconstruct.candidates import (
    Terms,
    metric_of,
    noise,
    rounded_together,
    rounding,
    solve_site,
)
from rabbet.solve.gram import Gram
from rabbet.solve.metric import Metric
from rabbet.solve.rounding import Rows, round_layouts, start
from rabbet.solve.whiten import noise_left, spectrum

TINY = 1e-30
ROWS = 64  # of each group, that stand for all
STEPS = 10  # evaluations of the error at the least rank of a factorisation, see `Form.unfinished`


def predict_site(
    weight: Tensor, second: Tensor | None = None, *, site: Site, menu: Sequence[Terms]
) -> Tensors:
    """About the errors that `solve_site` finds, [menu]; an entry of no known kind is solved.

    Arguments: see `solve_site`. Also a change of the weight such as rounding causes (`noise`, in
    its shape): white in the metric, and in each row as large as the row's largest entry.
    `noise.error` is its error in the metric.
    """
    told = _Prediction(site, weight, metric_of(site, weight, second))
    change = told.noise()
    return {
        "errors": told.menu(menu, second),
        "noise": change.bfloat16(),
        "noise.error": told.metric.error(site.matrix(change.bfloat16().float())).sum(),
    }


def predict_errors(
    weight: Tensor, second: Tensor | None = None, *, site: Site, menu: Sequence[Terms]
) -> Tensors:
    """The `errors` of `predict_site` alone."""
    told = _Prediction(site, weight, metric_of(site, weight, second))
    return {"errors": told.menu(menu, second)}


class _Prediction:
    """What is known of one layer, as far as it was asked for."""

    def __init__(self, site: Site, weight: Tensor, metric: Metric) -> None:
        self.site, self.weight, self.metric = site, weight, metric
        self.target = site.matrix(weight)
        self.power = float(metric.error(self.target).sum())
        self.least: dict[type[Form], Form] = {}
        self.sums: dict[tuple[Form, int], tuple[Tensor, Tensor, float]] = {}
        self.rounded: dict[Grid, float] = {}
        self.spectra: dict[bool, Tensor] = {}

    def menu(self, menu: Sequence[Terms], second: Tensor | None) -> Tensor:
        """About the errors of all entries, [menu]; one of no known kind is solved."""
        self.round([terms[0].grid for terms in menu if rounded_together(terms[0])])
        for form in sorted({terms[0].form for terms in menu}, key=lambda f: -(f.rank or 0)):
            self.least[type(form)] = form
        known = {k: error for k, terms in enumerate(menu) if (error := self.of(terms)) is not None}
        unknown = [k for k in range(len(menu)) if k not in known]
        entries = [menu[k] for k in unknown]
        solved = solve_site(self.weight, second, site=self.site, menu=entries)
        known |= {k: float(solved[f"{place}.error"]) for place, k in enumerate(unknown)}
        return torch.tensor([known[k] for k in range(len(menu))], dtype=torch.float64)

    def of(self, terms: Terms) -> float | None:
        """About the error of an entry; None if nothing cheap is known of it."""
        first, *others = terms
        if rounded_together(first) and all(t.form.nested for t in others):
            rank = sum(t.form.rank or 0 for t in others)
            return self.rounded[first.grid] * (self._mended(rank) if rank else 1.0)
        if others or first.form.contracted or first.form.verbatim:
            return None
        return self._nested(first) if first.form.nested else self._factorised(first)

    def round(self, grids: Sequence[Grid]) -> None:
        """Learn what rounding to these grids leaves: from some rows, of all grids in one pass.

        Each row counts for others as large as their own rounding to nearest would err.
        """
        count = self.target.shape[1]
        some = torch.linspace(0, count - 1, min(count, ROWS)).round().long()
        trials: list[list[Grid]] = []
        begun: list[Rows] = []
        for layout in dict.fromkeys(grid.scales for grid in grids):
            alike = [grid for grid in dict.fromkeys(grids) if grid.scales == layout]
            tried = [(g, m) for g in alike for m in ((False, True) if g.mirrored else (False,))]
            starts = [start(self.target[:, some], g, self.metric, m) for g, m in tried]
            trials.append([grid for grid, _ in tried])
            begun.append(Rows.stack(starts))
        best: dict[Grid, Rows] = {}
        rounded = round_layouts(begun, self.metric, 1, 1) if begun else []
        for tried_grids, together in zip(trials, rounded, strict=True):
            for grid, rows in zip(tried_grids, together.split(len(some)), strict=True):
                best[grid] = best[grid].better(rows, self.metric) if grid in best else rows
        for grid, rows in best.items():
            sizes = self._sizes(grid)
            share = float(sizes[:, some].sum() / sizes.sum().clamp_min(TINY))
            self.rounded[grid] = float(rows.error(self.metric).sum()) / max(share, TINY)

    def _sizes(self, grid: Grid) -> Tensor:
        """About the error of each row if its entries were rounded to nearest, [groups, rows]."""
        step = 2 * self.target.abs().amax(2, keepdim=True) / grid.levels
        errors = torch.minimum(self.target.square(), step.square() / 12)
        return (errors * self.metric.diagonal[:, None]).sum(2)

    def _mended(self, rank: int) -> float:
        """The share of its error that a rounded weight keeps beside an adapter of a rank.

        What is rounded is what the adapter leaves of the weight, and of the noise of rounding it
        takes what a matrix of that rank can.
        """
        values = self._spectrum(whitened=False)
        rest = float(values[rank:].sum() / values.sum().clamp_min(TINY))
        return rest * noise_left(self.site.shape[0], self.site.columns, rank)

    def _nested(self, term: Term) -> float:
        """What a truncated SVD leaves, and the noise of what it keeps."""
        values, ridge = self._spectrum(whitened=True), rounding(term.grid)
        rank = term.form.rank or 0
        return float(values[rank:].sum() + values[:rank].sum() * ridge / (1 + ridge))

    def _spectrum(self, whitened: bool) -> Tensor:
        if whitened not in self.spectra:
            known = whitened and not self.metric.identity
            second = self.metric.second[0] if known else None
            self.spectra[whitened] = spectrum(self.target[0], second)
        return self.spectra[whitened]

    def _factorised(self, term: Term) -> float:
        """What is left when the last factor is solved for, with a ridge for the noise of rounding.

        The others are those that the solver starts from. How much further it gets is found at the
        least rank of a form, which takes the fewest multiplications, and told of the others.
        """
        form, grid = term.form, term.grid
        left = self._left(form, grid, 0)
        least = self.least[type(form)]
        if not form.evaluates or left <= 0:
            return left
        further = self._left(least, grid, STEPS) / max(self._left(least, grid, 0), TINY)
        grown: float = ((form.rank or 1) / (least.rank or 1)) ** form.furthers
        return left * min(further, 1.0) / grown / form.unfinished

    def _left(self, form: Form, grid: Grid, steps: int) -> float:
        """The error with the last factor solved for beside those found in so many evaluations."""
        if (form, steps) not in self.sums:
            lean = self.metric.lean if form.evaluates else None
            lean = None if lean is None else replace(lean, second=None)
            second = self.metric.second
            *first, last = form.decompose(
                self.site, self.weight, second, Aim(noise(grid), None, steps, lean)
            )
            eye = torch.eye(last.shape[1]).to(last)
            basis = form.contract(self.site, [*first, eye]).flatten(1)
            seen = basis @ second[0] if lean is None else lean.times(basis)
            norm = (seen * basis).sum(1, keepdim=True).clamp_min(TINY).rsqrt()
            matrix = self.weight.flatten(1)
            right = (seen @ matrix.mT) * norm
            power = self.power if lean is None else float((lean.times(matrix) * matrix).sum())
            gram = (seen @ basis.mT) * norm * norm.mT
            self.sums[form, steps] = gram.double(), right.double(), max(power, TINY)
        gram, right, power = self.sums[form, steps]
        solution = Gram(gram).inverse(rounding(grid))(right.mT).mT
        return self.power * max(1 - float((right * solution).sum()) / power, 0.0)

    def noise(self) -> Tensor:
        """See `predict_site`."""
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randn(self.target.shape, generator=generator).to(self.target)
        drawn = self.metric.spread(drawn) * self.target.abs().amax(2, keepdim=True)
        return drawn.view(self.weight.shape)
