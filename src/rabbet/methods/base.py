"""The interface of a method."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Protocol, TypeVar, runtime_checkable

from torch import nn

from rabbet.choose.search import Chooser
from rabbet.core.budget import Budget
from rabbet.core.cost import Cost
from rabbet.core.plan import Plan
from rabbet.errors import PlanError
from rabbet.workpiece import Workpiece

M = TypeVar("M", bound="Method")


@dataclass(frozen=True)
class Fitted:
    """A compressed network, and notes for the user on how it was made.

    counted: the cost that the method held against its budget, if it is not that of what is stored.
    errors: of layers, relative, as the method found them; None: a layer is compared with the float
    one.
    """

    model: nn.Module
    notes: tuple[str, ...]
    counted: Cost | None = None
    errors: Mapping[str, float] | None = None


class Method(Protocol):
    """A frozen dataclass whose fields are its settings.

    Planning and fitting are two calls, so that a plan can be read and edited before it is applied.
    """

    def plan(self, piece: Workpiece, budget: Budget) -> Plan:
        """Choose how every layer is compressed.

        Raises BudgetError, before any long work, if no choice keeps the budget.
        """
        ...

    def fit(self, piece: Workpiece, plan: Plan) -> Fitted:
        """Find the codes and scales for a plan, this method's or one written by hand.

        Raises PlanError for a plan that does not suit the network or the method.
        """
        ...


def preset(method: type[M], settings: Mapping[str, Any], changes: Mapping[str, Any]) -> M:
    """A method with these settings, and some of them or others changed.

    Raises PlanError for a setting that there is not.
    """
    unknown = sorted(changes.keys() - {f.name for f in fields(method)})  # type: ignore[arg-type]
    if unknown:
        raise PlanError(f"{method.__name__} has no setting {unknown[0]!r}")
    return method(**{**settings, **changes})


@runtime_checkable
class Searching(Protocol):
    """A method that finds the plans for many budgets at once."""

    def chooser(self, piece: Workpiece) -> Chooser:
        """What plans are chosen from, with nothing solved yet."""
        ...


def changed(settings: Any, name: str, value: Any) -> Any:
    """The settings of a method with one changed; `a.b` is setting b of setting a.

    Raises PlanError for a setting that is not there, and for a value that it does not take.
    """
    own, dot, inner = name.partition(".")
    known = [field.name for field in fields(settings)] if is_dataclass(settings) else []
    if own not in known:
        raise PlanError(f"{own!r} is no setting; there are {', '.join(known) or 'none'}")
    new = changed(getattr(settings, own), inner, value) if dot else value
    return replace(settings, **{own: new})
