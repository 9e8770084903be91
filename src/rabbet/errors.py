"""Every error that rabbet raises on purpose.

    RabbetError
    ├── BudgetError   a budget that cannot be read, cannot be met, or was broken
    ├── PlanError     a plan that cannot be read, or does not fit the network
    ├── ModelError    a network that cannot be compressed
    ├── DataError     batches that are empty, of the wrong shape, or not finite
    └── FileError     a file that is damaged, of another format, or of another network

Each message says what was asked, what was found and what to do. An error of the user's own code (a
loader, a forward, a loss) is none of these: it is passed on, with a note of where it arose.
"""

import contextlib
import difflib
import math
from collections.abc import Iterable, Iterator
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

NUMBERS: dict[Any, type] = {int: Integral, float: Real}
WORDS = {
    int: "a whole number",
    float: "a finite number",
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
    """A network that cannot be compressed in its present state."""


class DataError(RabbetError):
    """Batches that are empty, of the wrong shape, or not finite."""


class FileError(RabbetError):
    """A file that is damaged, of another format, or of another network."""


NOTE = "raised in "
"""How the notes begin that rabbet adds to errors of the user's own code."""


@contextlib.contextmanager
def theirs(place: str) -> Iterator[None]:
    """Run the user's code within this: its errors pass unchanged, with a note of the place."""
    try:
        yield
    except RabbetError:
        raise
    except Exception as e:
        if note_of(e) is None:  # the innermost place tells most
            e.add_note(NOTE + place)
        raise


def note_of(error: BaseException) -> str | None:
    """Where in the user's own code an error arose; None for one that did not pass `theirs`."""
    return next((n for n in getattr(error, "__notes__", ()) if n.startswith(NOTE)), None)


def check_fields(settings: Any) -> None:
    """Raise PlanError for a field of a dataclass whose value its type does not allow."""
    for name, kind in get_type_hints(type(settings)).items():
        value = getattr(settings, name)
        if not _allowed(value, kind):
            choice = "one of " * (get_origin(kind) is Literal)
            raise PlanError(f"{name} is {choice}{_described(kind)}; found {value!r}")


def _allowed(value: Any, kind: Any) -> bool:
    inner = get_args(kind)
    if get_origin(kind) is Literal:
        return value in inner
    if get_origin(kind) in (Union, UnionType):
        return any(_allowed(value, k) for k in inner)
    if get_origin(kind) is tuple:  # a list serves as well
        if not isinstance(value, tuple | list):
            return False
        kinds = inner[:1] * len(value) if inner[-1] is Ellipsis else inner
        return len(value) == len(kinds) and all(map(_allowed, value, kinds))
    if kind in NUMBERS:
        number = isinstance(value, NUMBERS[kind]) and not isinstance(value, bool)
        return number and math.isfinite(value)
    return isinstance(value, kind)


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
    """Raise PlanError for a field of a dataclass that is below `least`; None passes."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and value < least:
            raise PlanError(f"{name} is at least {least}; found {value}")


def require_count(name: str, value: object, least: int) -> None:
    """Raise PlanError unless a value is a whole number, and not below `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise PlanError(f"{name} is a whole number, at least {least}; found {value!r}")


def near(name: str, known: Iterable[str]) -> str:
    """What somebody who wrote an unknown name may have meant, in words; nothing if that is open."""
    close = difflib.get_close_matches(name, list(known), n=3)
    return f"; did you mean {' or '.join(close)}?" if close else ""
