"""The metric of a layer: the damped second moment of its inputs, in which errors are measured."""

import functools

import torch
from torch import Tensor

from rabbet.errors import ModelError
from rabbet.solve.columns import gather
from rabbet.solve.varpro import LARGE, Lean

DAMPING = 0.01  # a share of the mean square of inputs: the default of GPTQ, arXiv 2210.17323
LEAST = 1e-30  # a mean square of inputs below counts as none: the inputs are always zero
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
        self.factor = _inverse_factor(gather(gather(self.second, self.order, 2), self.order, 1))

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
        there = gather(gather(second, self.order, 2), self.order, 1)
        sizes = self.factor.diagonal(dim1=1, dim2=2).square()
        result: Tensor = (((self.factor @ there) * self.factor).sum(2) / sizes).sum(1)
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


def _inverse_factor(second: Tensor) -> Tensor:
    """Upper U with `U^T U = H^-1`, computed in double precision.

    Of H with rows and columns in reverse order a Cholesky factor is taken; read backwards, it is an
    upper V with `V V^T = H`, and U its inverse: half the work of inverting H and factorising that.
    Damping is raised where rounding still makes H indefinite.
    """
    # in place and let go of at once: of a wide layer each of these matrices is large
    for extra in (0.0, 1e-6, 1e-4, 1e-2, 1.0):
        wide = second.flip(1, 2).double()
        diagonal = wide.diagonal(dim1=1, dim2=2)
        diagonal += extra * diagonal.mean(1, keepdim=True)
        lower, info = torch.linalg.cholesky_ex(wide)
        del wide, diagonal
        if not info.any():
            upper = lower.flip(1, 2)
            del lower
            _invert_upper(upper)
            if torch.isfinite(upper).all():
                factor: Tensor = upper.float()
                return factor
    raise ModelError(
        "the second moment of the inputs is not positive definite; are the inputs finite?"
    )


def _invert_upper(upper: Tensor) -> None:
    """Invert upper triangular matrices [..., n, n] in place, halves first."""
    n = upper.shape[-1]
    if n <= BLOCK:
        eye = torch.eye(n, dtype=upper.dtype, device=upper.device).expand_as(upper)
        upper.copy_(torch.linalg.solve_triangular(upper, eye, upper=True))
        return
    first, rest = slice(n // 2), slice(n // 2, n)
    one, corner, other = upper[..., first, first], upper[..., first, rest], upper[..., rest, rest]
    across = torch.linalg.solve_triangular(one, -corner, upper=True)
    corner.copy_(torch.linalg.solve_triangular(other, across, upper=True, left=False))
    _invert_upper(one)
    _invert_upper(other)
