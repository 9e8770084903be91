"""Matrices as kernels for weights in blocks hold them: unsigned codes, scales, whole zero points.

A code u of 2, 4 or 8 bits stands for `scale * (u - zero)`. Every uniform grid is exactly that: a
half-step code c + 1/2 is the odd integer 2c + 1 on half the scale, one bit wider. So zero points
stay whole numbers, which the fast kernels want (onnxruntime takes floats, too, and then unpacks the
whole weight in every step).
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rabbet.grids.grid import Grid, Quantised

WIDTHS = (2, 4, 8)  # bits of the codes that kernels read
SIZES = (128, 64, 32, 16)  # of blocks; of 256 onnxruntime has no fast kernel for 2 bits


@dataclass(frozen=True)
class Blocks:
    """A matrix [rows, columns] as codes and scales.

    integers: `gain * code + offset` of the grid, [rows, columns]. scales: [rows, groups], of the
    integers. zeros: whole numbers beside the scales, or None. bits, shift: codes are
    `integers + shift`, of so many bits. group: columns that share a scale. size: of a block.
    """

    grid: Grid
    codes: Tensor
    integers: Tensor
    scales: Tensor
    zeros: Tensor | None
    bits: int
    shift: int
    group: int
    size: int

    @classmethod
    def of(cls, numbers: Quantised, least: int = WIDTHS[0]) -> "Blocks | None":
        """A factor [rows, columns] in blocks; None for one that is none, such as floats.

        least: the narrowest codes that are wanted.
        """
        grid, scales = numbers.grid, numbers.grid.scales
        rows, columns = numbers.codes.shape if numbers.codes.ndim == 2 else (0, 0)
        book, parts = grid.codebook, scales.parts(columns)
        if book.uniform is None or book.integers is None or not rows:
            return None
        if parts is None and not scales.single:
            return None
        group = scales.part_size(columns)
        size = _size(columns, group)
        gain, offset = book.integers
        low, high = gain * grid.low + offset, gain * grid.high + offset
        width = next((w for w in WIDTHS if w >= least and high - low < 2**w), None)
        if size is None or width is None:
            return None
        middle = 2 ** (width - 1)
        scale = (numbers.scale / gain).detach().cpu().float()
        wide = scale.expand(rows).reshape(rows, 1) if parts is None else scale.reshape(rows, parts)
        codes = numbers.codes.detach().cpu()
        zero = None if numbers.zero is None else gain * numbers.zero.detach().cpu()
        return cls(
            grid=grid,
            codes=codes,
            integers=gain * codes + offset,
            scales=wide.contiguous(),
            zeros=None if zero is None else zero.reshape(wide.shape),
            bits=width,
            shift=middle if low >= -middle and high < middle else -low,
            group=group,
            size=size,
        )

    @property
    def rows(self) -> int:
        """Outputs."""
        return self.codes.shape[0]

    @property
    def columns(self) -> int:
        """Inputs."""
        return self.codes.shape[1]

    @property
    def count(self) -> int:
        """Blocks of a row."""
        return -(-self.columns // self.size)

    @property
    def padding(self) -> int:
        """Columns that fill the last block."""
        return self.count * self.size - self.columns

    @property
    def packed(self) -> bool:
        """Whether a file holds the codes as kernels read them: then nothing is done at load."""
        return self.grid.levels == 2**self.bits and not self.padding

    @property
    def places(self) -> NDArray[np.int64]:
        """The scale of each block of a row."""
        return np.arange(self.count, dtype=np.int64) * self.size // self.group

    def blob(self) -> NDArray[np.uint8]:
        """The codes as kernels read them, uint8 [rows, blocks, bytes of a block]."""
        whole = torch.zeros(self.rows, self.count * self.size)
        whole[:, : self.columns] = self.integers + self.shift
        return joined(whole.numpy(), self.bits).reshape(self.rows, self.count, -1)

    def zero_points(self) -> NDArray[np.uint8] | None:
        """The zero point of each block, packed row by row; None if all are the kernel's own."""
        middle = 2 ** (self.bits - 1)
        if self.zeros is None and self.shift == middle:
            return None
        known = torch.zeros(self.scales.shape) if self.zeros is None else self.zeros
        each = (known + self.shift).numpy()[:, self.places]
        spare = -self.count % (8 // self.bits)
        return joined(np.pad(each, ((0, 0), (0, spare))), self.bits)


def joined(codes: NDArray[np.floating], bits: int) -> NDArray[np.uint8]:
    """Codes of 2, 4 or 8 bits, [rows, n], in bytes, the first in the lowest bits."""
    numbers, each = codes.astype(np.uint8), 8 // bits
    whole = np.zeros((len(numbers), numbers.shape[1] // each), np.uint8)
    for k in range(each):
        whole |= numbers[:, k::each] << (bits * k)
    return whole


def _size(columns: int, group: int) -> int | None:
    """The size of blocks that lie in groups and need the least padding; None if there is none."""
    whole = group >= columns
    legal = [size for size in SIZES if whole or group % size == 0]
    return min(legal, key=lambda size: (-columns % size, -size), default=None)
