"""The options that commands share, and how their text is read."""

import ast
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer

from rabbet.core.budget import Budget
from rabbet.core.plan import Plan
from rabbet.errors import BudgetError, FileError, PlanError
from rabbet.methods import METHODS, QUALITY, Method

DEFAULT_BUDGET = "bytes <= 10%"


def known_quality(name: str) -> str:
    """The name of a tier; a usage error for any other."""
    if name not in QUALITY:
        raise typer.BadParameter(f"{name!r} is not one of {', '.join(QUALITY)}")
    return name


REFERENCE = "module:callable or file.py:callable, called without arguments"
NETWORK = f"{REFERENCE}, or a folder of Hugging Face's save_pretrained"

Model = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL", help=f"The trained network: {NETWORK}. Default: the demo network."
    ),
]
Data = Annotated[str | None, typer.Option(help=f"Unlabelled batches or a Task: {REFERENCE}.")]
Test = Annotated[
    str | None,
    typer.Option(
        help="Batches of (inputs, labels), or a function from a model to a number, named likewise."
    ),
]
BudgetText = Annotated[str, typer.Option("--budget", help="Such as 'bytes <= 10%, bops <= 0.5%'.")]
OptionalBudget = Annotated[
    str | None,
    typer.Option(
        "--budget",
        help=f"Such as 'bytes <= 10%, bops <= 0.5%'. Default without --plan: {DEFAULT_BUDGET}.",
    ),
]
Quality = Annotated[
    str,
    typer.Option(
        callback=known_quality, metavar="|".join(QUALITY), help="How long to tune after the choice."
    ),
]
MethodText = Annotated[
    str | None,
    typer.Option(
        "--method",
        metavar="NAME [SETTING=VALUE ...]",
        help=f"One of {', '.join(METHODS)}, with settings: 'cora bits=3 tuning.steps=0'. Default: joint.",
    ),
]
Output = Annotated[
    Path,
    typer.Option(
        "--output", "-o", dir_okay=False, help="The file to write; its ending says what it is."
    ),
]
Seed = Annotated[
    int, typer.Option(min=0, max=2**32 - 1, help="The same seed gives the same bytes.")
]
Resume = Annotated[
    Path | None,
    typer.Option(metavar="DIR", file_okay=False, help="Keep finished work here and go on from it."),
]
Processes = Annotated[
    int, typer.Option("--jobs", min=1, metavar="N", help="Processes that solve layers.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


def budget_of(text: str) -> Budget:
    """A budget from its text; a usage error, not a broken budget, if it cannot be read."""
    try:
        return Budget.parse(text)
    except BudgetError as e:
        raise typer.BadParameter(str(e), param_hint="--budget") from None


def method_of(text: str | None, quality: str = "default") -> Method:
    """A method from its text, such as `cora bits=3 ranking.steps=50`; without any, `Joint` of a quality.

    A usage error for a name or a setting that is not there, or a value that the setting does not
    take.
    """
    if text is None:
        return QUALITY[quality]
    if quality != "default":
        raise typer.BadParameter(
            "it is a setting of the default method; leave it out", param_hint="--quality"
        )
    name, *settings = text.split() or [""]
    if name not in METHODS:
        raise typer.BadParameter(
            f"{name!r} is not one of {', '.join(METHODS)}", param_hint="--method"
        )
    try:
        method: Any = METHODS[name]()
        for setting in settings:
            method = _with(method, *setting.partition("=")[::2], setting)
    except PlanError as e:
        raise typer.BadParameter(str(e), param_hint="--method") from None
    found: Method = method
    return found


def _with(settings: Any, name: str, value: str, text: str) -> Any:
    """Settings with one changed; `a.b` is setting b of setting a."""
    name, _, inner = name.partition(".")
    known = [f.name for f in fields(settings)]
    if name not in known:
        raise typer.BadParameter(
            f"{text!r} is no setting; there are {', '.join(known)}", param_hint="--method"
        )
    old = getattr(settings, name)
    if inner and is_dataclass(old):
        return replace(settings, **{name: _with(old, inner, value, text)})
    kind = get_type_hints(type(settings))[name]
    options = get_args(kind) if isinstance(kind, UnionType) else (kind,)
    kinds = [k for k in (get_origin(one) or one for one in options) if isinstance(k, type)]
    try:
        new = ast.literal_eval(value)
    except (ValueError, SyntaxError):
        new = value  # a word
    whole = isinstance(new, int) and not isinstance(new, bool) and float in kinds
    if inner or (kinds and type(new) not in kinds and not whole):
        wanted = " or ".join("none" if k is type(None) else k.__name__ for k in kinds)
        raise typer.BadParameter(
            f"{text!r}: the value must be of type {wanted}", param_hint="--method"
        )
    return replace(settings, **{name: new})


def plan_of_file(path: Path) -> Plan:
    """A plan from a text file; raises FileError for a file that cannot be read, PlanError for one that is no plan."""
    try:
        return Plan.parse(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as e:
        raise FileError(f"the plan {path} cannot be read: {e}") from None
    except PlanError as e:
        raise PlanError(f"{path}: {e}") from None
