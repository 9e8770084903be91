"""The integer program: one option per layer, every limit of the budget as a row, least total score.

This is the only place that brings a plan under its limits. The program works in floating point, so
its answer is counted again in whole numbers; if that is over a limit, within the tolerance of the
solver, the program is solved again with less room.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from rabbet.core.budget import METRICS, Budget, heaviest
from rabbet.core.cost import Cost
from rabbet.core.plan import LayerPlan, Plan, quoted
from rabbet.errors import BudgetError, ModelError

NODES = 20_000  # of the search; a limit in seconds would give other plans on a busy machine


@dataclass(frozen=True, slots=True)
class Option:
    """One way to compress a layer, and what it costs."""

    plan: LayerPlan
    cost: Cost


Table = Sequence[Sequence[Option]]
Exact = Callable[[Plan], Cost]
"""The true cost of a plan, in whole numbers."""


def picked(table: Table, choice: Sequence[int]) -> Plan:
    """The plan that takes one option for each layer."""
    return Plan(tuple(row[k].plan for row, k in zip(table, choice, strict=True)))


def smallest(table: Table, metric: str) -> list[int]:
    """The cheapest option of every layer by one metric."""
    amount = METRICS[metric].amount
    return [min(range(len(row)), key=lambda k: amount(row[k].cost)) for row in table]


def require_feasible(table: Table, budget: Budget, whole: Cost, exact: Exact) -> None:
    """Refuse a budget that no choice of options meets, before anything is solved.

    Raises BudgetError naming the smallest reachable value and the layers that cost most there.
    """
    for limit in budget.limits:
        choice = smallest(table, limit.metric)
        cost = exact(picked(table, choice))
        if limit.broken_by(cost, whole):
            metric = METRICS[limit.metric]
            reached, base = metric.amount(cost), metric.amount(whole)
            costs = {row[k].plan.name: row[k].cost for row, k in zip(table, choice, strict=True)}
            rest = reached - sum(metric.amount(c) for c in costs.values())
            what = "header and all else" if limit.metric == "bytes" else "all else"
            heavy = rest > max(map(metric.amount, costs.values()))
            beside = f"; {what} {metric.show(rest, whole.weights)}" if heavy else ""
            least = metric.show(reached, whole.weights)
            allowed = metric.show(limit.amount(whole), whole.weights)
            raise BudgetError(
                f"{limit.text!r} cannot be met: the smallest reachable value is "
                f"{least} {limit.metric} "
                f"({100 * reached / max(base, 1):.4g}% of float32), {allowed} were allowed. "
                f"The heaviest layers at that point: {heaviest(costs, limit.metric)}{beside}"
            )
    if len(budget.limits) > 1:
        zero = [[0.0] * len(row) for row in table]
        if _solve(zero, table, budget, whole, exact, {}) is None:
            raise BudgetError(
                f"each limit of '{budget}' can be met, but not all at once; loosen one of them"
            )


def allocate(
    scores: Sequence[Sequence[float]], table: Table, budget: Budget, whole: Cost, exact: Exact
) -> Plan:
    """The plan of least total score under all limits.

    scores: how much each option harms, [layers][options]. exact: the cost that the budget is
    checked against. Raises ModelError naming a layer whose scores are not finite, BudgetError if no
    choice keeps the budget.
    """
    for row, options in zip(scores, table, strict=True):
        if not np.isfinite(row).all():
            raise ModelError(
                f"the scores of {quoted(options[0].plan.name)} are not finite: {list(row)}"
            )
    room: dict[str, int] = {}
    for _ in range(8):
        choice = _solve(scores, table, budget, whole, exact, room)
        if choice is None:
            break
        plan = picked(table, choice)
        cost = exact(plan)
        over = {x.metric: METRICS[x.metric].amount(cost) - x.amount(whole) for x in budget.limits}
        if all(excess <= 0 for excess in over.values()):
            return plan
        for metric, excess in over.items():
            room[metric] = room.get(metric, 0) + max(0, excess)
    # The tightest corner: the smallest choice is known to fit a single limit.
    for limit in budget.limits:
        plan = picked(table, smallest(table, limit.metric))
        cost = exact(plan)
        if not any(x.broken_by(cost, whole) for x in budget.limits):
            return plan
    raise BudgetError(f"no choice of options keeps '{budget}' in whole numbers; loosen it a little")


def _solve(
    scores: Sequence[Sequence[float]],
    table: Table,
    budget: Budget,
    whole: Cost,
    exact: Exact,
    room: dict[str, int],
) -> list[int] | None:
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    layer = np.repeat(np.arange(len(table)), [len(row) for row in table])
    flat = np.concatenate([np.asarray(row, float) for row in scores])
    one_each = csr_array((np.ones(len(layer)), (layer, np.arange(len(layer)))))
    constraints = [LinearConstraint(one_each, 1, 1)]
    base = exact(picked(table, [0] * len(table)))
    for limit in budget.limits:
        amount = METRICS[limit.metric].amount
        column = np.array([amount(option.cost) for row in table for option in row], float)
        # What no option changes (untouched tensors, the fixed part of the header) is the difference
        # between the reference plan and the sum of its options.
        fixed = amount(base) - sum(amount(row[0].cost) for row in table)
        allowed = limit.amount(whole) - fixed - room.get(limit.metric, 0)
        if allowed <= 0 and column.min() > 0:
            return None
        scale = max(float(allowed), 1.0)
        constraints.append(
            LinearConstraint(csr_array(column[None] / scale), -np.inf, allowed / scale)
        )
    top = flat.max()
    # Rarely, HiGHS writes a line of its own to the process's standard output, which no option
    # stops; the descriptor is the process's, and only the command line, which owns it, moves it.
    result = milp(
        flat / top * 1e3 if top > 0 else flat,
        constraints=constraints,
        integrality=np.ones(len(flat)),
        bounds=Bounds(0, 1),
        options={"node_limit": NODES, "mip_rel_gap": 1e-4},
    )
    if result.x is None:
        return None
    parts = np.split(result.x, np.cumsum([len(r) for r in table])[:-1])
    return [int(np.argmax(part)) for part in parts]
