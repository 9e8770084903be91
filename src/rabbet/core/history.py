"""How numbers went over the steps of a search or a training, for reports."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class History:
    """The values of one quantity after each step.

    stage: what was done. step: what is counted, such as "epoch". quantity: what the values are, and
    of what. lines: the values, by what they belong to; by "" where there is one line. first: the
    number of the step that the first value is of; 0: of before any.
    """

    stage: str
    step: str
    quantity: str
    lines: Mapping[str, tuple[float, ...]]
    first: int = 1
