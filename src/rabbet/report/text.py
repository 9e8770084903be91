"""A plan as text: a line a layer, then cost against budget."""

from collections.abc import Sequence

from rabbet.core.budget import METRICS, Budget
from rabbet.core.cost import Cost, layer_cost
from rabbet.core.plan import Plan, quoted
from rabbet.core.survey import Survey

Row = tuple[str, str, str, int, int, int]


def layer_rows(survey: Survey, plan: Plan) -> list[Row]:
    """Name, shape, decision, bytes, MACs and BOPs of every site, in order; a kept site's bytes are its float32 ones."""
    found = []
    for site in survey:
        line = plan.get(site.name)
        shape = "x".join(map(str, site.shape))
        if line is None:
            found.append(
                (
                    quoted(site.name),
                    shape,
                    "kept as it is",
                    4 * site.numel,
                    site.macs,
                    site.macs * 1024,
                )
            )
        else:
            cost = layer_cost(site, line)
            found.append((quoted(site.name), shape, line.body, cost.bytes, cost.macs, cost.bops))
    return found


def remainder(survey: Survey, plan: Plan, cost: Cost) -> Row:
    """The row that makes the bytes add up: the file's header, and tensors that belong to no site."""
    rest = cost.bytes - sum(row[3] for row in layer_rows(survey, plan))
    return ("", "", "header and all else", rest, 0, 0)


def limit_rows(cost: Cost, whole: Cost, budget: Budget | None) -> list[tuple[str, str, str, str]]:
    """Quantity, amount, share of the float32 network, and what the budget allows."""
    stated = {limit.metric: limit for limit in budget.limits} if budget else {}
    found = []
    for name, metric in METRICS.items():
        amount, base = metric.amount(cost), metric.amount(whole)
        if name == "latency" and not base:
            continue  # it was not asked for, so nobody measured
        allowed = metric.show(stated[name].amount(whole), whole.weights) if name in stated else ""
        found.append(
            (
                name,
                metric.show(amount, whole.weights),
                f"{100 * amount / max(base, 1):.3g}%",
                allowed,
            )
        )
    return found


def render(
    survey: Survey,
    plan: Plan,
    cost: Cost,
    whole: Cost,
    budget: Budget | None = None,
    notes: tuple[str, ...] = (),
) -> str:
    """The whole report as plain text."""
    table = [("layer", "shape", "plan", "bytes", "MACs", "BOPs")]
    table += [
        (a, b, c, f"{d:,}", f"{e:,}", f"{f:,}")
        for a, b, c, d, e, f in [*layer_rows(survey, plan), remainder(survey, plan, cost)]
    ]
    totals = [("", "found", "of float32", "allowed"), *limit_rows(cost, whole, budget)]
    left = [f"left alone: {quoted(x.name)} ({x.bytes:,} bytes): {x.reason}" for x in survey.left]
    return "\n".join([*_aligned(table, 3), "", *_aligned(totals, 1), *left, *notes])


def _aligned(table: Sequence[tuple[str, ...]], left: int) -> list[str]:
    """Columns of equal width, the first `left` of them flush left."""
    widths = [max(len(row[k]) for row in table) for k in range(len(table[0]))]
    pad = [str.ljust if k < left else str.rjust for k in range(len(widths))]
    return [
        "  ".join(p(cell, w) for p, cell, w in zip(pad, row, widths, strict=True)).rstrip()
        for row in table
    ]
