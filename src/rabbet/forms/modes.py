"""How the axes of a matrix are read as digits of a tensor train, and forms that do so."""

import functools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

from rabbet.errors import PlanError
from rabbet.forms.base import Ranked

Modes = tuple[tuple[int, ...], tuple[int, ...]]
"""Sizes of the digits: of a layer's inputs and outputs, or of a table's rows and columns."""

_MODES = re.compile(r"(\d+):(\d+(?:x\d+)*):(\d+(?:x\d+)*)")


@dataclass(frozen=True)
class Chain(Ranked):
    """A form whose factors are small cores, contracted before they meet the input.

    modes: how the axes of the weight are read as digits; None: chosen from the shape.
    """

    modes: Modes | None = None

    contracted: ClassVar[bool] = True

    @classmethod
    def read(cls, inside: str | None) -> Self:
        """A rank, optionally followed by modes: `20` or `20:24x32:32x24`."""
        match = _MODES.fullmatch(inside or "")
        if match is None and ":" in (inside or ""):
            raise PlanError(
                f"{cls.name} takes a rank, and modes of both axes if any, such as 20:24x32:32x24"
            )
        if match is None:
            return cls(cls.read_rank(inside))
        return cls(cls.read_rank(match[1]), (_digits(match[2]), _digits(match[3])))

    @property
    def inside(self) -> str:
        """The rank, and modes that are not the usual ones."""
        parts = ["x".join(map(str, part)) for part in self.modes or ()]
        return ":".join([str(self.rank), *parts])


def _digits(text: str) -> tuple[int, ...]:
    digits = tuple(map(int, text.split("x")))
    if not all(digits):
        raise PlanError(f"{text!r}: a mode is at least 1")
    return digits


@functools.cache  # called at every run of a layer
def balanced(size: int, count: int) -> tuple[int, ...]:
    """At most `count` factors of a size, none of them 1, in falling order: 768 is 12 x 8 x 8.

    They are those of least sum.
    """
    return min(
        (f for f in _factors(size, count, 2)), key=lambda f: (sum(f), len(f), f), default=(size,)
    )


def exactly(size: int, count: int) -> tuple[int, ...]:
    """Exactly `count` factors of a size, in falling order, filled up with ones."""
    factors = balanced(size, count)
    return (*factors, *[1] * (count - len(factors)))


@functools.cache
def covering(size: int, count: int) -> tuple[int, ...]:
    """`count` nearly equal numbers in falling order whose product is no less than a size.

    870 rows fit into 6 x 6 x 5 x 5.
    """
    left, digits = size, []
    for k in range(count, 0, -1):
        digits.append(max(1, _root(left, k)))
        left = -(-left // digits[-1])
    return tuple(sorted(digits, reverse=True))


def _root(size: int, k: int) -> int:
    """The smallest number whose k-th power is no less than a size."""
    root = 1
    while root**k < size:
        root += 1
    return root


def _factors(size: int, count: int, least: int) -> list[tuple[int, ...]]:
    if size == 1:
        return []
    results: list[tuple[int, ...]] = [(size,)]
    if count > 1:
        for n in range(least, math.isqrt(size) + 1):
            if size % n == 0:
                rest = _factors(size // n, count - 1, n)
                results += [tuple(sorted((n, *r), reverse=True)) for r in rest]
    return results


def check(modes: Modes, sizes: Sequence[int], names: Sequence[str], covers: bool = False) -> None:
    """Raise PlanError if modes do not multiply to the sizes of a layer.

    covers: the product of the first may be larger than its size.
    """
    for k, (digits, size, name) in enumerate(zip(modes, sizes, names, strict=True)):
        product = math.prod(digits)
        if product != size and not (covers and k == 0 and product > size):
            wanted = "at least " if covers and k == 0 else ""
            text = "x".join(map(str, digits))
            raise PlanError(f"the modes {text} make {product} {name}; the layer has {wanted}{size}")
