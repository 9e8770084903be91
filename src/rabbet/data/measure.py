"""What a measure of networks says of itself: its name, and which way is better.

A measure is a function of a network that gives a number. Larger is better, unless it has an
attribute `smaller_is_better` that is true, as perplexities do; its `quantity` is what it is called.
"""

import math
from collections.abc import Sequence

from rabbet.data.batches import describe
from rabbet.errors import DataError


def smaller_is_better(measure: object) -> bool:
    """Whether a network is the better the smaller a measure of it is."""
    return bool(getattr(measure, "smaller_is_better", False))


def quantity_of(measure: object, default: str) -> str:
    """What a measure is called; the default, if it does not say so."""
    return str(getattr(measure, "quantity", default))


def require_measure(measure: object) -> None:
    """Raise DataError for what no network can be given to."""
    if not callable(measure):
        raise DataError(f"a measure is a function of a network; found {describe(measure)}")


def require_share(measure: object, examples: int | None, value: float = 0.0) -> None:
    """Refuse a number of examples beside a measure that is no share of them in per cent.

    Raises DataError for a measure that is the better the smaller it is, and for a value that no
    share has.
    """
    if examples is None or (0 <= value <= 100 and not smaller_is_better(measure)):
        return
    what = "smaller is better" if smaller_is_better(measure) else f"it gave {value:g}"
    raise DataError(
        f"examples says of how many a measure is a share in per cent, which this is not: {what}; "
        "leave examples out, or give an accuracy from 0 to 100"
    )


def worsening(measure: object, before: float, after: float) -> float:
    """By how much a network became worse, in the unit of the measure; below 0 it became better."""
    return after - before if smaller_is_better(measure) else before - after


def standard_error(sums: Sequence[float], counts: Sequence[float]) -> float:
    """The standard error of sum(sums) / sum(counts), a ratio of sums over at least two examples."""
    many, total = len(sums), sum(counts)
    mean = sum(sums) / total
    squares = sum((s - mean * c) ** 2 for s, c in zip(sums, counts, strict=True))
    return math.sqrt(squares * many / (many - 1)) / total
