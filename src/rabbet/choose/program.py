"""The integer program: one option per layer, every limit of the budget as a row, least total score.

This is the only place that brings a plan under its limits. Every limit is exact, the bytes too: the
header's padding and its digits are part of the program (`core.frame`). The solver works in floating
point, so each answer is counted again in whole numbers; one that is over a limit, within the
tolerance of the solver, is taken out, and the program solved again. A budget is refused only once
nothing is left.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Protocol

import numpy as np

from rabbet.choose.milp import IntegerProgram
from rabbet.core.budget import FILES, METRICS, Budget, Limit, heaviest
from rabbet.core.cost import Cost
from rabbet.core.frame import Frame, Rows, Step
from rabbet.core.plan import LayerPlan, Plan, quoted
from rabbet.core.survey import Left
from rabbet.errors import BudgetError, ModelError

CUTS = 200  # answers that are taken out before the limits are tightened instead
ROUNDS = 8  # of tightening
ALIGNED = 8  # bytes that the header is padded to


@dataclass(frozen=True, slots=True)
class Option:
    """One way to compress a layer, and what it costs."""

    plan: LayerPlan
    cost: Cost


Table = Sequence[Sequence[Option]]


class Priced(Protocol):
    """What knows the true cost of a plan, in whole numbers: a `Workpiece`."""

    @property
    def float_cost(self) -> Cost:
        """What the float32 network costs."""
        ...

    @property
    def left(self) -> Sequence[Left]:
        """What is left alone, and takes its bytes under any plan."""
        ...

    def cost(self, plan: Plan) -> Cost:
        """The exact cost of a plan."""
        ...

    def frame(self, rows: Rows) -> Frame | None:
        """The header of every plan that takes one line of each row; None: bytes simply add up."""
        ...

    def steps(self, metric: str, rows: Rows) -> Sequence[Step]:
        """What the lines share in an exported file, which is counted once."""
        ...


def picked(table: Table, choice: Sequence[int]) -> Plan:
    """The plan that takes one option for each layer."""
    return Plan(tuple(row[k].plan for row, k in zip(table, choice, strict=True)))


def smallest(table: Table, metric: str) -> list[int]:
    """The cheapest option of every layer by one metric."""
    amount = METRICS[metric].amount
    return [min(range(len(row)), key=lambda k: amount(row[k].cost)) for row in table]


def require_feasible(table: Table, budget: Budget, piece: Priced) -> None:
    """Refuse a budget that no choice of options meets, before anything is solved.

    Raises BudgetError naming the smallest reachable value and the layers that cost most there.
    """
    for limit in budget.limits:
        choice = _least(table, limit, piece)
        cost, whole = piece.cost(picked(table, choice)), piece.float_cost
        if limit.broken_by(cost, whole):
            metric = METRICS[limit.metric]
            reached, base = metric.amount(cost), metric.amount(whole)
            costs = {row[k].plan.name: row[k].cost for row, k in zip(table, choice, strict=True)}
            rest = reached - sum(metric.amount(c) for c in costs.values())
            what = "header and all else" if limit.metric == "bytes" else "all else"
            heavy = rest > max(map(metric.amount, costs.values()))
            beside = f"; {what} {metric.show(rest, whole.weights)}" if heavy else ""
            stored = limit.metric in ("bytes", *FILES)
            left = sorted(piece.left, key=lambda x: -x.bytes)[:3] if stored else ()
            if heavy and left:
                named = ", ".join(f"{quoted(x.name)} {x.bytes:,}" for x in left)
                beside += f", of which is left alone: {named}"
            least = metric.show(reached, whole.weights)
            allowed = metric.show(limit.amount(whole), whole.weights)
            raise BudgetError(
                f"{limit.text!r} cannot be met: the smallest reachable value is "
                f"{least} {limit.unit} "
                f"({100 * reached / max(base, 1):.4g}% of float32), {allowed} were allowed. "
                f"The heaviest layers at that point: {heaviest(costs, limit.metric)}{beside}"
            )
    if len(budget.limits) > 1:
        together, proven = _landed(_nothing(table), table, budget, piece)
        if together is None and proven:
            raise BudgetError(
                f"each limit of '{budget}' can be met, but not all at once; loosen one of them"
            )


def allocate(
    scores: Sequence[Sequence[float]],
    table: Table,
    budget: Budget,
    piece: Priced,
    gap: float = 0.0,
) -> Plan:
    """The plan of least total score under all limits.

    scores: how much each option harms, [layers][options]. piece: knows the cost that the budget is
    checked against. gap: the share of the score by which another plan may be better.

    Raises ModelError naming a layer whose scores are not finite, BudgetError if no choice keeps the
    budget.
    """
    for row, options in zip(scores, table, strict=True):
        if not np.isfinite(row).all():
            raise ModelError(
                f"the scores of {quoted(options[0].plan.name)} are not finite: {list(row)}"
            )
    choice, proven = _landed(scores, table, budget, piece, gap)
    if choice is not None:
        return picked(table, choice)
    # The tightest corner: the smallest choice is known to fit a single limit.
    for limit in budget.limits:
        plan = picked(table, _least(table, limit, piece))
        if _keeps(plan, budget, piece):
            return plan
    if proven:
        raise BudgetError(f"no choice of options keeps '{budget}'; loosen it a little")
    raise BudgetError(
        f"no choice of options was found that keeps '{budget}', though there may be one; "
        "loosen it a little"
    )


def _nothing(table: Table) -> list[list[float]]:
    """Scores by which all choices are equally good."""
    return [[0.0] * len(row) for row in table]


def _keeps(plan: Plan, budget: Budget, piece: Priced) -> bool:
    cost, whole = piece.cost(plan), piece.float_cost
    return not any(limit.broken_by(cost, whole) for limit in budget.limits)


def _least(table: Table, limit: Limit, piece: Priced) -> list[int]:
    """The choice of least cost by the metric of a limit, or one that keeps the limit.

    Of what adds up it is the cheapest option of every layer. Of bytes another may be smaller by
    the header's padding or by what layers share: then ever smaller ones are asked for until there
    is none.
    """
    choice = smallest(table, limit.metric)
    whole = piece.float_cost
    while limit.metric in ("bytes", *FILES):
        cost = piece.cost(picked(table, choice))
        if not limit.broken_by(cost, whole):
            break
        smaller = Fraction(METRICS[limit.metric].amount(cost) - 1)
        below = Budget((replace(limit, value=smaller, share=False),))
        found, _ = _landed(_nothing(table), table, below, piece)
        if found is None:
            break
        choice = found
    return choice


def _landed(
    scores: Sequence[Sequence[float]],
    table: Table,
    budget: Budget,
    piece: Priced,
    gap: float = 0.0,
) -> tuple[list[int] | None, bool]:
    """The best choice that keeps the budget in whole numbers; None, and whether that is proven."""
    room = dict.fromkeys((limit.metric for limit in budget.limits), 0)
    whole, proven = piece.float_cost, True
    for _ in range(ROUNDS):
        program = _program(table, budget, piece, room)
        excess = dict.fromkeys(room, 0)
        for _ in range(CUTS):
            answer = program.best(scores, gap)
            if answer.choice is None:
                return None, proven and answer.proven
            cost = piece.cost(picked(table, answer.choice))
            over = {
                x.metric: METRICS[x.metric].amount(cost) - x.amount(whole) for x in budget.limits
            }
            if all(amount <= 0 for amount in over.values()):
                return answer.choice, True
            excess = {metric: max(amount, over[metric]) for metric, amount in excess.items()}
            program.exclude(answer.choice)
        proven = False
        room = {metric: amount + excess[metric] for metric, amount in room.items()}
    return None, False


def _program(table: Table, budget: Budget, piece: Priced, room: dict[str, int]) -> IntegerProgram:
    """The program of a budget; room: by how much each limit is tighter than it says."""
    program = IntegerProgram([len(row) for row in table])
    rows = [[option.plan for option in row] for row in table]
    first = [0] * len(table)
    base = piece.cost(picked(table, first))
    for limit in budget.limits:
        amount = METRICS[limit.metric].amount
        amounts = [amount(option.cost) for row in table for option in row]
        # What no option changes (untouched tensors, the fixed part of the header) is the difference
        # between the reference plan and the sum of its options.
        fixed = amount(base) - sum(amount(row[0].cost) for row in table)
        allowed = limit.amount(piece.float_cost) - room[limit.metric]
        frame = piece.frame(rows) if limit.metric == "bytes" else None
        if frame is None:
            steps = piece.steps(limit.metric, rows) if limit.metric in FILES else ()
            _limit_sum(program, amounts, allowed - fixed, steps, program.places(first))
        else:
            _limit_file(program, amounts, allowed - base.bytes, frame, program.places(first))
    return program


def _limit_sum(
    program: IntegerProgram,
    amounts: Sequence[int],
    most: int,
    steps: Sequence[Step],
    first: Sequence[int],
) -> None:
    """Limit a sum of amounts and of steps; `most` is without the steps of a reference choice."""
    taken = sum(s.bytes for s in steps if sum(s.amounts[k] for k in first) >= s.least)
    program.limit(amounts, most + taken, _taken(program, steps))


def _taken(program: IntegerProgram, steps: Sequence[Step]) -> dict[int, int]:
    """A variable for each step, which is 1 where it is reached, and its bytes."""
    bytes_of: dict[int, int] = {}
    for step in steps:
        taken = program.variable(1)
        bytes_of[taken] = step.bytes
        # Unless the step is taken, amounts stay below it.
        program.limit(step.amounts, step.least - 1, {taken: -(step.most - step.least + 1)})
    return bytes_of


def _limit_file(
    program: IntegerProgram, amounts: Sequence[int], more: int, frame: Frame, first: Sequence[int]
) -> None:
    """Limit the bytes of the file to those of a reference choice and `more`.

    The header is its text, in whole units of 8 bytes, and the text has a step up wherever a number
    in it gets a digit more.
    """
    values = [size - line for size, line in zip(amounts, frame.lines, strict=True)]
    units = -(-frame.text(first) // ALIGNED)
    text = _taken(program, frame.steps)
    most = sum(frame.lines) + frame.base + sum(step.bytes for step in frame.steps)
    header = program.variable(-(-most // ALIGNED))
    program.limit(frame.lines, -frame.base, text | {header: -ALIGNED})
    whole = sum(values[k] for k in first) + ALIGNED * units + more
    program.limit(values, whole, {header: ALIGNED})
