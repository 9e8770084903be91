"""How the axes of a matrix are read as digits of a tensor train, and forms that do so."""

import functools
import math
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

from rabbet.errors import PlanError
from rabbet.forms.base import Ranked

Modes = tuple[tuple[int, ...], tuple[int, ...]]
"""Sizes of the digits: of a layer's inputs and outputs, or of a table's rows and columns."""

_MODES = re.compile(r"([0-9]+):([0-9]+(?:x[0-9]+)*):([0-9]+(?:x[0-9]+)*)")
MOST_DIGITS = 16  # of an axis: torch knows no tensors of many axes
LARGEST = 2**31  # an axis of so many entries has no usual digits: to find them would take long


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
    parts = text.split("x")
    if len(parts) > MOST_DIGITS or max(map(len, parts)) > len(str(LARGEST)):
        raise PlanError(f"an axis has at most {MOST_DIGITS} modes, each below {LARGEST:,}")
    digits = tuple(map(int, parts))
    if not all(digits):
        raise PlanError(f"{text!r}: a mode is at least 1")
    return digits


@functools.cache  # called at every run of a layer
def balanced(size: int, count: int) -> tuple[int, ...]:
    """At most `count` factors of a size, none of them 1, in falling order: 768 is 12 x 8 x 8.

    They are those of least sum. Raises PlanError for a size that has no usual digits.
    """
    if size >= LARGEST:
        raise PlanError(
            f"an axis of {size:,} has no usual modes; say which, such as tt[20:24x32:32x24]"
        )
    return _balanced(size, count, _divisors(size))


def _balanced(size: int, count: int, divisors: tuple[int, ...]) -> tuple[int, ...]:
    """See `balanced`; divisors: in rising order, those of the size among them."""
    if count == 2:  # of two factors those nearest to one another
        near = bisect_right(divisors, math.isqrt(size))
        small = next(n for n in reversed(divisors[:near]) if size % n == 0)
        return min((size,), (size // small, small), key=_badness) if small > 1 else (size,)
    best: tuple[int, ...] = _balanced(size, count - 1, divisors) if count > 2 else (size,)
    near = bisect_right(divisors, size, key=lambda n: n**count) if count > 2 else 0
    for n in reversed(divisors[:near]):  # as the smallest factor, the largest first
        # No smaller factor than one whose equals would already add up to more.
        if n == 1 or n + (count - 1) * (size / n) ** (1 / (count - 1)) > sum(best) + 0.5:
            break
        if size % n == 0:
            rest = _balanced(size // n, count - 1, divisors)
            best = min(best, tuple(sorted((*rest, n), reverse=True)), key=_badness)
    return best


def _badness(factors: tuple[int, ...]) -> tuple[int, int, tuple[int, ...]]:
    return sum(factors), len(factors), factors


def _divisors(size: int) -> tuple[int, ...]:
    """All divisors of a size, in rising order."""
    divisors, left = [1], size
    for prime in _primes(math.isqrt(LARGEST)):
        if prime * prime > left:
            break
        power = 1
        known = tuple(divisors)
        while left % prime == 0:
            left, power = left // prime, power * prime
            divisors += [n * power for n in known]
    if left > 1:
        divisors += [n * left for n in divisors]
    return tuple(sorted(divisors))


@functools.cache
def _primes(most: int) -> tuple[int, ...]:
    """The primes up to a number."""
    sieve = bytearray([1]) * (most + 1)
    sieve[:2] = b"\0\0"
    for n in range(2, math.isqrt(most) + 1):
        if sieve[n]:
            sieve[n * n :: n] = bytes(len(range(n * n, most + 1, n)))
    return tuple(n for n in range(most + 1) if sieve[n])


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
