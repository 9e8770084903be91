"""A report in a notebook: a small picture and a short table, without any script."""

from rabbet.core.budget import METRICS
from rabbet.core.plan import quoted
from rabbet.report.content import Frontier, Report
from rabbet.report.markup import Element, element, markup
from rabbet.report.points import (
    NAMES,
    cost_standings,
    measure_words,
    nearest,
    reference_words,
    verdict,
)
from rabbet.report.text import KEPT, Standing, layer_rows, percent, times_smaller

ROWS = 12  # layers that are shown, the heaviest; plans of a frontier
WIDTH, HEIGHT = 480, 56  # of the picture
LEFT = "text-align: left; vertical-align: baseline"
RIGHT = "text-align: right; vertical-align: baseline; font-variant-numeric: tabular-nums"


def summary(report: Report) -> str:
    """A report as HTML for `_repr_html_`: bytes by layer as a picture, costs, heaviest layers."""
    size = f"{report.cost.bytes:,} bytes, {times_smaller(report.whole.bytes, report.cost.bytes)}"
    costs = [
        [
            NAMES[s.metric],
            s.show(s.amount),
            f"{100 * s.amount / max(s.whole, 1):.3g} %",
            "" if s.allowed is None else s.show(s.allowed),
            verdict(s),
        ]
        for s in cost_standings(report.cost, report.whole, report.budget)
    ]
    rows = layer_rows(report.survey, report.plan)
    heaviest = sorted(rows, key=lambda row: -row.bytes)[:ROWS]
    chosen = [row for row in rows if row in heaviest][:ROWS]
    layers = [
        [
            quoted(row.site.name),
            row.body or KEPT,
            f"{row.bits:.2f}",
            f"{row.bytes:,}",
            percent(report.found.errors.get(row.site.name)),
        ]
        for row in chosen
    ]
    more = len(rows) - len(layers)
    return markup(
        element(
            "div",
            element("p", element("strong", size)),
            _bars(report),
            _table(["", "found", "of float32", "allowed", ""], costs, 1),
            _table(["layer", "plan", "bits", "bytes", "error"], layers, 2),
            element("p", f"and {more:,} lighter layers") if more else None,
        )
    )


def frontier_summary(frontier: Frontier) -> str:
    """A frontier as HTML for `_repr_html_`: its curve, and plans at equal distances of cost."""
    of, whole = METRICS[frontier.axis].amount, frontier.float_cost
    amounts = [of(point.cost) for point in frontier.points]
    low, high = min(amounts), max(amounts)
    steps = (high - (high - low) * k / (ROWS - 1) for k in range(ROWS))
    places = dict.fromkeys(nearest(frontier, round(step)) for step in steps)
    rows = []
    for place in places:
        point = frontier.points[place]
        standing = Standing.of(frontier.axis, point.cost, whole)
        share = f"{100 * standing.amount / max(standing.whole, 1):.3g} %"
        known = measure_words(point)
        rows.append([standing.show(standing.amount), share, f"{point.harm:.3g}", known])
    heads = [NAMES[frontier.axis], "of float32", "expected error", frontier.quantity]
    title = f"{len(frontier.points):,} plans by {NAMES[frontier.axis]}{reference_words(frontier)}"
    return markup(
        element(
            "div", element("p", element("strong", title)), _curve(frontier), _table(heads, rows, 0)
        )
    )


def _table(heads: list[str], rows: list[list[str]], left: int) -> Element:
    def cells(tag: str, row: list[str]) -> list[Element]:
        styles = [LEFT if k < left else RIGHT for k in range(len(row))]
        return [element(tag, text, style=s) for text, s in zip(row, styles, strict=True)]

    body = (element("tr", *cells("td", row)) for row in rows)
    head = element("thead", element("tr", *cells("th", heads)))
    return element("table", head, element("tbody", *body))


def _picture(about: str, *shapes: Element) -> Element:
    return element(
        "svg",
        element("title", about),
        *shapes,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        width=str(WIDTH),
        height=str(HEIGHT),
        role="img",
        style="max-width: 100%",
    )


def _bars(report: Report) -> Element:
    """Each layer as wide as its share of the weights and as high as its bits, of 8."""
    whole, start, bars = max(report.survey.weights, 1), 0.0, []
    for row in layer_rows(report.survey, report.plan):
        width, height = WIDTH * row.site.numel / whole, HEIGHT * min(row.bits, 8) / 8
        title = element("title", f"{quoted(row.site.name)}: {row.bits:.2f} bits a weight")
        bar = element(
            "rect",
            title,
            x=f"{start:.2f}",
            y=f"{HEIGHT - height:.2f}",
            width=f"{max(width - 0.75, 0.25):.2f}",
            height=f"{height:.2f}",
            fill="#3a83a5",
        )
        bars.append(bar)
        start += width
    return _picture("bits of each layer, as wide as its share of the weights", *bars)


def _curve(frontier: Frontier) -> Element:
    """The expected error over the cost, from the loosest plan to the tightest."""
    of = METRICS[frontier.axis].amount
    amounts = [of(point.cost) for point in frontier.points]
    harms = [point.harm for point in frontier.points]
    wide, high = max(amounts) - min(amounts) or 1, max(harms) - min(harms) or 1.0
    points = " ".join(
        f"{(max(amounts) - a) / wide * (WIDTH - 4) + 2:.1f},"
        f"{HEIGHT - 2 - (h - min(harms)) / high * (HEIGHT - 4):.1f}"
        for a, h in zip(amounts, harms, strict=True)
    )
    style = {"fill": "none", "stroke": "#3a83a5", "stroke_width": "1.5"}
    return _picture("expected error by cost", element("polyline", points=points, **style))
