"""The options that commands share, and how their text is read."""

from pathlib import Path
from typing import Annotated

import typer

from rabbet.cost import Budget
from rabbet.errors import BudgetError, FileError, PlanError
from rabbet.methods.joint import QUALITY
from rabbet.plan import Plan

DEFAULT_BUDGET = "bytes <= 10%"


def known_quality(name: str) -> str:
    """The name of a tier; a usage error for any other."""
    if name not in QUALITY:
        raise typer.BadParameter(f"{name!r} is not one of {', '.join(QUALITY)}")
    return name


REFERENCE = "module:callable or file.py:callable, called without arguments"

Model = Annotated[
    str | None, typer.Argument(metavar="MODEL", help=f"The trained network: {REFERENCE}. Default: the demo network.")
]
Data = Annotated[str | None, typer.Option(help=f"Unlabelled batches or a Task: {REFERENCE}.")]
Test = Annotated[
    str | None,
    typer.Option(help="Batches of (inputs, labels), or a function from a model to a number, named likewise."),
]
BudgetText = Annotated[str, typer.Option("--budget", help="Such as 'bytes <= 10%, bops <= 0.5%'.")]
OptionalBudget = Annotated[
    str | None,
    typer.Option("--budget", help=f"Such as 'bytes <= 10%, bops <= 0.5%'. Default without --plan: {DEFAULT_BUDGET}."),
]
Quality = Annotated[
    str, typer.Option(callback=known_quality, metavar="|".join(QUALITY), help="How long to tune after the choice.")
]
Seed = Annotated[int, typer.Option(min=0, help="The same seed gives the same bytes.")]
Resume = Annotated[
    Path | None, typer.Option(metavar="DIR", file_okay=False, help="Keep finished work here and go on from it.")
]
Jobs = Annotated[int, typer.Option(min=1, metavar="N", help="Processes that solve layers.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


def budget_of(text: str) -> Budget:
    """A budget from its text; a usage error, not a broken budget, if it cannot be read."""
    try:
        return Budget.parse(text)
    except BudgetError as e:
        raise typer.BadParameter(str(e), param_hint="--budget") from None


def plan_of_file(path: Path) -> Plan:
    """A plan from a text file; raises FileError for a file that cannot be read, PlanError for one that is no plan."""
    try:
        return Plan.parse(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as e:
        raise FileError(f"the plan {path} cannot be read: {e}") from None
    except PlanError as e:
        raise PlanError(f"{path}: {e}") from None
