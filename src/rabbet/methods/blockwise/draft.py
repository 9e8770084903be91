"""A block written otherwise: inputs of its layers scaled or in another order, its answers the same.

What makes the inputs of a layer is divided by scales that the layer's columns are multiplied with,
or hands its channels on in another order in which the layer's columns are taken. In floats nothing
changes; on a grid whose scales are shared by inputs it may.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from rabbet.jobs import Tensors
from rabbet.layers import Site
from rabbet.methods.blockwise.stack import put

REST = "rest:"  # what the names of changed tensors of no site begin with, among a block's numbers


@dataclass(frozen=True)
class Norm:
    """A module that multiplies each channel with `offset + weight`, then adds its bias.

    weight, bias: names of the parameters within the block. kinds: the types in which they are
    stored, which a changed one must be exact in.
    """

    weight: str
    bias: str | None
    offset: float
    kinds: tuple[torch.dtype, ...]


@dataclass(frozen=True)
class Draft:
    """The tensors of a block, by names within it; every change gives a new one.

    weights: of the sites, canonical. biases: of those that have one. rest: changed parameters of
    norms. moments: second moments [groups, n, n] of the inputs of sites; none of a site that never
    ran, such as an expert that no word was sent to. moved: sites whose bias is not that of the
    network.
    """

    sites: Mapping[str, Site]
    weights: Mapping[str, Tensor]
    biases: Mapping[str, Tensor]
    moments: Mapping[str, Tensor]
    rest: Mapping[str, Tensor] = field(default_factory=dict)
    moved: frozenset[str] = frozenset()

    @classmethod
    def of(
        cls, block: nn.Module, sites: Mapping[str, Site], moments: Mapping[str, Tensor]
    ) -> "Draft":
        """The block as it is."""
        weights: dict[str, Tensor] = {}
        biases: dict[str, Tensor] = {}
        for name, site in sites.items():
            module: Any = block.get_submodule(name)
            weights[name] = site.kind.weight(module).detach()
            if site.bias:
                biases[name] = module.bias.detach()
        return cls(sites, weights, biases, moments)

    def read_scaled(self, name: str, scale: Tensor) -> "Draft":
        """A site whose inputs were divided by scales, [columns]."""
        over = scale[:, None] * scale
        return self._read(name, self.weights[name] * scale, lambda second: second / over)

    def made_scaled(self, name: str, scale: Tensor) -> "Draft":
        """A site whose outputs are divided by scales, [out]."""
        return self._made(name, self.weights[name] / scale[:, None], lambda bias: bias / scale)

    def read_ordered(self, name: str, order: Tensor) -> "Draft":
        """A site that is given its inputs in another order: the first is what was `order[0]`."""
        weight = self.weights[name][:, order]
        return self._read(name, weight, lambda second: second[:, order][:, :, order])

    def made_ordered(self, name: str, order: Tensor) -> "Draft":
        """A site that gives its outputs in another order."""
        return self._made(name, self.weights[name][order], lambda bias: bias[order])

    def _read(self, name: str, weight: Tensor, change: Callable[[Tensor], Tensor]) -> "Draft":
        moments = dict(self.moments)
        if name in moments:
            moments[name] = change(moments[name])
        return replace(self, weights={**self.weights, name: weight}, moments=moments)

    def _made(self, name: str, weight: Tensor, change: Callable[[Tensor], Tensor]) -> "Draft":
        weights = {**self.weights, name: weight}
        if name not in self.biases:
            return replace(self, weights=weights)
        biases = {**self.biases, name: change(self.biases[name])}
        return replace(self, weights=weights, biases=biases, moved=self.moved | {name})

    def norm_scaled(
        self, block: nn.Module, norm: Norm, readers: Sequence[str], scale: Tensor
    ) -> "Draft":
        """A norm divided by scales, [channels], and its readers' columns multiplied with them.

        Scales are moved to the nearest with which the norm is exact in the type in which it is
        stored; a channel where there is none keeps 1.
        """
        weight = block.get_parameter(norm.weight).detach().float()
        rest = dict(self.rest)
        if norm.bias is not None and any(kind != torch.float32 for kind in norm.kinds):
            scale = torch.exp2(scale.log2().round())  # exact in any type
        gain = weight + norm.offset
        stored = (gain / scale - norm.offset).to(norm.kinds[0]).float()
        real = gain / (stored + norm.offset)
        sound = torch.isfinite(real) & (real > 0)
        rest[norm.weight] = torch.where(sound, stored, weight)
        real = torch.where(sound, real, 1.0)
        if norm.bias is not None:
            bias = block.get_parameter(norm.bias).detach().float()
            rest[norm.bias] = (bias / real).to(norm.kinds[-1]).float()
        changed = replace(self, rest=rest)
        for name in readers:
            changed = changed.read_scaled(name, real)
        return changed

    @contextlib.contextmanager
    def worn(self, block: nn.Module) -> Iterator[None]:
        """The block with these tensors, for as long as this lasts."""
        values = dict(self.rest)
        for name, site in self.sites.items():
            values[f"{name}.weight"] = site.native(self.weights[name])
            if name in self.moved:
                values[f"{name}.bias"] = self.biases[name]
        with wearing(block, values):
            yield

    def kept(self, prefix: str) -> Tensors:
        """What a block's numbers must hold of it besides codes and scales; see `rest_among`.

        prefix: of the block, see `Stack.prefix`.
        """
        found = {f"{REST}{prefix}{name}": t.clone() for name, t in self.rest.items()}
        return found | {f"{prefix}{name}/bias": self.biases[name].clone() for name in self.moved}


def rest_among(found: Tensors) -> Tensors:
    """The changed tensors of no site among a block's numbers, by their names in the network."""
    return {n.removeprefix(REST): t for n, t in found.items() if n.startswith(REST)}


@contextlib.contextmanager
def wearing(block: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """A module with other values of some parameters, for as long as this lasts."""
    before = {name: block.get_parameter(name) for name in values}
    for name, value in values.items():
        like = value.to(before[name])
        put(block, name, nn.Parameter(like.contiguous(), requires_grad=False))
    try:
        yield
    finally:
        for name, p in before.items():
            put(block, name, p)
