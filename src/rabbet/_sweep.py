"""Settings of a method over values, and budgets: each combination fitted and measured."""

import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rabbet._api import finished
from rabbet._bench import Data, in_turn, landed, opened
from rabbet.core.budget import METRICS, Budget
from rabbet.core.cost import Cost
from rabbet.core.plan import Plan
from rabbet.data.batches import describe
from rabbet.data.measure import require_measure
from rabbet.data.task import measured
from rabbet.errors import BudgetError, DataError, PlanError
from rabbet.jobs import Jobs
from rabbet.methods import Method, method_of
from rabbet.methods.base import changed
from rabbet.report.facts import cost_facts, known
from rabbet.report.picture import draw_sweep
from rabbet.report.sweeps import write_sweep
from rabbet.report.text import Standing, Table, plain
from rabbet.workpiece import Workpiece

Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    """One combination, and what came of it.

    plan, cost, measure: None where the budget cannot be met, for which error says why; measure is
    None, too, where nothing measures.
    """

    budget: Budget
    settings: Settings
    plan: Plan | None = None
    cost: Cost | None = None
    measure: float | None = None
    error: str = ""


@dataclass(frozen=True)
class Sweep:
    """All rows, in the order in which they were asked for."""

    rows: tuple[Row, ...]
    float_cost: Cost
    float_measure: float | None

    def facts(self) -> dict[str, Any]:
        """All of it as plain values, for JSON; a measure that is infinite is null there."""
        return known(
            {
                "float": cost_facts(self.float_cost) | {"measure": self.float_measure},
                "rows": [
                    {
                        "budget": str(row.budget),
                        "settings": {name: str(value) for name, value in row.settings.items()},
                        "cost": None if row.cost is None else cost_facts(row.cost),
                        "measure": row.measure,
                        "plan": None if row.plan is None else str(row.plan),
                        "error": row.error or None,
                    }
                    for row in self.rows
                ],
            }
        )

    @property
    def table(self) -> Table:
        """A row for each combination, and the float network; measures if there are any."""
        names = list(dict.fromkeys(name for row in self.rows for name in row.settings))
        metrics = [m for m in METRICS if METRICS[m].amount(self.float_cost)]
        told = self.float_measure is not None
        heads = ("budget", *names, *metrics, *(["measure"] if told else []))
        whole = [Standing.of(m, self.float_cost, self.float_cost).row()[1] for m in metrics]
        rows = [("float", *[""] * len(names), *whole, *_shown(self.float_measure, told))]
        for row in self.rows:
            asked = (str(row.budget), *(str(row.settings.get(name, "")) for name in names))
            if row.cost is None:
                rows.append((*asked, *["-"] * (len(metrics) + told)))
                continue
            found = [Standing.of(m, row.cost, self.float_cost).row()[1] for m in metrics]
            rows.append((*asked, *found, *_shown(row.measure, told)))
        return Table(heads, rows, 1 + len(names))

    @property
    def errors(self) -> list[str]:
        """Why rows are empty, each once."""
        return list(dict.fromkeys(row.error for row in self.rows if row.error))

    def plot(self, path: str | Path, metric: str = "bytes") -> None:
        """Draw the measure over a metric, a line for each choice of settings.

        The ending of the path is the format. Raises ImportError without matplotlib, BudgetError for
        an unknown metric, DataError where nothing was measured that can be drawn, FileError for a
        path that cannot be written.
        """
        if metric not in METRICS:
            raise BudgetError(f"unknown metric {metric!r}; there are {', '.join(METRICS)}")
        lines: dict[str, list[tuple[float, float]]] = {}
        for row in self.rows:
            if row.cost is not None and row.measure is not None and math.isfinite(row.measure):
                label = ", ".join(f"{name}={value}" for name, value in row.settings.items())
                amount = Standing.of(metric, row.cost, self.float_cost)
                share = 100 * amount.amount / max(amount.whole, 1)
                lines.setdefault(label, []).append((share, row.measure))
        if not lines:
            raise DataError("there is nothing to draw: no row has a measure that is finite")
        draw_sweep(lines, f"% of the float32 network's {metric}", self.float_measure, path)

    def report(self, path: str | Path, title: str = "Sweep") -> int:
        """Write it as one HTML file for a browser: its rows, and measures over what was changed.

        Returns its bytes. Raises FileError without `rabbet[report]`, or for a place that cannot be
        written.
        """
        return write_sweep(self, path, title)

    def __str__(self) -> str:
        return plain([self.table, *self.errors])


def _shown(value: float | None, told: bool) -> tuple[str, ...]:
    return ("" if value is None else f"{value:.6g}",) if told else ()


