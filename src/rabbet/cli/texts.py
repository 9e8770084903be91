"""How the text in an option is read: a budget, a method with its settings, a file with a plan."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import typer

from rabbet.cli.references import literal
from rabbet.core.budget import METRICS, Budget
from rabbet.core.plan import Plan
from rabbet.errors import BudgetError, FileError, PlanError
from rabbet.files import write_whole
from rabbet.methods import CGMQ, METHODS, CoRa, Method, method_of
from rabbet.methods.base import changed


def drop_of(text: str) -> float:
    """A drop from its text, `0.5` or `<= 0.5`; a usage error for anything else."""
    number = text.strip().removeprefix("<=").removeprefix("≤").strip()
    try:
        drop = float(number)
    except ValueError:
        drop = -1.0
    if not 0 <= drop < math.inf:
        raise typer.BadParameter(
            f"{text!r} is not the most that may be lost, such as '<= 0.5': points of an accuracy "
            "in per cent, or the unit of a function of your own",
            param_hint="--drop",
        )
    return drop


def require_axis(axis: str) -> None:
    """A usage error for what is no metric."""
    if axis not in METRICS:
        raise typer.BadParameter(
            f"{axis!r} is not one of {', '.join(METRICS)}", param_hint="--axis"
        )


def require_beside(axis: str, beside: Budget) -> None:
    """A usage error for limits beside an axis that name it."""
    if any(limit.metric == axis for limit in beside.limits):
        raise typer.BadParameter(
            f"{axis} is the axis, so it cannot be limited beside it as well: name another --axis, "
            "or leave it out",
            param_hint="--budget",
        )


def require_limits(axis: str, limits: tuple[str, str] | None) -> None:
    """A usage error for ends of an axis that cannot be read."""
    for text in limits or ():
        try:
            Budget.parse(f"{axis} <= {text}")
        except BudgetError as e:
            raise typer.BadParameter(
                f"both ends are written as in a budget, such as '5%' '30%': {e}",
                param_hint="--limits",
            ) from None


def require_points(measure: int, held: str | None) -> None:
    """A usage error for too few points to measure, or for what none would be measured on."""
    if measure == 1:
        raise typer.BadParameter(
            "two points or more are measured, both ends among them", param_hint="--measure"
        )
    if not measure and held is not None:
        raise typer.BadParameter(
            "no point is measured on it; say how many are, with --measure", param_hint="--held"
        )


def budget_of(text: str, target: str | None = None) -> Budget:
    """A budget from its text, of the file for a target.

    A usage error, not a broken budget, if it cannot be read.
    """
    try:
        return Budget.parse(text).shipped(target)
    except BudgetError as e:
        raise typer.BadParameter(str(e), param_hint="--budget") from None


def budget_of_file(text: str) -> Budget:
    """A budget that a native file can be held against; a usage error for any other."""
    limits = budget_of(text)
    if "latency" in limits.metrics:
        raise typer.BadParameter(
            "a file does not say its latency; measure it with rabbet bench", param_hint="--budget"
        )
    if limits.files:
        raise typer.BadParameter(
            "a native file does not say how long an exported one is; write it with rabbet export",
            param_hint="--budget",
        )
    return limits


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
    presets: dict[str, Callable[[], Any]] = {
        **METHODS,
        "cora.paper": CoRa.paper,
        "cgmq.paper": CGMQ.paper,
    }
    if name not in presets:
        raise typer.BadParameter(
            f"{name!r} is not one of {', '.join(presets)}", param_hint="--method"
        )
    try:
        method = presets[name]()
        for setting in settings:
            key, _, value = setting.partition("=")
            method = changed(method, key, literal(value))
    except PlanError as e:
        raise typer.BadParameter(str(e), param_hint="--method") from None
    worker: Method = method
    return worker


def values_of(method: Method, texts: Sequence[str]) -> dict[str, list[Any]]:
    """The values of settings to be swept over, from texts such as `bits=2;3;4`.

    A usage error for a setting that is not there or a value that it does not take.
    """
    tried: dict[str, list[Any]] = {}
    for text in texts:
        name, _, values = text.partition("=")
        if not name or not values:
            raise typer.BadParameter(
                f"{text!r} is no setting with its values, such as 'bits=2;3;4'", param_hint="--set"
            )
        for value in values.split(";"):
            tried.setdefault(name, []).append(literal(value))
            try:
                changed(method, name, literal(value))
            except PlanError as e:
                raise typer.BadParameter(str(e), param_hint="--set") from None
    return tried


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
