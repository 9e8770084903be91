"""Budgets along an axis: the same limits beside, and one that is tightened step by step."""

from collections.abc import Iterator, Sequence
from decimal import ROUND_CEILING, Context, Decimal

import numpy as np

from rabbet.choose.program import Allocator, Priced
from rabbet.core.budget import METRICS, Budget, Limit
from rabbet.core.cost import Cost
from rabbet.core.plan import Plan
from rabbet.errors import BudgetError

DIGITS = Context(prec=4, rounding=ROUND_CEILING)  # of the limits of points


def budgets_along(
    allocator: Allocator,
    axis: str,
    beside: Budget | None,
    ends: tuple[Limit, Limit] | None,
    points: int,
) -> list[Budget]:
    """Budgets evenly spaced on a logarithmic axis, the loosest first, each with those beside it.

    At most so many: budgets that allow the same amount are one.

    ends: the first and the last limit, in any order; None: of what the plans need that take the
    most and the least. Raises BudgetError if no plan keeps the limits beside.
    """
    whole = allocator.piece.float_cost
    if ends is None:
        least, most = (METRICS[axis].amount(cost) for cost in allocator.ends(axis, beside))
        pair = tuple(
            limit_of(axis, amount, whole) for amount in (max(most, least, 1), max(least, 1))
        )
    else:
        pair = tuple(sorted(ends, key=lambda limit: -limit.amount(whole)))
    high, low = (limit.amount(whole) for limit in pair)
    values = np.geomspace(max(high, 1), max(low, 1), points)[1:-1].tolist()
    # Written with few digits a limit may come out above the loosest.
    between = [
        limit if (limit := limit_of(axis, value, whole)).amount(whole) < high else pair[0]
        for value in values
    ]
    # Of those that allow the same the last, which is as it was given.
    told = {limit.amount(whole): limit for limit in (pair[0], *between, pair[1])}
    return [joined(Budget((limit,)), beside) for limit in told.values()]


def ends_of(axis: str, texts: tuple[str, str]) -> tuple[Limit, Limit]:
    """Both ends of an axis as they stand in a budget, such as ("5%", "30%").

    Raises BudgetError unless they are two texts of one limit each.
    """
    pair = isinstance(texts, tuple | list) and len(texts) == 2
    if not pair or not all(isinstance(text, str) for text in texts):
        raise BudgetError(
            "limits are both ends of the axis as they stand in a budget, such as ('5%', '30%'); "
            f"found {texts!r}"
        )
    parsed = [Budget.parse(f"{axis} <= {text}").limits for text in texts]
    for text, limits in zip(texts, parsed, strict=True):
        if len(limits) > 1:
            raise BudgetError(f"an end of the axis is one limit of {axis}; found {text!r}")
    return parsed[0][0], parsed[1][0]


def joined(budget: Budget, beside: Budget | None) -> Budget:
    """A budget with the limits beside it, but for those that it names itself."""
    named = {limit.metric for limit in budget.limits}
    more = () if beside is None else (x for x in beside.limits if x.metric not in named)
    return Budget((*budget.limits, *more))


def tighter_only(piece: Priced, budgets: Sequence[Budget], plans: Sequence[Plan]) -> Iterator[Plan]:
    """The plans, the last one again where it keeps the next budget as well: it harms no more.

    Of plans that harm alike the program takes any, so that of a tighter budget may cost more.
    """
    last, whole = plans[0], piece.float_cost
    for budget, plan in zip(budgets, plans, strict=True):
        if any(limit.broken_by(piece.cost(last), whole) for limit in budget.limits):
            last = plan
        yield last


def limit_of(axis: str, amount: float, whole: Cost) -> Limit:
    """A limit of about an amount, and not below it, that can be written down."""
    metric = METRICS[axis]
    share = axis not in ("bits", "bpw")
    base = metric.amount(whole) if share else whole.weights
    value = DIGITS.create_decimal(Decimal(amount) / Decimal(max(base, 1)) * (100 if share else 1))
    text = f"{axis} <= {value:f}{'%' if share else ''}"
    return Budget.parse(text).limits[0]
