"""Matrices [groups, rows, n] taken column by column, and in another order."""

from collections.abc import Iterator

import torch
from torch import Tensor


def gather(x: Tensor, order: Tensor, axis: int) -> Tensor:
    """Reorder an axis of x [groups, ., .], each group in its own order."""
    index = order[:, None, :] if axis == 2 else order[:, :, None]
    return x.gather(axis, index.expand_as(x))


def by_column(values: Tensor) -> Tensor:
    """Values [groups, rows, n] with each column a row, so that it lies in one piece in memory."""
    # never a view: of one row, or one column, it would be
    return values.mT.clone(memory_format=torch.contiguous_format)


def columns(*blocks: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Column j of each block [groups, columns, rows], as [groups, 1, rows], for every j."""
    return zip(*(block.split(1, dim=1) for block in blocks), strict=True)
