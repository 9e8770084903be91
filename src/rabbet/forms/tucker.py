"""Tucker-2, three factors: 1x1, a small kernel, 1x1.

The kernel [out, in, *k] is a core [r2, r1, *k] between two mixes of channels, r1 <= in and r2 <=
out. One rank says both: r1 is the rank, r2 the same share of the outputs. A kernel with one place
needs no core: that is `lowrank`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from rabbet.forms.base import PLAIN, Aim, Between, pointwise
from rabbet.layers.site import Site
from rabbet.solve.varpro import project
from rabbet.solve.whiten import principal


@dataclass(frozen=True)
class Tucker:
    """Factors U [rank, in], the core [r2, rank, *kernel] and V [out, r2]."""

    ranked: bool = True
    gaps: int = 2

    def full_rank(self, site: Site) -> int:
        """The input channels; 0 for kernels with one place, and for groups."""
        if site.groups > 1 or not site.stride or math.prod(site.shape[2:]) == 1:
            return 0
        return site.shape[1]

    def shapes(self, site: Site, rank: int | None) -> tuple[tuple[int, ...], ...]:
        """U, core, V."""
        assert rank is not None
        out, channels = site.shape[:2]
        inner = -(-rank * out // channels)
        return ((rank, channels), (inner, rank, *site.shape[2:]), (out, inner))

    def macs(self, site: Site, rank: int | None) -> tuple[int, ...]:
        """U runs where the input lies, the other two where the output does."""
        u, core, v = (math.prod(shape) for shape in self.shapes(site, rank))
        return (u * site.inputs, core * site.positions, v * site.positions)

    def decompose(
        self, site: Site, weight: Tensor, rank: int | None, second: Tensor | None, aim: Aim = PLAIN
    ) -> tuple[Tensor, ...]:
        """Variable projection in the metric, from the leading singular vectors of both modes (HOSVD)."""
        u, core, _ = self.shapes(site, rank)
        metric = None if second is None else second[0]
        matrix = weight.flatten(1)
        if aim.start is not None:
            small, steps = (aim.start[0], aim.start[1].flatten(2)), aim.steps
        else:
            left = principal(matrix, metric, core[0])
            inner = (left.mT @ matrix).view(core[0], site.shape[1], -1)
            mix = principal(inner.transpose(0, 1).flatten(1), count=u[0]).mT
            small = (mix.contiguous(), mix @ inner)
            steps = 0 if rank == self.full_rank(site) else aim.steps
        found = project(_rows, small, matrix, metric, aim.noise, steps)
        # columns of V to one norm: rounding the tensor before it then weighs the same in each
        # channel
        norm = found.last.square().mean(0).clamp_min(1e-20).sqrt()
        return found.small[0], (found.small[1] * norm[:, None, None]).view(core), found.last / norm

    def contract(self, site: Site, factors: Sequence[Tensor]) -> Tensor:
        """V core U, in the shape of the weight."""
        u, core, v = factors
        return (v @ _rows((u, core.flatten(2)))).view(v.shape[0], u.shape[1], *core.shape[2:])

    def apply(
        self,
        site: Site,
        x: Tensor,
        factors: Sequence[Tensor],
        between: Between,
        bias: Tensor | None,
    ) -> Tensor:
        """Three layers, as they will be exported."""
        u, core, v = factors
        inner = between(0, pointwise(site, x, u))
        inner = between(1, replace(site, shape=tuple(core.shape)).run(inner, core))
        return pointwise(site, inner, v, bias)


def _rows(small: Sequence[Tensor]) -> Tensor:
    """The core with U put in, as rows [r2, in * k]; core [r2, rank, k]."""
    u, core = small
    return (u.mT @ core).flatten(1)
