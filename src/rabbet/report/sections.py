"""The sections of a page, in the order in which they stand; one that has nothing to say is None."""

from collections.abc import Callable, Iterator, Sequence

from rabbet.core.budget import FILES
from rabbet.core.plan import quoted
from rabbet.core.survey import Left, shapes
from rabbet.report.content import Report
from rabbet.report.examples import Answered, Example, Seen
from rabbet.report.markup import Child, Element, cell, element, table
from rabbet.report.points import NAMES, cost_standings, reference_words, standing_facts
from rabbet.report.text import (
    KEPT,
    LayerRow,
    Standing,
    layer_rows,
    left_groups,
    milliseconds,
    percent,
    shape_of,
)

LISTED = 40  # names of layers that are left alone for one reason


def sections(report: Report) -> list[Element]:
    """All of them."""
    made = (make(report) for make in SECTIONS)
    return [part for part in made if part is not None]


def section(name: str, title: str, *children: Child | None) -> Element:
    """A part of a page under a title; name: by which it is linked."""
    head = element("h2", title, id=f"{name}-title")
    return element("section", head, *children, id=name, aria_labelledby=f"{name}-title")


def how(*sentences: str) -> Element:
    """How the numbers of a section came about."""
    return element("p", " ".join(s for s in sentences if s), class_="how")


def chart(name: str, words: str) -> Element:
    """The place of a chart that the script draws; words: what it shows, for who cannot see it."""
    drawn = element("div", class_="chart", data_chart=name, role="img", aria_label=words)
    return element("figure", element("figcaption", words), drawn, class_="drawn")


def asked(report: Report) -> Element:
    """What was asked for and what came out."""
    heads = [("", ""), ("float32", "n"), ("found", "n"), ("of float32", "n")]
    limited = report.budget is not None
    heads += [("allowed", "n"), ("", "")] if limited else []
    heads.append(("how it is known", ""))
    each = cost_standings(report.cost, report.whole, report.budget)
    rows = [_standing(report, standing, limited) for standing in each]
    rows += _measured(report, limited)
    budget = "No budget was given." if report.budget is None else f"Asked for: {report.budget}."
    return section("asked", "Asked and found", element("p", budget), table(heads, rows, "cards"))


def _standing(report: Report, standing: Standing, limited: bool) -> Element:
    shown = standing_facts(standing)
    cells = [
        element("th", NAMES[standing.metric], scope="row"),
        cell(standing.show(standing.whole), "float32", "n"),
        cell(shown["found"], "found", "n found"),
        cell(shown["share"], "of float32", "n share", shown["part"]),
    ]
    if limited:
        allowed = "" if standing.allowed is None else standing.show(standing.allowed)
        cells.append(cell(allowed, "allowed", "n"))
        kind = "verdict over" if standing.over else "verdict"
        cells.append(cell(shown["verdict"], "", kind))
    cells.append(cell(_known(report, standing.metric), "", "how"))
    return element("tr", *cells, data_metric=standing.metric)


def _known(report: Report, metric: str) -> str:
    """How a cost came about."""
    example = report.survey.example
    of = f"of one example, {shapes(example)}" if example else "of one example of the first batch"
    exact = "counted; the file is exactly as long"
    return {
        "bytes": exact if report.fitted else "counted before anything is solved, exactly",
        "macs": f"counted, {of}",
        "bops": "counted: MACs times bits of weight and input",
        "bits": "counted: mean bits of the codes",
        "bpw": "counted: codes, scales and zero points",
        "latency": "predicted: the sum of layers that were timed alone; float: measured",
        **dict.fromkeys(FILES, "predicted, then held against a file that was written"),
    }[metric]


