"""Factors in the metric of a layer's inputs, by variable projection.

A weight [out, n] is written as `A M`: the rows of M [rank, n] are built from small factors, and A
[out, rank] is free. Given M, the best A is a least-squares solution; with it inserted, the error is
a smooth function of the small factors alone, which L-BFGS minimises in some tens of steps. There is
no learning rate to choose, and no mode waits for the others as in alternating least squares.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Basis = Callable[[Sequence[Tensor]], Tensor]
"""The rows M [rank, n] that small factors stand for."""

SMALLEST = {torch.float32: 1e-6, torch.float64: 1e-10}  # ridge: rows of M may be parallel
TOLD = 1e-3  # ridge from which float32 solves as well as double precision
LARGE = 2048  # columns from which a metric has a lean stand-in
SHARE = 8  # of its columns for each vector of that


@dataclass(frozen=True)
class Lean:
    """A stand-in for a large metric H = second, `L L^T + diag(rest)`: L [n, n / 8], rest [n].

    Steps towards the least error take an eighth of the multiplications with it. Nystroem's
    approximation (Halko, Martinsson and Tropp, arXiv 0909.4061, section 5.4), which H exceeds by no
    negative rest. second: None if it stands alone, for what need not be exact.
    """

    second: Tensor | None
    leading: Tensor
    rest: Tensor

    @classmethod
    def of(cls, second: Tensor) -> "Lean":
        """Of a metric [n, n], after one turn of a subspace that is drawn at random."""
        n = len(second)
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randn(n, max(1, n // SHARE), generator=generator).to(second)
        basis = torch.linalg.qr(second @ drawn).Q
        seen = second @ basis
        inner = (basis.mT @ seen).double()
        inner += 1e-6 * inner.diagonal().mean() * torch.eye(len(inner)).to(inner)
        root = torch.linalg.cholesky(inner).to(seen)
        leading = torch.linalg.solve_triangular(root, seen.mT, upper=False).mT
        rest = second.diagonal() - leading.square().sum(1)
        return cls(second, leading, rest.clamp_min(0))

    def times(self, rows: Tensor) -> Tensor:
        """`rows @ H`, about."""
        return (rows @ self.leading) @ self.leading.mT + rows * self.rest


@dataclass(frozen=True)
class Projected:
    """Small factors, the matrix A that goes with them, and the loss.

    loss: the relative squared error, the ridge's share included.
    """

    small: tuple[Tensor, ...]
    last: Tensor
    loss: float


def project(
    basis: Basis,
    start: Sequence[Tensor],
    matrix: Tensor,
    second: "Tensor | Lean | None",
    ridge: float,
    evaluations: int,
) -> Projected:
    """Small factors of least error `tr(D H D^T)`, D = A M - matrix.

    matrix: [out, n]; second: H [n, n], None for the plain error. ridge: weight of |A|^2, with rows
    of M of norm 1 in H. It stands for the rounding error that A will suffer, which makes terms that
    cancel one another unprofitable. A lean metric is what the small factors are found in; A and the
    loss are those of the one that it stands for, unless it stands alone.
    """
    problem = Inserted(basis, matrix, second, ridge)
    small = minimised(start, problem.loss, evaluations)
    if isinstance(second, Lean) and second.second is None:
        loss, last, _ = problem.solved(basis(small))
        return Projected(small, last, float(loss))
    second = second.second if isinstance(second, Lean) else second
    # a ridge such as rounding calls for keeps the last problem far from singular
    kind = matrix.dtype if ridge >= TOLD else torch.float64
    exact = Inserted(basis, matrix.to(kind), None if second is None else second.to(kind), ridge)
    loss, last, _ = exact.solved(basis([s.to(kind) for s in small]))
    return Projected(small, last.to(matrix.dtype), float(loss))


def minimised(
    start: Sequence[Tensor], loss: Callable[[Sequence[Tensor]], Tensor], evaluations: int
) -> tuple[Tensor, ...]:
    """Tensors that minimise a loss by L-BFGS from a start, in at most `evaluations` of it.

    If any of them is not finite, a copy of the start.
    """
    moving = [s.detach().contiguous().clone().requires_grad_() for s in start]
    if evaluations:
        optimiser = torch.optim.LBFGS(
            moving,
            max_iter=evaluations,
            max_eval=evaluations,
            line_search_fn="strong_wolfe",
            tolerance_change=1e-12,
        )

        def closure() -> Tensor:
            optimiser.zero_grad()
            value = loss(moving)
            value.backward()
            return value

        with torch.enable_grad():
            optimiser.step(closure)
    reached = tuple(s.detach() for s in moving)
    if all(torch.isfinite(s).all() for s in reached):
        return reached
    return tuple(s.detach().clone() for s in start)


class Inserted:
    """The problem that is left of the small factors once the best A is inserted."""

    def __init__(
        self, basis: Basis, matrix: Tensor, second: Tensor | Lean | None, ridge: float
    ) -> None:
        self.basis, self.second, self.ridge = basis, second, max(ridge, SMALLEST[matrix.dtype])
        self.aim = self._seen(matrix).mT  # H W^T [n, out]
        self.power = (matrix.mT * self.aim).sum().clamp_min(1e-30)

    def loss(self, small: Sequence[Tensor]) -> Tensor:
        """The loss alone, of which gradients can be asked."""
        result: Tensor = _Loss.apply(  # type: ignore[no-untyped-call]
            self.basis(small), self
        )
        return result

    def solved(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The loss, A [out, rank], and the gradient of the loss by the rows M [rank, n].

        A is the best for these rows, so what the loss gains by moving A counts for nothing
        (Golub and Pereyra 1973): the gradient is that of `|A M - W|^2 + ridge |A|^2` by M alone,
        where each column of A counts with the squared norm of its row.
        """
        seen = self._seen(rows)
        gram = seen @ rows.mT
        power = gram.diagonal().clamp_min(1e-30)
        norm = power.rsqrt()[:, None]
        eye = torch.eye(len(rows), dtype=rows.dtype, device=rows.device)
        right = (rows @ self.aim) * norm
        root = torch.linalg.cholesky(gram * norm * norm.mT + self.ridge * eye)
        solution = torch.cholesky_solve(right, root)
        loss = 1 - (right * solution).sum() / self.power
        last = solution * norm  # A^T
        inner = last @ last.mT
        inner.diagonal().mul_(1 + self.ridge)
        slope = (inner @ seen - last @ self.aim.mT) * (2 / self.power)
        return loss, last.mT, slope

    def _seen(self, rows: Tensor) -> Tensor:
        """`rows @ H`."""
        if isinstance(self.second, Lean):
            return self.second.times(rows)
        return rows if self.second is None else rows @ self.second


class _Loss(torch.autograd.Function):
    """The loss of a problem, whose gradient comes with it."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, problem: Inserted) -> Tensor:
        loss, _, slope = problem.solved(rows)
        ctx.save_for_backward(slope)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.saved_tensors[0], None
