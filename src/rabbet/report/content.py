"""What a page of a report shows, as one value; where each part comes from, its maker knows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from rabbet.core.budget import Budget
from rabbet.core.cost import Cost, Latencies
from rabbet.core.history import History
from rabbet.core.plan import Plan
from rabbet.core.survey import Survey
from rabbet.errors import PlanError
from rabbet.report.examples import Example
from rabbet.report.text import NOTHING, Findings


class Point(Protocol):
    """One plan of a frontier.

    harm: the expected error of the outputs. accuracy: the measure and the ends of its interval,
    measured or put between measured ones; None where there is none.
    """

    @property
    def plan(self) -> Plan:
        """What becomes of every layer."""
        ...

    @property
    def cost(self) -> Cost:
        """What the network costs under the plan."""
        ...

    @property
    def harm(self) -> float:
        """The expected error of the outputs."""
        ...

    @property
    def accuracy(self) -> tuple[float, float, float] | None:
        """The value and the ends of its interval."""
        ...

    @property
    def measured(self) -> bool:
        """Whether the measure was taken of this very plan."""
        ...


class Frontier(Protocol):
    """The best plans of a network, from the loosest to the tightest by one metric."""

    @property
    def axis(self) -> str:
        """The metric, one of `METRICS`."""
        ...

    @property
    def quantity(self) -> str:
        """What the accuracy of a point is called, where it is another measure."""
        ...

    @property
    def reference(self) -> float | None:
        """What the float network measures, where it was asked."""
        ...

    @property
    def points(self) -> Sequence[Point]:
        """The plans."""
        ...

    @property
    def survey(self) -> Survey:
        """The layers of the network."""
        ...

    @property
    def float_cost(self) -> Cost:
        """What the float32 network costs."""
        ...


@dataclass(frozen=True)
class Head:
    """What stands above a page: its kind, its title, and what it comes to in a few words."""

    kind: str
    title: str
    lead: str


@dataclass(frozen=True)
class Score:
    """How good the float network and the written file are, in words; examples: 0 if not known."""

    quantity: str
    before: str
    after: str
    examples: int


@dataclass(frozen=True)
class Report:
    """A plan, and all that is known of it.

    fitted: whether weights were found for it; else it is only a choice. files: bytes of what was
    written, by name. unknown: what was looked for and could not be told, in words. Raises PlanError
    for a frontier that has no plans or is of another network.
    """

    title: str
    survey: Survey
    plan: Plan
    cost: Cost
    whole: Cost
    budget: Budget | None = None
    fitted: bool = True
    found: Findings = NOTHING
    notes: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    histories: tuple[History, ...] = ()
    latencies: Latencies | None = None
    files: Mapping[str, int] = field(default_factory=dict)
    score: Score | None = None
    frontier: Frontier | None = None
    examples: tuple[Example, ...] = ()

    def __post_init__(self) -> None:
        self._require_kinds()
        if self.frontier is not None and not self.frontier.points:
            raise PlanError("the frontier of a report has no plan; give one with plans, or none")
        if self.frontier is not None and self.frontier.survey != self.survey:
            raise PlanError("the frontier of a report is of another network; give this one's")

    def _require_kinds(self) -> None:
        sizes = self.files.items() if isinstance(self.files, Mapping) else [("", None)]
        for asked, fits, found in (
            ("title is a text", isinstance(self.title, str), self.title),
            (
                "frontier is what rabbet.frontier gives",
                self.frontier is None or hasattr(self.frontier, "points"),
                self.frontier,
            ),
            (
                "files are numbers of bytes by name, such as {'a.onnx': 9000}",
                all(isinstance(n, str) and isinstance(size, int) for n, size in sizes),
                self.files,
            ),
            (
                "score is a rabbet.report.content.Score",
                self.score is None or isinstance(self.score, Score),
                self.score,
            ),
        ):
            if not fits:
                raise PlanError(f"{asked}; found {found!r}")

    @classmethod
    def of_frontier(cls, frontier: Frontier, title: str = "Frontier") -> "Report":
        """The report of a frontier alone, which begins with its loosest plan.

        Raises PlanError for a frontier without plans.
        """
        if not frontier.points:
            raise PlanError("a frontier without a plan cannot be reported")
        first = frontier.points[0]
        costs = first.cost, frontier.float_cost
        return cls(title, frontier.survey, first.plan, *costs, fitted=False, frontier=frontier)
