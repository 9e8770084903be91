"""A sweep as a page: a row for each combination, and the measures over what was changed."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

from rabbet.core.budget import Budget
from rabbet.core.cost import Cost
from rabbet.core.plan import Plan
from rabbet.report.content import Head
from rabbet.report.markup import Element, cell, element, table
from rabbet.report.page import assembled, page_path, write
from rabbet.report.points import NAMES
from rabbet.report.sections import chart, how, section
from rabbet.report.text import Standing, Table


class Row(Protocol):
    """One combination of a budget and settings, and what came of it; see `rabbet.Sweep`."""

    @property
    def budget(self) -> Budget:
        """What was asked for."""
        ...

    @property
    def settings(self) -> Mapping[str, Any]:
        """Of the method, by name."""
        ...

    @property
    def plan(self) -> Plan | None:
        """What became of every layer; None where the budget cannot be met."""
        ...

    @property
    def cost(self) -> Cost | None:
        """What the network costs then."""
        ...

    @property
    def measure(self) -> float | None:
        """How good it is then; None where nothing measures."""
        ...


class Sweep(Protocol):
    """Combinations in the order in which they were asked for."""

    @property
    def rows(self) -> Sequence[Row]:
        """All of them."""
        ...

    @property
    def float_cost(self) -> Cost:
        """What the float32 network costs."""
        ...

    @property
    def float_measure(self) -> float | None:
        """How good the float32 network is."""
        ...

    @property
    def table(self) -> Table:
        """A row for each, and the float network."""
        ...

    @property
    def errors(self) -> list[str]:
        """Why rows are empty."""
        ...


def write_sweep(sweep: Sweep, path: str | Path, title: str = "Sweep") -> int:
    """Write the page of a sweep, whole or not at all; returns its bytes.

    Raises FileError without vl-convert-python, and for a place that cannot be written.
    """
    page_path(path)  # before what takes long
    found = [row for row in sweep.rows if row.cost is not None]
    lead = f"{len(sweep.rows):,} combinations, {len(found):,} of them found"
    parts = [_measures(sweep), _rows(sweep), _plans(found), _refused(sweep)]
    shown = [part for part in parts if part is not None]
    facts: dict[str, Any] = {"histories": [], "frontier": None, "sweep": sweep_facts(sweep)}
    return write(assembled(Head("Sweep", title, lead), shown, facts), path)


def sweep_facts(sweep: Sweep) -> dict[str, Any]:
    """What the chart of measures is drawn from.

    Along the axis lies the metric of the budgets, as a share of float32, if there are several
    budgets, or nothing but a budget was changed; else the first setting that was. A line joins rows
    that agree in everything else. places: the values along the axis where they are no numbers.
    """
    budgets = list(dict.fromkeys(str(row.budget) for row in sweep.rows))
    changed = [name for name, values in _values(sweep).items() if len(values) > 1]
    name = changed[0] if changed and len(budgets) == 1 else None
    metric = sweep.rows[0].budget.metrics[0] if sweep.rows else "bytes"
    values = _values(sweep)[name] if name else []
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    rows, whole = [], sweep.float_measure
    for row in sweep.rows:
        if row.cost is None or row.measure is None or not math.isfinite(row.measure):
            continue
        standing = Standing.of(metric, row.cost, sweep.float_cost)
        at = row.settings[name] if name else standing.amount / max(standing.whole, 1)
        others = [f"{k}={row.settings[k]}" for k in changed if k != name and k in row.settings]
        cost = f"{standing.show(standing.amount)} {NAMES[metric]}"
        place = at if numbers else str(at)
        line = ", ".join(others)
        rows.append({"x": place, "y": row.measure, "line": line, "at": cost})
    return {
        "axis": name or f"{NAMES[metric]}, of float32",
        "share": name is None,
        "places": None if numbers else [str(v) for v in values],
        "lines": len({row["line"] for row in rows}),
        "rows": rows,
        "whole": whole if whole is not None and math.isfinite(whole) else None,
    }


def _values(sweep: Sweep) -> dict[str, list[Any]]:
    """The values of each setting, in their order, each once."""
    values: dict[str, list[Any]] = {}
    for row in sweep.rows:
        for name, value in row.settings.items():
            known = values.setdefault(name, [])
            if value not in known:
                known.append(value)
    return values


def _measures(sweep: Sweep) -> Element | None:
    facts = sweep_facts(sweep)
    if not facts["rows"]:
        return None
    words = f"Measure of every combination over {facts['axis']}"
    line = "The dashed line is the float network." if facts["whole"] is not None else ""
    told = "Every dot was fitted and measured.", line
    return section("measures", "Measures", chart("sweep", words), how(*told))


def _rows(sweep: Sweep) -> Element:
    shown = sweep.table
    heads = [
        (head, "") if k < shown.left else (NAMES.get(head, head), "n")
        for k, head in enumerate(shown.heads)
    ]
    body = []
    for first, *rest in shown.rows:
        cells = [cell(text, head, kind) for text, (head, kind) in zip(rest, heads[1:], strict=True)]
        body.append(element("tr", element("th", first, scope="row"), *cells))
    said = (
        "Costs are counted; latencies and bytes of exported files are predicted.",
        "A row of dashes cannot be met." if sweep.errors else "",
    )
    return section("rows", "Row by row", table(heads, body, "cards"), how(*said))


def _plans(found: Sequence[Row]) -> Element | None:
    """Every plan, to be opened; equal ones that follow one another are shown once."""
    if not found:
        return None
    items = []
    for before, row in pairwise((None, *found)):
        assert row is not None
        words = [str(row.budget), *(f"{k}={v}" for k, v in row.settings.items())]
        same = before is not None and before.plan == row.plan
        text = "the same as the one before" if same else str(row.plan)
        items.append(element("details", element("summary", ", ".join(words)), element("pre", text)))
    return section("plans", "Plans", *items)


def _refused(sweep: Sweep) -> Element | None:
    if not sweep.errors:
        return None
    listed = element("ul", *(element("li", error) for error in sweep.errors))
    return section("refused", "What cannot be met", listed)
