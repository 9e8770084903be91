"""How the axes of a matrix are read as digits of a tensor train."""

import functools
import math
from collections.abc import Sequence

from rabbet.errors import PlanError

Modes = tuple[tuple[int, ...], tuple[int, ...]]
"""Sizes of the digits: of the inputs and of the outputs of a layer, or of the rows and columns of a table."""


@functools.cache  # asked for at every run of a layer
def balanced(size: int, count: int) -> tuple[int, ...]:
    """Factors of a size, at most `count`, none of them 1, in falling order, of least sum: 768 is 12 x 8 x 8."""
    return min(
        (f for f in _factors(size, count, 2)), key=lambda f: (sum(f), len(f), f), default=(size,)
    )


def exactly(size: int, count: int) -> tuple[int, ...]:
    """Exactly `count` factors of a size, in falling order, of least sum; ones where it has too few."""
    found = balanced(size, count)
    return (*found, *[1] * (count - len(found)))


@functools.cache
def covering(size: int, count: int) -> tuple[int, ...]:
    """`count` numbers in falling order, all alike, whose product is no less than a size: 870 fits 6 x 6 x 5 x 5."""
    left, found = size, []
    for k in range(count, 0, -1):
        found.append(max(1, _root(left, k)))
        left = -(-left // found[-1])
    return tuple(sorted(found, reverse=True))


def _root(size: int, k: int) -> int:
    """The smallest number whose k-th power is no less than a size."""
    found = 1
    while found**k < size:
        found += 1
    return found


def _factors(size: int, count: int, least: int) -> list[tuple[int, ...]]:
    if size == 1:
        return []
    found: list[tuple[int, ...]] = [(size,)]
    if count > 1:
        for n in range(least, math.isqrt(size) + 1):
            if size % n == 0:
                found += [
                    tuple(sorted((n, *rest), reverse=True))
                    for rest in _factors(size // n, count - 1, n)
                ]
    return found


def check(modes: Modes, sizes: Sequence[int], names: Sequence[str], covers: bool = False) -> None:
    """Raise PlanError if modes do not multiply to the sizes of a layer; covers: the first may be larger."""
    for k, (digits, size, name) in enumerate(zip(modes, sizes, names, strict=True)):
        found = math.prod(digits)
        if found != size and not (covers and k == 0 and found > size):
            wanted = "at least " if covers and k == 0 else ""
            text = "x".join(map(str, digits))
            raise PlanError(f"the modes {text} make {found} {name}; the layer has {wanted}{size}")
