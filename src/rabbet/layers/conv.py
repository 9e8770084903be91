"""Convs over one, two or three axes, with groups, strides, dilation and every padding of torch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rabbet.layers.base import LayerKind, Site

CLASSES: dict[int, type[nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
RUNS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


@dataclass(frozen=True)
class Conv(LayerKind):
    """A conv whose kernel moves along `space` axes: [batch, channels, *places]."""

    space: int
    channel_axis: ClassVar[int] = 1
    operator: ClassVar[str] = "Conv"
    output_axis: ClassVar[int | None] = 0

    @property
    def name(self) -> str:  # type: ignore[override]
        """The torch function that runs it."""
        return f"conv{self.space}d"

    def fits(self, module: nn.Module) -> bool:
        """See `LayerKind.fits`."""
        base = CLASSES[self.space]
        return isinstance(module, base) and type(module).forward is base.forward

    def facts(self, module: Any) -> dict[str, Any]:
        """Stride, padding, dilation and groups."""
        return {
            "stride": tuple(module.stride),
            # resolves 'same' and 'valid'
            "pads": tuple(module._reversed_padding_repeated_twice),  # noqa: SLF001
            "padding_mode": module.padding_mode,
            "dilation": tuple(module.dilation),
            "groups": module.groups,
        }

    def usual(self, shape: Sequence[int]) -> dict[str, Any]:
        """Unpadded, of stride 1, without groups."""
        ones = (1,) * self.space
        return super().usual(shape) | {
            "stride": ones,
            "pads": (0, 0) * self.space,
            "dilation": ones,
        }

    def sound(self, site: Site) -> bool:
        """One stride and dilation for each axis of places, two pads."""
        lengths = (len(site.stride), len(site.dilation), len(site.pads) // 2, len(site.shape) - 2)
        whole = not site.output_padding and site.shape[0] % site.groups == 0
        return set(lengths) == {self.space} and len(site.pads) % 2 == 0 and whole

    def obstacle(self, module: nn.Module) -> str | None:
        """A padding that is not torch's own."""
        mode = module.padding_mode
        return None if mode in PADDING_MODES else f"padding mode {mode} is not known"

    def least_axes(self, module: nn.Module) -> int:
        """Batch, channels and the axes of places."""
        return 2 + self.space

    def places(self, value: Tensor) -> int:
        """Examples times pixels."""
        return len(value) * math.prod(value.shape[2:])

    def foldable(self, module: nn.Module, output: Tensor) -> bool:
        """Always: both work on axis 1."""
        return True

    def run(self, site: Site, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """One call of torch's conv, after any padding that it cannot do itself."""
        conv = RUNS[self.space]
        # [left, right, top, bottom] is symmetric for all but odd 'same' paddings; the conv then
        # pads by itself, which is faster.
        ends = site.pads[::2]
        if site.padding_mode == "zeros" and ends == site.pads[1::2]:
            result: Tensor = conv(
                x, weight, bias, site.stride, ends[::-1], site.dilation, site.groups
            )
        else:
            border = self.prepared(site, x)
            result = conv(border, weight, bias, site.stride, 0, site.dilation, site.groups)
        return result

    def pointwise(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """A conv with a kernel of one place."""
        result: Tensor = RUNS[self.space](x, weight.view(*weight.shape, *[1] * self.space), bias)
        return result

    def by_axis(self, site: Site) -> tuple[Site, ...]:
        """All but the last run where the input lies, and only the last has the stride.

        So on the axes of all but the last the padding must make up for the kernel.
        """
        *first, last = (k for k, n in enumerate(site.shape[2:]) if n > 1)
        ends = list(zip(site.pads[::2], site.pads[1::2], strict=True))[::-1]
        if any(sum(ends[k]) != site.dilation[k] * (site.shape[2 + k] - 1) for k in first):
            return ()

        def along(k: int, padded: Sequence[int]) -> Site:
            pads = [ends[j] if j in padded else (0, 0) for j in reversed(range(self.space))]
            kernel = [n if j == k else 1 for j, n in enumerate(site.shape[2:])]
            return replace(
                site, shape=(*site.shape[:2], *kernel), pads=tuple(n for pair in pads for n in pair)
            )

        ones, others = (1,) * self.space, [k for k in range(self.space) if k not in first]
        before = (replace(along(k, [k]), stride=ones, positions=site.inputs) for k in first)
        return (*before, along(last, others))

    def prepared(self, site: Site, x: Tensor) -> Tensor:
        """The input with its border, as the layer itself would pad it."""
        if not any(site.pads):
            return x
        mode = "constant" if site.padding_mode == "zeros" else site.padding_mode
        return F.pad(x, site.pads, mode=mode)

    def step(self, site: Site) -> tuple[int, ...]:
        """How far the kernel moves over the prepared input from one output place to the next."""
        return site.stride

    def tap_order(self, site: Site) -> Tensor:
        """For each tap of the kernel its place in the window of prepared inputs, [taps]."""
        return torch.arange(site.taps)

    def patches(
        self, site: Site, x: Tensor, places: int | None, generator: torch.Generator
    ) -> Tensor:
        """Patches of the prepared input (im2col): what the kernel meets at each output place."""
        x = self.prepared(site, x)
        kernel, space, stride = site.shape[2:], x.shape[2:], self.step(site)
        extent = [
            (s - d * (k - 1) - 1) // t + 1
            for s, d, k, t in zip(space, site.dilation, kernel, stride, strict=True)
        ]
        total = math.prod(extent)
        if places is not None and places < total:
            where = torch.randperm(total, generator=generator)[:places]
        else:
            where = torch.arange(total)
        # [places, taps] into the flattened space
        index = torch.zeros(len(where), site.taps, dtype=torch.long)
        inside, width = self.tap_order(site), 1
        axes = list(zip(space, extent, kernel, stride, site.dilation, strict=True))
        for size, out, k, t, d in reversed(axes):
            index += ((where % out) * t)[:, None] * width + ((inside % k) * d)[None] * width
            where, inside, width = where // out, inside // k, width * size
        # [batch, places * taps, channels]: a place is copied with all its channels at once
        patches = x.flatten(2).mT.contiguous().index_select(1, index.to(x.device).reshape(-1))
        patches = patches.view(len(x), *index.shape, site.groups, site.columns // site.taps)
        return patches.permute(3, 0, 1, 4, 2).reshape(site.groups, -1, site.columns)
