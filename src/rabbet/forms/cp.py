"""Three factors: 1x1, depthwise, 1x1 (quantisation-aware CP, arXiv 2308.04595).

The kernel [out, in, k * k] is `sum_r a_r o b_r o c_r`. The layer is a chain of three: B [rank, in]
mixes channels where the input lies, C [rank, *k] filters each of them and carries stride, padding
and dilation, A [out, rank] mixes again. A kernel with one place has only two factors to be written
as: that is `lowrank`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rabbet.forms.base import PLAIN, Aim, Between, pointwise
from rabbet.layers.site import Site
from rabbet.solve.cp import khatri_rao_rows, start
from rabbet.solve.varpro import project


@dataclass(frozen=True)
class CP:
    """Factors B [rank, in], C [rank, *kernel] and A [out, rank]."""

    ranked: bool = True
    gaps: int = 2

    def full_rank(self, site: Site) -> int:
        """min(in * k, out * k, out * in) with k the places of the kernel; 0 where there is one, and for groups."""
        if site.groups > 1 or not site.stride or (places := math.prod(site.shape[2:])) == 1:
            return 0
        out, channels = site.shape[:2]
        return min(channels * places, out * places, out * channels)

    def shapes(self, site: Site, rank: int | None) -> tuple[tuple[int, ...], ...]:
        """B, C, A."""
        assert rank is not None
        return ((rank, site.shape[1]), (rank, *site.shape[2:]), (site.shape[0], rank))

    def macs(self, site: Site, rank: int | None) -> tuple[int, ...]:
        """B runs where the input lies: a strided layer saves less."""
        assert rank is not None
        places = math.prod(site.shape[2:])
        return (
            rank * site.shape[1] * site.inputs,
            rank * places * site.positions,
            rank * site.shape[0] * site.positions,
        )

    def decompose(
        self, site: Site, weight: Tensor, rank: int | None, second: Tensor | None, aim: Aim = PLAIN
    ) -> tuple[Tensor, ...]:
        """Variable projection in the metric, from the rank-one terms of the weight's leading right singular vectors."""
        assert rank is not None
        channels, places = site.shape[1], math.prod(site.shape[2:])
        matrix, metric = weight.flatten(1), None if second is None else second[0]
        if aim.start is not None:
            small, steps = (aim.start[0], aim.start[1].flatten(1)), aim.steps
        elif rank >= channels * places:  # every entry of an input patch has a term of its own
            small, steps = (
                (
                    torch.eye(channels).repeat_interleave(places, 0),
                    torch.eye(places).repeat(channels, 1),
                ),
                0,
            )
        else:
            small = start(matrix, metric, channels, rank)
            steps = 0 if rank == self.full_rank(site) else aim.steps
        found = project(khatri_rao_rows, small, matrix, metric, aim.noise, steps)
        return _evened(site, found.small, found.last, metric)

    def contract(self, site: Site, factors: Sequence[Tensor]) -> Tensor:
        """A (B khatri-rao C), in the shape of the weight."""
        b, c, a = factors
        return (a @ khatri_rao_rows((b, c.flatten(1)))).view(a.shape[0], b.shape[1], *c.shape[1:])

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
        inner = between(0, pointwise(site, x, b))
        inner = between(1, _depthwise(site, len(b)).run(inner, c.unsqueeze(1)))
        return pointwise(site, inner, a, bias)


def _depthwise(site: Site, rank: int) -> Site:
    return replace(site, shape=(rank, 1, *site.shape[2:]), groups=rank)


def _evened(
    site: Site, small: Sequence[Tensor], last: Tensor, metric: Tensor | None
) -> tuple[Tensor, ...]:
    """The same product, each term scaled so that 8 bits serve all channels alike.

    Channels between B and C get the same mean square, columns of A the same norm: the rounding of
    the tensor between C and A then weighs the same in each.
    """
    b, c = small
    places = c.shape[1]
    if metric is None:
        power = b.square().sum(1)
    else:
        per_place = (
            metric.view(b.shape[1], places, b.shape[1], places).diagonal(dim1=1, dim2=3).mean(2)
        )
        power = ((b @ per_place) * b).sum(1)
    first = power.clamp_min(1e-20).sqrt()[:, None]
    norm = last.square().mean(0).clamp_min(1e-20).sqrt()
    c = c * first * norm[:, None]
    return b / first, c.view(len(c), *site.shape[2:]), last / norm
