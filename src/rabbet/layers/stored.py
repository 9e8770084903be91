"""Weights that no layer of another kind holds: stored small, and float when they are used."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rabbet.layers.base import LayerKind, Site

WIDE = 16  # entries that a row has at least, if the tensor has as many
FEW = 4  # entries that must share a scale, even if that leaves a single row
WIDEST = 4096  # that it has at most, if it can be cut


def rows_of(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of a tensor as a matrix: the last axes that make a row long enough.

    A weight that is multiplied with has its outputs in front, a table its rows: either way what
    belongs together shares a scale. A tensor of one axis is cut into rows of equal length.
    """
    sizes = [n for n in shape if n > 1] or [1]
    columns = sizes.pop()
    while columns < WIDE and (len(sizes) > 1 or (sizes and columns < FEW)):
        columns *= sizes.pop()
    if not sizes and columns > WIDEST:
        whole = range(WIDEST, WIDE - 1, -1)
        columns = next((n for n in whole if columns % n == 0), columns)
    return math.prod(shape) // columns, columns


@dataclass(frozen=True)
class Stored(LayerKind):
    """A tensor of a network, by its name; canonical as a matrix, see `rows_of`.

    Nothing is known of how it is used: it is rounded for itself, or in the metric of the inputs
    that it was seen to meet.
    """

    name: str = "stored"
    runs: ClassVar[bool] = False

    def fits(self, module: nn.Module) -> bool:
        """No module: the tensor may lie in any."""
        return False

    def held(self, model: nn.Module, name: str) -> Tensor:
        """The tensor as a matrix."""
        tensor = tensor_of(model, name)
        return tensor.detach().reshape(rows_of(tensor.shape))

    def usual(self, shape: Sequence[int]) -> dict[str, Any]:
        """No bias."""
        return super().usual(shape) | {"bias": False}

    def kernel_positions(self, site: Site) -> int:
        """None: it is not known where it multiplies."""
        return 0

    def run(self, site: Site, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Not known."""
        raise NotImplementedError("a stored weight is used in ways that are not known")

    def patches(
        self, site: Site, x: Tensor, places: int | None, generator: torch.Generator
    ) -> Tensor:
        """Not known."""
        raise NotImplementedError("a stored weight meets rows that are not known")


def tensor_of(model: nn.Module, name: str) -> Tensor:
    """The parameter or buffer of a full name."""
    owner, _, leaf = name.rpartition(".")
    tensor = getattr(model.get_submodule(owner), leaf)
    assert isinstance(tensor, Tensor)
    return tensor
