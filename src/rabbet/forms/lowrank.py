"""Two factors: the layer with `rank` outputs, then a 1x1 mix of them.

The weight's first unfolding [out, in * k * k] is B A with A [rank, in, *k], which carries stride
and padding, and B [out, rank] (CoRa, arXiv 2408.00923, theorem 1).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from rabbet.forms.base import PLAIN, Aim, Between, Ranked
from rabbet.layers import Site
from rabbet.solve.als import CPProblem, Problem
from rabbet.solve.whiten import leading


@dataclass(frozen=True)
class LowRank(Ranked):
    """Factors A [rank, in, *kernel] and B [out, rank]."""

    name: ClassVar[str] = "lowrank"
    adds: ClassVar[bool] = True
    nested: ClassVar[bool] = True
    alternates: ClassVar[bool] = True

    def full_rank(self, site: Site) -> int:
        """min(out, in * k * k); 0 for grouped convs, which a factor would mix, and for tables."""
        fits = site.groups == 1 and site.runs and not site.looks_up
        return min(site.shape[0], site.columns) if fits else 0

    def shapes(self, site: Site) -> tuple[tuple[int, ...], ...]:
        """A, then B."""
        return ((self.rank, *site.shape[1:]), (site.shape[0], self.rank))

    def macs(self, site: Site) -> tuple[int, ...]:
        """A runs where the layer's kernel does, B at the places of the output."""
        first = self.rank * site.columns * site.kernel_positions
        return (first, self.rank * site.shape[0] * site.positions)

    def matrix_rank(self, site: Site) -> int | None:
        """The rank."""
        return self.rank

    def decompose(
        self, site: Site, weight: Tensor, second: Tensor | None, aim: Aim = PLAIN
    ) -> tuple[Tensor, ...]:
        """The truncated SVD whitened by the second moment (QERA, arXiv 2410.06040, theorem 1)."""
        left, right = leading(weight.flatten(1), self.rank, None if second is None else second[0])
        return right.view(self.rank, *site.shape[1:]), left

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
        return site.pointwise(inner, b, bias)

    def problem(self, weight: Tensor) -> Problem:
        """B [out, R] and A [in * k, R] of the weight as a matrix."""
        return CPProblem(weight.flatten(1))

    def arranged(self, site: Site, matrices: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """A, then B."""
        b, a = matrices
        return a.mT.reshape(self.shapes(site)[0]), b
