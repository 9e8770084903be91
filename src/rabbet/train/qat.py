"""Factors that train in float, then on their grid with scales that are learnt (LSQ, arXiv 1902.08153)."""

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from rabbet.grids.grid import Grid, Quantised, stored
from rabbet.model.compressed import Factor


class Latent(Factor):
    """A factor that trains: a float tensor and, once it is on its grid, the scale."""

    def __init__(self, value: Tensor, grid: Grid) -> None:
        scale = torch.ones(grid.scale_shape(tuple(value.shape)))
        zero = torch.zeros_like(scale) if grid.scales.zeros else None
        super().__init__(Quantised(grid, torch.zeros_like(value), scale, zero))
        # one layout, whether computed now or read from a folder: sums in another order would be
        # other bytes
        self.value = nn.Parameter(value.detach().float().contiguous().clone(), requires_grad=False)
        self.on = False
        self.shown: Tensor | None = (
            None  # the values, where they were made together with those of others
        )

    def forward(self) -> Tensor:
        """The values."""
        return super().forward() if self.shown is None else self.shown

    @property
    def held(self) -> Tensor:
        """The float tensor."""
        return self.value

    def show(self, held: Tensor, scale: Tensor) -> Tensor:
        """The values of it, or of some rows of it."""
        zero = 0.0 if self.zero is None else self.zero
        return self.grid.fake(held, scale, zero) if self.on else held

    def settle(self) -> None:
        """Put on the grid, with the scale of least squared error."""
        scale, zero = self.grid.search(self.value.detach())
        self.scale.copy_(scale)
        if self.zero is not None and zero is not None:
            self.zero.copy_(zero)
        self.on = True

    @property
    def numbers(self) -> Quantised:
        """As a file holds them."""
        scale = stored(self.scale.detach())
        zero = 0.0 if self.zero is None else self.zero
        codes = self.grid.codes(self.value.detach(), scale, zero)
        return Quantised(self.grid, codes, scale, self.zero)


@contextlib.contextmanager
def together(latents: Iterable[Latent]) -> Iterator[None]:
    """While this lasts, latents show what they are now; those of one shape and grid are rounded in one operation.

    Cores are small, and many: one by one, their rounding takes a sixth of a step of 32 short
    sentences.
    """
    alike: dict[tuple[Grid, torch.Size], list[Latent]] = {}
    for latent in latents:
        if latent.on and latent.grid.scales.single:
            alike.setdefault((latent.grid, latent.value.shape), []).append(latent)
    for (grid, _), group in alike.items():
        values, scales = torch.stack([x.value for x in group]), torch.cat([x.scale for x in group])
        for latent, shown in zip(
            group, grid.with_axis(0).fake(values, scales).unbind(), strict=True
        ):
            latent.shown = shown
    try:
        yield
    finally:
        for group in alike.values():
            for latent in group:
                latent.shown = None
