"""What an export is, and what it is given."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from rabbet.core.layout import Rest
from rabbet.core.plan import Plan
from rabbet.core.survey import Survey
from rabbet.data.task import Task
from rabbet.errors import BudgetError


@dataclass(frozen=True)
class Parcel:
    """A compressed network with everything that a file says about it.

    most: by target, the bytes that a file may have, where a budget says so.
    """

    model: nn.Module
    plan: Plan
    survey: Survey
    rest: tuple[Rest, ...]
    task: Task
    most: Mapping[str, int] = field(default_factory=dict)

    def require(self, target: str, size: int) -> None:
        """Raise BudgetError if a file for a target takes more than its budget allows."""
        if size > self.most.get(target, size):
            raise BudgetError(
                f"the file for {target} takes {size:,} bytes, {self.most[target]:,} are allowed; "
                "nothing was written: compress it again under a smaller budget"
            )


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
