"""A program in whole numbers: one option of each row, limits that all hold, the least total score.

HiGHS works in floating point, so limits are made of whole numbers that are as small as they can be:
each row of options counts from its cheapest one, and what all amounts share is divided away. HiGHS
sees them divided by a power of two, which is exact.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

NODES = 20_000  # that HiGHS visits; a limit in seconds would give other plans on a busy machine
TOP = 1e5  # the largest score that HiGHS sees: its absolute gap of 1e-6 is then far below the sum
FINER = 100  # how much smaller the largest score must have become to ask again with finer ones
CORE = 2  # options of each row, in the mean, that are asked about first
WIDER = 8  # how much more excess options may have if those first ones keep no limits
LARGEST = 64  # amount in a limit that HiGHS sees, so that a millionth of an option is next to none
UNIT = 2.0**-16  # the least that an amount of 1 becomes, well above the solver's tolerance of 1e-6
ABSOLUTE = 1e-4  # what sums of scores may be wrong by
OPTIMAL, INFEASIBLE = 0, 2  # what scipy calls these ends


@dataclass(frozen=True, slots=True)
class Answer:
    """The option of each row, None if there is none; proven: whether none is then certain."""

    choice: list[int] | None
    proven: bool


@dataclass
class IntegerProgram:
    """Which option of each row; limits are added to it, and choices taken out of it.

    counts: options in each row. Variables are the options, one row after the other, each 0 or 1,
    and further ones that limits bring along.
    """

    counts: Sequence[int]
    _more: list[float] = field(default_factory=list)
    """The largest value of each further variable."""
    _rows: list[tuple[dict[int, int], int]] = field(default_factory=list)
    """What is added up, by variable, and the largest sum."""

    @property
    def options(self) -> int:
        """How many options there are in all."""
        return sum(self.counts)

    def variable(self, most: float) -> int:
        """The place of a further variable, a whole number from 0."""
        self._more.append(most)
        return self.options + len(self._more) - 1

    def limit(self, amounts: Sequence[int], most: int, more: dict[int, int] | None = None) -> None:
        """The amounts of the chosen options, and of further variables, add up to at most `most`."""
        start, parts = 0, {}
        for count in self.counts:
            cheapest = min(amounts[start : start + count])
            most -= cheapest
            for k in range(start, start + count):
                if amounts[k] > cheapest:
                    parts[k] = amounts[k] - cheapest
            start += count
        parts |= more or {}
        shared = math.gcd(*parts.values()) or 1
        self._rows.append(({k: n // shared for k, n in parts.items()}, most // shared))

    def exclude(self, choice: Sequence[int]) -> None:
        """Some row has another option than in this choice."""
        places = self.places(choice)
        self._rows.append((dict.fromkeys(places, 1), len(places) - 1))

    def places(self, choice: Sequence[int]) -> list[int]:
        """The places of chosen options among all."""
        starts = np.cumsum([0, *self.counts[:-1]])
        return [int(start) + k for start, k in zip(starts, choice, strict=True)]

    def best(self, scores: Sequence[Sequence[float]], gap: float = 0.0) -> Answer:
        """The choice of least total score, or one that is worse by at most a share `gap` of it."""
        flat = _above_least(scores)
        allowed = np.ones(len(flat), bool)
        top = float(flat.max())
        answer = self._solved(_scaled(flat, top), allowed, gap)
        while answer.choice is not None and top > 0 and not gap:
            total = float(flat[self.places(answer.choice)].sum())
            # What alone harms more than this whole choice is in none that is better. Without it
            # scores can be told apart that were within the solver's gap.
            allowed = flat <= total
            finer = float(flat[allowed].max())
            if finer * FINER > top:
                break
            top = finer
            again = self._solved(_scaled(np.where(allowed, flat, 0.0), top), allowed, gap)
            if again.choice is None or flat[self.places(again.choice)].sum() >= total:
                break
            answer = again
        return answer

    def excess(self, scores: Sequence[Sequence[float]]) -> list[list[float]] | None:
        """By how much, at least, the least total score grows if a row has to take an option.

        They are the reduced costs of the relaxation, whose rows may take parts of several options;
        None if not even parts keep the limits.
        """
        flat = _above_least(scores)
        top = float(flat.max()) or 1.0
        relaxed = self._relaxed(_scaled(flat, top), np.ones(len(flat), bool))
        if relaxed is None:
            return None
        return [part.tolist() for part in self._split(relaxed.excess * (top / TOP))]

    def _solved(self, scores: NDArray[Any], allowed: NDArray[Any], gap: float) -> Answer:
        """The best choice among the options that are allowed.

        The program is solved with the options of little excess alone. Its answer is the best of all
        once no option that was left out can be part of a better one.
        """
        relaxed = self._relaxed(scores, allowed)
        if relaxed is None:  # whether that is certain only the program itself tells
            return self._asked(scores, allowed, gap)
        excess = np.where(allowed, relaxed.excess, np.inf)
        most = float(np.sort(excess)[min(CORE * len(self.counts), len(excess)) - 1])
        while True:
            core = allowed & (excess <= most)
            answer = self._asked(scores, core, gap)
            if (core == allowed).all():
                return answer
            if answer.choice is None:
                most = WIDER * most if most > 0 else TOP
                continue
            total = float(scores[self.places(answer.choice)].sum())
            above = total - relaxed.total + ABSOLUTE
            if above <= max(most, gap * total):
                return answer
            most = above

    def _relaxed(self, scores: NDArray[Any], allowed: NDArray[Any]) -> "_Relaxed | None":
        """The program in parts of options; None if no answer was found."""
        from scipy.optimize import linprog

        one_each, limits, most = self._matrices()
        costs = np.concatenate([scores, np.zeros(len(self._more))])
        ends = np.concatenate([allowed, self._more])
        result = linprog(
            costs,
            A_ub=limits,
            b_ub=most,
            A_eq=one_each,
            b_eq=np.ones(len(self.counts)),
            bounds=np.stack([np.zeros(len(costs)), ends], 1),
            method="highs",
        )
        if result.x is None:
            return None
        prices = limits.T @ result.ineqlin.marginals + one_each.T @ result.eqlin.marginals
        return _Relaxed(float(result.fun), np.maximum(costs - prices, 0.0)[: len(scores)])

    def _asked(self, scores: NDArray[Any], allowed: NDArray[Any], gap: float) -> Answer:
        """What HiGHS answers if rows may take only the options that are allowed."""
        from scipy.optimize import Bounds, LinearConstraint, milp

        one_each, limits, most = self._matrices()
        used = np.concatenate([allowed, np.ones(len(self._more), bool)])
        costs = np.concatenate([scores, np.zeros(len(self._more))])[used]
        ends = np.concatenate([np.ones(len(scores)), self._more])[used]
        # Repairing an answer, HiGHS writes a line to the process's standard output, which no option
        # stops. The descriptor is the process's: only the command line, which owns it, moves it.
        result = milp(
            costs,
            constraints=[
                LinearConstraint(one_each[:, used], 1, 1),
                LinearConstraint(limits[:, used], -np.inf, most),
            ],
            integrality=np.ones(len(costs)),
            bounds=Bounds(0, ends),
            options={"node_limit": NODES, "mip_rel_gap": gap},
        )
        if result.x is None:
            return Answer(None, result.status == INFEASIBLE)
        whole = np.zeros(len(used))
        whole[used] = result.x
        parts = self._split(whole[: len(scores)])
        return Answer([int(np.argmax(part)) for part in parts], result.status == OPTIMAL)

    def _split(self, values: NDArray[Any]) -> list[NDArray[Any]]:
        return np.split(values, np.cumsum(self.counts)[:-1])

    def _matrices(self) -> tuple[Any, Any, NDArray[Any]]:
        """One option of each row; all limits, and what they allow."""
        from scipy.sparse import csr_array

        width = self.options + len(self._more)
        each = np.repeat(np.arange(len(self.counts)), self.counts)
        places = (each, np.arange(self.options))
        one_each = csr_array((np.ones(self.options), places), shape=(len(self.counts), width))
        scales = [_scale(row.values()) for row, _ in self._rows]
        entries = [
            (k, place, n * scales[k])
            for k, (row, _) in enumerate(self._rows)
            for place, n in row.items()
        ]
        rows, columns, numbers = zip(*entries, strict=True) if entries else ((), (), ())
        shape = (len(self._rows), width)
        limits = csr_array((np.array(numbers, float), (rows, columns)), shape=shape)
        ends = [most * scale for (_, most), scale in zip(self._rows, scales, strict=True)]
        return one_each, limits, np.array(ends, float)


@dataclass(frozen=True, slots=True)
class _Relaxed:
    """The least total score of the relaxation, and the excess of each option."""

    total: float
    excess: NDArray[Any]


def _above_least(scores: Sequence[Sequence[float]]) -> NDArray[Any]:
    """Only what an option is worse than the best of its row counts."""
    return np.concatenate([np.asarray(row, float) - min(row) for row in scores])


def _scale(amounts: Collection[int]) -> float:
    """The power of two that the amounts of a limit are multiplied with."""
    most = max(map(abs, amounts), default=0)
    return max(UNIT, min(1.0, 2.0 ** math.floor(math.log2(LARGEST / most)))) if most else 1.0


def _scaled(scores: NDArray[Any], top: float) -> NDArray[Any]:
    """As HiGHS sees them; divided first, for the factor alone may be more than a float holds."""
    return scores / top * TOP if top > 0 else scores
