"""What commands print: tables for people, plain values for JSON."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from rabbet.core.budget import Budget
from rabbet.core.cost import Cost
from rabbet.core.plan import Plan, quoted
from rabbet.core.survey import Left, Survey
from rabbet.report.text import layer_rows, limit_rows, remainder

WIDE = 100_000  # columns of a file or a pipe: nothing is folded or cut


def console(stderr: bool = False) -> Console:
    """Where tables go. Names of layers and terms hold brackets, which are not markup here."""
    made = Console(stderr=stderr, markup=False, emoji=False, highlight=False)
    return (
        made
        if made.is_terminal
        else Console(stderr=stderr, markup=False, emoji=False, highlight=False, width=WIDE)
    )


def table(heads: Sequence[str], lines: Iterable[Sequence[str]], left: int = 1) -> Table:
    """Columns under heads, the first `left` of them flush left."""
    made = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for k, head in enumerate(heads):
        made.add_column(head, justify="left" if k < left else "right", overflow="fold")
    for line in lines:
        made.add_row(*line)
    return made


def print_report(
    out: Console,
    survey: Survey,
    plan: Plan,
    costs: tuple[Cost, Cost],
    budget: Budget | None = None,
    notes: tuple[str, ...] = (),
) -> None:
    """A line a layer, then cost against budget, what is left alone, and notes.

    costs: found, and of float32.
    """
    heads = ("layer", "shape", "plan", "bytes", "MACs", "BOPs")
    lines = [*layer_rows(survey, plan), remainder(survey, plan, costs[0])]
    out.print(
        table(heads, ((a, b, c, f"{d:,}", f"{e:,}", f"{f:,}") for a, b, c, d, e, f in lines), 3)
    )
    out.print()
    print_totals(out, survey, costs, budget)
    for note in notes:
        out.print(note, soft_wrap=True)


def print_totals(
    out: Console, survey: Survey, costs: tuple[Cost, Cost], budget: Budget | None
) -> None:
    """Cost against budget, and what is left alone."""
    heads = ("", "found", "of float32", *(["allowed"] if budget else []))
    out.print(table(heads, (line[: len(heads)] for line in limit_rows(*costs, budget))))
    print_left(out, survey.left)


def print_left(out: Console, left: Iterable[Left]) -> None:
    """Every layer that stays as it is, and why."""
    for entry in left:
        out.print(
            f"left alone: {quoted(entry.name)} ({entry.bytes:,} bytes): {entry.reason}",
            soft_wrap=True,
        )


def print_json(facts: dict[str, Any]) -> None:
    """One JSON object."""
    print(json.dumps(facts, indent=2))


def cost_facts(cost: Cost) -> dict[str, Any]:
    """A cost for JSON; bits are the mean bits of a weight."""
    return asdict(cost) | {"bits": cost.bits}


def left_facts(survey: Survey) -> list[dict[str, Any]]:
    """What is left alone, for JSON."""
    return [asdict(entry) for entry in survey.left]


def plan_facts(
    survey: Survey, plan: Plan, cost: Cost, whole: Cost, budget: Budget | None = None
) -> dict[str, Any]:
    """A plan and what it costs, for JSON; a layer that stays as it is has no plan."""
    layers = []
    for site, (_, _, _, size, macs, bops) in zip(survey, layer_rows(survey, plan), strict=True):
        line = plan.get(site.name)
        body = None if line is None else line.body
        layers.append(
            {
                "name": site.name,
                "shape": list(site.shape),
                "plan": body,
                "bytes": size,
                "macs": macs,
                "bops": bops,
            }
        )
    return {
        "plan": str(plan),
        "layers": layers,
        "cost": cost_facts(cost),
        "float": cost_facts(whole),
        "budget": None if budget is None else str(budget),
        "left": left_facts(survey),
    }
