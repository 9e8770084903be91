"""Codebooks: what a small integer stands for, in units of a scale.

The text of a codebook is the first part of a grid's:

    4      signed, -8 .. 7                      u8     unsigned, 0 .. 255
    2h     half-step (mid-rise), -3/2 .. 3/2    1      binary, -1/2 and 1/2
    t      ternary, -1, 0, 1                    f32    floats; also f16 and bf16

A new codebook is a class here, or in a file of its own, and a line in CODEBOOKS.
"""

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from rabbet.errors import PlanError
from rabbet.grids.pack import pack, packed_bytes, unpack

FLOAT_BITS = (16, 32)  # of the floats that weights may be


def nearest(steps: Tensor, shift: Tensor | float) -> Tensor:
    """The nearest codes, not clipped, of values in units of their scale; a new tensor."""
    return (steps - shift).round_()


def points(codes: Tensor, shift: Tensor | float, scale: Tensor) -> Tensor:
    """What codes stand for: `scale * (code + shift)`, a zero point being part of the shift."""
    return (codes + shift) * scale


class Codebook(ABC):
    """A set of codes, integers from `low` to `high`, and the point that each stands for.

    The codes of `Float` are no integers but the points themselves.
    """

    bits: int
    """Of the arithmetic that its points are multiplied in."""
    name: ClassVar[str]
    """What its family is called."""
    mirrored: bool = False
    """Whether -x may lie nearer to the points than x, so that both signs of a scale are tried."""
    floats: bool = False
    """Whether codes are floats, each with an exponent of its own: their scale is 1."""

    @classmethod
    @abstractmethod
    def read(cls, text: str) -> Self | None:
        """The codebook of a text; None for one that is of another family."""

    @property
    @abstractmethod
    def text(self) -> str:
        """What stands in a plan."""

    @property
    @abstractmethod
    def low(self) -> int:
        """The smallest code."""

    @property
    @abstractmethod
    def levels(self) -> int:
        """How many codes there are."""

    @property
    def high(self) -> int:
        """The largest code."""
        return self.low + self.levels - 1

    @property
    @abstractmethod
    def span(self) -> float:
        """Half the way from the smallest to the largest point, or all of it if none is negative."""

    @abstractmethod
    def encode(self, steps: Tensor) -> Tensor:
        """The code of the nearest point, as a float, for each value in units of its scale."""

    @abstractmethod
    def decode(self, codes: Tensor) -> Tensor:
        """The point of each code, in units of the scale."""

    @property
    def uniform(self) -> "Uniform | None":
        """The same as points at equal distances, which solvers can round with error feedback."""
        return None

    @property
    def integers(self) -> tuple[int, int] | None:
        """(gain, offset) so that `gain * code + offset`, an int8 or uint8, is `gain` times a point.

        That is what an integer kernel multiplies with. None if there is none.
        """
        return None

    def packed_bytes(self, count: int) -> int:
        """Bytes that `count` codes take in a file."""
        return packed_bytes(count, self.levels)

    def pack(self, codes: Tensor) -> Tensor:
        """Codes of any shape as a file holds them, uint8 [packed_bytes]; see `grids.pack`."""
        return pack(codes - self.low, self.levels)

    def unpack(self, packed: Tensor, count: int) -> Tensor:
        """The inverse of `pack`, [count]; raises ValueError for bytes that `pack` cannot write."""
        return unpack(packed, self.levels, count) + self.low


@dataclass(frozen=True, slots=True)
class Uniform(Codebook):
    """Points at equal distances: `code + shift`."""

    bits: int

    shift: ClassVar[float] = 0.0
    least: ClassVar[int] = 2

    def __post_init__(self) -> None:
        if not self.least <= self.bits <= 8:
            raise PlanError(
                f"a {self.name} grid of {self.bits} bits does not exist; "
                f"use {self.least} to 8 bits (a plan writes binary as 1)"
            )

    @property
    def low(self) -> int:
        """As in two's complement."""
        return -(1 << (self.bits - 1))

    @property
    def levels(self) -> int:
        """All patterns of the bits."""
        return 1 << self.bits

    @property
    def span(self) -> float:
        """Half the way from one end to the other."""
        return (self.levels - 1) / 2

    def encode(self, steps: Tensor) -> Tensor:
        """`clip(round(steps - shift), low, high)`."""
        return nearest(steps, self.shift).clamp_(self.low, self.high)

    def decode(self, codes: Tensor) -> Tensor:
        """`codes + shift`."""
        return codes + self.shift

    @property
    def uniform(self) -> "Uniform":
        """The codebook itself."""
        return self

    @property
    def integers(self) -> tuple[int, int]:
        """The codes; with a shift of a half twice as many steps of half the size."""
        return (2, 1) if self.shift else (1, 0)


@dataclass(frozen=True, slots=True)
class Signed(Uniform):
    """Two's complement: one step more below zero than above."""

    name: ClassVar[str] = "signed"

    @classmethod
    def read(cls, text: str) -> Self | None:
        """`2` to `8`."""
        return cls(int(text)) if re.fullmatch("[2-8]", text) else None

    @property
    def text(self) -> str:
        """The bits."""
        return str(self.bits)

    @property
    def mirrored(self) -> bool:  # type: ignore[override]
        """Where the lopsided end is a large part of the grid."""
        return self.bits <= 4


@dataclass(frozen=True, slots=True)
class Unsigned(Uniform):
    """From zero upwards."""

    name: ClassVar[str] = "unsigned"

    @classmethod
    def read(cls, text: str) -> Self | None:
        """`u2` to `u8`."""
        return cls(int(text[1])) if re.fullmatch("u[2-8]", text) else None

    @property
    def text(self) -> str:
        """`u` and the bits."""
        return f"u{self.bits}"

    @property
    def low(self) -> int:
        """Zero."""
        return 0

    @property
    def span(self) -> float:
        """All the way from zero."""
        return float(self.levels - 1)


