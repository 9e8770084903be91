"""Alternating least squares, and the problems that it and its refinements solve.

A tensor X [I, J, ...] is written as `sum_r a_r o b_r o ...` with factors A [I, R], B [J, R], ... in
the order of its axes (CP; a matrix is the case of two), or as a Tucker-2 chain. Given all other
factors, one factor [n, R] solves a least-squares problem with Gram matrix G [R, R] and right-hand
side F [n, R]. The other solvers only solve that problem differently (`epc`: with least norms at a
given error; `admm` and `feedback`: on a grid).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

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


Sides = tuple[Tensor, Tensor, float]
"""G [R, R], F [n, R] and the rest c.

The squared error of a factor A is `tr(A G A^T) - 2 tr(F A^T) + c`.
"""


class Problem:
    """A tensor to be factorised, and the least-squares problem of each of its factors."""

    def __init__(self, tensor: Tensor) -> None:
        self.shape = tuple(tensor.shape)
        self.flat = tensor.double().flatten(1)
        self.power = float(self.flat.square().sum())

    def sides(self, factors: Factors, mode: int) -> Sides:
        """The problem of one factor, given the others."""
        raise NotImplementedError

    def error(self, gram: Tensor, right: Tensor, rest: float, factor: Tensor) -> float:
        """||X - X'|| / ||X|| from the problem of any factor and that factor."""
        square = rest + float(((factor @ gram - 2 * right) * factor).sum())
        return math.sqrt(max(square, 0.0) / max(self.power, 1e-300))

    def relative(self, factors: Factors) -> float:
        """||X - X'|| / ||X|| of factors."""
        return self.error(*self.sides(factors, 0), factors[0])

    def balanced(self, factors: Factors) -> Factors:
        """The same tensor from factors that share their norms evenly; see `balanced`."""
        return balanced(factors)

    def sensitivity(self, factors: Factors) -> float:
        """See `sensitivity`."""
        return sensitivity(factors)

    def weights(self, factors: Factors, mode: int) -> Tensor:
        """What the square of each column of a factor is multiplied with in the sensitivity, [R]."""
        return weights(factors, mode)


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
            return gram, self.flat @ khatri_rao(factors[1:]), self.power
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
        return gram, inner, self.power


class Tucker2Problem(Problem):
    """Factors V [I, q], U [J, p] and the core [K, q * p] of a tensor [I, J, K].

    X_ijk = sum V_iq core_kqp U_jp.
    """

    def sides(self, factors: Factors, mode: int) -> Sides:
        """The least-squares problem of one factor, given the others.

        The Gram matrix of the core is a Kronecker product, [q p, q p]: meant for ranks of a few
        tens.
        """
        v, u, flat = factors
        x = self.flat.view(self.shape)
        core = flat.view(-1, v.shape[1], u.shape[1])
        if mode == 0:
            basis = torch.einsum("kqp,jp->qjk", core, u).flatten(1)
            return basis @ basis.mT, self.flat @ basis.mT, self.power
        if mode == 1:
            basis = torch.einsum("kqp,iq->pik", core, v).flatten(1)
            return basis @ basis.mT, x.transpose(0, 1).flatten(1) @ basis.mT, self.power
        inner = torch.einsum("ijk,iq,jp->kqp", x, v, u).flatten(1)
        return torch.kron(v.mT @ v, u.mT @ u), inner, self.power


def khatri_rao(factors: Sequence[Tensor]) -> Tensor:
    """Column-wise Kronecker product [prod n, R] of factors [n, R], the last axis fastest."""
    result = factors[0]
    for f in factors[1:]:
        result = (result[:, None] * f[None]).flatten(0, 1)
    return result


def solved(gram: Tensor, right: Tensor, ridge: float = 1e-12) -> Tensor:
    """`F (G + ridge I)^-1`, the ridge relative to the mean of the diagonal.

    The ridge is raised until G can be factorised.
    """
    mean = gram.diagonal().mean().clamp_min(1e-300)
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    while True:
        lower, info = torch.linalg.cholesky_ex(gram + ridge * mean * eye)
        if not info:
            return torch.cholesky_solve(right.mT, lower).mT
        ridge = max(ridge, 1e-14) * 100


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
