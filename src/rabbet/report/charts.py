"""What the charts of a page are drawn from, as plain values; how they look, its script knows."""

import math
from itertools import pairwise
from typing import Any

from rabbet.core.history import History
from rabbet.core.plan import quoted
from rabbet.report.content import Report
from rabbet.report.points import frontier_facts
from rabbet.report.sections import byte_parts
from rabbet.report.text import layer_rows

VALUES = 6000  # of a history that are drawn, over all its lines
PARTS = ("layers", "left alone", "header and all else")
STEEP = 30  # from this ratio of the largest to the smallest value on, an axis is logarithmic


def chart_facts(report: Report) -> dict[str, Any]:
    """All of them for JSON."""
    histories = [h for h in report.histories if any(h.lines.values())]
    return {
        "layers": _layers(report),
        "bytes": _bytes(report),
        "histories": [_history(h) for h in histories],
        "latency": _latency(report),
        "frontier": None if report.frontier is None else frontier_facts(report.frontier, report),
    }


def _layers(report: Report) -> list[dict[str, Any]]:
    """Of each layer where it begins and ends among all weights, as shares, and its bits."""
    rows, whole = layer_rows(report.survey, report.plan), max(report.survey.weights, 1)
    ends = [0]
    for row in rows:
        ends.append(ends[-1] + row.site.numel)
    return [
        {
            "name": quoted(row.site.name),
            "from": a / whole,
            "to": b / whole,
            "bits": row.bits,
            "plan": row.body or "",
        }
        for row, (a, b) in zip(rows, pairwise(ends), strict=True)
    ]


def _bytes(report: Report) -> list[dict[str, Any]]:
    return [
        {"version": name, "part": part, "order": order, "bytes": size}
        for name, parts, whole in byte_parts(report)
        for order, (part, size) in enumerate(
            zip(PARTS, parts, strict=True) if parts else [("file, whole", whole)]
        )
    ]


def _history(history: History) -> dict[str, Any]:
    count = sum(map(len, history.lines.values()))
    every = -(-count // VALUES)
    values = [
        {"line": name, "step": k + history.first, "value": value}
        for name, line in history.lines.items()
        for k, value in enumerate(line)
        if (k % every == 0 or k + 1 == len(line)) and math.isfinite(value)
    ]
    seen = [value for line in history.lines.values() for value in line if math.isfinite(value)]
    steep = bool(seen) and min(seen) > 0 and max(seen) > STEEP * min(seen)
    return {"step": history.step, "lines": len(history.lines), "log": steep, "values": values}


def _latency(report: Report) -> list[dict[str, Any]]:
    times = {} if report.latencies is None else report.latencies.layers
    return [
        {"place": k + 1, "name": quoted(name), "ms": time / 1e6}
        for k, (name, time) in enumerate(times.items())
    ]
