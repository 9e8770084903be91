"""The weight itself: one factor, no rank."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from rabbet.errors import PlanError
from rabbet.forms.base import PLAIN, Aim, Between, Form
from rabbet.layers import Site

DIGITS = 6  # that the index of an output may have


@dataclass(frozen=True)
class Dense(Form):
    """One factor, the canonical weight [out, in / groups, *kernel], or some rows of it.

    rows: the outputs that the term computes, in rising order; None: all. Terms of different rows
    give the outputs of one layer different grids. Layers with groups have no such terms: rows would
    be spread unevenly over the groups.
    """

    rows: tuple[int, ...] | None = None

    name: ClassVar[str] = "dense"
    adds: ClassVar[bool] = True
    verbatim: ClassVar[bool] = True

    @classmethod
    def read(cls, inside: str | None) -> Self:
        """Outputs, such as `0-5,9`; none for all."""
        return cls(None if inside is None else rows_of(inside))

    @property
    def inside(self) -> str:
        """The outputs, if they are not all."""
        return "" if self.rows is None else runs(self.rows)

    @property
    def partial(self) -> bool:
        """Whether rows are named."""
        return self.rows is not None

    def outputs(self, site: Site) -> tuple[int, ...]:
        """The rows, or all."""
        return super().outputs(site) if self.rows is None else self.rows

    def of_outputs(self, values: Tensor) -> Tensor:
        """The rows of a tensor."""
        return values if self.rows is None else values[list(self.rows)]

    def full_rank(self, site: Site) -> int:
        """1: the form fits every site; with rows named, 0 for sites with groups.

        Raises PlanError for a row that does not exist.
        """
        if self.rows is None:
            return 1
        if self.rows[-1] >= site.shape[0]:
            raise PlanError(
                f"there is no output {self.rows[-1]}; the layer has {site.shape[0]}, counted from 0"
            )
        return int(site.groups == 1)

    def shapes(self, site: Site) -> tuple[tuple[int, ...], ...]:
        """The weight's own shape."""
        return (site.shape if self.rows is None else (len(self.rows), *site.shape[1:]),)

    def macs(self, site: Site) -> tuple[int, ...]:
        """The layer's own MACs."""
        whole = site.macs
        return (whole if self.rows is None else whole * len(self.rows) // site.shape[0],)

    def decompose(
        self, site: Site, weight: Tensor, second: Tensor | None, aim: Aim = PLAIN
    ) -> tuple[Tensor, ...]:
        """The weight itself."""
        return (self.of_outputs(weight),)

    def contract(self, site: Site, factors: Sequence[Tensor]) -> Tensor:
        """The factor itself; zeros in the rows that it does not have."""
        return factors[0] if self.rows is None else self._spread(site, factors[0], 0)

    def apply(
        self,
        site: Site,
        x: Tensor,
        factors: Sequence[Tensor],
        between: Between,
        bias: Tensor | None,
    ) -> Tensor:
        """The layer itself."""
        if self.rows is None or site.looks_up:
            return site.run(x, self.contract(site, factors), bias)
        output = self._spread(site, site.run(x, factors[0], None), site.kind.channel_axis)
        return output if bias is None else output + site.per_channel(bias)

    def _spread(self, site: Site, values: Tensor, axis: int) -> Tensor:
        """Every row at its place along an axis, zeros at the other places.

        Some row is picked for each place; those that do not belong are then multiplied by zero.
        """
        assert self.rows is not None
        place = torch.zeros(site.shape[0], dtype=torch.long)
        there = torch.zeros(site.shape[0])
        place[list(self.rows)], there[list(self.rows)] = torch.arange(len(self.rows)), 1.0
        wide = [1] * len(values.shape)
        wide[axis] = site.shape[0]
        picked = values.index_select(axis, place.to(values.device))
        return picked * there.to(values.device).view(wide)


def runs(rows: Sequence[int]) -> str:
    """Rows as text, consecutive ones as `first-last`."""
    ranges: list[list[int]] = []
    for row in rows:
        if ranges and row == ranges[-1][1] + 1:
            ranges[-1][1] = row
        else:
            ranges.append([row, row])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in ranges)


def rows_of(text: str) -> tuple[int, ...]:
    """The inverse of `runs`; raises PlanError for anything else."""
    rows: list[int] = []
    for part in text.split(","):
        first, bar, last = part.partition("-")
        if not (first.isdecimal() and (last.isdecimal() or not bar)):
            raise PlanError(f"{text!r} are not rows; write them in rising order, such as 0-5,9")
        # A short text must not be able to ask for all memory.
        if max(len(first), len(last)) > DIGITS:
            longest = max(first, last, key=len)[:20]
            raise PlanError(f"there is no output {longest}; no layer has so many")
        rows += range(int(first), int(last or first) + 1)
    if not rows or sorted(set(rows)) != rows or runs(rows) != text:
        raise PlanError(f"{text!r} are not rows in rising order; write such as 0-5,9")
    return tuple(rows)
