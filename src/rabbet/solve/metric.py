"""The metric of a layer: the damped second moment of its inputs, in which errors are measured."""

import functools

import torch
from torch import Tensor

from rabbet.errors import ModelError
from rabbet.solve.columns import gather
from rabbet.solve.varpro import LARGE, Lean

DAMPING = 0.01  # a share of the mean square of inputs: the default of GPTQ, arXiv 2210.17323
LEAST = 1e-30  # a mean square of inputs below counts as none: the inputs are always zero
ROWS = 256  # of a matrix that are put in order at once
BLOCK = 64  # columns of a triangular matrix that are inverted without cutting it again


class Metric:
    """A damped second moment [groups, n, n], factorised once.

    damping: added to the diagonal as a share of its mean.
    """

    identity = False

    def __init__(self, second: Tensor, damping: float = DAMPING) -> None:
        diagonal = second.diagonal(dim1=1, dim2=2)
        mean = diagonal.mean(1)
        ridge = torch.where(mean > LEAST, damping * mean, 1.0)
        # In place: of a wide layer no matrix is made that need not be.
        self.second = second.to(torch.float32, copy=True)
        diagonal = self.second.diagonal(dim1=1, dim2=2)
        diagonal += ridge.float()[:, None]
        # The most used input comes first: all others can still compensate its rounding error.
        self.order = diagonal.argsort(dim=1, descending=True, stable=True)
        self.factor = _inverse_factor(self.second, self.order)

    @classmethod
    def plain(cls, groups: int, columns: int, device: torch.device | None = None) -> "Metric":
        """The identity: the weight's own error, where nothing is known of the inputs."""
        return _Plain(groups, columns, device)

    @property
    def diagonal(self) -> Tensor:
        """[groups, n]."""
        return self.second.diagonal(dim1=1, dim2=2)

    @functools.cached_property
    def lean(self) -> Lean | None:
        """A stand-in for a large metric of one group, which is faster to multiply with."""
        groups, n = self.diagonal.shape
        return Lean.of(self.second[0]) if groups == 1 and n >= LARGE and not self.identity else None

    def times(self, x: Tensor) -> Tensor:
        """`x @ second`, of rows [groups, rows, n]."""
        return x @ self.second

    def times_part(self, x: Tensor, own: slice) -> Tensor:
        """The same of rows that are zero but for some columns, [groups, rows, own]."""
        return x @ self.second[:, own]

    def spread(self, noise: Tensor) -> Tensor:
        """White noise [groups, rows, n], its columns mixed so that the metric sees it as white."""
        mixed = noise @ self.factor
        return mixed.gather(2, self.order.argsort(dim=1)[:, None].expand_as(mixed))

    def whitened(self, slope: Tensor) -> Tensor:
        """Rows [groups, rows, n] whose squares add up to `slope H^-1 slope^T`."""
        return gather(slope, self.order, 2) @ self.factor.mT

    def fed_back(self, second: Tensor) -> Tensor:
        """The mean error, in other second moments, of a row rounded with feedback in this metric.

        Column by column (GPTQ, arXiv 2210.17323), an error of variance one is made and its share
        handed on to later columns: the row errs by `(e / diag U) U`. The result is [groups].
        """
        handed = self.factor @ _ordered(second, self.order)
        handed *= self.factor
        sizes = self.factor.diagonal(dim1=1, dim2=2).square()
        result: Tensor = (handed.sum(2) / sizes).sum(1)
        return result

    def error(self, delta: Tensor) -> Tensor:
        """Squared error per row, [groups, rows], of a difference [groups, rows, n]."""
        result: Tensor = (self.times(delta) * delta).sum(2)
        return result


class _Plain(Metric):
    """The identity, of which no matrix is made: a row of a stored tensor may be very long.

    No column can compensate the error of another, so solvers skip that work.
    """

    identity = True

    def __init__(self, groups: int, columns: int, device: torch.device | None) -> None:
        self._ones = torch.ones(groups, columns, device=device)

    @functools.cached_property
    def second(self) -> Tensor:  # type: ignore[override]
        """[groups, n, n], for solvers that need it as a matrix."""
        return torch.diag_embed(self._ones)

    @property
    def diagonal(self) -> Tensor:
        """[groups, n]."""
        return self._ones

    def times(self, x: Tensor) -> Tensor:
        """X itself."""
        return x

    def times_part(self, x: Tensor, own: slice) -> Tensor:
        """X itself, and zeros in all other columns."""
        wide = x.new_zeros(*x.shape[:2], self._ones.shape[1])
        wide[:, :, own] = x
        return wide

    def spread(self, noise: Tensor) -> Tensor:
        """The noise itself."""
        return noise

    def whitened(self, slope: Tensor) -> Tensor:
        """The rows themselves."""
        return slope


def _inverse_factor(second: Tensor, order: Tensor) -> Tensor:
    """Upper U with `U^T U = H^-1` of H with its columns in an order, in double precision.

    Of H with rows and columns in reverse a Cholesky factor is taken; read backwards, it is an upper
    V with `V V^T = H`, and U its inverse: half the work of inverting H and factorising that.
    Damping is raised where rounding still makes H indefinite.
    """
    for extra in (0.0, 1e-6, 1e-4, 1e-2, 1.0):
        # all in one place, since of a wide layer this matrix is large
        lower = _ordered(second, order.flip(1)).double().mT
        diagonal = lower.diagonal(dim1=1, dim2=2)
        diagonal += extra * diagonal.mean(1, keepdim=True)
        info = torch.empty(len(lower), dtype=torch.int32, device=lower.device)
        torch.linalg.cholesky_ex(lower, out=(lower, info))
        if not info.any():
            _invert_lower(lower)
            if torch.isfinite(lower).all():
                factor = lower.float()
                del lower, diagonal
                return factor.flip(1, 2)
        del lower, diagonal
    raise ModelError(
        "the second moment of the inputs is not positive definite; are the inputs finite?"
    )


def _ordered(second: Tensor, order: Tensor) -> Tensor:
    """Rows and columns in an order, each group in its own."""
    if second.shape[1] <= ROWS:
        return gather(gather(second, order, 1), order, 2)
    # In a large matrix some rows at a time are faster.
    made = torch.empty_like(second)
    for into, matrix, own in zip(made, second, order, strict=True):
        for rows, some in zip(into.split(ROWS), own.split(ROWS), strict=True):
            torch.index_select(matrix.index_select(0, some), 1, own, out=rows)
    return made


def _invert_lower(lower: Tensor) -> None:
    """Invert lower triangular matrices [..., n, n] in place, halves first."""
    n = lower.shape[-1]
    if n <= BLOCK:
        eye = torch.eye(n, dtype=lower.dtype, device=lower.device).expand_as(lower)
        lower.copy_(torch.linalg.solve_triangular(lower, eye, upper=False))
        return
    first, rest = slice(n // 2), slice(n // 2, n)
    one, corner, other = lower[..., first, first], lower[..., rest, first], lower[..., rest, rest]
    across = torch.linalg.solve_triangular(other, -corner, upper=False)
    corner.copy_(torch.linalg.solve_triangular(one, across, upper=False, left=False))
    _invert_lower(one)
    _invert_lower(other)
