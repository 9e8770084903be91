"""Reports of a survey, a plan and its cost, for `print(result)` and the command line.

A report is a list of parts, each a table or a line. `plain` turns them into text; the command line
formats them for a terminal.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from rabbet.core.budget import MEASURED, METRICS, Budget, Limit
from rabbet.core.cost import Cost, layer_cost
from rabbet.core.plan import Plan, quoted
from rabbet.core.survey import Left, Survey
from rabbet.layers import Site

KEPT = "kept as it is"
LONGEST = 2000  # signs of a cell that are shown


@dataclass(frozen=True)
class Table:
    """Rows of cells under heads; the first `left` columns are flush left, the others right.

    bits: of each row, drawn as a bar where the table is shown on a terminal.
    """

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: int = 1
    bits: Sequence[float] = ()


@dataclass(frozen=True)
class Findings:
    """What was measured of layers, by their names; of what was not there is nothing.

    errors: of their outputs, relative. harms: what each alone does to the network's output. times:
    of each alone, in nanoseconds.
    """

    errors: Mapping[str, float] = field(default_factory=dict)
    harms: Mapping[str, float] = field(default_factory=dict)
    times: Mapping[str, int] = field(default_factory=dict)


NOTHING = Findings()
Part = Table | str
"""A table, or a line."""


class LayerRow(NamedTuple):
    """A site and what it costs under a plan.

    body: its line of the plan without the name; None if the layer is not compressed, in which case
    the costs are those of float32. bits: of its codes, for each of its weights.
    """

    site: Site
    body: str | None
    bytes: int
    macs: int
    bops: int
    bits: float


@dataclass(frozen=True)
class Standing:
    """One metric of a network: its amount, that of the float32 network, and what a limit allows.

    Amounts are whole numbers; for `bits` and `bpw` they are the bits of all weights together.
    """

    metric: str
    amount: int
    whole: int
    weights: int
    limit: Limit | None
    allowed: int | None

    @classmethod
    def of(cls, metric: str, cost: Cost, whole: Cost, limit: Limit | None = None) -> "Standing":
        """The standing of a cost by one metric."""
        amount = METRICS[metric].amount
        allowed = None if limit is None else limit.amount(whole)
        return cls(metric, amount(cost), amount(whole), whole.weights, limit, allowed)

    @property
    def over(self) -> int:
        """The amount above the limit; 0 if the limit is kept."""
        return 0 if self.allowed is None else max(self.amount - self.allowed, 0)

    def show(self, amount: float) -> str:
        """An amount as text with its unit."""
        return METRICS[self.metric].show(amount, self.weights)

    def row(self) -> tuple[str, str, str, str]:
        """The metric, its amount, its share of the float32 network's, and what is allowed."""
        allowed = "" if self.allowed is None else self.show(self.allowed)
        share = f"{100 * self.amount / max(self.whole, 1):.3g}%"
        name = "latency, predicted" if self.metric == "latency" else self.metric
        return (name, self.show(self.amount), share, allowed)

    def verdict(self) -> str:
        """The amount compared with the limit, in a sentence."""
        assert self.limit is not None
        assert self.allowed is not None
        difference = self.show(abs(self.amount - self.allowed))
        verdict = f"OVER by {difference}" if self.over else f"within, {difference} to spare"
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
            rows.append(LayerRow(site, None, 4 * site.numel, site.macs, site.macs * 1024, 32.0))
        else:
            cost = layer_cost(site, line)
            rows.append(LayerRow(site, line.body, cost.bytes, cost.macs, cost.bops, cost.bits))
    return rows


def standings(cost: Cost, whole: Cost, limits: Iterable[Limit]) -> list[Standing]:
    """The standing of a cost under each limit, in the order of the limits."""
    return [Standing.of(limit.metric, cost, whole, limit) for limit in limits]


def plan_table(survey: Survey, plan: Plan, cost: Cost, found: Findings = NOTHING) -> Table:
    """A row per layer, and one for the file's header and all tensors that belong to no site.

    Errors and latencies of the layers have a column each where they are known.
    """
    rows = layer_rows(survey, plan)
    names = [row.site.name for row in rows]
    cells = [
        (quoted(row.site.name), shape_of(row.site), row.body or KEPT, row.bytes, row.macs, row.bops)
        for row in rows
    ]
    cells.append(("", "", "header and all else", cost.bytes - sum(r.bytes for r in rows), 0, 0))
    heads = ["layer", "shape", "plan", "bytes", "MACs", "BOPs"]
    body = [[*row[:3], *(f"{amount:,}" for amount in row[3:])] for row in cells]
    if found.errors:
        heads.append("error")
        _extend(body, [percent(found.errors.get(name)) for name in names], "")
    if found.times:
        heads.append("ms")
        rest = cost.time - sum(found.times.get(name, 0) for name in names)
        _extend(
            body, [milliseconds(found.times.get(name, 0)) for name in names], milliseconds(rest)
        )
    return Table(heads, body, 3, [*(row.bits for row in rows), 0.0])


