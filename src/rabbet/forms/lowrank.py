"""Two factors: the layer with `rank` outputs, then a 1x1 mix of them (CoRa, arXiv 2408.00923, theorem 1).

The weight's first unfolding [out, in * k * k] is B A with A [rank, in, *k], which carries stride
and padding, and B [out, rank].
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from rabbet.forms.base import PLAIN, Aim, Between, pointwise
from rabbet.layers.site import Site
from rabbet.solve.whiten import leading


@dataclass(frozen=True)
class LowRank:
    """Factors A [rank, in, *kernel] and B [out, rank]."""

    ranked: bool = True
    gaps: int = 1

    def full_rank(self, site: Site) -> int:
        """min(out, in * k * k); 0 for grouped convs (a factor would mix the groups) and for tables."""
        return (
            0 if site.groups > 1 or site.kind == "embedding" else min(site.shape[0], site.columns)
        )

    def shapes(self, site: Site, rank: int | None) -> tuple[tuple[int, ...], ...]:
        """A, then B."""
        assert rank is not None
        return ((rank, *site.shape[1:]), (site.shape[0], rank))

    def macs(self, site: Site, rank: int | None) -> tuple[int, ...]:
        """Both run at the output's places: the stride sits in A."""
        assert rank is not None
        return (rank * site.columns * site.positions, rank * site.shape[0] * site.positions)

    def decompose(
        self, site: Site, weight: Tensor, rank: int | None, second: Tensor | None, aim: Aim = PLAIN
    ) -> tuple[Tensor, ...]:
        """The truncated SVD whitened by the full second moment (QERA-exact, arXiv 2410.06040, theorem 1)."""
        assert rank is not None
        left, right = leading(weight.flatten(1), rank, None if second is None else second[0])
        return right.view(rank, *site.shape[1:]), left

    def contract(self, site: Site, factors: Sequence[Tensor]) -> Tensor:
        """B A, in the shape of the weight."""
        a, b = factors
        return (b @ a.flatten(1)).view(b.shape[0], *a.shape[1:])

    def apply(
        self,
        site: Site,
        x: Tensor,
        factors: Sequence[Tensor],
        between: Between,
        bias: Tensor | None,
    ) -> Tensor:
        """Two layers, as they will be exported: never the product."""
        a, b = factors
        inner = between(0, site.run(x, a))  # [batch, rank, *places] or [..., rank]
        return pointwise(site, inner, b, bias)