@in_turn
def sweep(  # noqa: PLR0913 (those behind the star are options, given by name)
    model: nn.Module,
    budgets: str | Budget | Sequence[str | Budget],
    data: Data,
    settings: Mapping[str, Sequence[Any]] | None = None,
    method: Method | None = None,
    *,
    quality: str = "default",
    measure: Callable[[nn.Module], float] | None = None,
    seed: int = 0,
    jobs: Jobs | None = None,
) -> Sweep:
    """Compress once for each budget and each combination of settings, and measure each.

    settings: of the method, by name (`"bits"`, `"tuning.steps"`), each with the values to try.
    measure: of a network, larger is better; default: the task's `evaluate`, if it has one. The rest
    is as for `compress`. Rows share what is solved, and a jobs with a folder keeps finished rows. A
    budget that cannot be met is a row that says so.

    Raises PlanError for a setting that the method does not have, and otherwise as `compress` does.
    """
    asked = _budgets(budgets)
    worker = method_of(method, quality)
    if measure is not None:
        require_measure(measure)
    tried = list(combinations(worker, settings or {}))
    metrics = [limit.metric for budget in asked for limit in budget.limits]
    piece = opened(model, metrics, data, seed, jobs)
    run = piece.task.evaluate if measure is None else measure
    if run is not None:
        require_measure(run)
    rows = list[Row]()
    for budget, (chosen, own) in itertools.product(asked, tried):
        piece.jobs.progress("sweeping", len(rows), len(asked) * len(tried))
        rows.append(_row(piece, budget, chosen, own, run))
    piece.jobs.progress("sweeping", len(rows), len(rows))
    return Sweep(tuple(rows), piece.float_cost, None if run is None else measured(piece.model, run))


def _budgets(budgets: object) -> list[Budget]:
    """Each budget that a sweep was asked for."""
    several = [budgets] if isinstance(budgets, str | Budget) else budgets
    if not isinstance(several, Iterable) or isinstance(several, Mapping):
        raise BudgetError(
            "a sweep takes a budget such as 'bytes <= 10%', or several in a list; found "
            f"{describe(budgets)}"
        )
    asked = [Budget.parse(text) for text in several]
    if not asked:
        raise BudgetError("a sweep needs a budget; name one or several")
    return asked


def _row(
    piece: Workpiece,
    budget: Budget,
    method: Method,
    own: Settings,
    run: Callable[[nn.Module], float] | None,
) -> Row:
    settings = {"method": method, "budget": str(budget)}
    key = piece.key("row of a sweep", {}, settings, judge=run)
    kept = piece.jobs.kept(key)
    if kept is None:
        kept = _found(piece, budget, method, run)
        piece.jobs.keep(key, kept)
    if "error" in kept:
        return Row(budget, own, error=_text(kept["error"]))
    plan, cost = Plan.parse(_text(kept["plan"])), Cost(**json.loads(_text(kept["cost"])))
    found = float(kept["measure"]) if "measure" in kept else None
    return Row(budget, own, plan, cost, found)


def _found(
    piece: Workpiece,
    budget: Budget,
    method: Method,
    run: Callable[[nn.Module], float] | None,
) -> dict[str, Tensor]:
    """A row as it is kept; its bytes of exported files as they were predicted for it.

    What is predicted follows the file that was written last, which is another one when a sweep goes
    on from what was kept.
    """
    try:
        plan = landed(piece, lambda: method.plan(piece, budget), budget)
        result = finished(piece, method, plan, budget)
    except BudgetError as e:
        return {"error": _bytes(str(e))}
    found = {"plan": _bytes(str(result.plan)), "cost": _bytes(json.dumps(asdict(result.cost)))}
    if run is not None:
        found["measure"] = torch.tensor(measured(result.model, run), dtype=torch.float64)
    return found


def _bytes(text: str) -> Tensor:
    return torch.tensor(list(text.encode("utf-8", "surrogatepass")), dtype=torch.uint8)


def _text(kept: Tensor) -> str:
    return bytes(kept.tolist()).decode("utf-8", "surrogatepass")


def combinations(
    method: Method, settings: Mapping[str, Sequence[Any]]
) -> Iterator[tuple[Method, Settings]]:
    """The method with every combination of the values of its settings, and what they are.

    Raises PlanError for a setting that it does not have or that has no values to try, and for a
    value that it does not take.
    """
    if not isinstance(settings, Mapping):
        raise PlanError(
            "settings are values to try by the name of the setting, such as {'act': [8, None]}; "
            f"found {settings!r}"
        )
    tried = dict[str, list[Any]]()
    for name, values in settings.items():
        several = isinstance(values, Iterable) and not isinstance(values, str | Mapping)
        tried[name] = list(values) if several else []
        if not isinstance(name, str) or not tried[name]:
            raise PlanError(
                "each setting has a name and a list of values to try, such as 'act': [8, None]; "
                f"found {name!r}: {values!r}"
            )
    for chosen in itertools.product(*tried.values()):
        own = dict(zip(tried, chosen, strict=True))
        worker: Any = method
        for name, value in own.items():
            worker = changed(worker, name, value)
        yield worker, own


__all__ = ["Row", "Sweep", "combinations", "sweep"]
