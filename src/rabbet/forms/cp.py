"""Three factors: 1x1, depthwise, 1x1 (quantisation-aware CP, arXiv 2308.04595).

The kernel [out, in, k * k] is `sum_r a_r o b_r o c_r`. The layer is a chain of three: B [rank, in]
mixes channels where the input lies, C [rank, *k] filters each of them and carries stride, padding
and dilation, A [out, rank] mixes again. A kernel of one tap needs only two factors: that is
`lowrank`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from rabbet.forms.base import PLAIN, Aim, Between, Ranked
from rabbet.layers import Site
from rabbet.solve.als import CPProblem, Problem
from rabbet.solve.cp import khatri_rao_rows, start
from rabbet.solve.varpro import project


@dataclass(frozen=True)
class CP(Ranked):
    """Factors B [rank, in], C [rank, *kernel] and A [out, rank]."""

    name: ClassVar[str] = "cp"
    evaluates: ClassVar[bool] = True
    unfinished: ClassVar[float] = 1.7
    furthers: ClassVar[float] = 0.6
    alternates: ClassVar[bool] = True

    def full_rank(self, site: Site) -> int:
        """min(in * k, out * k, out * in) with k taps; 0 for a single tap, and with groups."""
        if site.groups > 1 or site.taps == 1:
            return 0
        out, channels = site.shape[:2]
        return min(channels * site.taps, out * site.taps, out * channels)

    def shapes(self, site: Site) -> tuple[tuple[int, ...], ...]:
        """B, C, A."""
        return (
            (self.rank, site.shape[1]),
            (self.rank, *site.shape[2:]),
            (site.shape[0], self.rank),
        )

    def macs(self, site: Site) -> tuple[int, ...]:
        """B runs where the input lies: a strided conv saves less."""
        return (
            self.rank * site.shape[1] * site.inputs,
            self.rank * site.taps * site.kernel_positions,
            self.rank * site.shape[0] * site.positions,
        )

    def matrix_rank(self, site: Site) -> int | None:
        """The rank."""
        return self.rank

    def decompose(
        self, site: Site, weight: Tensor, second: Tensor | None, aim: Aim = PLAIN
    ) -> tuple[Tensor, ...]:
        """Variable projection in the metric.

        It starts from the rank-one terms of the weight's leading right singular vectors.
        """
        channels, places = site.shape[1], site.taps
        matrix, metric = weight.flatten(1), None if second is None else second[0]
        if aim.start is not None:
            small, steps = (aim.start[0], aim.start[1].flatten(1)), aim.steps
        elif self.rank >= channels * places:
            # Every entry of an input patch has its own term.
            eyes = [torch.eye(n, device=weight.device) for n in (channels, places)]
            small = (eyes[0].repeat_interleave(places, 0), eyes[1].repeat(channels, 1))
            steps = 0
        else:
            small = start(matrix, metric, channels, self.rank)
            steps = 0 if self.rank == self.full_rank(site) else aim.steps
        solution = project(khatri_rao_rows, small, matrix, aim.lean or metric, aim.noise, steps)
        return _evened(site, solution.small, solution.last, metric)

    def contract(self, site: Site, factors: Sequence[Tensor]) -> Tensor:
        """A (B khatri-rao C), in the shape of the weight."""
        b, c, a = factors
        rows = khatri_rao_rows((b, c.flatten(1)))
        return (a @ rows).view(a.shape[0], b.shape[1], *c.shape[1:])

    def apply(
        self,
        site: Site,
        x: Tensor,
        factors: Sequence[Tensor],
        between: Between,
        bias: Tensor | None,
    ) -> Tensor:
        """Three layers, as they will be exported."""
        b, c, a = factors
        inner = between(0, site.pointwise(x, b))
        inner = between(1, _depthwise(site, len(b)).run(inner, c.unsqueeze(1)))
        return site.pointwise(inner, a, bias)

    def problem(self, weight: Tensor) -> Problem:
        """A [out, R], B [in, R] and C [k, R] of the kernel [out, in, k]."""
        return CPProblem(weight.flatten(2))

    def arranged(self, site: Site, matrices: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """B, C, A."""
        a, b, c = matrices
        shapes = self.shapes(site)
        return b.mT.reshape(shapes[0]), c.mT.reshape(shapes[1]), a


def _depthwise(site: Site, rank: int) -> Site:
    return replace(site, shape=(rank, 1, *site.shape[2:]), groups=rank)


def _evened(
    site: Site, small: Sequence[Tensor], last: Tensor, metric: Tensor | None
) -> tuple[Tensor, ...]:
    """The same product, each term scaled so that 8 bits serve all channels equally well.

    Channels between B and C get the same mean square, columns of A the same norm: rounding the
    tensor between C and A then weighs the same in each channel.
    """
    b, c = small
    places = c.shape[1]
    if metric is None:
        power = b.square().sum(1)
    else:
        blocks = metric.view(b.shape[1], places, b.shape[1], places)
        per_place = blocks.diagonal(dim1=1, dim2=3).mean(2)
        power = ((b @ per_place) * b).sum(1)
    first = power.clamp_min(1e-20).sqrt()[:, None]
    norm = last.square().mean(0).clamp_min(1e-20).sqrt()
    c = c * first * norm[:, None]
    return b / first, c.view(len(c), *site.shape[2:]), last / norm
