"""Alternating least squares, and the problems that it and its refinements solve.

A tensor X [I, J, ...] is written as `sum_r a_r o b_r o ...` with factors A [I, R], B [J, R], ... in
the order of its axes (CP; a matrix is the case of two), or as a tensor train
(`solve.kernel_train`). Given all other factors, one factor [n, R] solves a least-squares problem
with Gram matrix G [R, R] and right-hand side F [n, R]. The other solvers only solve that problem
differently (`epc`: with least norms at a given error; `admm` and `feedback`: on a grid).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rabbet.solve.gram import Gram

Factors = tuple[Tensor, ...]


@dataclass(frozen=True)
class Fit:
    """What a solver found: factors and their relative error ||X - X'|| / ||X||.

    steps: sweeps taken. stalled: the last sweep changed too little to go on; False means that the
    allowed sweeps ran out first. history: the relative error after each sweep.
    """

    factors: Factors
    error: float
    steps: int
    stalled: bool
    history: tuple[float, ...] = ()


Sides = tuple[Gram, Tensor, float]
"""G [R, R], F [n, R] and the rest c.

The squared error of a factor A is `tr(A G A^T) - 2 tr(F A^T) + c`.
"""


class Problem:
    """A tensor [I, J, ...] to be factorised, and the least-squares problem of each of its factors.

    Factors [n, R] are in the order of the tensor's axes. cancels: whether terms may grow that
    cancel one another, which error-preserving correction (`epc`) is against.
    """

    cancels: ClassVar[bool] = True

    def __init__(self, tensor: Tensor) -> None:
        self.shape = tuple(tensor.shape)
        self.flat = tensor.double().flatten(1)
        self.power = float(self.flat.square().sum())

    def sides(self, factors: Factors, mode: int) -> Sides:
        """The problem of one factor, given the others."""
        raise NotImplementedError

    def error(self, gram: Gram, right: Tensor, rest: float, factor: Tensor) -> float:
        """||X - X'|| / ||X|| from the problem of any factor and that factor."""
        square = rest + float(((gram.times(factor) - 2 * right) * factor).sum())
        return math.sqrt(max(square, 0.0) / max(self.power, 1e-300))

    def relative(self, factors: Factors) -> float:
        """||X - X'|| / ||X|| of factors."""
        return self.error(*self.sides(factors, 0), factors[0])

    def balanced(self, factors: Factors) -> Factors:
        """The same tensor from factors that share their norms evenly."""
        raise NotImplementedError

    @property
    def channel_axes(self) -> tuple[int | None, ...]:
        """For each factor the axis of its channels, along which it may have scales."""
        raise NotImplementedError

    def random(self, rank: int, seed: int) -> Factors:
        """Factors that are drawn at random, the same on every device."""
        raise NotImplementedError

    def leading(self, rank: int, seed: int) -> Factors:
        """Factors from leading singular vectors of the tensor; seed: for what these do not fill."""
        raise NotImplementedError

    @property
    def full_rank(self) -> int:
        """The rank from which on any tensor of this shape is represented exactly."""
        raise NotImplementedError

    def sensitivity(self, factors: Factors) -> float:
        """The squared error that noise on the factors makes, see `epc`."""
        raise NotImplementedError

    def weights(self, factors: Factors, mode: int) -> Tensor:
        """What the square of each column of a factor is multiplied with in the sensitivity, [R]."""
        raise NotImplementedError


