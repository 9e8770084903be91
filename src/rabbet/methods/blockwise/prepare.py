"""Exact changes of a block before its layers are rounded, each made only where it pays.

Scales (as of AWQ, arXiv 2306.00978): inputs that are large, and so whose weights must not err, are
made smaller and their weights larger, by `s = (E x^2)^(a/2)`, with the exponent a that leaves the
least harm. Order: channels of about the same size come to share the scales of their group. What a
change is worth is foretold: some rows of each layer are rounded in its metric on its planned grid.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from rabbet.core.plan import LayerPlan
from rabbet.grids.grid import Grid
from rabbet.jobs import Job, Jobs, Tensors
from rabbet.methods.blockwise.draft import Draft
from rabbet.methods.blockwise.wiring import Hidden, Pair, Shared, Wiring
from rabbet.reconstruct.candidates import round_rows_of, rounded_together
from rabbet.solve.metric import Metric

POWERS = (0.25, 0.5, 0.75)  # exponents of the size of inputs that are tried
LEAST = 1e-6  # of the mean square of inputs: smaller ones count as so large
PAYS = 0.02  # share by which the foretold harm must fall
ROWS = 64  # of each layer, that stand for all
T = TypeVar("T")


@dataclass(frozen=True)
class Ways:
    """Which changes may be made."""

    scale: bool
    permute: bool

    @property
    def any(self) -> bool:
        """Whether there is one."""
        return self.scale or self.permute


def foretell_harm(  # a job
    second: Tensor,
    rows: Tensor,
    worth: Tensor,
    scale: Tensor | None = None,
    order: Tensor | None = None,
    *,
    grids: Sequence[tuple[Grid, int]],
) -> Tensors:
    """About the harm of rounding rows [n, columns] whose columns are scaled, or in another order.

    second: [1, columns, columns] of the inputs as they are; worth: [n], of a unit of a row's error
    in it. grids: with the number of rows that each is for, in order.
    """
    scale = torch.ones_like(second[0, 0]) if scale is None else scale
    order = torch.arange(len(scale), device=scale.device) if order is None else order
    moved = second[:, order[:, None], order[None, :]]
    moved /= scale[order, None]
    moved /= scale[order]
    metric = Metric(moved)
    targets = (rows * scale)[:, order].split([count for _, count in grids])
    errors: list[Tensor] = []
    for (grid, _), part in zip(grids, targets, strict=True):
        off = round_rows_of([(grid, part[None])], metric)[0].values[0] - part
        # damping is a share of the inputs' size, which scales change: all are judged without
        errors.append((off @ moved[0] * off).sum(1))
    return {"harm": (torch.cat(errors) * worth).sum()}


def prepared(
    block: nn.Module, wiring: Wiring, lines: Mapping[str, LayerPlan], choosing: "Choosing"
) -> Draft:
    """The block written otherwise, as far as that is foretold to pay on the planned grids.

    lines: of the plan, by the names of sites within the block.
    """
    ways, draft = choosing.ways, wiring.draft
    if ways.scale:
        groups: list[Shared | Pair] = list(wiring.shared())
        groups += wiring.pairs([name for group in groups for name in group.readers])
        tries = []
        for group in groups:
            asked = choosing.asked(draft, lines, group.readers)
            size = _sizes(draft, group)
            if asked is None or size is None:
                continue
            tries.append((group, asked, [_scale(size, power) for power in POWERS]))
        for group, scale in choosing.best(tries, "scale"):
            draft = _if_exact(wiring, draft, group.scaled(draft, block, scale))
    if ways.permute:
        turns = []
        for hidden in wiring.hidden():
            asked = choosing.asked(draft, lines, (hidden.reader,))
            if asked is not None and any(_shares(grid, draft, hidden) for grid, _ in asked.grids):
                turns.append((hidden, asked, [_order(draft, hidden.reader)]))
        for hidden, order in choosing.best(turns, "order"):
            draft = _if_exact(wiring, draft, hidden.ordered(draft, order))
    return draft


def _if_exact(wiring: Wiring, before: Draft, after: Draft) -> Draft:
    """The change, unless what was proven with numbers drawn at random fails with these."""
    return after if wiring.proves(after) else before


def _sizes(draft: Draft, group: Shared | Pair) -> Tensor | None:
    """The mean square of each input; of those that come from one output their mean."""
    second = draft.moments.get(group.readers[0])
    if second is None:
        return None
    size = second[0].diagonal()
    if isinstance(group, Pair):
        known = group.source >= 0
        place = group.source[known]
        count = int(place.max()) + 1
        total, times = (torch.zeros(count, device=size.device) for _ in range(2))
        total.index_add_(0, place, size[known])
        times.index_add_(0, place, torch.ones_like(size)[known])
        size = size.clone()
        size[known] = (total / times.clamp_min(1))[place]
    return size.clamp_min(LEAST * float(size.mean()))


def _scale(size: Tensor, power: float) -> Tensor:
    """Scales of a geometric mean of one."""
    scale = size.pow(power / 2)
    return scale / scale.log().mean().exp()


def _shares(grid: Grid, draft: Draft, hidden: Hidden) -> bool:
    """Whether some, but not all inputs of a layer share a scale."""
    return (grid.scales.parts(draft.weights[hidden.reader].shape[1]) or 1) > 1


def _order(draft: Draft, reader: str) -> Tensor:
    """Channels by their size times that of their weights, the largest first."""
    size = draft.moments[reader][0].diagonal().sqrt()
    largest = draft.weights[reader].abs().amax(0)
    return (size * largest).argsort(descending=True, stable=True)


@dataclass(frozen=True)
class Asked:
    """The layers of a group, as `foretell_harm` is given them."""

    given: Tensors
    grids: tuple[tuple[Grid, int], ...]


@dataclass(frozen=True)
class Choosing:
    """Chooses among changes by the harm that is foretold of them.

    ratios: see `Seen`, by the names of sites within the block.
    """

    ways: Ways
    ratios: Mapping[str, float]
    jobs: Jobs
    stage: str

    def asked(
        self, draft: Draft, lines: Mapping[str, LayerPlan], readers: Sequence[str]
    ) -> Asked | None:
        """What is to be foretold of some layers; None if nothing can be.

        A layer whose first term is not a whole weight is left out: of low rank, scales say little.
        """
        rows: list[Tensor] = []
        worth: list[Tensor] = []
        grids: list[tuple[Grid, int]] = []
        for name in readers:
            weight, term = draft.weights[name].float(), lines[name].terms[0]
            if not rounded_together(term) or name not in draft.moments:
                continue
            count = min(len(weight), ROWS)
            some = torch.linspace(0, len(weight) - 1, count).round().long().to(weight.device)
            rows.append(weight[some])
            worth.append(torch.full_like(weight[some, 0], self.ratios[name] * len(weight) / count))
            grids.append((term.grid, count))
        if not rows or not any(bool(w.any()) for w in worth):
            return None
        second = draft.moments[readers[0]]
        given = {"second": second, "rows": torch.cat(rows), "worth": torch.cat(worth)}
        return Asked(given, tuple(grids))

    def best(
        self, tries: Sequence[tuple[T, Asked, Sequence[Tensor]]], part: str
    ) -> Iterator[tuple[T, Tensor]]:
        """Of each group the change that is worth most, if it pays. part: what is changed."""
        work: list[Job] = []
        for _, asked, changes in tries:
            settings = {"grids": asked.grids}
            work.append((foretell_harm, asked.given, settings))
            work += [(foretell_harm, {**asked.given, part: c}, settings) for c in changes]
        harms = iter([float(found["harm"]) for found in self.jobs.run(self.stage, work)])
        for group, _, changes in tries:
            plain, *others = [next(harms) for _ in range(1 + len(changes))]
            least = min(range(len(others)), key=others.__getitem__)
            if others[least] < (1 - PAYS) * plain:
                yield group, changes[least]