def _extend(rows: list[list[str]], cells: list[str], last: str) -> None:
    for row, cell in zip(rows, [*cells, last], strict=True):
        row.append(cell)


def percent(share: float | None) -> str:
    """A share in per cent to two digits; nothing if it is not known."""
    return "" if share is None else f"{100 * share:.2g}%"


def times_smaller(whole: float, found: float) -> str:
    """How much smaller than float32 so many bytes are, in words."""
    times = whole / max(found, 1)
    return f"{times:.3g}x smaller than float32" if times > 1 else "no smaller than float32"


def milliseconds(nanoseconds: int) -> str:
    """A time without its unit."""
    return f"{nanoseconds / 1e6:.3f}"


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
    said = [summary, survey.counted("MACs"), *left_lines(survey)]
    return [Table(heads, rows, 3), "", *said, *survey.notes]


def total_parts(survey: Survey, cost: Cost, whole: Cost, budget: Budget | None) -> list[Part]:
    """Cost against budget, of which example it is, then what is left alone."""
    limits = {limit.metric: limit for limit in budget.limits} if budget else {}
    each = [Standing.of(metric, cost, whole, limits.get(metric)) for metric in METRICS]
    # What is measured is zero where it was not asked for.
    rows = [s.row() for s in each if s.whole or s.metric not in MEASURED]
    heads = ("", "found", "of float32", *(["allowed"] if budget else []))
    counted = survey.counted("MACs, BOPs and latency" if whole.time else "MACs and BOPs")
    return [Table(heads, [row[: len(heads)] for row in rows]), counted, *left_lines(survey)]


def report_parts(
    survey: Survey,
    plan: Plan,
    cost: Cost,
    whole: Cost,
    budget: Budget | None = None,
    found: Findings = NOTHING,
) -> list[Part]:
    """The whole report: a row per layer, cost against budget, what is left alone."""
    totals = total_parts(survey, cost, whole, budget)
    return [plan_table(survey, plan, cost, found), "", *totals]


def left_groups(survey: Survey) -> list[tuple[str, list[Left]]]:
    """What is left alone by reason, heaviest first."""
    groups: dict[str, list[Left]] = {}
    for left in survey.left:
        groups.setdefault(left.reason, []).append(left)
    return sorted(groups.items(), key=lambda group: -sum(x.bytes for x in group[1]))


def left_lines(survey: Survey) -> list[str]:
    """What is left alone, a line for each reason, heaviest first; their bytes are in float32."""
    lines = []
    for reason, group in left_groups(survey):
        first = quoted(max(group, key=lambda x: x.bytes).name)
        others = f" and {len(group) - 1} more" if len(group) > 1 else ""
        size = sum(x.bytes for x in group)
        lines.append(f"left alone: {first}{others} ({size:,} bytes): {reason}")
    return lines


def plain(parts: Iterable[Part]) -> str:
    """Parts as plain text."""
    lines: list[str] = []
    for part in parts:
        lines += [part] if isinstance(part, str) else _aligned(part)
    return "\n".join(lines)


def cut(cell: str) -> str:
    """A cell of bearable length: every row of a table is as wide as its longest."""
    return cell if len(cell) <= LONGEST else f"{cell[:LONGEST]}..."


def shortened(cell: str, width: int) -> str:
    """A cell without its middle, where it is longer than a width."""
    if len(cell) <= width:
        return cell
    end = (width - 3) // 2
    return f"{cell[: width - 3 - end]}...{cell[len(cell) - end :]}"


def _aligned(table: Table) -> list[str]:
    """Columns of equal width, two spaces apart."""
    rows = [list(map(cut, row)) for row in (table.heads, *table.rows)]
    widths = [max(len(row[k]) for row in rows) for k in range(len(table.heads))]
    pad = [str.ljust if k < table.left else str.rjust for k in range(len(widths))]
    return [
        "  ".join(p(cell, w) for p, cell, w in zip(pad, row, widths, strict=True)).rstrip()
        for row in rows
    ]