def _measured(report: Report, limited: bool) -> Iterator[Element]:
    """Rows of what was measured on the whole network."""

    def row(name: str, before: str, after: str, known: str) -> Element:
        cells = [cell(before, "float32", "n"), cell(after, "found", "n only"), cell("")]
        cells += [cell(""), cell("")] if limited else []
        return element("tr", element("th", name, scope="row"), *cells, cell(known, "", "how"))

    if report.latencies is not None:
        taken = f"{milliseconds(report.latencies.measured)} ms"
        whole = f"{milliseconds(report.whole.time)} ms"
        yield row("latency", whole, taken, "measured: the exported file in onnxruntime, here")
    score = report.score
    if score is not None:
        on = f", on {score.examples:,} labelled examples" if score.examples else ""
        known = f"measured: the written file{on}"
        yield row(score.quantity, score.before, score.after, known)


def frontier(report: Report) -> Element | None:
    """A slider over the plans of a frontier."""
    if report.frontier is None:
        return None
    points = report.frontier.points
    name = NAMES[report.frontier.axis]
    slider = element("input", type="range", id="at", min="0", max=str(len(points) - 1), step="1")
    known = any(point.accuracy is not None for point in points)
    shown = {"cost": name, "smaller": "file", "harm": "expected error"}
    quantity = report.frontier.quantity
    shown |= {"accuracy": quantity} if known else {}
    facts = [
        element("div", element("dt", title), element("dd", "", id=f"at-{part}"))
        for part, title in shown.items()
    ]
    label = element(
        "label", f"Plan, from the loosest to the tightest of {len(points):,}", for_="at"
    )
    back = element("button", "Back to the fitted plan", type="button", id="back", hidden="")
    state = element("div", element("output", "", id="at-words"), back, class_="state")
    harm = "Expected error of the outputs, of every plan"
    accuracy = (
        f"{quantity.capitalize()} of every plan: measured (dots) or interpolated, with its interval"
        f"{reference_words(report.frontier)}"
    )
    return section(
        "frontier",
        "Frontier",
        element("div", label, slider, state, class_="slider"),
        element("dl", *facts, class_="facts"),
        chart("harm", harm),
        chart("accuracy", accuracy) if known else None,
        how(
            "Every point is a plan that can be fitted; its costs are counted.",
            "The expected error is predicted from what each layer alone does to the outputs.",
            "Below, layers and bytes are those of the plan at the slider.",
        ),
    )


def layers(report: Report) -> Element:
    """A row for each layer in the order in which they run."""
    found = report.found
    heads = [("layer", ""), ("plan", ""), ("bits", "n"), ("bytes", "n"), ("of the file", "n")]
    heads.append(("MACs", "n"))
    heads += [("error", "n")] if found.errors else []
    heads += [("harm", "n")] if found.harms else []
    heads += [("ms", "n")] if found.times else []
    rows = layer_rows(report.survey, report.plan)
    worst = {
        "error": max(found.errors.values(), default=0.0),
        "harm": max(found.harms.values(), default=0.0),
        "ms": float(max(found.times.values(), default=0)),
    }
    body = [_layer(report, row, number, worst) for number, row in enumerate(rows)]
    rest = report.cost.bytes - sum(row.bytes for row in rows)
    last = [cell("", "", "empty"), cell("", "", "empty"), cell(f"{rest:,}", "bytes", "n bytes")]
    last += [cell("", "", "empty") for _ in heads[4:]]
    name = element("th", "header and all else", scope="row")
    body.append(element("tr", name, *last, class_="rest"))
    words = "Each layer as wide as its share of the weights, as high as its bits: areas are codes"
    notes = (
        "Bits are the mean of the codes for each weight.",
        "Error: measured on the first batch, the norm of the difference of the layer's outputs "
        "over their norm, both networks given the same inputs."
        if found.errors
        else "",
        "Harm: measured by gradients on calibration examples, what this layer alone does to the "
        "network's outputs: their expected squared error over their variance."
        if found.harms
        else "",
        "Milliseconds: measured, each layer exported and timed alone in onnxruntime."
        if found.times
        else "",
    )
    return section(
        "layers",
        "Layer by layer",
        chart("layers", words),
        table(heads, body, "cards layers"),
        how(*notes),
    )


