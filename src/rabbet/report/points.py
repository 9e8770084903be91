"""The plans of a frontier as plain values, from which the script of a page shows any of them."""

import math
from collections.abc import Sequence
from typing import Any

from rabbet.core.budget import MEASURED, METRICS, Budget
from rabbet.core.cost import Cost
from rabbet.core.plan import Plan
from rabbet.report.content import Frontier, Point, Report
from rabbet.report.text import KEPT, LayerRow, Standing, layer_rows, times_smaller

NAMES = {
    "bytes": "bytes",
    "macs": "MACs",
    "bops": "BOPs",
    "bits": "bits a weight",
    "bpw": "bits a weight, with scales",
    "latency": "latency",
    "onnx": "bytes of the ONNX file",
    "openvino": "bytes of the file for OpenVINO",
}
"""How metrics are called on a page."""


def layer_facts(row: LayerRow) -> dict[str, Any]:
    """What a row of the table of layers shows, and what its bars are drawn from."""
    return {
        "plan": row.body or KEPT,
        "bits": f"{row.bits:.2f}",
        "width": row.bits,
        "bytes": f"{row.bytes:,}",
        "size": row.bytes,
        "macs": f"{row.macs:,}",
    }


def standing_facts(standing: Standing) -> dict[str, Any]:
    """What a row of the table of costs shows: the amount, its share of float32, the verdict."""
    return {
        "found": standing.show(standing.amount),
        "share": f"{100 * standing.amount / max(standing.whole, 1):.3g} %",
        "part": standing.amount / max(standing.whole, 1),
        "verdict": verdict(standing),
        "over": standing.over > 0,
    }


def verdict(standing: Standing) -> str:
    """Whether a limit is kept, and by how much; nothing where there is none."""
    if standing.allowed is None:
        return ""
    difference = standing.show(abs(standing.amount - standing.allowed))
    return f"over by {difference}" if standing.over else f"kept, {difference} to spare"


def cost_standings(cost: Cost, whole: Cost, budget: Budget | None) -> list[Standing]:
    """The standing by every metric; a latency that was not measured is left out."""
    limits = {} if budget is None else {limit.metric: limit for limit in budget.limits}
    each = (Standing.of(metric, cost, whole, limits.get(metric)) for metric in METRICS)
    return [s for s in each if s.whole or s.metric not in MEASURED]


def frontier_facts(frontier: Frontier, report: Report) -> dict[str, Any]:
    """All points; each layer's options are listed once, and a point says which it takes.

    fitted: the number of the point whose plan is that of the report; null if none is.
    """
    options: list[list[dict[str, Any]]] = [[] for _ in frontier.survey]
    known: list[dict[str, int]] = [{} for _ in frontier.survey]
    points = []
    for point in frontier.points:
        rows = layer_rows(frontier.survey, point.plan)
        choice = []
        for row, listed, places in zip(rows, options, known, strict=True):
            line = row.body or ""
            if line not in places:
                places[line] = len(listed)
                listed.append(layer_facts(row))
            choice.append(places[line])
        points.append(_point_facts(frontier, point, rows, report.budget) | {"choice": choice})
    amount = METRICS[frontier.axis].amount
    return {
        "axis": NAMES[frontier.axis],
        "quantity": frontier.quantity,
        "options": options,
        "points": points,
        "fitted": position(frontier.points, report.plan),
        "start": nearest(frontier, amount(report.cost)),
    }


def reference_words(frontier: Frontier) -> str:
    """What the float network measures, to stand behind what is said of plans; empty if unknown."""
    if frontier.reference is None:
        return ""
    return f"; {frontier.quantity} of the float network: {frontier.reference:#.4g}"


def position(points: Sequence[Point], plan: Plan) -> int | None:
    """The number of the point that has this plan."""
    return next((k for k, point in enumerate(points) if point.plan == plan), None)


def nearest(frontier: Frontier, amount: int) -> int:
    """The number of the point whose cost is nearest to an amount of the frontier's metric."""
    of = METRICS[frontier.axis].amount
    each = range(len(frontier.points))
    return min(each, key=lambda k: abs(of(frontier.points[k].cost) - amount))


def _point_facts(
    frontier: Frontier, point: Point, rows: Sequence[LayerRow], budget: Budget | None
) -> dict[str, Any]:
    cost, whole = point.cost, frontier.float_cost
    standing = Standing.of(frontier.axis, cost, whole)
    units = "" if frontier.axis == "latency" else f" {NAMES[frontier.axis]}"
    return {
        "x": standing.amount / max(standing.whole, 1),
        "at": f"{standing.show(standing.amount)}{units}",
        "smaller": times_smaller(whole.bytes, cost.bytes),
        "harm": point.harm if math.isfinite(point.harm) else None,
        "harmed": f"{point.harm:.3g}",
        "accuracy": None if point.accuracy is None else list(point.accuracy),
        "accurate": measure_words(point),
        "measured": point.measured,
        "bytes": cost.bytes,
        "rest": f"{cost.bytes - sum(row.bytes for row in rows):,}",
        "costs": {s.metric: standing_facts(s) for s in cost_standings(cost, whole, budget)},
    }


def measure_words(point: Point) -> str:
    """A measure, its interval, and how it came about."""
    if point.accuracy is None:
        return "not known"
    value, low, high = point.accuracy
    how = "measured" if point.measured else "interpolated"
    return f"{value:.4g} ({low:.4g} to {high:.4g}), {how}"
