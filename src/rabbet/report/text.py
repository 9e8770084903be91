"""What is said of a survey, a plan and its cost, in rows: for `print(result)` and the command line.

Everything is a list of parts, each a table or a line. `plain` makes text of them, the command line
what suits a terminal.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from rabbet.core.budget import METRICS, Budget, Limit
from rabbet.core.cost import Cost, layer_cost
from rabbet.core.plan import Plan, quoted
from rabbet.core.survey import Survey
from rabbet.layers import Site

KEPT = "kept as it is"


@dataclass(frozen=True)
class Table:
    """Rows of cells under heads, the first `left` columns flush left."""

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: int = 1


Part = Table | str
"""A table, or a line."""


class LayerRow(NamedTuple):
    """A site and what a plan makes of it; one that is kept has no body, and float32 bytes."""

    site: Site
    body: str | None
    bytes: int
    macs: int
    bops: int


@dataclass(frozen=True)
class Standing:
    """One quantity of a network: its amount, that of the float32 network, and what a limit allows.

    Amounts are whole numbers; of `bits` and `bpw` they are the bits of all weights together.
    """

    metric: str
    amount: int
    whole: int
    weights: int
    limit: Limit | None
    allowed: int | None

    @classmethod
    def of(cls, metric: str, cost: Cost, whole: Cost, limit: Limit | None = None) -> "Standing":
        """How a cost stands by one metric."""
        amount = METRICS[metric].amount
        allowed = None if limit is None else limit.amount(whole)
        return cls(metric, amount(cost), amount(whole), whole.weights, limit, allowed)

    @property
    def over(self) -> int:
        """By how much the limit is broken; 0 if it is not."""
        return 0 if self.allowed is None else max(self.amount - self.allowed, 0)

    def show(self, amount: float) -> str:
        """An amount in words."""
        return METRICS[self.metric].show(amount, self.weights)

    def row(self) -> tuple[str, str, str, str]:
        """The quantity, its amount, its share of the float32 network, and what is allowed."""
        allowed = "" if self.allowed is None else self.show(self.allowed)
        share = f"{100 * self.amount / max(self.whole, 1):.3g}%"
        return (self.metric, self.show(self.amount), share, allowed)

    def verdict(self) -> str:
        """Amount against limit in a sentence."""
        assert self.limit is not None
        assert self.allowed is not None
        apart = self.show(abs(self.amount - self.allowed))
        verdict = f"OVER by {apart}" if self.over else f"within, {apart} to spare"
        amounts = f"{self.show(self.amount)} of {self.show(self.allowed)}"
        return f"{self.limit.text}: {amounts} {self.metric}, {verdict}"


def shape_of(site: Site) -> str:
    """The shape of a weight, such as `64x32x3x3`."""
    return "x".join(map(str, site.shape))


def layer_rows(survey: Survey, plan: Plan) -> list[LayerRow]:
    """A row for every site, in order."""
    rows = []
    for site in survey:
        line = plan.get(site.name)
        if line is None:
            rows.append(LayerRow(site, None, 4 * site.numel, site.macs, site.macs * 1024))
        else:
            cost = layer_cost(site, line)
            rows.append(LayerRow(site, line.body, cost.bytes, cost.macs, cost.bops))
    return rows


def standings(cost: Cost, whole: Cost, limits: Iterable[Limit]) -> list[Standing]:
    """How a cost stands under each limit, in the order of the limits."""
    return [Standing.of(limit.metric, cost, whole, limit) for limit in limits]


def plan_table(survey: Survey, plan: Plan, cost: Cost) -> Table:
    """A row a layer, and one for all else: the file's header, and tensors that are of no site."""
    rows = layer_rows(survey, plan)
    cells = [
        (quoted(row.site.name), shape_of(row.site), row.body or KEPT, row.bytes, row.macs, row.bops)
        for row in rows
    ]
    cells.append(("", "", "header and all else", cost.bytes - sum(r.bytes for r in rows), 0, 0))
    return Table(
        ("layer", "shape", "plan", "bytes", "MACs", "BOPs"),
        [(*words, f"{size:,}", f"{macs:,}", f"{bops:,}") for *words, size, macs, bops in cells],
        3,
    )


def survey_parts(survey: Survey) -> list[Part]:
    """A row for every layer that can be compressed, then what is left alone and why."""
    heads = ("layer", "kind", "shape", "MACs", "positions", "float bytes")
    rows = [
        (
            quoted(site.name),
            ", ".join((site.kind.name, *site.heads)),
            shape_of(site),
            *(f"{n:,}" for n in (site.macs, site.positions, 4 * site.numel)),
        )
        for site in survey
    ]
    held = f"{4 * survey.weights:,} of {survey.float_bytes:,} bytes in float32"
    summary = f"{len(survey.sites)} layers hold {held}"
    return [Table(heads, rows, 3), "", summary, *left_lines(survey), *survey.notes]


def total_parts(survey: Survey, cost: Cost, whole: Cost, budget: Budget | None) -> list[Part]:
    """Cost against budget, then what is left alone."""
    limits = {limit.metric: limit for limit in budget.limits} if budget else {}
    stood = [Standing.of(metric, cost, whole, limits.get(metric)) for metric in METRICS]
    # a latency that was not asked for was not measured
    rows = [s.row() for s in stood if s.whole or s.metric != "latency"]
    heads = ("", "found", "of float32", *(["allowed"] if budget else []))
    return [Table(heads, [row[: len(heads)] for row in rows]), *left_lines(survey)]


def report_parts(
    survey: Survey,
    plan: Plan,
    cost: Cost,
    whole: Cost,
    budget: Budget | None = None,
    notes: tuple[str, ...] = (),
) -> list[Part]:
    """The whole report: a row a layer, cost against budget, what is left alone, notes."""
    totals = total_parts(survey, cost, whole, budget)
    return [plan_table(survey, plan, cost), "", *totals, *notes]


def left_lines(survey: Survey) -> list[str]:
    """Every layer that stays as it is, and why."""
    return [f"left alone: {quoted(x.name)} ({x.bytes:,} bytes): {x.reason}" for x in survey.left]


def plain(parts: Iterable[Part]) -> str:
    """Parts as plain text."""
    lines: list[str] = []
    for part in parts:
        lines += [part] if isinstance(part, str) else _aligned(part)
    return "\n".join(lines)


def _aligned(table: Table) -> list[str]:
    """Columns of equal width, two spaces apart."""
    rows = [table.heads, *table.rows]
    widths = [max(len(row[k]) for row in rows) for k in range(len(table.heads))]
    pad = [str.ljust if k < table.left else str.rjust for k in range(len(widths))]
    return [
        "  ".join(p(cell, w) for p, cell, w in zip(pad, row, widths, strict=True)).rstrip()
        for row in rows
    ]
