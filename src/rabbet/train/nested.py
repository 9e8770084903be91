"""A weight that trains with a width for each of its entries, and is stored on one grid.

The grids lie within one another, as those of Bayesian Bits do (arXiv 2005.07093, eq. 1 to 3): at b
bits the step is 2 reach / (2^b - 1) and the codes are symmetric, so that if 2^b - 1 divides 2^w - 1
every point at b bits is one at w bits. A file stores the whole weight at the widest of its widths,
and the entries that have fewer bits exactly.
"""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rabbet.core.plan import Term
from rabbet.grids.grid import Quantised, stored
from rabbet.train.qat import FLOAT, TINY, WIDEST, GatedWeight


def nest(widths: Sequence[int]) -> bool:
    """Whether each grid of rising widths is a part of the next; beyond 8 bits there is no grid."""
    steps = [2**bits - 1 for bits in widths if bits <= WIDEST]
    return all(wide % narrow == 0 for narrow, wide in itertools.pairwise(steps))


class NestedWeight(GatedWeight):
    """A dense weight whose entries have widths of their own, on grids that lie within one another.

    All widths share one range. It starts where the middle of them has the least squared error, and
    trains. each: the width of every entry, of the weight's shape; entries wider than 8 bits are not
    rounded.

    widths: that the entries can have, rising; at 2 bits the grid is ternary.
    """

    def __init__(self, weight: Tensor, axis: int | None, widths: Sequence[int]) -> None:
        super().__init__(weight, axis)
        self.two = "ternary"
        self.each: Tensor
        self.register_buffer("each", torch.full_like(self.start, FLOAT))
        grids = [self.grid_of(bits) for bits in widths if bits <= WIDEST]
        middle = grids[len(grids) // 2]
        reach = middle.mse(self.start) * (2**middle.bits - 1) / 2
        self.reach = nn.Parameter(reach, requires_grad=False)

    @property
    def bits(self) -> list[int]:
        """The largest width of any entry, at which a file stores all of them."""
        return [int(self.each.max())] if self.each.numel() else [FLOAT]

    @bits.setter
    def bits(self, bits: list[int]) -> None:
        if "each" in self._buffers:  # not yet while the base class is made
            self.each.fill_(bits[0])

    @property
    def gates(self) -> int:
        """One for each entry."""
        return self.each.numel()

    @property
    def mean_bits(self) -> float:
        """The mean over entries, of the widths that a file could hold."""
        return float(self.each.clamp(max=WIDEST).mean())

    def forward(self) -> Tensor:
        """The weight, each entry on the grid of its width, with straight-through gradients."""
        levels = 2 ** self.each.clamp(max=WIDEST) - 1
        step = 2 * self._wide(self.reach) / levels
        steps = torch.clamp(self.latent / step, -(levels - 1) / 2, (levels - 1) / 2)
        rounded = steps + (steps.round() - steps).detach()
        return torch.where(self.each > WIDEST, self.latent, rounded * step)

    def scale_of(self, bits: int) -> Tensor:
        """The scale at a width: its grid covers the reach."""
        reach = torch.where(self.reach.abs() < TINY, TINY, self.reach)
        scale: Tensor = 2 * reach / (2**bits - 1)
        return scale

    def numbers_of(self, term: Term) -> Quantised:
        """The weight on the grid of a term, exactly what its entries are on their own grids."""
        scale = stored(self.scale_of(term.grid.bits).detach())
        own = 2 ** self.each.clamp(max=term.grid.bits) - 1
        factor = (2**term.grid.bits - 1) / own  # whole numbers, for the grids nest
        ends = (own - 1) / 2
        codes = (self.latent.detach() / (self._wide(scale) * factor)).round()
        return Quantised(term.grid, torch.clamp(codes, -ends, ends) * factor, scale)

    def _wide(self, scale: Tensor) -> Tensor:
        """A number for each output, or one for all, that broadcasts against the weight."""
        safe = torch.where(scale.abs() < TINY, TINY, scale)
        return safe.view(-1, *[1] * (self.latent.ndim - 1)) if len(safe) > 1 else safe
