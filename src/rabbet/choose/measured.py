"""What a few measured points say of all others on a frontier, and which to measure next."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from rabbet.data.accuracy import deviation

FIRST = 0.01  # harm of what is tried first: a relative squared error of the outputs
STEP = 8.0  # how many times the harm of the next, at most, if little was lost
INSIDE = 0.8  # share of the drop that is aimed at
TIGHT = 0.02  # of an amount: nearer points are not told apart by another fit


def interpolated(
    harms: Sequence[float], found: Mapping[int, float], examples: int | None = None
) -> list[tuple[float, float, float]]:
    """A value for every place from those that were found, with the ends of its interval of 90 %.

    harms: of all places, in order. found: by the number of the place. examples: how many stand
    behind a value, if it is a share in per cent. Values are linear in the logarithm of the harm
    between two neighbours. The interval reaches over both of them, and further by as much as found
    values lay outside of theirs, or as chance makes of so many examples; that of a share ends at 0
    and at 100.
    """
    places = [_logarithm(harm) for harm in harms]
    known = sorted(found)
    chance = 0.0
    if examples is not None:
        chance = 1.645 * max(deviation(examples, value) for value in found.values())
    # How far a measured point lay outside of the two beside it.
    beyond = [0.0]
    for before, here, after in zip(known, known[1:], known[2:], strict=False):
        low, high = sorted((found[before], found[after]))
        beyond.append(max(low - found[here], found[here] - high, 0.0))
    margin = max(chance, float(np.quantile(beyond, 0.9, method="higher")))
    low, high = (-math.inf, math.inf) if examples is None else (0.0, 100.0)
    told = []
    for k, place in enumerate(places):
        if k in found:
            told.append((found[k], max(found[k] - chance, low), min(found[k] + chance, high)))
            continue
        left = max((j for j in known if j < k), default=known[0])
        right = min((j for j in known if j > k), default=known[-1])
        ends = sorted((places[left], places[right]))
        values = [found[left], found[right]]
        if places[left] > places[right]:
            values.reverse()
        value = float(np.interp(place, ends, values))
        told.append((value, max(min(values) - margin, low), min(max(values) + margin, high)))
    return told


def next_try(
    harms: Sequence[float],
    amounts: Sequence[int],
    tried: Mapping[int, float],
    drop: float,
    last: bool,
) -> int | None:
    """The place to try next for the tightest whose drop is within; None if none is of use.

    harms, amounts: of all places, the loosest first. tried: drops by place. last: whether no other
    may follow. A drop is taken to grow in proportion to the harm while one side alone is known, and
    linearly in its logarithm between two.
    """
    logs = [_logarithm(harm) for harm in harms]
    good = max((k for k, lost in tried.items() if lost <= drop), default=None)
    worse = (k for k, lost in tried.items() if lost > drop and (good is None or k > good))
    bad = min(worse, default=None)
    if good is None and bad is None:
        aim = math.log(FIRST)
    elif good is None:
        assert bad is not None
        if last:  # anything that is within is better than nothing
            return 0 if 0 not in tried else None
        aim = logs[bad] + math.log(max(INSIDE * drop / tried[bad], STEP**-2))
    elif bad is None:
        more = INSIDE * drop / tried[good] if tried[good] > 0 else STEP
        aim = logs[good] + math.log(min(max(more, 1.25), STEP))
    else:
        share = (INSIDE * drop - tried[good]) / (tried[bad] - tried[good])
        aim = logs[good] + min(max(share, 0.1), 0.9) * (logs[bad] - logs[good])
    free = [
        k
        for k in range(0 if good is None else good + 1, len(logs) if bad is None else bad)
        if k not in tried and (good is None or amounts[k] < (1 - TIGHT) * amounts[good])
    ]
    return min(free, key=lambda k: abs(logs[k] - aim), default=None)


def _logarithm(harm: float) -> float:
    return math.log(max(harm, 1e-12))
