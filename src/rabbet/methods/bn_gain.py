"""Weights as they were trained, before their BatchNorm was folded in: what the papers' quantisers see.

One scale for the whole tensor there is a scale per channel of the folded weight: the gain goes into
the scales, and the codes are the paper's.
"""

import torch
from torch import Tensor

from rabbet.grids.grid import Grid, Quantised, stored
from rabbet.layers import Site
from rabbet.workpiece import Norm, Workpiece


def gain_of(piece: Workpiece, site: Site, grid: Grid) -> Tensor | None:
    """What the site's BatchNorm multiplies each output with, [out]; None where the scales of a grid cannot take it."""
    norm: Norm | None = piece.norms.get(site.name)
    if norm is None or grid.scales.parts(1) is None or not bool((norm.gain.abs() > 1e-12).all()):
        return None
    return norm.gain


def without_gain(piece: Workpiece, site: Site, grid: Grid) -> Tensor:
    """The canonical weight [out, in / groups, *kernel] without the gain that the scales of a grid can take."""
    weight, gain = piece.weight(site), gain_of(piece, site, grid)
    return weight if gain is None else weight / gain.view(-1, *[1] * (weight.ndim - 1))


def with_gain(piece: Workpiece, site: Site, grid: Grid, codes: Tensor, scale: Tensor) -> Quantised:
    """A factor whose first axis is the site's output, the gain put into its scales; scale: [1] or [out]."""
    gain = gain_of(piece, site, grid)
    wide = scale.expand(grid.scale_shape(tuple(codes.shape))).clone()
    zero = torch.zeros_like(wide) if grid.scales.zeros else None
    gained = None if gain is None else grid.scales.gained(wide, gain)
    return Quantised(grid, codes, wide if gained is None else stored(gained), zero)


def round_to_nearest(piece: Workpiece, site: Site, grid: Grid) -> Quantised:
    """The weight rounded to nearest on one scale for the tensor, of least squared error.

    A grid of another layout than one scale, or one for each output, is rounded on its own scales.
    """
    if not grid.scales.single and grid.axis != 0:
        return Quantised.nearest(piece.weight(site), grid)
    plain = Quantised.nearest(without_gain(piece, site, grid), grid.with_axis(None))
    return with_gain(piece, site, grid, plain.codes, plain.scale)


def clipped(piece: Workpiece, site: Site, grid: Grid, sigmas: float) -> Quantised:
    """The weight rounded to nearest on `mean +- sigmas` deviations (arXiv 2408.00923), its zero point in the middle.

    An even number of codes has no middle: the paper's zero point, rounded down, gives the step more
    to the positive side, but for a mean that is clearly negative.
    """
    weight = without_gain(piece, site, grid)
    step = stored((2 * sigmas * weight.std() / (grid.levels - 1)).clamp_min(1e-12).reshape(1))
    spread = sigmas * float(weight.std()) / (grid.levels - 1)
    scale = -step if float(weight.mean()) > -spread else step
    return with_gain(piece, site, grid, grid.with_axis(None).codes(weight, scale), scale)