def _layer(report: Report, row: LayerRow, number: int, worst: dict[str, float]) -> Element:
    name, found, part = row.site.name, report.found, row.bytes / max(report.cost.bytes, 1)
    title = element("span", quoted(name), class_="name")
    shape = element("span", f"{row.site.kind.name} {shape_of(row.site)}", class_="shape")
    cells = [
        element("th", title, shape, scope="row"),
        cell(row.body or KEPT, "plan", "plan" if row.body else "plan kept"),
        cell(f"{row.bits:.2f}", "bits", "n bits", min(row.bits, 8) / 8),
        cell(f"{row.bytes:,}", "bytes", "n bytes"),
        cell(f"{100 * part:.1f} %", "of the file", "n share", part),
        cell(f"{row.macs:,}", "MACs", "n macs"),
    ]
    error, harm = found.errors.get(name), found.harms.get(name)
    if found.errors:
        cells.append(_part(error, worst["error"], percent(error), "error"))
    if found.harms:
        cells.append(_part(harm, worst["harm"], "" if harm is None else f"{harm:.2g}", "harm"))
    if found.times:
        time = found.times.get(name, 0)
        cells.append(_part(time, worst["ms"], milliseconds(time), "ms"))
    return element("tr", *cells, data_layer=str(number))


def _part(value: float | None, most: float, text: str, label: str) -> Element:
    """A number that is known of the fitted plan alone, with a bar beside the largest of them."""
    if value is None:
        return cell("", label, "n own empty")
    return cell(text, label, "n own", value / most if most else 0.0)


def bytes_(report: Report) -> Element:
    """Where the bytes are, in float, as planned, and in every file that was written."""
    heads = [("", ""), ("layers", "n"), ("left alone", "n"), ("header and all else", "n")]
    heads.append(("together", "n"))
    rows = []
    for name, parts, whole in byte_parts(report):
        texts = [f"{part:,}" for part in parts] or [""] * 3  # not known of an exported file
        cells = [cell(text, head, "n") for text, (head, _) in zip(texts, heads[1:4], strict=True)]
        title = element("th", name, scope="row")
        rows.append(element("tr", title, *cells, cell(f"{whole:,}", "together", "n")))
    known = "Counted before anything is written; the length of a file is read from the disk."
    words = "Bytes of the float network, of the plan, and of the files"
    shown = chart("bytes", words), table(heads, rows, "cards"), how(known)
    return section("bytes", "Where the bytes are", *shown)


def byte_parts(report: Report) -> list[tuple[str, tuple[int, ...], int]]:
    """Of each version its name, the bytes of its parts (none of an exported file), and all."""
    left = sum(x.bytes for x in report.survey.left)
    weights = 4 * report.survey.weights
    planned = sum(row.bytes for row in layer_rows(report.survey, report.plan))
    versions = []
    for name, of_layers, whole in (
        ("float32", weights, report.whole.bytes),
        ("planned", planned, report.cost.bytes),
    ):
        alone = min(left, max(whole - of_layers, 0))
        versions.append((name, (of_layers, alone, max(whole - of_layers - alone, 0)), whole))
    return [*versions, *((name, (), size) for name, size in report.files.items())]


def left(report: Report) -> Element | None:
    """What is left alone and why, by reason."""
    groups = left_groups(report.survey)
    if not groups:
        return None
    rows = []
    for reason, group in groups:
        cells = [
            element("th", reason, scope="row"),
            cell(f"{len(group):,}", "tensors", "n"),
            cell(f"{sum(x.bytes for x in group):,}", "bytes", "n"),
            cell(_names(group), "which", "names"),
        ]
        rows.append(element("tr", *cells))
    heads = [("why", ""), ("tensors", "n"), ("bytes", "n"), ("which, the largest first", "names")]
    known = "These tensors take as many bytes in any file, in the type that they have."
    return section("left", "Left alone", table(heads, rows, "cards"), how(known))


