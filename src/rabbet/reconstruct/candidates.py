"""All candidates of one layer at once: the job that `Jobs` distributes.

Dense terms on any number of grids are rounded in one pass. For a weight of several terms the solver
alternates: each term in turn is fitted to what the others leave, and the best state is kept.
"""

import threading
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from rabbet.core.plan import Term
from rabbet.forms import Aim, Form
from rabbet.grids.grid import Grid, Quantised
from rabbet.jobs import Tensors
from rabbet.layers import Site
from rabbet.model.compressed import Numbers
from rabbet.solve.metric import Metric
from rabbet.solve.rounding import Rows, descend, feedback, round_rows, start

Terms = tuple[Term, ...]

ALTERNATIONS = 3
# Of rounding rows, see `round_rows`. A third takes half as much time again, and 0.1 to 0.9 % of the
# squared error on ResNet-20. One is enough where the target still moves.
ROUNDS = 2
ENTRIES = 2**25  # of the second moments whose metrics are kept; with these three times as many
PART = 1024  # rows that are rounded at once: a whole embedding table would not fit into the cache
ALONE = 2**18  # entries that are, where rows are rounded each for itself
# Evaluations of a candidate's error, from a closed form and from another grid's factors.
COLD, WARM = 40, 10


def solve_site(
    weight: Tensor, second: Tensor | None = None, *, site: Site, menu: Sequence[Terms]
) -> Tensors:
    """Numbers of the entries of a menu for one layer, and their errors in the metric.

    weight: canonical [out, in / groups, *kernel]; second: [groups, n, n] of its inputs, None where
    there is none (a table). The result is a flat dict, as jobs return it: read it with
    `read_numbers`. The numbers of a menu of one entry depend on nothing but that entry.
    """
    metric = metric_of(site, weight, second)
    result: Tensors = {}
    for k, (error, numbers) in enumerate(_solved(site, weight, menu, metric, (), WARM)):
        for t, factors in enumerate(numbers):
            for f, factor in enumerate(factors):
                floats = factor.grid.codebook.floats
                result[f"{k}.{t}.{f}.codes"] = (
                    factor.codes if floats else factor.codes.to(torch.int8)
                )
                result[f"{k}.{t}.{f}.scale"] = factor.scale
                if factor.zero is not None:
                    result[f"{k}.{t}.{f}.zero"] = factor.zero
        result[f"{k}.error"] = error
    return result


def metric_of(site: Site, weight: Tensor, second: Tensor | None) -> Metric:
    """What a site is solved in: the second moment of its inputs, or the identity without one."""
    if second is None:
        return Metric.plain(site.groups, site.columns, weight.device)
    with _LOCK:
        held = list(_METRICS)
    same = (pair for pair in held if pair[0].device == second.device)
    pair = next((pair for pair in same if torch.equal(pair[0], second)), None)
    del held, same  # or they would keep what is let go
    if pair is None:
        _make_room(second.numel())  # first: to factorise a wide one takes memory enough
        pair = second, Metric(second)
    with _LOCK:
        _METRICS[:] = [other for other in _METRICS if other[0] is not pair[0]]
    _make_room(pair[0].numel())  # once more: other threads may have made some, too
    with _LOCK:
        _METRICS.append(pair)
    return pair[1]


def _make_room(entries: int) -> None:
    """Let go of the metrics that were asked for longest ago, for one of so many entries."""
    with _LOCK:
        while _METRICS and sum(known.numel() for known, _ in _METRICS) + entries > ENTRIES:
            _METRICS.pop(0)


def forget_metrics() -> None:
    """Let go of the metrics that are kept; the second moments of a finished call are of no use."""
    with _LOCK:
        _METRICS.clear()


_LOCK = threading.Lock()
_METRICS: list[tuple[Tensor, Metric]] = []
"""Second moments and their metrics, the last that was asked for at the end: options of one layer
come one after the other, and some layers more than once. To factorise the metric of a wide layer
takes longer than to solve an option."""


def read_numbers(result: Tensors, menu: Sequence[Terms], k: int) -> Numbers:
    """The factors of entry k of a menu, as `solve_site` returned them."""
    numbers: list[list[Quantised]] = []
    for t, term in enumerate(menu[k]):
        count = sum(key.startswith(f"{k}.{t}.") and key.endswith(".codes") for key in result)
        parts = [f"{k}.{t}.{f}" for f in range(count)]
        numbers.append(
            [
                Quantised(
                    term.grid,
                    result[f"{p}.codes"].float(),
                    result[f"{p}.scale"],
                    result.get(f"{p}.zero"),
                )
                for p in parts
            ]
        )
    return numbers


def canonical(site: Site, terms: Terms, numbers: Numbers) -> Tensor:
    """The weight that terms add up to."""
    parts = [
        t.form.contract(site, [q.values for q in qs]) for t, qs in zip(terms, numbers, strict=True)
    ]
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)


