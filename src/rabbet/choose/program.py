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
from functools import cached_property
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
Scores = Sequence[Sequence[float]]
"""How much each option harms, [layers][options]."""


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
    """See `Allocator.require_feasible`."""
    Allocator(table, piece).require_feasible(budget)


def allocate(scores: Scores, table: Table, budget: Budget, piece: Priced, gap: float = 0.0) -> Plan:
    """See `Allocator.plan`."""
    return Allocator(table, piece).plan(scores, budget, gap)


@dataclass
class Allocator:
    """All plans that take one option for each layer, for one who asks for several.

    piece: knows the cost that a budget is checked against.
    """

    table: Table
    piece: Priced

    def plan(self, scores: Scores, budget: Budget, gap: float = 0.0) -> Plan:
        """The plan of least total score under all limits.

        gap: the share of the score by which another plan may be better. Raises ModelError naming a
        layer whose scores are not finite, BudgetError if no choice keeps the budget.
        """
        self._require_finite(scores)
        choice, proven = self._landed(scores, budget, gap)
        if choice is not None:
            return picked(self.table, choice)
        # The tightest corner: the smallest choice is known to fit a single limit.
        for limit in budget.limits:
            plan = picked(self.table, self._least(limit))
            if self._keeps(plan, budget):
                return plan
        if proven:
            raise BudgetError(f"no choice of options keeps '{budget}'; loosen it a little")
        raise BudgetError(
            f"no choice of options was found that keeps '{budget}', though there may be one; "
            "loosen it a little"
        )

    def excess(self, scores: Scores, budget: Budget) -> list[list[float]] | None:
        """By how much, at least, the least total score grows if a layer must take an option.

        [layers][options]; found in a small part of the time of `plan`. None if not even parts of
        options, added up, keep the budget.
        """
        self._require_finite(scores)
        return self._program(budget, _no_room(budget)).excess(scores)

    def require_feasible(self, budget: Budget) -> None:
        """Refuse a budget that no choice of options meets, before anything is solved.

        Raises BudgetError naming the smallest reachable value and the layers that cost most there.
        """
        for limit in budget.limits:
            choice = self._least(limit)
            cost = self.piece.cost(picked(self.table, choice))
            if limit.broken_by(cost, self.piece.float_cost):
                raise BudgetError(self._refusal(limit, choice, cost))
        if len(budget.limits) > 1:
            together, proven = self._landed([[0.0] * len(row) for row in self.table], budget)
            if together is None and proven:
                raise BudgetError(
                    f"each limit of '{budget}' can be met, but not all at once; loosen one of them"
                )

    def ends(self, metric: str, beside: Budget | None = None) -> tuple[Cost, Cost]:
        """The least that plans cost by a metric, under limits beside it; and the most.

        The most is by what their options cost: what lines share may make another plan cost more by
        a little. Raises BudgetError if no choice keeps those limits.
        """
        amount = METRICS[metric].amount
        if beside is not None:
            self.require_feasible(beside)
        none = Limit(metric, Fraction(0), False, f"{metric} <= 0")  # there is always a smaller one
        least = self._least(none, beside)
        most = [max(range(len(row)), key=lambda k: amount(row[k].cost)) for row in self.table]
        return self.piece.cost(picked(self.table, least)), self.piece.cost(picked(self.table, most))

    def _require_finite(self, scores: Scores) -> None:
        for row, options in zip(scores, self.table, strict=True):
            if not np.isfinite(row).all():
                raise ModelError(
                    f"what a change of {quoted(options[0].plan.name)} does to the outputs is not "
                    "finite: look for a gradient through the network that is NaN although the "
                    "outputs are finite, as that of a square root or a norm of zeros"
                )

    def _refusal(self, limit: Limit, choice: Sequence[int], cost: Cost) -> str:
        """Why a limit cannot be met: what its cheapest choice costs, and where."""
        metric, whole = METRICS[limit.metric], self.piece.float_cost
        reached, base = metric.amount(cost), metric.amount(whole)
        costs = {row[k].plan.name: row[k].cost for row, k in zip(self.table, choice, strict=True)}
        rest = reached - sum(metric.amount(c) for c in costs.values())
        what = "header and all else" if limit.metric == "bytes" else "all else"
        heavy = rest > max(map(metric.amount, costs.values()))
        beside = f"; {what} {metric.show(rest, whole.weights)}" if heavy else ""
        stored = limit.metric in ("bytes", *FILES)
        left = sorted(self.piece.left, key=lambda x: -x.bytes)[:3] if stored else ()
        if heavy and left:
            named = ", ".join(f"{quoted(x.name)} {x.bytes:,}" for x in left)
            beside += f", of which is left alone: {named}"
        least = metric.show(reached, whole.weights)
        allowed = metric.show(limit.amount(whole), whole.weights)
        return (
            f"{limit.text!r} cannot be met: the smallest reachable value is "
            f"{least} {limit.unit} "
            f"({100 * reached / max(base, 1):.4g}% of float32), {allowed} were allowed. "
            f"The heaviest layers at that point: {heaviest(costs, limit.metric)}{beside}"
        )

    def _keeps(self, plan: Plan, budget: Budget) -> bool:
        cost, whole = self.piece.cost(plan), self.piece.float_cost
        return not any(limit.broken_by(cost, whole) for limit in budget.limits)

    def _least(self, limit: Limit, beside: Budget | None = None) -> list[int]:
        """The choice of least cost by the metric of a limit, or one that keeps the limit.

        beside: limits that it keeps as well. Of what adds up it is the cheapest option of every
        layer. Of bytes another may be smaller by the header's padding or by what layers share:
        then ever smaller ones are asked for until there is none.
        """
        choice = self._cheapest(limit.metric, beside)
        others = () if beside is None else beside.limits
        whole = self.piece.float_cost
        while limit.metric in ("bytes", *FILES):
            cost = self.piece.cost(picked(self.table, choice))
            if not limit.broken_by(cost, whole):
                break
            smaller = Fraction(METRICS[limit.metric].amount(cost) - 1)
            below = Budget((replace(limit, value=smaller, share=False), *others))
            found, _ = self._landed([[0.0] * len(row) for row in self.table], below)
            if found is None:
                break
            choice = found
        return choice

    def _cheapest(self, metric: str, beside: Budget | None) -> list[int]:
        """The choice whose options cost least, without what they share; under limits beside it."""
        if beside is None:
            return smallest(self.table, metric)
        amount = METRICS[metric].amount
        amounts = [[float(amount(option.cost)) for option in row] for row in self.table]
        lines = [[option.plan for option in row] for row in self.table]
        plan = self.plan(amounts, beside)
        return [row.index(line) for row, line in zip(lines, plan, strict=True)]

    def _landed(
        self, scores: Scores, budget: Budget, gap: float = 0.0
    ) -> tuple[list[int] | None, bool]:
        """The best choice that keeps the budget in whole numbers; None, and whether proven."""
        room = _no_room(budget)
        whole, proven = self.piece.float_cost, True
        for _ in range(ROUNDS):
            program = self._program(budget, room)
            excess = dict.fromkeys(room, 0)
            for _ in range(CUTS):
                answer = program.best(scores, gap)
                if answer.choice is None:
                    return None, proven and answer.proven
                cost = self.piece.cost(picked(self.table, answer.choice))
                over = {
                    x.metric: METRICS[x.metric].amount(cost) - x.amount(whole)
                    for x in budget.limits
                }
                if all(amount <= 0 for amount in over.values()):
                    return answer.choice, True
                excess = {metric: max(amount, over[metric]) for metric, amount in excess.items()}
                program.exclude(answer.choice)
            proven = False
            room = {metric: amount + excess[metric] for metric, amount in room.items()}
        return None, False

    @cached_property
    def _base(self) -> Cost:
        """What the first option of every layer costs, all in all."""
        return self._reference()

    def _reference(self) -> Cost:
        return self.piece.cost(picked(self.table, [0] * len(self.table)))

    @cached_property
    def _frame(self) -> Frame | None:
        return self.piece.frame([[option.plan for option in row] for row in self.table])

    def _steps(self, metric: str) -> Sequence[Step]:
        """What lines share in an exported file."""
        if metric not in FILES:
            return ()
        rows = [[option.plan for option in row] for row in self.table]
        return self.piece.steps(metric, rows)

    def _program(self, budget: Budget, room: dict[str, int]) -> IntegerProgram:
        """The program of a budget; room: by how much each limit is tighter than it says."""
        program = IntegerProgram([len(row) for row in self.table])
        for limit in budget.limits:
            amount = METRICS[limit.metric].amount
            amounts = [amount(option.cost) for row in self.table for option in row]
            allowed = limit.amount(self.piece.float_cost) - room[limit.metric]
            frame = self._frame if limit.metric == "bytes" else None
            if frame is None:
                # What no option changes (untouched tensors, the fixed part of the header) is the
                # difference between the reference plan and the sum of its options. Of exported
                # files it is predicted better once one was written.
                base = self._reference() if limit.metric in FILES else self._base
                fixed = amount(base) - sum(amount(row[0].cost) for row in self.table)
                first = program.places([0] * len(self.table))
                _limit_sum(program, amounts, allowed - fixed, self._steps(limit.metric), first)
            else:
                first = program.places([0] * len(self.table))
                _limit_file(program, amounts, allowed - self._base.bytes, frame, first)
        return program


def _no_room(budget: Budget) -> dict[str, int]:
    return dict.fromkeys((limit.metric for limit in budget.limits), 0)


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
