"""What an export is, and what it is given."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from rabbet.core.layout import Rest
from rabbet.core.plan import Plan
from rabbet.core.survey import Survey
from rabbet.data.task import Task


@dataclass(frozen=True)
class Parcel:
    """A compressed network with everything that a file says about it."""

    model: nn.Module
    plan: Plan
    survey: Survey
    rest: tuple[Rest, ...]
    task: Task


@dataclass(frozen=True)
class Written:
    """What an export did.

    bytes: of the file. notes: what the user should know, such as layers that run in float. error:
    how far its answers in the runtime lie from the compressed network's, the norm of the difference
    over theirs; None where it was not run.
    """

    bytes: int
    notes: tuple[str, ...] = ()
    error: float | None = None


Export = Callable[[Parcel, Path], Written]
