"""What a measure of networks says of itself: its name, and which way is better.

A measure is a function of a network that gives a number. Larger is better, unless it has an
attribute `smaller_is_better` that is true, as perplexities do; its `quantity` is what it is called.
"""


def smaller_is_better(measure: object) -> bool:
    """Whether a network is the better the smaller a measure of it is."""
    return bool(getattr(measure, "smaller_is_better", False))


def quantity_of(measure: object, default: str) -> str:
    """What a measure is called; the default, if it does not say so."""
    return str(getattr(measure, "quantity", default))


def worsening(measure: object, before: float, after: float) -> float:
    """By how much a network became worse, in the unit of the measure; below 0 it became better."""
    return after - before if smaller_is_better(measure) else before - after
