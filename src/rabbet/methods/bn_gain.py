"""Rounding of weights as they were before their BatchNorm was folded in, as in the papers.

One scale for such a tensor becomes one scale per channel of the folded weight: the gain of the
BatchNorm goes into the scales, and the codes are those of the paper.
"""

import torch
from torch import Tensor

from rabbet.grids.grid import Grid, Quantised, stored
from rabbet.layers import Site
from rabbet.workpiece import Norm, Workpiece


def gain_of(piece: Workpiece, site: Site, grid: Grid) -> Tensor | None:
    """The gain of the site's BatchNorm, [out]; None if there is none that the scales can take.

    The scales of a grid can take gains if every output has scales of its own and no gain is zero.
    """
    norm: Norm | None = piece.norms.get(site.name)
    if norm is None or grid.scales.parts(1) is None or not bool((norm.gain.abs() > 1e-12).all()):
        return None
    return norm.gain


def without_gain(piece: Workpiece, site: Site, grid: Grid) -> Tensor:
    """The canonical weight [out, in / groups, *kernel] divided by its gain, if there is one.

    See `gain_of`.
    """
    weight, gain = piece.weight(site), gain_of(piece, site, grid)
    return weight if gain is None else weight / gain.view(-1, *[1] * (weight.ndim - 1))


def with_gain(piece: Workpiece, site: Site, grid: Grid, codes: Tensor, scale: Tensor) -> Quantised:
    """A factor of codes and a scale that does not hold the gain yet, with the gain multiplied in.

    The first axis of the codes is the site's output; scale: [1] or [out].
    """
    gain = gain_of(piece, site, grid)
    wide = scale.expand(grid.scale_shape(tuple(codes.shape))).clone()
    zero = torch.zeros_like(wide) if grid.scales.zeros else None
    gained = None if gain is None else grid.scales.gained(wide, gain)
    return Quantised(grid, codes, wide if gained is None else stored(gained), zero)


def round_to_nearest(piece: Workpiece, site: Site, grid: Grid) -> Quantised:
    """The weight rounded to nearest with one scale for the tensor, that of least squared error.

    If the grid has neither one scale nor one for each output, its own layout of scales is used.
    """
    if not grid.scales.single and grid.axis != 0:
        return Quantised.nearest(piece.weight(site), grid)
    plain = Quantised.nearest(without_gain(piece, site, grid), grid.with_axis(None))
    return with_gain(piece, site, grid, plain.codes, plain.scale)


def clipped(piece: Workpiece, site: Site, grid: Grid, sigmas: float) -> Quantised:
    """The weight rounded to nearest in `mean +- sigmas` standard deviations (arXiv 2408.00923).

    The zero point is in the middle of the codes. An even number of codes has no middle: the paper
    rounds it down, so the positive side has one step more, unless the mean is clearly negative.
    Floats need no range.
    """
    if grid.codebook.floats:
        return round_to_nearest(piece, site, grid)
    weight = without_gain(piece, site, grid)
    step = stored((2 * sigmas * weight.std() / (grid.levels - 1)).clamp_min(1e-12).reshape(1))
    spread = sigmas * float(weight.std()) / (grid.levels - 1)
    scale = -step if float(weight.mean()) > -spread else step
    return with_gain(piece, site, grid, grid.with_axis(None).codes(weight, scale), scale)
