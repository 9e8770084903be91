"""Transposed convs, as convs over inputs with zeros inserted between them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rabbet.layers.base import Site
from rabbet.layers.conv import Conv

CLASSES: dict[int, type[nn.Module]] = {
    1: nn.ConvTranspose1d,
    2: nn.ConvTranspose2d,
    3: nn.ConvTranspose3d,
}
RUNS = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


@dataclass(frozen=True)
class ConvTranspose(Conv):
    """A transposed conv; the module stores its weight as [in, out / groups, *kernel].

    An output place p meets the inputs at (p + padding - tap * dilation) / stride where that is an
    integer: a conv of stride 1, its taps in reverse order, over the inputs with `stride` - 1
    zeros between them.
    """

    operator: ClassVar[str] = "ConvTranspose"
    output_axis: ClassVar[int | None] = 1
    integer_kernel: ClassVar[bool] = False

    @property
    def name(self) -> str:  # type: ignore[override]
        """The conv that it transposes."""
        return f"transposed conv{self.space}d"

    def fits(self, module: nn.Module) -> bool:
        """See `LayerKind.fits`."""
        base = CLASSES[self.space]
        return isinstance(module, base) and type(module).forward is base.forward

    def weight(self, module: nn.Module) -> Tensor:
        """[in, out / groups, *kernel] -> [out, in / groups, *kernel]."""
        groups = module.groups
        assert isinstance(groups, int)
        return self._swapped(super().weight(module), groups)

    def native(self, weight: Tensor, groups: int = 1) -> Tensor:
        """[out, in / groups, *kernel] -> [in, out / groups, *kernel]."""
        return self._swapped(weight, groups)

    @staticmethod
    def _swapped(weight: Tensor, groups: int) -> Tensor:
        """The first two axes exchanged in each group, [g * a, b, *k] -> [g * b, a, *k]."""
        if groups == 1:
            return weight.transpose(0, 1)
        (rows, columns), kernel = weight.shape[:2], weight.shape[2:]
        parts = weight.reshape(groups, rows // groups, columns, *kernel).transpose(1, 2)
        return parts.reshape(groups * columns, rows // groups, *kernel)

    def facts(self, module: Any) -> dict[str, Any]:
        """Stride, both paddings, dilation and groups."""
        pads = [p for p in reversed(module.padding) for _ in range(2)]
        return {
            "stride": tuple(module.stride),
            "pads": tuple(pads),
            "padding_mode": module.padding_mode,
            "dilation": tuple(module.dilation),
            "groups": module.groups,
            "output_padding": tuple(module.output_padding),
        }

    def usual(self, shape: Sequence[int]) -> dict[str, Any]:
        """As for a conv, without output padding."""
        return super().usual(shape) | {"output_padding": (0,) * self.space}

    def sound(self, site: Site) -> bool:
        """As for a conv; padding is zeros only, and equal on both sides."""
        lengths = (
            len(site.stride),
            len(site.dilation),
            len(site.output_padding),
            len(site.pads) // 2,
            len(site.shape) - 2,
        )
        symmetric = site.pads[::2] == site.pads[1::2] and site.padding_mode == "zeros"
        return set(lengths) == {self.space} and symmetric and site.shape[0] % site.groups == 0

    def by_axis(self, site: Site) -> tuple[Site, ...]:
        """The layer itself if its kernel has one axis: how many places lie between two is open."""
        return (site,) if site.taps in site.shape[2:] else ()

    def kernel_positions(self, site: Site) -> int:
        """Every input is multiplied with the whole kernel."""
        return site.inputs

    def run(self, site: Site, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """One call of torch's transposed conv."""
        padding = site.pads[::2][::-1]
        result: Tensor = RUNS[self.space](
            x,
            self.native(weight, site.groups),
            bias,
            site.stride,
            padding,
            site.output_padding,
            site.groups,
            site.dilation,
        )
        return result

    def prepared(self, site: Site, x: Tensor) -> Tensor:
        """Inputs with zeros between them, padded so that every output place sees a whole window."""
        space = [(n - 1) * s + 1 for n, s in zip(x.shape[2:], site.stride, strict=True)]
        apart = x.new_zeros(*x.shape[:2], *space)
        every = [slice(None, None, s) for s in site.stride]
        apart[(slice(None), slice(None), *every)] = x
        border: list[int] = []
        padding = site.pads[::2][::-1]
        axes = zip(site.shape[2:], site.dilation, padding, site.output_padding, strict=True)
        for kernel, dilation, pad, extra in reversed(list(axes)):
            whole = dilation * (kernel - 1) - pad
            border += [whole, whole + extra]  # negative where outputs are cut off
        return F.pad(apart, border)

    def step(self, site: Site) -> tuple[int, ...]:
        """One: the stride is in the zeros between the inputs."""
        return (1,) * self.space

    def tap_order(self, site: Site) -> Tensor:
        """From the end of the window to its start."""
        return torch.arange(site.taps - 1, -1, -1)
