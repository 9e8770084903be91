"""A program in whole numbers: one option of each row, limits that all hold, the least total score.

HiGHS works in floating point, so its rows are made of whole numbers that are as small as they can
be: each row of options counts from its cheapest one, and what all amounts share is divided away.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

NODES = 20_000  # that HiGHS visits; a limit in seconds would give other plans on a busy machine
TOP = 1e5  # the largest score that HiGHS sees: its absolute gap of 1e-6 is then far below the sum
FINER = 100  # how much smaller the largest score must have become to ask again with finer ones
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
        # Only what an option is worse than the best of its row counts.
        each = [np.asarray(row, float) - min(row) for row in scores]
        flat = np.concatenate(each)
        allowed = np.ones(len(flat))
        top = float(flat.max())
        answer = self._solved(flat * (TOP / top) if top > 0 else flat, allowed, gap)
        while answer.choice is not None and top > 0 and not gap:
            total = float(flat[self.places(answer.choice)].sum())
            # What alone harms more than this whole choice is in none that is better. Without it
            # scores can be told apart that were within the solver's gap.
            allowed = (flat <= total).astype(float)
            finer = float(flat[allowed > 0].max())
            if finer * FINER > top:
                break
            top = finer
            scaled = np.where(allowed > 0, flat, 0.0) * (TOP / top if top > 0 else 1.0)
            again = self._solved(scaled, allowed, gap)
            if again.choice is None or flat[self.places(again.choice)].sum() >= total:
                break
            answer = again
        return answer

    def _solved(self, scores: NDArray[Any], allowed: NDArray[Any], gap: float) -> Answer:
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import csr_array

        width = len(scores) + len(self._more)
        layer = np.repeat(np.arange(len(self.counts)), self.counts)
        one_each = csr_array(
            (np.ones(len(layer)), (layer, np.arange(len(layer)))), shape=(len(self.counts), width)
        )
        constraints = [LinearConstraint(one_each, 1, 1)]
        for parts, most in self._rows:
            if not parts:
                if most < 0:
                    return Answer(None, True)
                continue
            places = ([0] * len(parts), list(parts))
            row = csr_array((np.array(list(parts.values()), float), places), shape=(1, width))
            constraints.append(LinearConstraint(row, -np.inf, most))
        # Rarely, HiGHS writes a line of its own to the process's standard output, which no option
        # stops. The descriptor is the process's: only the command line, which owns it, moves it.
        result = milp(
            np.concatenate([scores, np.zeros(len(self._more))]),
            constraints=constraints,
            integrality=np.ones(width),
            bounds=Bounds(0, np.concatenate([allowed, self._more])),
            options={"node_limit": NODES, "mip_rel_gap": gap},
        )
        if result.x is None:
            return Answer(None, result.status == INFEASIBLE)
        parts_of_x = np.split(result.x[: len(scores)], np.cumsum(self.counts)[:-1])
        return Answer([int(np.argmax(part)) for part in parts_of_x], result.status == OPTIMAL)
