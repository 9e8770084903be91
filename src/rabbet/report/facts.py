"""A survey, a plan and its cost as plain values, for JSON."""

import math
from dataclasses import asdict
from typing import Any

from rabbet.core.budget import MEASURED, Budget
from rabbet.core.cost import Cost
from rabbet.core.plan import Plan
from rabbet.core.survey import Survey
from rabbet.report.text import NOTHING, Findings, Standing, layer_rows, standings


def cost_facts(cost: Cost) -> dict[str, Any]:
    """A cost; `bits` is the mean bits of the codes per weight.

    `latency` is in nanoseconds, predicted for one example; it and the bytes of exported files are
    null where no budget asked for them.
    """
    facts = asdict(cost)
    facts = facts | {"bits": cost.bits, "latency": facts.pop("time")}
    return facts | {metric: facts[metric] or None for metric in MEASURED}


def known(facts: dict[str, Any]) -> dict[str, Any]:
    """Plain values with None for every number that is not finite: JSON has no other word for it."""
    return {name: _known(value) for name, value in facts.items()}


def _known(value: Any) -> Any:
    if isinstance(value, dict):
        return known(value)
    if isinstance(value, list | tuple):
        return [_known(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def limit_facts(standing: Standing) -> dict[str, Any]:
    """A limit and how much of it a cost uses, in whole numbers."""
    return {
        "limit": None if standing.limit is None else standing.limit.text,
        "metric": standing.metric,
        "found": standing.amount,
        "allowed": standing.allowed,
        "over": standing.over,
    }


def plan_facts(
    survey: Survey,
    plan: Plan,
    cost: Cost,
    whole: Cost,
    budget: Budget | None = None,
    found: Findings = NOTHING,
) -> dict[str, Any]:
    """A plan and its cost; the plan of a layer that is not compressed is null.

    So are the error of a layer's output and its latency in nanoseconds where they are not known.
    """
    limits = () if budget is None else budget.limits
    layers = [
        {
            "name": row.site.name,
            "shape": list(row.site.shape),
            "plan": row.body,
            "bytes": row.bytes,
            "macs": row.macs,
            "bops": row.bops,
            "error": found.errors.get(row.site.name),
            "latency": found.times.get(row.site.name),
        }
        for row in layer_rows(survey, plan)
    ]
    return {
        "plan": str(plan),
        "layers": layers,
        "cost": cost_facts(cost),
        "float": cost_facts(whole),
        "budget": None if budget is None else str(budget),
        "limits": [limit_facts(standing) for standing in standings(cost, whole, limits)],
        "example": _example(survey),
        "left": _left(survey),
    }


def survey_facts(survey: Survey) -> dict[str, Any]:
    """A survey."""
    sites = [
        {
            "name": site.name,
            "kind": site.kind.name,
            "shape": list(site.shape),
            "macs": site.macs,
            "positions": site.positions,
            "float_bytes": 4 * site.numel,
            "norm": site.norm,
            "tied": list(site.tied),
            "heads": list(site.heads),
        }
        for site in survey
    ]
    return {
        "sites": sites,
        "left": _left(survey),
        "float_bytes": survey.float_bytes,
        "example": _example(survey),
        "notes": list(survey.notes),
    }


def _example(survey: Survey) -> list[list[int]] | None:
    """The shapes of the example that MACs are of; null where only a file is known."""
    return [list(shape) for shape in survey.example] or None


def _left(survey: Survey) -> list[dict[str, Any]]:
    """The layers that are left alone."""
    return [asdict(entry) for entry in survey.left]
