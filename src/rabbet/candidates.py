"""All candidates of one layer at once: the job that an engine spreads.

Dense terms on any number of grids are rounded in one pass. A weight of several terms alternates: each term in turn is
solved for what the others leave, and a step is kept only if the error in the metric falls.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from rabbet.engine import Tensors
from rabbet.forms import FORMS
from rabbet.grid import Grid, Quantised
from rabbet.plan import Term
from rabbet.site import Site
from rabbet.solve.rounding import Metric, Rows, descend, feedback, round_rows, start

Terms = tuple[Term, ...]
Numbers = list[list[Quantised]]

DAMPING = 0.01
ALTERNATIONS = 3


def solve_site(weight: Tensor, second: Tensor | None = None, *, site: Site, menu: Sequence[Terms]) -> Tensors:
    """Numbers of every entry of a menu for one layer, and its error in the metric.

    weight: canonical [out, in / groups, *kernel]; second: [groups, n, n] of its inputs, None where there is none (a
    table). The result is flat, for the engine: read it with `read_numbers`.
    """
    metric = Metric.plain(site.groups, site.columns) if second is None else Metric(second, DAMPING)
    target = site.matrix(weight)
    plain = [terms[0].grid for terms in menu if _is_dense(terms)]
    rounded = dict(zip(plain, round_dense(target, plain, metric), strict=True))
    result: Tensors = {}
    for k, terms in enumerate(menu):
        numbers = [[_quantised(site, rounded[terms[0].grid], terms[0].grid)]] if _is_dense(terms) else None
        numbers = numbers or alternate(site, weight, terms, metric)
        for t, factors in enumerate(numbers):
            for f, factor in enumerate(factors):
                result[f"{k}.{t}.{f}.codes"] = factor.codes.to(torch.int16)
                result[f"{k}.{t}.{f}.scale"] = factor.scale
        delta = site.matrix(canonical(site, terms, numbers) - weight)
        result[f"{k}.error"] = metric.error(delta).sum()
    return result


def read_numbers(result: Tensors, menu: Sequence[Terms], k: int) -> Numbers:
    """The factors of entry k of a menu, as `solve_site` returned them."""
    numbers: Numbers = []
    for t, term in enumerate(menu[k]):
        count = 1 + FORMS[term.form].gaps
        parts = [f"{k}.{t}.{f}" for f in range(count)]
        numbers.append([Quantised(term.grid, result[f"{p}.codes"].float(), result[f"{p}.scale"]) for p in parts])
    return numbers


def canonical(site: Site, terms: Terms, numbers: Sequence[Sequence[Quantised]]) -> Tensor:
    """The weight that terms add up to."""
    parts = [FORMS[t.form].contract(site, [q.values for q in qs]) for t, qs in zip(terms, numbers, strict=True)]
    return torch.stack(parts).sum(0)


def round_dense(target: Tensor, grids: Sequence[Grid], metric: Metric) -> list[Rows]:
    """A weight [groups, rows, n] on each of several grids, the error in the metric as small as found.

    One scale per row is chosen, refitted and, on short lopsided grids, mirrored row by row; one scale per tensor is
    chosen by its squared error and stays.
    """
    count = target.shape[1]
    sliced = [(g, mirror) for g in grids if g.axis == 0 for mirror in ((False, True) if g.mirrored else (False,))]
    parts: dict[Grid, Rows] = {}
    if sliced:
        stacked = Rows.stack([start(target, grid, metric, mirror) for grid, mirror in sliced])
        for (grid, _), rows in zip(sliced, round_rows(stacked, metric).split(count), strict=True):
            parts[grid] = parts[grid].better(rows, metric) if grid in parts else rows
    for grid in grids:
        if grid.axis is None:
            scale = grid.mse(target).expand(target.shape[:2])
            parts[grid] = descend(feedback(Rows.of(target, scale, grid), metric), metric)
    return [parts[g] for g in grids]


def alternate(site: Site, weight: Tensor, terms: Terms, metric: Metric) -> Numbers:
    """Several terms, each solved in turn for what the others leave; the best state seen is returned."""
    state: list[list[Quantised] | None] = [None] * len(terms)
    best: Numbers | None = None
    least = torch.inf
    for _ in range(ALTERNATIONS if len(terms) > 1 else 1):
        for k, term in enumerate(terms):
            others = [(t, qs) for j, (t, qs) in enumerate(zip(terms, state, strict=True)) if j != k and qs is not None]
            left = weight
            if others:
                left = weight - canonical(site, tuple(t for t, _ in others), [qs for _, qs in others])
            state[k] = _solve_term(site, left, term, metric)
            if all(qs is not None for qs in state):
                full: Numbers = [qs for qs in state if qs is not None]
                error = float(metric.error(site.matrix(canonical(site, terms, full) - weight)).sum())
                if error < least:
                    best, least = full, error
    assert best is not None
    return best


def _solve_term(site: Site, left: Tensor, term: Term, metric: Metric) -> list[Quantised]:
    if term.form == "dense" and term.grid.axis in (None, 0):
        return [_quantised(site, round_dense(site.matrix(left), [term.grid], metric)[0], term.grid)]
    factors = FORMS[term.form].decompose(site, left, term.rank, metric.second)
    return [Quantised.nearest(f, term.grid) for f in factors]


def _quantised(site: Site, rows: Rows, grid: Grid) -> Quantised:
    scale = rows.scale.reshape(-1)
    return Quantised(grid, rows.codes.reshape(site.shape), scale if grid.axis == 0 else scale[:1])


def _is_dense(terms: Terms) -> bool:
    return len(terms) == 1 and terms[0].form == "dense" and terms[0].grid.axis in (None, 0)
