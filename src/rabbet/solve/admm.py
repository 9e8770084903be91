"""Factors on a grid by ADMM, one factor at a time (arXiv 2308.04595, after AO-ADMM).

For one factor with Gram matrix G and right-hand side F, a least-squares copy and an on-grid copy H
are driven together by a scaled dual U:

    X = (F + rho (H + U)) (G + rho I)^-1,   H = grid(X - U),   U = U + H - X,   rho = tr(G) / R

The grid is not convex: at this rho the residuals settle without vanishing, and a larger rho only
gives worse factors (measured). So the on-grid copy of best true objective is kept, both within a
factor's steps and over the sweeps.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from rabbet.grids.grid import Grid, Quantised
from rabbet.solve.als import Factors, Problem
from rabbet.solve.feedback import Rounded
from rabbet.solve.gram import Gram

SMALL = 1e-8  # bound on both residuals: the rule of the paper, met only on fine grids


def admm(
    problem: Problem,
    start: Factors,
    grids: Sequence[Grid],
    sweeps: int = 20,
    inner: int = 20,
    tolerance: float = 1e-5,
) -> Rounded:
    """Alternate over the factors, each by ADMM; every projection chooses its scale anew (MSE).

    Stops when a sweep changes the error by less than `tolerance`, or when it has grown by 1e-3 in
    five sweeps.
    """
    held = [Quantised.nearest(f.float(), g) for f, g in zip(start, grids, strict=True)]
    values = tuple(q.values.double() for q in held)
    duals = [torch.zeros_like(v) for v in values]
    best, least = list(held), problem.relative(values)
    history, primal, dual = [least], [], []
    stalled = False
    for _ in range(sweeps):
        for mode, grid in enumerate(grids):
            gram, right, _ = problem.sides(values, mode)
            held[mode], duals[mode], r, s = _inner(
                gram, right, held[mode], duals[mode], grid, inner
            )
            values = tuple(
                held[mode].values.double() if k == mode else v for k, v in enumerate(values)
            )
            primal.append(r)
            dual.append(s)
        history.append(problem.relative(values))
        if history[-1] < least:
            best, least = list(held), history[-1]
        stalled = abs(history[-2] - history[-1]) < tolerance
        if stalled or (len(history) > 5 and history[-1] > history[-6] * (1 + 1e-3)):
            break
    return Rounded(
        tuple(best), least, len(history) - 1, stalled, tuple(history), tuple(primal), tuple(dual)
    )


def _inner(
    gram: Gram, right: Tensor, held: Quantised, dual: Tensor, grid: Grid, steps: int
) -> tuple[Quantised, Tensor, float, float]:
    """One factor: the best on-grid copy seen, the dual, and the last residuals."""
    rho, solve = gram.mean, gram.inverse(1.0)
    copy = held.values.double()
    best, least = held, _objective(gram, right, copy)
    primal = change = 0.0
    for _ in range(steps):
        free = solve(right + rho * (copy + dual))
        last, rounded = copy, Quantised.nearest((free - dual).float(), grid)
        copy = rounded.values.double()
        dual = dual + copy - free
        objective = _objective(gram, right, copy)
        if objective < least:
            best, least = rounded, objective
        primal = float((copy - free).square().sum() / copy.square().sum().clamp_min(1e-30))
        change = float((copy - last).square().sum() / dual.square().sum().clamp_min(1e-30))
        if primal < SMALL and change < SMALL:
            break
    return best, dual, primal, change


def _objective(gram: Gram, right: Tensor, factor: Tensor) -> float:
    return float(((gram.times(factor) - 2 * right) * factor).sum())
