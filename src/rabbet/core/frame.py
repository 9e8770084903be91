"""The header of a file as the integer program sees it: what it adds to the sum of the layers.

The bytes of a file are no sum over its layers. The header is padded to 8 bytes, and where each
array lies is written in digits, of which there are more the longer the arrays are. Both are said
here in whole numbers that a program can hold, so that no byte of a budget is left to chance.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields

from rabbet.core.layout import (
    ARRAYS,
    TYPES,
    Lengths,
    Rest,
    arrays,
    header_text,
    layer_lengths,
    line_bytes,
    placed,
)
from rabbet.core.plan import LayerPlan, Plan
from rabbet.core.survey import Survey

FIELDS = tuple(field.name for field in fields(Lengths))
Rows = Sequence[Sequence[LayerPlan]]
"""The lines to choose from, a row a layer."""


@dataclass(frozen=True, slots=True)
class Step:
    """`bytes` more of header text where the amounts of the chosen lines add up to `least` or more.

    amounts: of every line, one row after the other. most: the largest sum of any choice.
    """

    amounts: tuple[int, ...]
    least: int
    most: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Frame:
    """Text of the header that any choice has, what each line adds to it, and the steps.

    The text is never longer than the header's, and is as long but where an array is there for some
    choices only. lines: the bytes of every line, one row after the other.
    """

    base: int
    lines: tuple[int, ...]
    steps: tuple[Step, ...]

    @classmethod
    def of(cls, survey: Survey, rest: tuple[Rest, ...], rows: Rows) -> "Frame":
        """The header of every plan that takes one line of each row.

        rest: the tensors that are kept as they are under all these plans.
        """
        held = [[layer_lengths(survey[line.name], line) for line in row] for row in rows]
        least, most = _ends(held)
        flat = [lengths for row in held for lengths in row]
        lines = tuple(line_bytes(line) for row in rows for line in row)
        first = Plan(tuple(row[0] for row in rows))
        text = len(header_text(survey, first, rest, least))
        base = text - sum(line_bytes(line) for line in first)
        steps = [
            Step(tuple(map(number.of, flat)), bound, number.of(most), size)
            for (number, bound), size in _thresholds(rest, least, most).items()
        ]
        return cls(base, lines, tuple(steps))

    def text(self, chosen: Sequence[int]) -> int:
        """Bytes of the header text of a choice, given as places among all lines."""
        steps = (s.bytes for s in self.steps if sum(s.amounts[k] for k in chosen) >= s.least)
        return self.base + sum(self.lines[k] for k in chosen) + sum(steps)


def _ends(held: Sequence[Sequence[Lengths]]) -> tuple[Lengths, Lengths]:
    """The least and the most that any choice puts into each array."""
    least, most = (
        Lengths(*(sum(end(getattr(x, f) for x in row) for row in held) for f in FIELDS))
        for end in (min, max)
    )
    return least, most


@dataclass(frozen=True, slots=True)
class _Number:
    """A number of the header: a fixed part, and what an entry of each field of `Lengths` adds."""

    fixed: int = 0
    weights: tuple[int, ...] = (0,) * len(FIELDS)

    def of(self, lengths: Lengths) -> int:
        """Its variable part for these lengths."""
        return sum(w * getattr(lengths, f) for w, f in zip(self.weights, FIELDS, strict=True))

    def plus(self, other: "_Number", times: int = 1) -> "_Number":
        """A sum of two."""
        added = (a + times * b for a, b in zip(self.weights, other.weights, strict=True))
        return _Number(self.fixed + times * other.fixed, tuple(added))


def _thresholds(
    rest: tuple[Rest, ...], least: Lengths, most: Lengths
) -> dict[tuple[_Number, int], int]:
    """Where the text of the header grows: (number, what its variable part reaches) -> bytes."""
    grown: dict[tuple[_Number, int], int] = {}
    always = {name for name, _, _ in arrays(least)}
    start = _Number()
    for name, dtype, _, size in placed(most, rest):
        parts = ARRAYS[name][1] if name in ARRAYS else ()
        count = _Number(0, tuple(int(f in parts) for f in FIELDS))
        end = start.plus(count, TYPES[dtype].itemsize) if parts else start.plus(_Number(size))
        if not parts or name in always:
            for number in (start, end, *([count] if parts else [])):
                lowest, highest = (number.fixed + number.of(ends) for ends in (least, most))
                for digits in range(len(str(lowest)), len(str(highest))):
                    place = (number, 10**digits - number.fixed)
                    grown[place] = grown.get(place, 0) + 1
        else:
            # Some choices only have this array. Its numbers count with their fewest digits: the
            # text is then shorter than the header's for some choices, never longer.
            offsets = [number.fixed + number.of(least) for number in (start, end)]
            entry = {name: {"dtype": dtype, "shape": [1], "data_offsets": offsets}}
            text = json.dumps(entry, separators=(",", ":"))
            grown[count, 1] = grown.get((count, 1), 0) + len(text) - 1  # a comma for its brackets
        start = end
    return grown