def solve_menu(
    site: Site,
    weight: Tensor,
    menu: Sequence[Terms],
    metric: Metric,
    held: Sequence[Numbers] = (),
    steps: int = WARM,
) -> list[Numbers]:
    """Numbers of all entries of a menu.

    held: the current numbers of the entries, for solvers that can go on from there; steps: how
    often these may evaluate the error.
    """
    return [numbers for _, numbers in _solved(site, weight, menu, metric, held, steps)]


def _solved(
    site: Site,
    weight: Tensor,
    menu: Sequence[Terms],
    metric: Metric,
    held: Sequence[Numbers],
    steps: int,
) -> list[tuple[Tensor, Numbers]]:
    """Alternate over the terms of all entries in step, so that rows are rounded in one pass.

    Each term is fitted to what the others leave; the best state that an entry passes through is
    returned, after its error in the metric.
    """
    known = {
        menu[k][t]: [q.values for q in qs]
        for k, numbers in enumerate(held)
        for t, qs in enumerate(numbers)
    }
    starts = {t.form: tuple(values) for t, values in known.items()}
    states: list[list[list[Quantised] | None]] = [[None] * len(terms) for terms in menu]
    best: dict[int, tuple[Tensor, Numbers]] = {}
    for turn in range(ALTERNATIONS):
        for place in range(max(map(len, menu), default=0)):
            active = [
                k
                for k, terms in enumerate(menu)
                if place < len(terms) and (turn == 0 or len(terms) > 1)
            ]
            wanted = [
                (
                    menu[k][place],
                    _left(site, weight, menu[k], states[k], place),
                    ROUNDS if len(menu[k]) == 1 or turn == ALTERNATIONS - 1 else 1,
                )
                for k in active
            ]
            solutions = _solve_terms(site, wanted, metric, starts, steps)
            for k, solved in zip(active, solutions, strict=True):
                states[k][place] = solved
                full = [qs for qs in states[k] if qs is not None]
                if len(full) == len(menu[k]):
                    error = _error(site, weight, menu[k], full, metric)
                    if k not in best or float(error) < float(best[k][0]):
                        best[k] = error, full
    return [best[k] for k in range(len(menu))]


def _left(
    site: Site, weight: Tensor, terms: Terms, state: Sequence[list[Quantised] | None], place: int
) -> Tensor:
    """What the other terms of an entry leave of the weight."""
    others = [
        (t, qs)
        for j, (t, qs) in enumerate(zip(terms, state, strict=True))
        if j != place and qs is not None
    ]
    if not others:
        return weight
    return weight - canonical(site, tuple(t for t, _ in others), [qs for _, qs in others])


def _error(site: Site, weight: Tensor, terms: Terms, numbers: Numbers, metric: Metric) -> Tensor:
    return metric.error(site.matrix(canonical(site, terms, numbers) - weight)).sum()


Starts = dict[Form, tuple[Tensor, ...]]
"""Factors of an earlier, similar problem, by form: the grid does not matter."""


def _solve_terms(
    site: Site,
    wanted: Sequence[tuple[Term, Tensor, int]],
    metric: Metric,
    starts: Starts,
    steps: int,
) -> list[list[Quantised]]:
    """Each term for its target: dense ones with scales per row together, the others one by one.

    wanted: a term, its target, and in how many rounds the rows of a dense one are rounded.
    """
    dense: dict[int, list[tuple[Grid, Tensor]]] = {}
    for term, left, rounds in wanted:
        if rounded_together(term):
            dense.setdefault(rounds, []).append((term.grid, site.matrix(left)))
    rounded = {k: iter(round_rows_of(targets, metric, k)) for k, targets in dense.items()}
    return [
        [_quantised(next(rounded[rounds]), term.grid, site.shape)]
        if rounded_together(term)
        else _solve_term(site, left, term, metric, starts, steps)
        for term, left, rounds in wanted
    ]


def rounded_together(term: Term) -> bool:
    """Whether a term is the whole weight, on a grid whose rows are rounded with error feedback."""
    return term.form.whole and _by_rows(term.grid)


def _by_rows(grid: Grid) -> bool:
    """Whether rows, each with scales of its own, can be rounded with error feedback."""
    return grid.scales.parts(1) is not None and grid.codebook.uniform is not None


