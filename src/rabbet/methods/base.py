"""What a method is."""

from dataclasses import dataclass
from typing import Protocol

from torch import nn

from rabbet.core.budget import Budget
from rabbet.core.plan import Plan
from rabbet.workpiece import Workpiece


@dataclass(frozen=True)
class Fitted:
    """A compressed network, and in words what was done to it."""

    model: nn.Module
    notes: tuple[str, ...]


class Method(Protocol):
    """A frozen dataclass whose fields are its settings.

    Choosing and fitting are two calls, so that a plan can be seen, edited by hand and then applied.
    """

    def plan(self, piece: Workpiece, budget: Budget) -> Plan:
        """Choose what becomes of every layer; raises BudgetError at once if no choice keeps the budget."""
        ...

    def fit(self, piece: Workpiece, plan: Plan) -> Fitted:
        """Find the numbers of a plan, this method's or one made by hand; raises PlanError if it does not fit."""
        ...
