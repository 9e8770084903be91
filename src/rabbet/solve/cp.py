"""CP of one kernel: how factors start, and the best quantised factors found so far."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from rabbet.errors import PlanError
from rabbet.grids.grid import Grid
from rabbet.solve.als import CPProblem, balanced
from rabbet.solve.feedback import Rounded, alternate
from rabbet.solve.varpro import project
from rabbet.solve.whiten import principal

STEPS = 2**38  # multiplications that `quantised_cp` may spend on the float factors


def khatri_rao_rows(small: Sequence[Tensor]) -> Tensor:
    """The Khatri-Rao product of B [rank, in] and C [rank, k] as rows [rank, in * k]."""
    b, c = small
    return (b[:, :, None] * c[:, None]).flatten(1)


def start(matrix: Tensor, metric: Tensor | None, channels: int, rank: int) -> tuple[Tensor, Tensor]:
    """Where CP of a matrix [out, in * k] starts: B [rank, in] and C [rank, k], with rows of norm 1.

    They are the largest rank-one terms of its right singular vectors, each reshaped to [in, k].
    """
    right = principal(matrix, metric).mT @ matrix
    u, s, v = torch.linalg.svd(right.view(len(right), channels, -1), full_matrices=False)
    chosen = s.flatten().argsort(descending=True, stable=True)[:rank]
    vector, term = chosen // s.shape[1], chosen % s.shape[1]
    return u[vector, :, term].contiguous(), v[vector, term].contiguous()


def require_numbers(what: str, tensor: object) -> None:
    """Raise PlanError for what is no tensor of finite real numbers."""
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        kind = str(tensor.dtype) if isinstance(tensor, Tensor) else type(tensor).__name__
        raise PlanError(f"{what} is a tensor of floating-point numbers; found {kind}")
    if not torch.isfinite(tensor).all():
        raise PlanError(f"{what} holds numbers that are not finite")


def quantised_cp(
    weight: Tensor,
    rank: int,
    bits: int,
    scales: Literal["tensor", "column"] = "tensor",
    sweeps: int = 10,
) -> Rounded:
    """The best quantised CP factors found for a single kernel, in the plain error of its weight.

    The factors are A [out, R], B [in, R] and C [k * k, R]. weight: [out, in, *kernel]. Variable
    projection with a ridge that stands for the rounding to come, then the factors rounded in turn.
    scales: one for each factor, or one for each column of each. Deterministic. Raises PlanError for
    a kernel that CP does not fit, or a rank that it cannot have.
    """
    require_numbers("the weight", weight)
    if weight.ndim < 3 or (places := math.prod(weight.shape[2:])) == 1:
        raise PlanError(
            "CP needs a kernel [out, in, *k] of more than one place; "
            f"found shape {list(weight.shape)}"
        )
    out, channels = weight.shape[:2]
    if not 1 <= rank <= min(out, channels * places) * min(channels, places):
        raise PlanError(
            f"rank {rank} is not one that a kernel of shape {list(weight.shape)} can have"
        )
    grid = Grid.of(bits, axis=1 if scales == "column" else None)
    flat = weight.detach().float().flatten(1)
    # Multiplications of one evaluation, forward and backward.
    each = 3 * rank * channels * places * (rank + out)
    steps = max(30, min(250, STEPS // each))
    first = start(flat, None, channels, rank)
    solution = project(khatri_rao_rows, first, flat, None, 4.0 / grid.levels**2, steps)
    factors = balanced((solution.last, solution.small[0].mT, solution.small[1].mT))
    return alternate(CPProblem(weight.detach().flatten(2)), factors, [grid] * 3, sweeps)
