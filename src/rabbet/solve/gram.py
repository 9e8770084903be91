"""Gram matrices of the least-squares problems of factors: what solvers ask of them."""

from collections.abc import Callable

import torch
from torch import Tensor

from rabbet.errors import PlanError

MOST = 2**13  # rows of a Kronecker product that is put together: half a GiB in double precision


class Gram:
    """A Gram matrix G [R, R] that all rows of a factor [n, R] share."""

    def __init__(self, matrix: Tensor) -> None:
        self._matrix = matrix

    @property
    def dense(self) -> Tensor:
        """The matrix."""
        return self._matrix

    @property
    def mean(self) -> Tensor:
        """The mean of the diagonal."""
        return self._matrix.diagonal().mean()

    def times(self, rows: Tensor) -> Tensor:
        """`rows @ G`, of [n, R]."""
        return rows @ self._matrix

    def inverse(self, ridge: float) -> Callable[[Tensor], Tensor]:
        """What makes `rows (G + ridge I)^-1` of rows [n, R], the ridge relative to the mean.

        The ridge is raised until G can be factorised.
        """
        if not torch.isfinite(self._matrix).all():
            raise PlanError("a least-squares problem of the factors is not finite: is the weight?")
        mean = self.mean.clamp_min(1e-300)
        eye = torch.eye(len(self._matrix), dtype=self._matrix.dtype, device=self._matrix.device)
        while True:
            lower, info = torch.linalg.cholesky_ex(self._matrix + ridge * mean * eye)
            if not info:
                return lambda rows: torch.cholesky_solve(rows.mT, lower).mT
            ridge = max(ridge, 1e-14) * 100


class Kronecker(Gram):
    """The Kronecker product of two Gram matrices [a, a] and [b, b], which is not put together.

    That of a core between bonds of 64 would have 16 million entries, and its factorisation would
    take thousands of times as long as those of the two.
    """

    def __init__(self, left: Tensor, right: Tensor) -> None:
        self.left, self.right = left, right

    @property
    def dense(self) -> Tensor:
        """The product; raises PlanError where it is too large."""
        a, b = len(self.left), len(self.right)
        if a * b > MOST:
            raise PlanError(
                f"rounding a core between bonds of {a} and {b} in turn needs a matrix of "
                f"{a * b:,} rows, more than {MOST:,}: take solver='admm', or a smaller rank"
            )
        return torch.kron(self.left, self.right)

    @property
    def mean(self) -> Tensor:
        """The mean of the diagonal."""
        return self.left.diagonal().mean() * self.right.diagonal().mean()

    def times(self, rows: Tensor) -> Tensor:
        """`rows @ G`, of [n, a * b]."""
        inner = self.left @ rows.view(-1, len(self.left), len(self.right)) @ self.right
        return inner.flatten(1)

    def inverse(self, ridge: float) -> Callable[[Tensor], Tensor]:
        """See `Gram.inverse`; by the eigenvectors of both, so that no ridge is too small."""
        (low, u), (high, v) = torch.linalg.eigh(self.left), torch.linalg.eigh(self.right)
        spread = torch.outer(low.clamp_min(0), high.clamp_min(0))
        spread = spread + max(ridge, 1e-14) * self.mean.clamp_min(1e-300)

        def solved(rows: Tensor) -> Tensor:
            turned = u.mT @ rows.view(-1, len(u), len(v)) @ v
            back: Tensor = u @ (turned / spread) @ v.mT
            return back.flatten(1)

        return solved
