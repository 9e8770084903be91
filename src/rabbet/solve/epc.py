"""Error-preserving correction: the least sensitive factors of a given error (arXiv 2008.05441).

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
from rabbet.solve.gram import Gram

SLACKS = (1.0, 1.03, 1.06, 1.1, 1.15, 1.2, 1.3, 1.5)

TINY = 1e-300
TRIES = 6  # values of mu tried per mode and sweep; each sweep starts from the last one's mu
NEAR = 1e-3  # how far below the bound, relative, an error may stay


def predicted(problem: Problem, fit: Fit, grids: Sequence[Grid]) -> float:
    """The relative error of factors once each is rounded to nearest on its grid, with MSE scales.

    `E^2 = error^2 + sum_r (prod (|f_r|^2 + n_f m_f) - prod |f_r|^2)` with m_f the mean squared
    rounding error of factor f and n_f its rows: the sensitivity weighted by m_f, plus the joint
    effect of errors in two factors. Correct within a few per cent, so it is the cheap model by
    which a slack, a rank or a bit-width is chosen.
    """
    clean = noisy = torch.ones(())
    for f, grid in zip(fit.factors, grids, strict=True):
        power = f.square().sum(0)
        noise = (grid.project(f, grid.mse(f)) - f).square().sum(0)
        clean, noisy = clean * power, noisy * (power + noise)
    return math.sqrt(fit.error**2 + float((noisy - clean).sum()) / max(problem.power, TINY))


def loosened(
    problem: CPProblem, start: Fit, grids: Sequence[Grid], slacks: Sequence[float] = SLACKS
) -> Fit:
    """`epc` with the bound that `predicted` expects to be best on the grids.

    slacks: the bounds to try, as multiples of the start's error; each goes on from the one before.
    Fewer bits want a looser bound (measured: 1.00 at 8 bits, 1.03 at 6, 1.10 at 4, 1.20 at 3).
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
    """Factors of relative error at most `bound` and of low sensitivity.

    The start is meant to be within the bound; a mode whose least error is above it only lowers its
    error. Stops when a sweep lowers the sensitivity by less than the share `tolerance`.
    `Fit.history` holds the sensitivity after each sweep.
    """
    factors = problem.balanced(tuple(f.double() for f in start))
    ridges = [1e-6] * len(factors)
    history: list[float] = []
    stalled = False
    while len(history) < sweeps and not stalled:
        for mode in range(len(factors)):
            sides, weights = problem.sides(factors, mode), problem.weights(factors, mode)
            corrected, ridges[mode] = _corrected(problem, sides, weights, bound, ridges[mode])
            factors = tuple(corrected if k == mode else f for k, f in enumerate(factors))
        factors = problem.balanced(factors)
        history.append(problem.sensitivity(factors))
        stalled = len(history) > 1 and history[-1] > (1 - tolerance) * history[-2]
    return Fit(factors, problem.relative(factors), len(history), stalled, tuple(history))


def _corrected(
    problem: Problem, sides: Sides, weights: Tensor, bound: float, ridge: float
) -> tuple[Tensor, float]:
    """One mode's ridge regression whose error is just within the bound, and the ridge that does it.

    The error grows with the ridge, so the ridge is bracketed and then bisected in the logarithm,
    starting from where the last sweep ended.
    """
    gram, right, rest = sides
    root = weights.clamp_min(max(1e-30 * float(weights.max()), TINY)).rsqrt()
    hat, aim = Gram(gram.dense * root * root[:, None]), right * root
    low, high, mu = 0.0, math.inf, ridge
    best = solved(hat, aim, 0.0) * root
    if problem.error(gram, right, rest, best) >= bound:
        return best, ridge
    for _ in range(TRIES):
        factor = solved(hat, aim, mu) * root
        error = problem.error(gram, right, rest, factor)
        if error <= bound:
            best, low = factor, mu
            if error >= (1 - NEAR) * bound:
                break
        else:
            high = mu
        mu = low * 4 if high == math.inf else high / 4 if low == 0.0 else (low * high) ** 0.5
    return best, low or mu