def round_rows_of(
    wanted: Sequence[tuple[Grid, Tensor]], metric: Metric, rounds: int = ROUNDS
) -> list[Rows]:
    """Targets [groups, rows, n] rounded to grids with scales per row, in the metric.

    Scales are chosen, refitted and, on short asymmetric grids, mirrored row by row. Grids of one
    layout are rounded in one pass.
    """
    rounded: dict[int, Rows] = {}
    for layout in dict.fromkeys(grid.scales for grid, _ in wanted):
        places = [k for k, (grid, _) in enumerate(wanted) if grid.scales == layout]
        rows = wanted[places[0]][1].shape[1]
        step, parts = PART, []
        if metric.identity:  # as fast with fewer, whose memory does not pile up
            step = max(1, min(PART, ALONE // wanted[places[0]][1].shape[2]))
        for k in range(0, rows, step):
            own = [(wanted[j][0], wanted[j][1][:, k : k + step]) for j in places]
            # of a large table, copies of the target and codes of four bytes would be too much
            parts.append([_small(part) for part in _rounded_rows(own, metric, rounds)])
        for place, part in zip(places, zip(*parts, strict=True), strict=True):
            together = Rows.stack(list(part))
            target = wanted[place][1]
            rounded[place] = replace(together, target=target, codes=together.codes.to(target.dtype))
    return [rounded[k] for k in range(len(wanted))]


def _small(rows: Rows) -> Rows:
    """Rows without their target, their codes in one byte where they fit."""
    fit = float(rows.high.max()) <= 127 and float(rows.low.min()) >= -128
    codes = rows.codes.to(torch.int8) if fit else rows.codes
    return replace(rows, target=rows.target[:, :, :0], codes=codes)


def _rounded_rows(wanted: Sequence[tuple[Grid, Tensor]], metric: Metric, rounds: int) -> list[Rows]:
    trials = [
        (k, mirror)
        for k, (g, _) in enumerate(wanted)
        for mirror in ((False, True) if g.mirrored else (False,))
    ]
    stacked = Rows.stack(
        [start(wanted[k][1], wanted[k][0], metric, mirror) for k, mirror in trials]
    )
    best: dict[int, Rows] = {}
    results = round_rows(stacked, metric, rounds).split(wanted[0][1].shape[1])
    for (k, _), rows in zip(trials, results, strict=True):
        best[k] = best[k].better(rows, metric) if k in best else rows
    return [best[k] for k in range(len(wanted))]


def _solve_term(
    site: Site, left: Tensor, term: Term, metric: Metric, starts: Starts, steps: int
) -> list[Quantised]:
    """Decompose, round all factors but the last to nearest, then refit the last to the others."""
    form, grid = term.form, term.grid
    lean = metric.lean if form.evaluates else None
    aim = Aim(noise(grid), starts.get(form), steps if form in starts else COLD, lean)
    second = None if form.verbatim else metric.second  # of which no matrix may be made
    factors = form.decompose(site, left, second, aim)
    starts[form] = factors  # for other grids with the same rank
    if form.contracted:
        return [Quantised.nearest(f, grid) for f in factors]
    *first, last = factors
    small = [Quantised.nearest(f, grid) for f in first]
    # A single factor is the weight itself, or some rows of it.
    if not small and last[0].numel() == site.columns:
        target = site.matrix(left) if len(last) == site.shape[0] else last.flatten(1)[None]
        return [_rounded(target, grid, metric, tuple(last.shape))]
    eye = torch.eye(last.shape[1], device=left.device)
    basis = form.contract(site, [*(q.values for q in small), eye]).flatten(1)
    seen = basis @ metric.second[0]
    inner = Metric((seen @ basis.mT)[None], damping=1e-4)
    right = (seen @ left.flatten(1).mT).double()
    ideal = torch.linalg.solve(inner.second[0].double(), right).mT.float()
    return [*small, _rounded(ideal[None], grid, inner, last.shape)]


def noise(grid: Grid) -> float:
    """The relative squared error that factors are made for, as given to `Form.decompose`.

    It never falls below 3e-3: the tensors between factors are on 8 bits, and where terms cancel one
    another their rounding is amplified. Without that floor wide grids get factors that only floats
    could multiply. On ResNet-20 at half its MACs 3e-3 gave the least divergence, 30 % below that
    without a floor.
    """
    return rounding(grid) + 3e-3


def rounding(grid: Grid) -> float:
    """The relative squared error of an entry that is rounded, measured to be right within 2."""
    return 2.0 / grid.levels**2


def _rounded(target: Tensor, grid: Grid, metric: Metric, shape: tuple[int, ...]) -> Quantised:
    """A target [groups, rows, n] rounded in its metric, as a tensor of the given shape."""
    if _by_rows(grid):
        return _quantised(round_rows_of([(grid, target)], metric)[0], grid, shape)
    if grid.codebook.uniform is None or not grid.scales.single:
        weight = metric.diagonal[:, None].expand_as(target).reshape(shape)
        plain = grid.codebook.uniform is not None
        return Quantised.nearest(target.reshape(shape), grid, None if plain else weight)
    # A single scale is chosen by squared error and kept; the codes are chosen in the metric.
    scale = grid.mse(target).expand(target.shape[:2])[..., None]
    rows = descend(feedback(Rows.of(target, scale, grid), metric), metric)
    return _quantised(rows, grid, shape)


def _quantised(rows: Rows, grid: Grid, shape: tuple[int, ...]) -> Quantised:
    scale, book = rows.scale.reshape(-1), grid.codebook.uniform
    assert book is not None
    zero = (book.shift - rows.shift).reshape(-1) if grid.scales.zeros else None
    return Quantised(grid, rows.codes.reshape(shape), scale if _by_rows(grid) else scale[:1], zero)
