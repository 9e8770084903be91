"""Error-preserving correction: factors of least sensitivity among those of a given error (arXiv 2008.05441).

Alternating least squares drives rank-one terms to huge norms that cancel one another: harmless in
floating point, fatal on a grid. The sensitivity

    ss = sum_r ( K |a_r|^2 |b_r|^2 + J |a_r|^2 |c_r|^2 + I |b_r|^2 |c_r|^2 )

is the squared error that noise of unit variance on every entry of every factor makes. One mode at a
time, minimising it at a bounded error is ridge regression: `A(mu) = F (G + mu D)^-1` with D the
weights of |a_r|^2 in ss, and mu so large that the error meets the bound.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rabbet.grids.grid import Grid
from rabbet.solve.als import CPProblem, Factors, Fit, Problem, Sides, solved

SLACKS = (1.0, 1.03, 1.06, 1.1, 1.15, 1.2, 1.3, 1.5)

TRIES = 6  # values of mu looked at per mode and sweep; the bracket carries over from sweep to sweep
NEAR = 1e-3  # how near below the bound is near enough, relative


def predicted(problem: Problem, fit: Fit, grids: Sequence[Grid]) -> float:
    """The relative error that factors will have once each is rounded to nearest on its grid (MSE scales).

    `E^2 = error^2 + sum_r (prod (|f_r|^2 + n_f m_f) - prod |f_r|^2)` with m_f the squared rounding
    error of factor f: the sensitivity weighted by m_f, and what errors of two factors make
    together. Within a few per cent, and so the cheap model by which a slack, a rank or a bit-width
    is chosen.
    """
    clean = noisy = torch.ones(())
    for f, grid in zip(fit.factors, grids, strict=True):
        power = f.square().sum(0)
        clean, noisy = (
            clean * power,
            noisy * (power + (grid.project(f, grid.mse(f)) - f).square().sum(0)),
        )
    return math.sqrt(fit.error**2 + float((noisy - clean).sum()) / problem.power)


def loosened(
    problem: CPProblem, start: Fit, grids: Sequence[Grid], slacks: Sequence[float] = SLACKS
) -> Fit:
    """`epc` with the bound, as a multiple of the start's error, that the closed form predicts to be best on the grids.

    Fewer bits want a looser bound (measured: 1.00 at 8 bits, 1.03 at 6, 1.10 at 4, 1.20 at 3). Each
    slack goes on from the one before.
    """
    best, least, fit = start, predicted(problem, start, grids), start
    for slack in slacks:
        fit = epc(problem, fit.factors, slack * start.error)
        expected = predicted(problem, fit, grids)
        if expected < least:
            best, least = fit, expected
        elif slack > 1:
            break
    return best


def epc(
    problem: Problem, start: Factors, bound: float, sweeps: int = 150, tolerance: float = 1e-4
) -> Fit:
    """Factors of relative error at most `bound` and of low sensitivity, from a start within the bound.

    Stops when a sweep lowers the sensitivity by less than `tolerance`. A mode whose best error is
    above the bound (the start was) only lowers its error. `Fit.history` holds the sensitivity after
    each sweep.
    """
    factors = problem.balanced(tuple(f.double() for f in start))
    ridges = [1e-6] * len(factors)
    history: list[float] = []
    stalled = False
    while len(history) < sweeps and not stalled:
        for mode in range(len(factors)):
            sides, weights = problem.sides(factors, mode), problem.weights(factors, mode)
            found, ridges[mode] = _corrected(problem, sides, weights, bound, ridges[mode])
            factors = tuple(found if k == mode else f for k, f in enumerate(factors))
        factors = problem.balanced(factors)
        history.append(problem.sensitivity(factors))
        stalled = len(history) > 1 and history[-1] > (1 - tolerance) * history[-2]
    return Fit(factors, problem.relative(factors), len(history), stalled, tuple(history))


def _corrected(
    problem: Problem, sides: Sides, weights: Tensor, bound: float, ridge: float
) -> tuple[Tensor, float]:
    """One mode's ridge regression whose error is just within the bound, and the ridge that does it.

    The error grows with the ridge: bracketed, then halved in the logarithm, from where the last
    sweep ended.
    """
    gram, right, rest = sides
    root = weights.clamp_min(1e-30 * float(weights.max())).rsqrt()
    hat, aim = gram * root * root[:, None], right * root
    low, high, mu = 0.0, math.inf, ridge
    best = solved(hat, aim, 0.0) * root
    if problem.error(gram, right, rest, best) >= bound:
        return best, ridge
    for _ in range(TRIES):
        found = solved(hat, aim, mu) * root
        error = problem.error(gram, right, rest, found)
        if error <= bound:
            best, low = found, mu
            if error >= (1 - NEAR) * bound:
                break
        else:
            high = mu
        mu = low * 4 if high == math.inf else high / 4 if low == 0.0 else (low * high) ** 0.5
    return best, low or mu
