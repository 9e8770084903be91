"""Tucker-2, three factors: 1x1, a small kernel, 1x1.

The kernel [out, in, *k] is a core [r2, r1, *k] between two mixes of channels, r1 <= in and
r2 <= out. One rank sets both: r1 is the rank, r2 the same share of the outputs. A kernel of one tap
needs no core: that is `lowrank`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from rabbet.forms.base import PLAIN, Aim, Between, Ranked
from rabbet.layers import Site
from rabbet.solve.als import Problem
from rabbet.solve.kernel_train import Tucker2Problem, tucker_bonds
from rabbet.solve.varpro import project
from rabbet.solve.whiten import principal


@dataclass(frozen=True)
class Tucker(Ranked):
    """Factors U [rank, in], the core [r2, rank, *kernel] and V [out, r2]."""

    name: ClassVar[str] = "tucker"
    evaluates: ClassVar[bool] = True
    unfinished: ClassVar[float] = 1.2
    alternates: ClassVar[bool] = True

    def full_rank(self, site: Site) -> int:
        """The input channels; 0 for kernels of one tap, and for groups."""
        return 0 if site.groups > 1 or site.taps == 1 else site.shape[1]

    def shapes(self, site: Site) -> tuple[tuple[int, ...], ...]:
        """U, core, V."""
        out, channels = site.shape[:2]
        inner = self._inner(site)
        return ((self.rank, channels), (inner, self.rank, *site.shape[2:]), (out, inner))

    def _inner(self, site: Site) -> int:
        """The rank of the outputs."""
        return tucker_bonds(site.shape, self.rank)[1]

    def macs(self, site: Site) -> tuple[int, ...]:
        """U runs where the input lies, the core where the kernel does, V where the output does."""
        u, core, v = (math.prod(shape) for shape in self.shapes(site))
        return (u * site.inputs, core * site.kernel_positions, v * site.positions)

    def matrix_rank(self, site: Site) -> int | None:
        """The rank of the outputs."""
        return self._inner(site)

    def decompose(
        self, site: Site, weight: Tensor, second: Tensor | None, aim: Aim = PLAIN
    ) -> tuple[Tensor, ...]:
        """Variable projection in the metric, from the leading singular vectors of both modes."""
        u, core, _ = self.shapes(site)
        metric = None if second is None else second[0]
        matrix = weight.flatten(1)
        if aim.start is not None:
            small, steps = (aim.start[0], aim.start[1].flatten(2)), aim.steps
        else:
            left = principal(matrix, metric, core[0])
            inner = (left.mT @ matrix).view(core[0], site.shape[1], -1)
            mix = principal(inner.transpose(0, 1).flatten(1), count=u[0]).mT
            small = (mix.contiguous(), mix @ inner)
            steps = 0 if self.rank == self.full_rank(site) else aim.steps
        solution = project(_rows, small, matrix, aim.lean or metric, aim.noise, steps)
        # All columns of V get one norm: rounding the tensor before it then weighs the same in each.
        norm = solution.last.square().mean(0).clamp_min(1e-20).sqrt()
        kernel = (solution.small[1] * norm[:, None, None]).view(core)
        return solution.small[0], kernel, solution.last / norm

    def contract(self, site: Site, factors: Sequence[Tensor]) -> Tensor:
        """V core U, in the shape of the weight."""
        u, core, v = factors
        rows = _rows((u, core.flatten(2)))
        return (v @ rows).view(v.shape[0], u.shape[1], *core.shape[2:])

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
        inner = between(0, site.pointwise(x, u))
        inner = between(1, replace(site, shape=tuple(core.shape)).run(inner, core))
        return site.pointwise(inner, v, bias)

    def problem(self, weight: Tensor) -> Problem:
        """V [out, r2], U [in, rank] and the core [k, rank * r2] of the kernel [out, in, k]."""
        return Tucker2Problem(weight.flatten(2))

    def arranged(self, site: Site, matrices: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """U, core, V."""
        v, u, core = matrices
        inner = core.mT.view(self.rank, -1, site.taps).transpose(0, 1)
        return u.mT, inner.reshape(self.shapes(site)[1]), v


def _rows(small: Sequence[Tensor]) -> Tensor:
    """The core with U put in, as rows [r2, in * k]; core [r2, rank, k]."""
    u, core = small
    return (u.mT @ core).flatten(1)
