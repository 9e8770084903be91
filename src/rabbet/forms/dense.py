"""The weight as it is: one factor, no rank."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from rabbet.forms.base import PLAIN, Aim, Between
from rabbet.site import Site


@dataclass(frozen=True)
class Dense:
    """One factor, the canonical weight [out, in / groups, *kernel]."""

    ranked: bool = False
    gaps: int = 0

    def full_rank(self, site: Site) -> int:
        """Always 1: the form fits every site."""
        return 1

    def shapes(self, site: Site, rank: int | None) -> tuple[tuple[int, ...], ...]:
        """The weight's own shape."""
        return (site.shape,)

    def macs(self, site: Site, rank: int | None) -> tuple[int, ...]:
        """The layer's own MACs."""
        return (site.macs,)

    def decompose(
        self, site: Site, weight: Tensor, rank: int | None, second: Tensor | None, aim: Aim = PLAIN
    ) -> tuple[Tensor, ...]:
        """The weight itself."""
        return (weight,)

    def contract(self, site: Site, factors: Sequence[Tensor]) -> Tensor:
        """The factor itself."""
        return factors[0]

    def apply(self, site: Site, x: Tensor, factors: Sequence[Tensor], between: Between, bias: Tensor | None) -> Tensor:
        """The layer itself."""
        return site.run(x, factors[0], bias)
