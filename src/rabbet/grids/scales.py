"""Scale layouts: who shares a scale, and a zero point if there are any.

The text of a layout is the last part of a grid's:

    (nothing)   one scale for the tensor
    c, c1       one for each slice of axis 0, or of axis 1
    g64         one for each 64 consecutive inputs of each output (a slice of axis 0, flattened)
    g64z        the same, with a zero point for each as well

A new layout is a class here, or in a file of its own, and a line in LAYOUTS.
"""

import math
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Self

import torch.nn.functional as F
from torch import Tensor

from rabbet.errors import PlanError

Shape = tuple[int, ...]


class Scales(ABC):
    """Which entries of a tensor share a scale. Scales are kept flat, [count]."""

    zeros: bool = False
    """Whether there is a zero point beside each scale."""
    single: bool = False
    """Whether there is one scale for the tensor."""
    along_axis: bool = True
    """Whether integer kernels can hold them: one scale, or one for each slice of an axis."""

    @classmethod
    @abstractmethod
    def read(cls, text: str) -> Self | None:
        """The layout of a text; None for one of another kind."""

    @property
    @abstractmethod
    def text(self) -> str:
        """What stands behind the codebook in a plan."""

    @abstractmethod
    def count(self, shape: Shape) -> int:
        """How many scales a tensor has; raises PlanError for a shape that does not fit."""

    @abstractmethod
    def slices(self, x: Tensor) -> Tensor:
        """[count, n]: the entries that share each scale, zero-padded where there are fewer."""

    @abstractmethod
    def spread(self, scale: Tensor, shape: Shape) -> Tensor:
        """A scale for each entry, in a shape that broadcasts against the tensor's."""

    def parts(self, columns: int) -> int | None:
        """How many scales each slice of axis 0, with `columns` entries, has.

        None if slices of axis 0 share any.
        """
        return None

    def part_size(self, columns: int) -> int:
        """How many consecutive entries of a slice of axis 0 share a scale."""
        return columns

    def gained(self, scale: Tensor, gain: Tensor) -> Tensor | None:
        """The scales of a tensor whose slices of axis 0 are each multiplied with a gain.

        None if slices share a scale.
        """
        return None


@dataclass(frozen=True, slots=True)
class OneScale(Scales):
    """One scale for the tensor."""

    single: ClassVar[bool] = True  # type: ignore[misc]

    @classmethod
    def read(cls, text: str) -> Self | None:
        """Nothing."""
        return None if text else cls()

    @property
    def text(self) -> str:
        """Nothing."""
        return ""

    def count(self, shape: Shape) -> int:
        """One."""
        return 1

    def slices(self, x: Tensor) -> Tensor:
        """All entries."""
        return x.reshape(1, -1)

    def spread(self, scale: Tensor, shape: Shape) -> Tensor:
        """A scalar."""
        return scale.reshape(())


@dataclass(frozen=True, slots=True)
class PerSlice(Scales):
    """One scale for each slice of an axis."""

    axis: int = 0

    @classmethod
    def read(cls, text: str) -> Self | None:
        """`c`, or `c` and the axis."""
        match = re.fullmatch(r"c(\d{0,2})", text)
        return None if match is None else cls(int(match[1] or 0))

    @property
    def text(self) -> str:
        """`c`, and the axis if it is not the first."""
        return f"c{self.axis or ''}"

    def count(self, shape: Shape) -> int:
        """The length of the axis."""
        if self.axis >= len(shape):
            raise PlanError(
                f"a scale per slice of axis {self.axis} does not fit a tensor of shape {[*shape]}"
            )
        return shape[self.axis]

    def slices(self, x: Tensor) -> Tensor:
        """The slices, flattened."""
        return x.movedim(self.axis, 0).flatten(1)

    def spread(self, scale: Tensor, shape: Shape) -> Tensor:
        """Along the axis."""
        return scale.reshape([-1 if d == self.axis else 1 for d in range(len(shape))])

    def parts(self, columns: int) -> int | None:
        """One, of the first axis."""
        return 1 if self.axis == 0 else None

    def gained(self, scale: Tensor, gain: Tensor) -> Tensor | None:
        """Each with its own gain, of the first axis."""
        return scale * gain if self.axis == 0 else None


@dataclass(frozen=True, slots=True)
class PerGroup(Scales):
    """One scale for each `size` consecutive entries of each slice of axis 0.

    The last group of a slice may be smaller.
    """

    size: int = 64
    zeros: bool = False

    along_axis: ClassVar[bool] = False  # type: ignore[misc]

    def __post_init__(self) -> None:
        if self.size < 2:
            raise PlanError(f"a group of inputs has at least 2; found {self.size}")

    @classmethod
    def read(cls, text: str) -> Self | None:
        """`g`, the size, and `z` for zero points."""
        match = re.fullmatch(r"g([1-9]\d{0,5})(z?)", text)
        return None if match is None else cls(int(match[1]), bool(match[2]))

    @property
    def text(self) -> str:
        """`g`, the size, and `z` for zero points."""
        return f"g{self.size}{'z' * self.zeros}"

    def parts(self, columns: int) -> int | None:
        """As many groups as it takes."""
        return -(-columns // self.size)

    def part_size(self, columns: int) -> int:
        """The size of a group."""
        return self.size

    def _parts(self, shape: Shape) -> int:
        return -(-math.prod(shape[1:]) // self.size)

    def count(self, shape: Shape) -> int:
        """Groups of all slices."""
        return shape[0] * self._parts(shape)

    def slices(self, x: Tensor) -> Tensor:
        """The groups, those of one slice after one another."""
        flat = x.flatten(1) if x.ndim > 1 else x[:, None]
        return F.pad(flat, (0, -flat.shape[1] % self.size)).reshape(-1, self.size)

    def spread(self, scale: Tensor, shape: Shape) -> Tensor:
        """A number for every entry."""
        wide = scale.reshape(shape[0], -1).repeat_interleave(self.size, 1)
        return wide[:, : math.prod(shape[1:])].reshape(shape)

    def gained(self, scale: Tensor, gain: Tensor) -> Tensor | None:
        """All groups of a slice with its gain."""
        return (scale.reshape(len(gain), -1) * gain[:, None]).flatten()


LAYOUTS: dict[str, type[Scales]] = {"one": OneScale, "slices": PerSlice, "groups": PerGroup}


def read_scales(text: str) -> Scales | None:
    """The layout of a text, None if there is none."""
    return next((s for kind in LAYOUTS.values() if (s := kind.read(text)) is not None), None)
