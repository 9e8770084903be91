"""Error-preserving correction: factors of least sensitivity among those of a given error (arXiv 2008.05441).

Alternating least squares drives rank-one terms to huge norms that cancel one another: harmless in floating point,
fatal on a grid. The sensitivity

    ss = sum_r ( K |a_r|^2 |b_r|^2 + J |a_r|^2 |c_r|^2 + I |b_r|^2 |c_r|^2 )

is the squared error that noise of unit variance on every entry of every factor makes. One mode at a time, minimising it
at a bounded error is ridge regression: `A(mu) = F (G + mu D)^-1` with D the weights of |a_r|^2 in ss, and mu so large
that the error meets the bound.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rabbet.solve.als import Factors, Fit, Problem, balanced, solved

TRIES = 6  # values of mu looked at per mode and sweep; the bracket carries over from sweep to sweep
NEAR = 1e-3  # how near below the bound is near enough, relative


def sensitivity(factors: Factors, noise: Sequence[float] | None = None) -> float:
    """The error's square that noise on the factors makes; `noise`: variance for each factor (default 1)."""
    norms = [f.square().sum(0) for f in factors]
    total = 0.0
    for mode, f in enumerate(factors):
        variance = 1.0 if noise is None else noise[mode]
        total += variance * len(f) * float(_others(norms, mode).sum())
    return total


def _others(norms: Sequence[Tensor], mode: int) -> Tensor:
    result = torch.ones_like(norms[0])
    for k, n in enumerate(norms):
        result = result if k == mode else result * n
    return result


def epc(tensor: Tensor, start: Factors, bound: float, sweeps: int = 60, tolerance: float = 1e-3) -> Fit:
    """Factors of relative error at most `bound` and of low sensitivity, from a start within the bound.

    Stops when a sweep lowers the sensitivity by less than `tolerance`. A mode whose best error is above the bound (the
    start was) only lowers its error. `Fit.history` holds the sensitivity after each sweep.
    """
    problem, factors = Problem(tensor), balanced(tuple(f.double() for f in start))
    ridges = [1e-6] * len(factors)
    history: list[float] = []
    for _ in range(sweeps):
        for mode in range(len(factors)):
            gram, right = problem.sides(factors, mode)
            weights = _weights(factors, mode)
            found, ridges[mode] = _corrected(problem, gram, right, weights, bound, ridges[mode])
            factors = tuple(found if k == mode else f for k, f in enumerate(factors))
        factors = balanced(factors)
        history.append(sensitivity(factors))
        if len(history) > 1 and history[-1] > (1 - tolerance) * history[-2]:
            return Fit(factors, problem.relative(factors), len(history), True, tuple(history))
    return Fit(factors, problem.relative(factors), len(history), False, tuple(history))


def _weights(factors: Factors, mode: int) -> Tensor:
    """What |a_r|^2 is multiplied with in the sensitivity: for three modes K |b_r|^2 + J |c_r|^2."""
    norms = [f.square().sum(0) for f in factors]
    total = torch.zeros_like(norms[0])
    for k, f in enumerate(factors):
        if k != mode:
            rest = [torch.ones_like(n) if j == mode else n for j, n in enumerate(norms)]
            total += len(f) * _others(rest, k)
    return total


def _corrected(
    problem: Problem, gram: Tensor, right: Tensor, weights: Tensor, bound: float, ridge: float
) -> tuple[Tensor, float]:
    """One mode's ridge regression whose error is just within the bound, and the ridge that does it."""
    root = weights.clamp_min(1e-30 * float(weights.max())).rsqrt()
    hat, aim = gram * root * root[:, None], right * root
    mean = float(hat.diagonal().mean())

    def attempt(mu: float) -> tuple[Tensor, float]:
        found = solved(hat, aim, mu) * root
        return found, problem.error(gram, right, found)

    return _largest_within(attempt, bound, ridge, mean)


def _largest_within(
    attempt: Callable[[float], tuple[Tensor, float]], bound: float, ridge: float, _: float
) -> tuple[Tensor, float]:
    """Bracket, then halve in the logarithm: the error grows with the ridge."""
    low, high = 0.0, float("inf")
    best, error = attempt(0.0)
    if error >= bound:
        return best, ridge
    mu = ridge
    for _try in range(TRIES):
        found, error = attempt(mu)
        if error <= bound:
            best, low = found, mu
            if error >= (1 - NEAR) * bound:
                break
        else:
            high = mu
        mu = low * 4 if high == float("inf") else high / 4 if low == 0.0 else (low * high) ** 0.5
    return best, low or mu
