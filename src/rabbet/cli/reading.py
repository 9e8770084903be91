"""The commands that need a file and no network: show, check, compare."""

from pathlib import Path
from typing import Annotated

import typer

from rabbet.cli import options

File = Annotated[
    Path, typer.Argument(metavar="FILE", help="A native file, or a folder, as compress writes it.")
]


def show(file: File, as_json: options.Json = False) -> None:
    """Show the plan of a file, what it costs, and what is left alone."""
    from rabbet.cli import tables
    from rabbet.cli.stored import Stored
    from rabbet.report.facts import plan_facts
    from rabbet.report.text import report_parts

    stored = Stored.read(file)
    content = stored.survey, stored.plan, stored.cost, stored.float_cost
    if as_json:
        tables.print_json({"file": str(file)} | plan_facts(*content))
    else:
        tables.show(report_parts(*content))


def check(
    file: File,
    budget: Annotated[str, typer.Option(help=f"{options.BUDGET}.")],
    as_json: options.Json = False,
) -> None:
    """Hold a file against a budget: exit code 0 if it is within, 1 if it is over."""
    from rabbet.cli import tables, texts
    from rabbet.cli.stored import Stored
    from rabbet.report.facts import limit_facts
    from rabbet.report.text import standings

    limits = texts.budget_of_file(budget).limits
    stored = Stored.read(file)
    stood = standings(stored.cost, stored.float_cost, limits)
    over = any(standing.over for standing in stood)
    if as_json:
        held = [limit_facts(standing) for standing in stood]
        tables.print_json({"file": str(file), "within": not over, "limits": held})
    else:
        for standing in stood:
            print(standing.verdict())
    if over:
        raise typer.Exit(1)


def compare(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE...", help="Native files or folders, two or more.")
    ],
    model: Annotated[
        str | None, typer.Option(help=f"The network that they hold: {options.NETWORK}.")
    ] = None,
    test: options.Test = None,
    as_json: options.Json = False,
) -> None:
    """Show files side by side: cost, accuracy where a network is given, and where plans differ."""
    from rabbet.cli import comparing, tables
    from rabbet.cli.stored import Stored

    if len(files) < 2:
        raise typer.BadParameter("give at least two files", param_hint="FILE...")
    stored = [Stored.read(file) for file in files]
    scores = comparing.scores_of(files, model, test)
    if as_json:
        tables.print_json(comparing.facts(stored, scores))
    else:
        tables.show(comparing.parts(stored, scores))
