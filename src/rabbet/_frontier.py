"""What every budget buys, found at once; and the least that keeps what the user measures."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from rabbet._api import Result, finished
from rabbet._bench import Data, in_turn, landed, opened
from rabbet._points import Point, Within
from rabbet.choose.axis import budgets_along, ends_of, joined, limit_of, tighter_only
from rabbet.choose.measured import interpolated, next_try
from rabbet.choose.search import Chooser
from rabbet.core.budget import MEASURED, METRICS, Budget
from rabbet.core.cost import Cost
from rabbet.core.plan import Plan
from rabbet.core.survey import Survey
from rabbet.data.accuracy import deviation
from rabbet.data.measure import (
    quantity_of,
    require_measure,
    require_share,
    smaller_is_better,
    worsening,
)
from rabbet.data.task import measured
from rabbet.errors import BudgetError, DataError, PlanError, require_count
from rabbet.jobs import Jobs
from rabbet.methods import Method, method_of
from rabbet.methods.base import Searching
from rabbet.report.content import Report
from rabbet.report.facts import cost_facts, known
from rabbet.report.notebook import frontier_summary
from rabbet.report.page import write_page
from rabbet.report.points import reference_words
from rabbet.report.text import Part, Standing, Table, plain
from rabbet.workpiece import Workpiece

SHOWN = 16  # points that a printed frontier has

Measure = Callable[[nn.Module], float]
"""How good a network is; larger is better unless it says otherwise (`rabbet.data.measure`)."""


@dataclass(frozen=True)
class Frontier:
    """Plans along an axis, from the loosest budget to the tightest.

    axis: the metric that changes. beside: limits that hold at every point. quantity: what the
    measure of the points is called. reference: what the float network measures, once it was asked.
    """

    axis: str
    points: tuple[Point, ...]
    beside: Budget | None
    method: Method
    piece: Workpiece = field(repr=False)
    searched: Chooser = field(repr=False)
    quantity: str = "measure"
    reference: float | None = None

    @property
    def survey(self) -> Survey:
        """The layers."""
        return self.piece.survey

    @cached_property
    def float_cost(self) -> Cost:
        """What the float32 network costs."""
        return self.piece.float_cost

    @in_turn
    def at(self, budget: str | Budget) -> Plan:
        """The plan for any budget, with the limits beside it unless it names them itself.

        Raises BudgetError for one that cannot be met.
        """
        limits = joined(Budget.parse(budget), self.beside)
        _require_known(self.piece, limits)

        def chosen() -> Plan:
            self.searched.allocator.require_feasible(limits)
            return self.searched.plans([limits])[0]

        return landed(self.piece, chosen, limits)

    @in_turn
    def fit(self, budget: str | Budget | Point) -> Result:
        """The network at a point, or for any budget: its layers solved in order, and tuned."""
        if isinstance(budget, Point):
            limits = joined(Budget((budget.limit,)), self.beside)
            if not limits.files:  # whose bytes at a point are foretold, and may be a few more
                return finished(self.piece, self.method, budget.plan, limits)
        else:
            limits = joined(Budget.parse(budget), self.beside)
        return finished(self.piece, self.method, self.at(limits), limits)

    @in_turn
    def measure(
        self, count: int = 9, measure: Measure | None = None, examples: int | None = None
    ) -> "Frontier":
        """The frontier with a measure of every point: `count` are fitted, the others lie between.

        The float network is measured, too, and is the `reference` of what is returned.

        measure: of a network (`Measure`); default: the task's `evaluate`. It must not be of the
        data that the network is judged on at the end. examples: how many stand behind it, if
        it is a share in per cent. Between two measured points the measure is interpolated along the
        logarithm of the harm. Its interval reaches over both neighbours, and further by as much as
        measured points lay outside of theirs, or as chance makes of so many examples (90 %).
        Raises DataError without a measure, or for examples beside one that is no share of them,
        PlanError for fewer than two points.
        """
        run, total = self._measure(measure, examples), len(self.points)
        require_count("count", count, 2)
        places = sorted({round(k) for k in np.linspace(0, total - 1, min(count, total))})
        whole = self._measured(None, run)
        require_share(run, examples, whole)
        found: dict[int, float] = {}
        for place in places:
            self.piece.jobs.progress("measuring points", len(found), len(places))
            found[place] = self._measured(self.points[place], run)
            require_share(run, examples, found[place])
        self.piece.jobs.progress("measuring points", len(found), len(places))
        told = interpolated([p.harm for p in self.points], found, examples)
        points = tuple(
            replace(point, accuracy=accuracy, measured=k in found)
            for k, (point, accuracy) in enumerate(zip(self.points, told, strict=True))
        )
        quantity = quantity_of(run, self.quantity)
        return replace(self, points=points, quantity=quantity, reference=whole)

    @in_turn
    def within(
        self,
        drop: float,
        measure: Measure | None = None,
        examples: int | None = None,
        fits: int = 4,
    ) -> Within:
        """The smallest plan that is measured to be worse than the float network by at most `drop`.

        That is a drop of the measure, or a rise where smaller is better. Arguments: see `measure`;
        at most `fits` plans are fitted. Raises BudgetError if none of these is within, DataError
        and PlanError as `measure` does.
        """
        run = self._measure(measure, examples)
        if not isinstance(drop, int | float) or not drop >= 0:
            raise PlanError(f"a drop is a number, at least 0; found {drop!r}")
        require_count("fits", fits, 1)
        whole = self._measured(None, run)
        require_share(run, examples, whole)
        rises = smaller_is_better(run)
        harms = [point.harm for point in self.points]
        amounts = [METRICS[self.axis].amount(point.cost) for point in self.points]
        tried: dict[int, float] = {}
        best: tuple[int, Result] | None = None
        while len(tried) < fits:
            last = len(tried) == fits - 1
            place = next_try(harms, amounts, tried, drop, last)
            if place is None:
                break
            self.piece.jobs.progress(f"fitting {self.points[place].limit.text}", len(tried), fits)
            result = self.fit(self.points[place])
            tried[place] = worsening(run, whole, _finite(result.model, run, examples))
            if tried[place] <= drop and (best is None or place > best[0]):
                best = place, result
        said = tuple((self.points[k].limit, lost) for k, lost in tried.items())
        if best is None:
            least = min(said, key=lambda pair: pair[1])
            raise BudgetError(
                f"no plan that was fitted {'rises' if rises else 'drops'} by at most {drop:g}: the "
                f"least was {least[1]:.3g} at {least[0].text}; allow more, or tune longer"
            )
        place, result = best
        shares = (whole, whole + (tried[place] if rises else -tried[place]))
        error = None if examples is None else deviation(examples, *shares)
        return Within(result, self.points[place], tried[place], error, said, rises)

    def _measured(self, point: Point | None, run: Measure) -> float:
        """The measure at a point, or of the float network; nothing is fitted or measured again."""
        settings = {"method": self.method, "plan": str(point.plan)} if point else {}
        key = self.piece.key("measured point", {}, settings, judge=run)
        kept = self.piece.jobs.kept(key)
        if kept is None:
            value = _finite(self.fit(point).model if point else self.piece.model, run)
            kept = {"value": torch.tensor(value, dtype=torch.float64)}
            self.piece.jobs.keep(key, kept)
        return float(kept["value"])

    def _measure(self, measure: Measure | None, examples: int | None) -> Measure:
        found = self.piece.task.evaluate if measure is None else measure
        if found is None:
            raise DataError(
                "nothing says how good a network is: give a function of a network, or a "
                "Task(evaluate=...)"
            )
        require_measure(found)
        if examples is not None:
            require_count("examples", examples, 1)
        require_share(found, examples)
        return found

    def facts(self) -> dict[str, Any]:
        """All of it as plain values, for JSON; what is infinite is null there."""
        return known(
            {
                "axis": self.axis,
                "quantity": self.quantity,
                "beside": None if self.beside is None else str(self.beside),
                "float": cost_facts(self.float_cost) | {"measure": self.reference},
                "points": [
                    {
                        "limit": point.limit.text,
                        "cost": cost_facts(point.cost),
                        "harm": point.harm,
                        "accuracy": point.accuracy,
                        "measured": point.measured,
                        "plan": str(point.plan),
                    }
                    for point in self.points
                ],
            }
        )

    @property
    def table(self) -> Table:
        """Some of the points, evenly spread, and all that were measured."""
        metrics = [m for m in METRICS if METRICS[m].amount(self.float_cost)]
        told = any(point.accuracy for point in self.points)
        of_measure = (self.quantity, "from", "to") if told else ()
        heads = ("budget", *metrics, "expected error", *of_measure)
        last = len(self.points) - 1
        spread = {round(k) for k in np.linspace(0, last, min(SHOWN, last + 1))}
        shown = [p for k, p in enumerate(self.points) if k in spread or p.measured]
        return Table(heads, [(*self._row(p, metrics), *_shown(p, told)) for p in shown])

    def _row(self, point: Point, metrics: Sequence[str]) -> Iterator[str]:
        yield point.limit.text
        for metric in metrics:
            yield Standing.of(metric, point.cost, self.float_cost).row()[1]
        yield f"{point.harm:.2e}"

    @property
    def parts(self) -> list[Part]:
        """The report for people."""
        beside = "" if self.beside is None else f", beside {self.beside}"
        last = f"{len(self.points)} points along {self.axis}{beside}{reference_words(self)}"
        between = any(point.accuracy and not point.measured for point in self.points)
        notes = ["?: not measured, but told by the measured points on both sides"] * between
        return [self.table, last, *notes, self.survey.counted("MACs and BOPs")]

    def report(self, path: str | Path) -> int:
        """Write it as one HTML file for a browser, a slider over its plans; returns its bytes.

        Raises FileError without `rabbet[report]`, or for a place that cannot be written.
        """
        return write_page(Report.of_frontier(self), path)

    def _repr_html_(self) -> str:
        return frontier_summary(self)

    def __str__(self) -> str:
        return plain(self.parts)


def _finite(model: nn.Module, run: Measure, examples: int | None = None) -> float:
    """What is measured of a network; raises DataError for what nothing lies between.

    So it does for what is no share of examples, where these are given.
    """
    value = measured(model, run)
    if not math.isfinite(value):
        raise DataError(f"the measure gave {value}; drops and what lies between need finite ones")
    require_share(run, examples, value)
    return value


def _shown(point: Point, told: bool) -> tuple[str, ...]:
    if not told or point.accuracy is None:
        return ()
    value, *ends = point.accuracy
    return (f"{value:#.4g}{'' if point.measured else ' ?'}", *(f"{end:#.4g}" for end in ends))


@in_turn
def frontier(  # noqa: PLR0913 (those behind the star are options, given by name)
    model: nn.Module,
    data: Data,
    axis: str = "bytes",
    *,
    beside: str | Budget | None = None,
    limits: tuple[str, str] | None = None,
    points: int = 200,
    method: Method | None = None,
    quality: str = "default",
    seed: int = 0,
    jobs: Jobs | None = None,
) -> Frontier:
    """What every budget along an axis buys: plans, their costs and the error to expect of each.

    axis: a metric of budgets, such as "bytes", "macs" or "latency". beside: limits that hold at
    every point. limits: both ends of the axis, as they stand in a budget (`("5%", "30%")`);
    default: from what the smallest plan needs to what the most accurate one takes. points: at most,
    evenly spaced on a logarithmic axis; budgets that buy the same plan are one point. The rest is
    as for `compress`. Candidates are solved and measured once for all points.

    Raises BudgetError if the tightest point cannot be met, PlanError for a method that does not
    choose by the program, and otherwise as `compress` does.
    """
    if not isinstance(axis, str) or axis not in METRICS:
        raise BudgetError(f"unknown axis {axis!r}; there are {', '.join(METRICS)}")
    require_count("points", points, 2)
    ends = None if limits is None else ends_of(axis, limits)
    worker = method_of(method, quality)
    if not isinstance(worker, Searching):
        raise PlanError(
            f"a frontier needs a method that chooses by the program, which {type(worker).__name__} "
            "does not: take Joint, or rabbet.sweep over budgets"
        )
    more = None if beside is None else Budget.parse(beside)
    metrics = [axis, *(limit.metric for limit in (more.limits if more else ()))]
    if metrics.count(axis) > 1:
        raise BudgetError(f"{axis} is the axis, and cannot be limited beside it as well")
    piece = opened(model, metrics, data, seed, jobs)
    searched = worker.chooser(piece)
    budgets = budgets_along(searched.allocator, axis, more, ends, points)
    searched.allocator.require_feasible(budgets[-1])
    plans = tighter_only(piece, budgets, searched.plans(budgets))
    found = [
        Point(budget.limits[0], plan, piece.cost(plan), searched.harm(plan))
        for budget, plan in zip(budgets, plans, strict=True)
    ]
    if ends is None:  # options that nobody takes may cost more than all that is taken
        most = max(METRICS[axis].amount(found[0].cost), 1)
        found[0] = replace(found[0], limit=limit_of(axis, most, piece.float_cost))
    # Of those that buy the same plan the tightest.
    kept = [
        point
        for point, after in zip(found, [*found[1:], None], strict=True)
        if after is None or after.plan != point.plan
    ]
    return Frontier(axis, tuple(kept), more, worker, piece, searched)


def _require_known(piece: Workpiece, budget: Budget) -> None:
    """Raise BudgetError for what was neither timed nor predicted for this frontier."""
    known = {*piece.gauges, *(["latency"] if piece.clock is not None else [])}
    missing = next((m for m in budget.metrics if m in MEASURED and m not in known), None)
    if missing is not None:
        raise BudgetError(
            f"{str(budget)!r} needs {missing}, which was not measured for this frontier: take it "
            "as its axis, or limit it beside"
        )