def _names(group: Sequence[Left]) -> str:
    ranked = sorted(group, key=lambda x: -x.bytes)
    more = f" and {len(ranked) - LISTED:,} more" if len(ranked) > LISTED else ""
    return ", ".join(quoted(x.name) for x in ranked[:LISTED]) + more


def notes(report: Report) -> Element | None:
    """What the method has to say."""
    said = [*report.notes, *report.unknown]
    if not said:
        return None
    return section("notes", "Notes", element("ul", *(element("li", note) for note in said)))


def convergence(report: Report) -> Element | None:
    """How searches and trainings went."""
    charts = [
        chart(f"history-{k}", f"{h.stage}: {h.quantity}, by {h.step}")
        for k, h in enumerate(report.histories)
        if any(h.lines.values())
    ]
    if not charts:
        return None
    known = "Measured while it ran; of long histories every second, third, ... value is drawn."
    return section("convergence", "Convergence", element("div", *charts, class_="grid"), how(known))


def before_and_after(report: Report) -> Element | None:
    """Some examples with the answers of both networks."""
    if not report.examples:
        return None
    cards = [_example(example, k) for k, example in enumerate(report.examples)]
    known = (
        "Measured: what the float and the compressed network make of the task's prompts."
        if any(one.prose for example in report.examples for one in example.answers)
        else "Measured: the first examples of the calibration data, run by the float and by the "
        "compressed network. Pictures are scaled from their smallest to their largest number."
    )
    grid = element("div", *cards, class_="examples")
    return section("examples", "Before and after", grid, how(known))


def _example(example: Example, number: int) -> Element:
    parts = [_seen(one, number) for one in example.inputs]
    return element("article", *parts, *(_answered(one) for one in example.answers))


def _seen(one: Seen, number: int) -> Element:
    about = element("figcaption", one.about)
    if one.form == "picture":
        words = f"input of example {number + 1}"
        picture = element("img", src=str(one.content), alt=words, decoding="async")
        return element("figure", picture, about, class_="seen")
    if one.form == "line" and isinstance(one.content, tuple):
        return element("figure", _line(one.content), about, class_="seen")
    return element("figure", element("code", str(one.content)), about, class_="seen")


def _line(values: tuple[float, ...]) -> Element:
    """Numbers as a line, from the smallest to the largest."""
    low, high = min(values), max(values)
    scale = 40 / (high - low) if high > low else 0.0
    step = 200 / max(len(values) - 1, 1)
    points = " ".join(f"{k * step:.1f},{42 - (v - low) * scale:.1f}" for k, v in enumerate(values))
    line = element("polyline", points=points)
    about = f"{len(values)} numbers from {low:.3g} to {high:.3g}"
    return element("svg", line, viewBox="0 0 200 44", role="img", aria_label=about)


def _answered(one: Answered) -> Element:
    kind = "prose" if one.prose else "n"
    heads = [(one.heads[0], ""), (one.heads[1], kind), (one.heads[2], kind)]
    rows = [
        element("tr", element("th", name, scope="row"), cell(a, "", kind), cell(b, "", kind))
        for name, a, b in one.rows
    ]
    return element("div", table(heads, rows), element("p", one.agree, class_="agree"))


def latency(report: Report) -> Element | None:
    """How long each layer takes."""
    if report.latencies is None:
        return None
    times = report.latencies
    predicted = sum(times.layers.values()) + times.rest
    words = "Milliseconds of each layer, in the order in which they run"
    return section(
        "latency",
        "Latency by layer",
        chart("latency", words),
        how(
            "Measured: each layer exported and timed alone in onnxruntime, one example at a time.",
            f"What no layer's choice changes counts {milliseconds(times.rest)} ms (below 0 where "
            f"layers are faster together than alone): {milliseconds(predicted)} ms are predicted.",
            f"Measured, the whole file: {milliseconds(times.measured)} ms.",
        ),
    )


SECTIONS: tuple[Callable[[Report], Element | None], ...] = (
    asked,
    frontier,
    layers,
    bytes_,
    left,
    notes,
    convergence,
    before_and_after,
    latency,
)
