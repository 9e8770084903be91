"""What is said of a budget along an axis, and of the least that keeps a measure."""

from dataclasses import dataclass

from rabbet._api import Result
from rabbet.core.budget import Limit
from rabbet.core.cost import Cost
from rabbet.core.plan import Plan


@dataclass(frozen=True)
class Point:
    """A budget, and what it buys.

    limit: on the axis. harm: the expected error of the outputs, relative and squared, as the
    program adds it up from what each layer was measured to do alone. accuracy: the user's measure,
    and the ends of its interval; None before any was measured. measured: whether it was measured at
    this point, and not between others.
    """

    limit: Limit
    plan: Plan
    cost: Cost
    harm: float
    accuracy: tuple[float, float, float] | None = None
    measured: bool = False


@dataclass(frozen=True)
class Within:
    """The smallest of the plans that were fitted whose measured drop is within what was asked.

    drop: by how much it is worse than the float network. tried: every limit that was fitted, in
    that order, with its drop. deviation: the standard deviation of the drop with so many examples,
    None where their number is not known. rises: whether the measure is one that rises then.
    """

    result: Result
    point: Point
    drop: float
    deviation: float | None
    tried: tuple[tuple[Limit, float], ...]
    rises: bool = False

    def __str__(self) -> str:
        sure = (
            "of how many examples is not known"
            if self.deviation is None
            else f"give or take {self.deviation:.3g} (one standard deviation)"
        )
        tries = ", ".join(f"{limit.text} ({drop:+.3g})" for limit, drop in self.tried)
        change = "rise" if self.rises else "drop"
        return f"{self.point.limit.text}: a {change} of {self.drop:.3g}, {sure}; fitted: {tries}"
