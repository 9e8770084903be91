"""Every error that rabbet raises on purpose.

    RabbetError
    ├── BudgetError   a budget that cannot be read, cannot be met, or was broken
    ├── PlanError     a plan that cannot be read, or does not fit the network
    ├── ModelError    a network that cannot be compressed as it is
    ├── DataError     batches that are empty, of the wrong shape, or not finite
    └── FileError     a file that is damaged, of another format, or of another network

Each message says what was asked, what was found and what to do.
"""

from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

NUMBERS: dict[Any, type] = {int: Integral, float: Real}
WORDS = {
    int: "a whole number",
    float: "a number",
    str: "a text",
    bool: "True or False",
    NoneType: "None",
}


class RabbetError(Exception):
    """The root of the tree: catch this to catch every mistake that rabbet reports."""


class BudgetError(RabbetError):
    """A budget that cannot be read, cannot be met, or was broken."""


class PlanError(RabbetError):
    """A plan that cannot be read, or that does not fit the network."""


class ModelError(RabbetError):
    """A network that cannot be compressed as it is."""


class DataError(RabbetError):
    """Batches that are empty, of the wrong shape, or not finite."""


class FileError(RabbetError):
    """A file that is damaged, of another format, or of another network."""


def check_fields(settings: Any) -> None:
    """Raise PlanError for a field of a dataclass that holds none of the values that its type allows."""
    for name, kind in get_type_hints(type(settings)).items():
        found = getattr(settings, name)
        if not _allowed(found, kind):
            raise PlanError(
                f"{name} is {'one of ' * (get_origin(kind) is Literal)}{_described(kind)}; found {found!r}"
            )


def _allowed(found: Any, kind: Any) -> bool:
    inner = get_args(kind)
    if get_origin(kind) is Literal:
        return found in inner
    if get_origin(kind) in (Union, UnionType):
        return any(_allowed(found, k) for k in inner)
    if get_origin(kind) is tuple:  # a list serves as well
        if not isinstance(found, tuple | list):
            return False
        kinds = inner[:1] * len(found) if inner[-1] is Ellipsis else inner
        return len(found) == len(kinds) and all(map(_allowed, found, kinds))
    if kind in NUMBERS:
        return isinstance(found, NUMBERS[kind]) and not isinstance(found, bool)
    return isinstance(found, kind)


def _described(kind: Any) -> str:
    """A type in the words of a message."""
    inner = get_args(kind)
    if get_origin(kind) is Literal:
        return ", ".join(map(repr, inner))
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(map(_described, inner))
    if get_origin(kind) is tuple:
        each = inner[:1] if inner[-1] is Ellipsis else inner
        return f"({', '.join(map(_described, each))}{', ...' * (each != inner)})"
    return WORDS.get(kind, f"a {kind.__name__}")


def check_least(settings: Any, least: int, *names: str) -> None:
    """Raise PlanError for a field of a dataclass that is less than it may be; None is no number and passes."""
    for name in names:
        found = getattr(settings, name)
        if found is not None and found < least:
            raise PlanError(f"{name} is at least {least}; found {found}")