class CPProblem(Problem):
    """Factors [n, R], one for each axis of a tensor of two or more axes."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__(tensor)
        self._seen: Tensor | None = None
        self._inner = self.flat

    def sides(self, factors: Factors, mode: int) -> Sides:
        """The least-squares problem of one factor, given the others.

        G is the Hadamard product of the others' Gram matrices, F the tensor times their Khatri-Rao
        product.
        """
        gram = self.flat.new_ones(1, 1)
        for k, f in enumerate(factors):
            gram = gram if k == mode else gram * (f.mT @ f)
        if mode == 0:
            return Gram(gram), self.flat @ khatri_rao(factors[1:]), self.power
        # X_(1)^T A serves all modes but the first: they run one after another, and A does not
        # change in between.
        if self._seen is not factors[0]:
            self._seen, self._inner = factors[0], self.flat.mT @ factors[0]
        inner = self._inner.view(*self.shape[1:], -1)
        for k in reversed(range(1, len(factors))):
            if k != mode:
                # Behind axis k lie the mode's own axis, if it comes later, and the rank.
                wide = factors[k].view(-1, *[1] * (mode > k), factors[k].shape[1])
                inner = (inner * wide).sum(k - 1)
        return Gram(gram), inner, self.power

    def balanced(self, factors: Factors) -> Factors:
        """See `balanced`."""
        return balanced(factors)

    @property
    def channel_axes(self) -> tuple[int | None, ...]:
        """Outputs of the first factor, terms of the others."""
        return (0, *[1] * (len(self.shape) - 1))

    def random(self, rank: int, seed: int) -> Factors:
        """See `random_start`."""
        return random_start(self.shape, rank, seed, self.flat.device)

    def leading(self, rank: int, seed: int) -> Factors:
        """See `svd_start`."""
        return svd_start(self.flat.view(self.shape), rank, seed)

    @property
    def full_rank(self) -> int:
        """The product of all axes but the largest."""
        return math.prod(self.shape) // max(self.shape)

    def sensitivity(self, factors: Factors) -> float:
        """See `sensitivity`."""
        return sensitivity(factors)

    def weights(self, factors: Factors, mode: int) -> Tensor:
        """See `weights`."""
        return weights(factors, mode)


def khatri_rao(factors: Sequence[Tensor]) -> Tensor:
    """Column-wise Kronecker product [prod n, R] of factors [n, R], the last axis fastest."""
    result = factors[0]
    for f in factors[1:]:
        result = (result[:, None] * f[None]).flatten(0, 1)
    return result


def solved(gram: Gram, right: Tensor, ridge: float = 1e-12) -> Tensor:
    """`F (G + ridge I)^-1`, the ridge relative to the mean of the diagonal."""
    return gram.inverse(ridge)(right)


def balanced(factors: Factors) -> Factors:
    """The same tensor with the norm of each rank-one term shared evenly by its columns."""
    norms = torch.stack([f.norm(dim=0).clamp_min(1e-30) for f in factors])
    even = norms.log().mean(0).exp()
    return tuple(f * (even / n) for f, n in zip(factors, norms, strict=True))


def sensitivity(factors: Factors) -> float:
    """The squared error, to first order, of noise of variance 1 on every entry of every factor."""
    norms = [f.square().sum(0) for f in factors]
    return float(sum(len(f) * _others(norms, mode).sum() for mode, f in enumerate(factors)))


def weights(factors: Factors, mode: int) -> Tensor:
    """What |a_r|^2 is multiplied with in the sensitivity: for three modes K |b_r|^2 + J |c_r|^2."""
    norms = [
        torch.ones_like(f[0]) if k == mode else f.square().sum(0) for k, f in enumerate(factors)
    ]
    return torch.stack(
        [len(f) * _others(norms, k) for k, f in enumerate(factors) if k != mode]
    ).sum(0)


def _others(norms: Sequence[Tensor], mode: int) -> Tensor:
    result = torch.ones_like(norms[0])
    for k, n in enumerate(norms):
        result = result if k == mode else result * n
    return result


def random_start(
    shape: Sequence[int], rank: int, seed: int = 0, device: torch.device | None = None
) -> Factors:
    """Standard normal factors, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    drawn = (torch.randn(n, rank, generator=generator, dtype=torch.float64) for n in shape)
    return tuple(factor.to(device) for factor in drawn)


def svd_start(tensor: Tensor, rank: int, seed: int = 0) -> Factors:
    """Leading singular vectors of each unfolding (HOSVD).

    A mode that has fewer than the rank is filled up with standard normal columns.
    """
    factors = []
    for mode, noise in enumerate(random_start(tensor.shape, rank, seed, tensor.device)):
        unfolded = tensor.double().movedim(mode, 0).flatten(1)
        vectors = torch.linalg.eigh(unfolded @ unfolded.mT)[1].flip(1)
        factors.append(torch.cat([vectors[:, :rank], noise[:, vectors.shape[1] :]], 1))
    return tuple(factors)


def als(problem: Problem, start: Factors, sweeps: int = 50, tolerance: float = 1e-5) -> Fit:
    """Alternating least squares from given factors.

    Stops when a sweep changes the relative error by less than `tolerance`. Works in double
    precision: the Gram matrices of nearly collinear terms need it.
    """
    factors = problem.balanced(tuple(f.double() for f in start))
    history: list[float] = []
    for _ in range(sweeps):
        for mode in range(len(factors)):
            gram, right, rest = problem.sides(factors, mode)
            solution = solved(gram, right)
            if mode == len(factors) - 1:
                history.append(problem.error(gram, right, rest, solution))
            # Norms gather in the factor solved last; `balanced` shares them out again, so that no
            # column underflows.
            factors = tuple(solution if k == mode else f for k, f in enumerate(factors))
        factors = problem.balanced(factors)
        if len(history) > 1 and abs(history[-2] - history[-1]) < tolerance:
            return Fit(factors, history[-1], len(history), True, tuple(history))
    return Fit(
        factors,
        history[-1] if history else problem.relative(factors),
        len(history),
        False,
        tuple(history),
    )