@dataclass(frozen=True, slots=True)
class HalfStep(Uniform):
    """Mid-rise: half a step off zero on both sides. With one bit it is binary."""

    name: ClassVar[str] = "half"
    shift: ClassVar[float] = 0.5
    least: ClassVar[int] = 1

    @classmethod
    def read(cls, text: str) -> Self | None:
        """`1`, or `2h` to `8h`."""
        return cls(int(text[0])) if re.fullmatch("1|[2-8]h", text) else None

    @property
    def text(self) -> str:
        """The bits, and `h` unless they are one."""
        return "1" if self.bits == 1 else f"{self.bits}h"


@dataclass(frozen=True, slots=True)
class Ternary(Uniform):
    """-1, 0 and 1: arithmetic in two bits, 1.6 on disk."""

    bits: int = 2

    name: ClassVar[str] = "ternary"

    def __post_init__(self) -> None:
        if self.bits != 2:
            raise PlanError(f"a ternary grid takes 2 bits of arithmetic, asked for {self.bits}")

    @classmethod
    def read(cls, text: str) -> Self | None:
        """`t`."""
        return cls() if text == "t" else None

    @property
    def text(self) -> str:
        """`t`."""
        return "t"

    @property
    def low(self) -> int:
        """-1."""
        return -1

    @property
    def levels(self) -> int:
        """Three."""
        return 3


@dataclass(frozen=True, slots=True)
class Float(Codebook):
    """Floating-point numbers: a code is the number itself, rounded to the type.

    brain: bfloat16, which has the exponents of float32, rather than float16.
    """

    bits: int = 32
    brain: bool = False

    name: ClassVar[str] = "float"
    floats: ClassVar[bool] = True  # type: ignore[misc]

    def __post_init__(self) -> None:
        if self.bits not in FLOAT_BITS or (self.brain and self.bits == 32):
            raise PlanError(
                f"a float grid of {self.bits} bits does not exist; use f32, f16 or bf16"
            )

    @classmethod
    def read(cls, text: str) -> Self | None:
        """`f32`, `f16` or `bf16`."""
        match = re.fullmatch("f32|b?f16", text)
        return None if match is None else cls(int(text[-2:]), text[0] == "b")

    @property
    def text(self) -> str:
        """`f` and the bits, with `b` in front for bfloat16."""
        return f"{'b' * self.brain}f{self.bits}"

    @property
    def dtype(self) -> torch.dtype:
        """The type as torch knows it."""
        if self.bits == 32:
            return torch.float32
        return torch.bfloat16 if self.brain else torch.float16

    @property
    def low(self) -> int:
        """The smallest finite number."""
        return int(torch.finfo(self.dtype).min)

    @property
    def high(self) -> int:
        """The largest finite number."""
        return int(torch.finfo(self.dtype).max)

    @property
    def levels(self) -> int:
        """All patterns of the bits, as many as numbers but for those that are not finite."""
        return 1 << self.bits

    @property
    def span(self) -> float:
        """The largest finite number."""
        return float(self.high)

    def encode(self, steps: Tensor) -> Tensor:
        """The nearest number, half to even; beyond the largest finite one, that."""
        return steps.clamp(float(self.low), float(self.high)).to(self.dtype).to(steps.dtype)

    def decode(self, codes: Tensor) -> Tensor:
        """The codes."""
        return codes

    def packed_bytes(self, count: int) -> int:
        """Two or four bytes each."""
        return count * self.bits // 8

    def pack(self, codes: Tensor) -> Tensor:
        """The bytes of the numbers, little-endian; one that is not finite is refused."""
        numbers = codes.reshape(-1).to(self.dtype).contiguous()
        self._require_finite(numbers)
        return numbers.view(torch.uint8)

    def unpack(self, packed: Tensor, count: int) -> Tensor:
        """The inverse of `pack`; a number that is not finite is refused."""
        if packed.numel() != self.packed_bytes(count):
            raise ValueError(
                f"{count} numbers of {self.text} take {self.packed_bytes(count)} bytes, "
                f"found {packed.numel()}"
            )
        # a copy, as a view of wider numbers must begin at a multiple of their width
        numbers = packed.reshape(-1).clone().view(self.dtype)
        self._require_finite(numbers)
        return numbers.float()

    def _require_finite(self, numbers: Tensor) -> None:
        if not bool(torch.isfinite(numbers).all()):
            raise ValueError(f"a number of {self.text} is not finite")


CODEBOOKS: dict[str, type[Codebook]] = {
    book.name: book for book in (Signed, Unsigned, HalfStep, Ternary, Float)
}


def read_codebook(text: str) -> Codebook | None:
    """The codebook of a text, None if there is none."""
    return next((b for book in CODEBOOKS.values() if (b := book.read(text)) is not None), None)


def uniform(bits: int, kind: str = "signed") -> Uniform:
    """A uniform codebook by its family; raises PlanError for an unknown or non-uniform one."""
    book = CODEBOOKS.get(kind)
    if book is None or not issubclass(book, Uniform):
        raise PlanError(f"{kind!r} is no family of uniform grids")
    return book(bits)


def table_lookup(codes: Tensor, low: int, table: Tensor) -> Tensor:
    """The points of codes that start at `low`, from a table: for codebooks of arbitrary points."""
    return table.to(codes.device)[(codes - low).long()]


def nearest_in(steps: Tensor, low: int, table: Tensor) -> Tensor:
    """The codes of the nearest entries of a table of points in rising order."""
    middles = ((table[1:] + table[:-1]) / 2).to(steps.device)
    return torch.bucketize(steps, middles).to(steps.dtype) + low
