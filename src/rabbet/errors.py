"""Every error that rabbet raises on purpose.

    RabbetError
    ├── BudgetError   a budget that cannot be read, cannot be met, or was broken
    ├── PlanError     a plan that cannot be read, or does not fit the network
    ├── ModelError    a network that cannot be compressed as it is
    ├── DataError     batches that are empty, of the wrong shape, or not finite
    └── FileError     a file that is damaged, of another format, or of another network

Each message says what was asked, what was found and what to do.
"""

from typing import Any, Literal, get_args, get_origin, get_type_hints


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


def check_choices(settings: Any) -> None:
    """Raise PlanError for a field of a dataclass that holds none of the values that its `Literal` type lists."""
    for name, kind in get_type_hints(type(settings)).items():
        if get_origin(kind) is Literal and getattr(settings, name) not in get_args(kind):
            known = ", ".join(map(repr, get_args(kind)))
            raise PlanError(f"{name} is one of {known}; found {getattr(settings, name)!r}")


def check_least(settings: Any, least: int, *names: str) -> None:
    """Raise PlanError for a field of a dataclass that is less than it may be; None is no number and passes."""
    for name in names:
        found = getattr(settings, name)
        if found is not None and found < least:
            raise PlanError(f"{name} is at least {least}; found {found}")
