"""A survey, a plan and its cost as plain values, for JSON."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from rabbet.core.budget import Budget
from rabbet.core.cost import Cost
from rabbet.core.plan import Plan
from rabbet.core.survey import Survey
from rabbet.report.text import Standing, layer_rows


def cost_facts(cost: Cost) -> dict[str, Any]:
    """A cost; `bits` is the mean bits of the codes per weight."""
    return asdict(cost) | {"bits": cost.bits}


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
    errors: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """A plan and its cost; the plan of a layer that is not compressed is null.

    So is the error of a layer's output where it is not known.
    """
    layers = [
        {
            "name": row.site.name,
            "shape": list(row.site.shape),
            "plan": row.body,
            "bytes": row.bytes,
            "macs": row.macs,
            "bops": row.bops,
            "error": (errors or {}).get(row.site.name),
        }
        for row in layer_rows(survey, plan)
    ]
    return {
        "plan": str(plan),
        "layers": layers,
        "cost": cost_facts(cost),
        "float": cost_facts(whole),
        "budget": None if budget is None else str(budget),
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
