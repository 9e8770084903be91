"""Means and deviations of a layer's channels made those of the float network.

The gain goes into the scales, the shift into the bias, nothing is added. Unlike re-estimated
batch-norm statistics this harms no network that is healthy. Each goes only as far as two halves of
the examples agree on it.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rabbet.grids.grid import stored
from rabbet.layers import Site
from rabbet.model.compressed import Compressed, Factor

Halves = Callable[[Tensor], list[Tensor]]
"""Cuts an input or output of a layer into every second example, see `Axes.halves`."""


@dataclass(frozen=True)
class Statistics:
    """Means and deviations of channels, [halves, out]; one half if they are known for sure."""

    mean: Tensor
    spread: Tensor


def gained(layer: Compressed) -> bool:
    """Whether every term has a scale for each output channel, which can take a gain."""
    ends = zip(layer.forms, layer.factors, strict=True)
    return all(_takes_gain(factors[-1]) and not form.contracted for form, factors in ends)


def _takes_gain(factor: Factor) -> bool:
    """Whether each slice of the first axis, an output, has scales of its own."""
    return factor.grid.scales.parts(1) is not None


def in_halves(out: Tensor, site: Site, halves: Halves) -> Statistics | None:
    """The statistics of every second example; None where these cannot be told."""
    each = [_statistics(half, site) for half in halves(out)]
    return Statistics(*(torch.stack(parts) for parts in zip(*each, strict=True))) if each else None


def _trusted(corrections: Tensor, units: Tensor | float = 1.0) -> Tensor:
    """The mean of the corrections that two halves ask for, [halves, out], as far as they agree.

    The share is what one half explains of the other over all channels, in the given units: 1 where
    they are the same, 0 where they have nothing in common.
    """
    if len(corrections) < 2:
        return corrections[0]
    one, other = corrections / units
    both = (one.square() + other.square()).sum().clamp_min(1e-30)
    trust: Tensor = (2 * (one * other).sum() / both).clamp(0, 1)
    return trust * corrections.mean(0)


def matcher(
    wanted: Statistics,
    limits: tuple[float, float],
    shape: torch.Size | None = None,
    halves: Halves | None = None,
) -> Callable[[Compressed, tuple[Tensor, ...], Tensor], Tensor]:
    """A hook that gives a layer's channels a mean and a deviation; it returns the new output.

    limits: the least and the largest gain. shape: of the input that the wanted statistics come
    from; another one is of other places. halves: cuts an output as those were cut; of two halves,
    both must agree.
    """

    def hook(layer: Compressed, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        if not len(out) or shape not in (None, args[0].shape):
            return out
        out = out.float()
        sure = halves is None
        mean, spread = _statistics(out, layer.site)
        ours = Statistics(mean[None], spread[None])
        if halves is not None:
            told = in_halves(out, layer.site, halves)
            assert told is not None  # it was for an output of the same shape
            ours = told
        ratio = wanted.spread / ours.spread.clamp_min(1e-8)
        ratio = torch.where(ours.spread > 1e-8, ratio, 1.0).clamp(*limits)
        gain = ratio[0] if sure else _trusted(ratio.log()).exp()
        shift = _trusted(wanted.mean - ours.mean, wanted.spread.clamp_min(1e-8))
        old = torch.zeros_like(mean) if layer.bias is None else layer.bias.data
        first = layer.factors[0][-1].scale.clone()
        for form, factors in zip(layer.forms, layer.factors, strict=True):
            last = factors[-1]
            scale = last.grid.scales.gained(last.scale, form.of_outputs(gain))
            assert scale is not None
            last.scale.copy_(stored(scale))
        new = old if layer.bias is None else mean + shift - (mean - old) * gain
        if layer.bias is not None:
            layer.bias.data = new
        # each term's scales were rounded for themselves
        if len(layer.factors) > 1 or len(first) != len(gain):
            return layer.forward(args[0].float())
        real = layer.factors[0][-1].scale / first
        channel = layer.site.per_channel
        return (out - channel(old)) * channel(real) + channel(new)

    return hook


def _statistics(out: Tensor, site: Site) -> tuple[Tensor, Tensor]:
    channels = range(out.ndim)[site.kind.channel_axis]
    others = [axis for axis in range(out.ndim) if axis != channels]
    if out.numel() < 2 * site.shape[0]:  # an expert that one place was sent to, or none
        return out.sum(others), torch.zeros_like(out.sum(others))
    variance, mean = torch.var_mean(out, others)
    return mean, variance.sqrt()
