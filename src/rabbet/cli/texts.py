"""How the text in an option is read: a budget, a method with its settings, a file with a plan."""

from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import typer

from rabbet.cli.references import literal
from rabbet.core.budget import Budget
from rabbet.core.plan import Plan
from rabbet.errors import BudgetError, FileError, PlanError
from rabbet.files import write_whole
from rabbet.methods import METHODS, Method, method_of


def budget_of(text: str, target: str | None = None) -> Budget:
    """A budget from its text, of the file for a target.

    A usage error, not a broken budget, if it cannot be read.
    """
    try:
        return Budget.parse(text).shipped(target)
    except BudgetError as e:
        raise typer.BadParameter(str(e), param_hint="--budget") from None


def worker_of(text: str | None, quality: str = "default") -> Method:
    """A method from its text, such as `cora bits=3`; without any the default one, of a quality.

    A usage error for a name or a setting that is not there, for a value that the setting does not
    take, or for a quality of a method that has none.
    """
    method = None if text is None else _method(text)
    try:
        return method_of(method, quality)
    except PlanError as e:
        raise typer.BadParameter(str(e), param_hint="--quality") from None


def _method(text: str) -> Method:
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
    worker: Method = method
    return worker


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
    new = literal(value)
    whole = isinstance(new, int) and not isinstance(new, bool) and float in kinds
    if inner or (kinds and type(new) not in kinds and not whole):
        wanted = " or ".join("none" if k is type(None) else k.__name__ for k in kinds)
        raise typer.BadParameter(
            f"{text!r}: the value must be of type {wanted}", param_hint="--method"
        )
    return replace(settings, **{name: new})


def plan_of_file(path: Path) -> Plan:
    """A plan from a text file.

    Raises FileError for a file that cannot be read, PlanError for one that holds no plan.
    """
    try:
        return Plan.parse(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as e:
        raise FileError(f"the plan {path} cannot be read: {e}") from None
    except PlanError as e:
        raise PlanError(f"{path}: {e}") from None


def write_plan(path: Path, plan: Plan) -> None:
    """Write a plan as text, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, [f"{plan}\n".encode()])
