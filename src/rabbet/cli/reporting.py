"""The command that makes a page of a file: report."""

from pathlib import Path
from typing import Annotated

import typer

from rabbet.cli import options


def report(
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="A native file, or a folder, as compress writes it."),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", dir_okay=False, help="The page to write: .html.")
    ],
    model: Annotated[
        str | None,
        typer.Option(
            help=f"The network that the file holds: {options.NETWORK}. With it the page shows "
            "errors of layers, and examples before and after."
        ),
    ] = None,
    data: options.Data = None,
    test: options.Test = None,
    budget: Annotated[
        str | None, typer.Option(help=f"What was asked for: {options.BUDGET}.")
    ] = None,
    exported: Annotated[
        list[Path] | None,
        typer.Option(exists=True, dir_okay=False, help="Files that were exported from it."),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Make a page of a file that a browser shows: one HTML file, which loads nothing else."""
    from rabbet.cli import pages, tables, texts
    from rabbet.cli.inputs import open_inputs
    from rabbet.cli.stored import require_there

    limits = None if budget is None else texts.budget_of_file(budget)
    if model is None and (data is not None or test is not None):
        given = "--data" if data is not None else "--test"
        raise typer.BadParameter(f"{given} needs the network", param_hint="--model")
    require_there(file)
    pages.ready(output, "--output", file, *(exported or []), model, data, test)
    inputs = None if model is None else open_inputs(model, data, test)
    facts = pages.write_stored(file, output, limits, inputs, exported or [])
    if as_json:
        tables.print_json(facts)
    else:
        print(f"{output}: {facts['bytes']:,} bytes, for a browser")
