"""The weight as it is: one factor, no rank."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rabbet.errors import PlanError
from rabbet.forms.base import PLAIN, Aim, Between
from rabbet.layers.site import Site

DIGITS = 6  # of the number of an output


@dataclass(frozen=True)
class Dense:
    """One factor, the canonical weight [out, in / groups, *kernel], or some rows of it.

    rows: the outputs that the term makes, in rising order; None: all. Terms of different rows give
    the outputs of one layer different grids. Layers with groups have no such terms: their groups
    would not come out even.
    """

    rows: tuple[int, ...] | None = None
    ranked: bool = False
    gaps: int = 0

    def full_rank(self, site: Site) -> int:
        """1: the form fits every site, with rows those without groups; raises PlanError for a row that is not there."""
        if self.rows is None:
            return 1
        if self.rows[-1] >= site.shape[0]:
            raise PlanError(
                f"there is no output {self.rows[-1]}; the layer has {site.shape[0]}, counted from 0"
            )
        return int(site.groups == 1)

    def shapes(self, site: Site, rank: int | None) -> tuple[tuple[int, ...], ...]:
        """The weight's own shape."""
        return (site.shape if self.rows is None else (len(self.rows), *site.shape[1:]),)

    def macs(self, site: Site, rank: int | None) -> tuple[int, ...]:
        """The layer's own MACs."""
        return (site.macs if self.rows is None else site.macs * len(self.rows) // site.shape[0],)

    def decompose(
        self, site: Site, weight: Tensor, rank: int | None, second: Tensor | None, aim: Aim = PLAIN
    ) -> tuple[Tensor, ...]:
        """The weight itself."""
        return (weight if self.rows is None else weight[list(self.rows)],)

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
        if self.rows is None or site.kind == "embedding":
            return site.run(x, self.contract(site, factors), bias)
        axis = 1 if site.stride else -1
        made = self._spread(site, site.run(x, factors[0], None), axis)
        return made if bias is None else made + bias.view(-1, *[1] * len(site.stride))

    def _spread(self, site: Site, made: Tensor, axis: int) -> Tensor:
        """Every row at its place along an axis: one is picked for each place, then what does not belong is cut off."""
        assert self.rows is not None
        place, there = torch.zeros(site.shape[0], dtype=torch.long), torch.zeros(site.shape[0])
        place[list(self.rows)], there[list(self.rows)] = torch.arange(len(self.rows)), 1.0
        wide = [1] * len(made.shape)
        wide[axis] = site.shape[0]
        return made.index_select(axis, place.to(made.device)) * there.to(made.device).view(wide)


def runs(rows: Sequence[int]) -> str:
    """Rows as text, those that follow one another as `first-last`."""
    found: list[list[int]] = []
    for row in rows:
        if found and row == found[-1][1] + 1:
            found[-1][1] = row
        else:
            found.append([row, row])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in found)


def rows_of(text: str) -> tuple[int, ...]:
    """The inverse of `runs`; raises PlanError for anything else."""
    found: list[int] = []
    for part in text.split(","):
        first, bar, last = part.partition("-")
        if not (first.isdecimal() and (last.isdecimal() or not bar)):
            raise PlanError(f"{text!r} are not rows; write them in rising order, such as 0-5,9")
        if max(len(first), len(last)) > DIGITS:  # a text must not be able to ask for all memory
            raise PlanError(
                f"there is no output {max(first, last, key=len)[:20]}; no layer has so many"
            )
        found += range(int(first), int(last or first) + 1)
    if not found or sorted(set(found)) != found or runs(found) != text:
        raise PlanError(f"{text!r} are not rows in rising order; write such as 0-5,9")
    return tuple(found)
