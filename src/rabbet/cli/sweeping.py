"""The commands about many budgets at once: frontier, sweep."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rabbet.cli import options

if TYPE_CHECKING:
    from rabbet.cli.judge import Judge

Picture = Annotated[
    Path | None, typer.Option(dir_okay=False, help="Draw a picture (.svg, .png, .pdf), too.")
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE;VALUE...",
        help="A setting of the method and its values: 'bits=2;3;4'; may be given several "
        "times, for every combination.",
    ),
]


def frontier(
    model: options.Model = None,
    data: options.Data = None,
    outputs: options.Outputs = None,
    axis: options.Axis = "bytes",
    budget: Annotated[
        str | None, typer.Option(help="Limits that hold at every point, beside the axis.")
    ] = None,
    limits: Annotated[
        tuple[str, str] | None,
        typer.Option(
            help="Both ends of the axis, as in a budget: '5%' '30%'. Default: all that can be "
            "reached."
        ),
    ] = None,
    points: Annotated[int, typer.Option(min=2, help="Points, at most.")] = 200,
    measure: Annotated[
        int,
        typer.Option(
            min=0, metavar="K", help="Fit so many points, and measure them on --held; 0: none."
        ),
    ] = 0,
    held: options.Held = None,
    method: options.MethodText = None,
    quality: options.Quality = "default",
    seed: options.Seed = 0,
    resume: options.Resume = None,
    processes: options.Processes = 1,
    html: options.Html = None,
    as_json: options.Json = False,
) -> None:
    """Show what every budget along an axis buys; candidates are solved once for all of them."""
    from rabbet._frontier import frontier as find
    from rabbet.cli import pages, tables, texts
    from rabbet.cli.inputs import open_held, open_inputs
    from rabbet.cli.terminal import working

    texts.require_axis(axis)
    beside = None if budget is None else texts.budget_of(budget)
    if beside is not None:
        texts.require_beside(axis, beside)
    texts.require_limits(axis, limits)
    texts.require_points(measure, held)
    worker = texts.worker_of(method, quality)
    pages.ready(html, "--html", model, data, held)
    inputs = open_inputs(model, data, outputs=outputs)
    judge = open_held(model, held, inputs) if measure else None
    with working(resume, processes, as_json) as jobs:
        examples = None if judge is None else judge.examples(inputs.network)
        found = find(
            inputs.network, inputs.task, axis, beside=beside, limits=limits, points=points,
            method=worker, seed=seed, jobs=jobs,
        )  # fmt: skip
        if judge is not None:
            found = found.measure(measure, judge, examples)
    tables.tell(as_json, lambda: found.facts() | {"seed": seed}, lambda: found.parts)
    if html is not None:  # at the end: what was found is not lost if it fails
        found.report(html)


def sweep(
    model: options.Model = None,
    data: options.Data = None,
    outputs: options.Outputs = None,
    budgets: Annotated[
        list[str] | None,
        typer.Option(
            "--budget",
            help=f"A budget; may be given several times. Default: {options.DEFAULT_BUDGET}.",
        ),
    ] = None,
    settings: Settings = None,
    held: options.Held = None,
    plot: Picture = None,
    method: options.MethodText = None,
    quality: options.Quality = "default",
    seed: options.Seed = 0,
    resume: options.Resume = None,
    processes: options.Processes = 1,
    html: options.Html = None,
    as_json: options.Json = False,
) -> None:
    """Compress for each budget and each value of settings; they share what is solved."""
    from rabbet._sweep import sweep as run
    from rabbet.cli import pages, tables, texts
    from rabbet.cli.inputs import open_held, open_inputs
    from rabbet.cli.stored import writable
    from rabbet.cli.terminal import working
    from rabbet.report.picture import require_picture

    asked = [texts.budget_of(text) for text in budgets or [options.DEFAULT_BUDGET]]
    worker = texts.worker_of(method, quality)
    tried = texts.values_of(worker, settings or [])
    if plot is not None:
        writable(plot)
        require_picture(plot)
    pages.ready(html, "--html", model, data, held, plot)
    inputs = open_inputs(model, data, outputs=outputs)
    judge = open_held(model, held, inputs, required=plot is not None)
    given = inputs.network, asked, inputs.task, tried, worker
    with working(resume, processes, as_json) as jobs:
        found = run(*given, measure=judge, seed=seed, jobs=jobs)
    facts, parts = _measured(judge)
    tables.tell(
        as_json,
        lambda: found.facts() | {"seed": seed, "measured": facts},
        lambda: [found.table, *parts, *found.errors],
    )
    if html is not None:  # pictures at the end: what was found is not lost if one fails
        found.report(html)
    if plot is not None:
        plot.parent.mkdir(parents=True, exist_ok=True)
        found.plot(plot)


def _measured(judge: "Judge | None") -> tuple[dict[str, str] | None, list[str]]:
    """What was measured, on what: for JSON, and for people."""
    if judge is None:
        return None, []
    on = {"quantity": judge.quantity, "on": judge.reference}
    return on, [f"measure: {judge.quantity}, on {judge.reference}"]
