"""Factors on a grid, one at a time, by error-feedback rounding, in place of ADMM.

Given all other factors, the best factor on a grid is an integer least-squares problem with a Gram
matrix G that all of its rows share. Rounding it column by column, with each error spread over the
columns to come (GPTQ, arXiv 2210.17323), solves that nearly as well as ADMM from a good start, far
better from a bad one, and needs no penalty.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from rabbet.grids.grid import Grid, Quantised
from rabbet.solve.als import Factors, Problem, solved
from rabbet.solve.metric import Metric
from rabbet.solve.rounding import Rows, descend, feedback

DAMPING = 1e-3


@dataclass(frozen=True)
class Rounded:
    """Factors on their grids, their relative error, and how the solver got there; see `als.Fit`.

    primal, dual: both residuals of ADMM after the last inner step of each factor and sweep.
    """

    factors: tuple[Quantised, ...]
    error: float
    steps: int
    stalled: bool
    history: tuple[float, ...] = ()
    primal: tuple[float, ...] = ()
    dual: tuple[float, ...] = ()


def rounded_factor(
    target: Tensor, scale: Tensor, grid: Grid, gram: Tensor, sweeps: int = 2
) -> Quantised:
    """A factor [n, R] on a grid of given scale, nearest to target in `tr(D G D^T)`, G [R, R].

    grid.axis: None, 0 (a scale per row) or 1 (per column).
    """
    columns = grid.axis == 1
    wide = scale[None] if columns else scale.new_ones(1, target.shape[1])
    per_row = scale.new_ones(1) if columns else scale
    metric = Metric((gram.float() * wide * wide.mT)[None], DAMPING)
    plain = grid.with_axis(0)
    scales = per_row.expand(len(target))[None, :, None].contiguous()
    rows = Rows.of((target.float() / wide)[None], scales, plain)
    rows = descend(feedback(rows, metric), metric, sweeps)
    return Quantised(grid, rows.codes[0], scale)


def alternate(
    problem: Problem,
    start: Factors,
    grids: Sequence[Grid],
    sweeps: int = 10,
    tolerance: float = 1e-3,
) -> Rounded:
    """Round each factor in turn, given the others as rounded so far; the best state is returned.

    Two scales are tried for each factor: its current one, and the best for its least-squares
    solution. Errors are those of the rounded factors.
    """
    state = [Quantised.nearest(f.float(), g) for f, g in zip(start, grids, strict=True)]
    best = list(state)
    values = tuple(q.values.double() for q in state)
    least = problem.relative(values)
    history: list[float] = []
    for _ in range(sweeps):
        before = least
        for mode, grid in enumerate(grids):
            gram, right, rest = problem.sides(values, mode)
            ideal = solved(gram, right, DAMPING).float()
            trials = [
                rounded_factor(ideal, scale, grid, gram.dense)
                for scale in (state[mode].scale, grid.mse(ideal))
            ]
            errors = [problem.error(gram, right, rest, q.values.double()) for q in trials]
            error, state[mode] = min(zip(errors, trials, strict=True), key=lambda pair: pair[0])
            values = tuple(
                state[mode].values.double() if k == mode else v for k, v in enumerate(values)
            )
            if error < least:
                least, best = error, list(state)
        history.append(least)
        if least > (1 - tolerance) * before:
            return Rounded(tuple(best), least, len(history), True, tuple(history))
    return Rounded(tuple(best), least, len(history), False, tuple(history))
