"""The facts of one layer, the kinds of layer there are, and how each runs with a weight of its shape.

Every kind presents its weight in one canonical layout, [out, in / groups, *kernel], so that solvers
and forms see only that: a linear is a kernel without positions, transformers' Conv1D is a linear
that stores its transpose.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rabbet.errors import FileError


@dataclass(frozen=True, slots=True)
class Site:
    """One layer whose weight can be compressed. All numbers are read from one forward pass.

    shape: canonical weight shape. positions, inputs: output and input places per example, over all
    calls (pixels of a conv, tokens of a linear). pads: as `torch.nn.functional.pad` takes them.
    tied: further names of this layer. norm: the BatchNorm that was folded in, by name. heads:
    linears that share the table of an embedding; head_positions: the places per example at which
    they multiply with it.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    stride: tuple[int, ...] = ()
    pads: tuple[int, ...] = ()
    padding_mode: str = "zeros"
    dilation: tuple[int, ...] = ()
    groups: int = 1
    bias: bool = False
    positions: int = 1
    inputs: int = 1
    calls: int = 1
    tied: tuple[str, ...] = ()
    norm: str | None = None
    heads: tuple[str, ...] = ()
    head_positions: int = 0

    @property
    def numel(self) -> int:
        """Entries of the weight."""
        return math.prod(self.shape)

    @property
    def columns(self) -> int:
        """Inputs that one output sees: the width of the weight as a matrix, and of the metric."""
        return self.numel // self.shape[0]

    @property
    def macs(self) -> int:
        """Multiply-accumulates per example of the dense layer; a table look-up has none, the heads of a table have."""
        return self.numel * (self.head_positions if self.kind == "embedding" else self.positions)

    @property
    def multiplies(self) -> bool:
        """Whether the weight meets inputs that can be quantised; a table that is only looked up meets indices."""
        return self.kind != "embedding" or bool(self.heads)

    @property
    def head(self) -> "Site":
        """The linear that the heads of a table are: [..., columns] -> [..., rows]. Their biases are not the table's."""
        places = self.head_positions
        return replace(
            self, kind="linear", positions=places, inputs=places, calls=1, tied=(), heads=()
        )

    @property
    def names(self) -> tuple[str, ...]:
        """All names of the layer."""
        return (self.name, *self.tied)

    def matrix(self, weight: Tensor) -> Tensor:
        """A canonical weight as [groups, out / groups, columns]: the shape that solvers work on."""
        return weight.reshape(self.groups, self.shape[0] // self.groups, self.columns)

    def native(self, weight: Tensor) -> Tensor:
        """A canonical weight in the layout of the layer itself."""
        return weight.T if self.kind == "transposed linear" else weight

    def run(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """The layer, with this canonical weight (its first axis may be any multiple of the groups)."""
        return KINDS[self.kind].run(self, x, weight, bias)

    def to_json(self) -> list[Any]:
        """Name, kind, shape, positions, inputs, and the facts that are not the usual ones: it is in every file."""
        usual = _usual(self.kind, self.shape)
        other = {k: v for k in _FACTS if (v := getattr(self, k)) != usual[k]}
        return [self.name, self.kind, list(self.shape), self.positions, self.inputs, other]

    @classmethod
    def from_json(cls, facts: list[Any]) -> "Site":
        """The inverse of `to_json`; raises FileError for facts that are not a site's."""
        try:
            name, kind, shape, positions, inputs, other = facts
            known = _usual(kind, shape) | {
                k: tuple(v) if isinstance(v, list) else v for k, v in other.items()
            }
            site = cls(
                name=name,
                kind=kind,
                shape=tuple(shape),
                positions=positions,
                inputs=inputs,
                **known,
            )
            if site._sound():
                return site
        except (TypeError, ValueError, KeyError, AttributeError):
            pass
        raise FileError(f"{json.dumps(facts)} does not describe a layer")

    def _sound(self) -> bool:
        """Whether facts from a file are of the right types and lengths; a network may still contradict them."""
        space = len(self.stride)
        counts = (
            *self.shape,
            *self.stride,
            *self.dilation,
            self.groups,
            self.positions,
            self.inputs,
            self.calls,
        )
        texts = (
            self.name,
            self.padding_mode,
            *self.tied,
            *self.heads,
            "" if self.norm is None else self.norm,
        )
        return (
            all(type(n) is int and n > 0 for n in counts)
            and all(type(n) is int and n >= 0 for n in (*self.pads, self.head_positions))
            and all(
                type(t) is tuple
                for t in (self.stride, self.dilation, self.pads, self.tied, self.heads)
            )
            and bool(self.heads) == (self.head_positions > 0)
            and (self.kind == "embedding" or not self.heads)
            and all(type(t) is str for t in texts)
            and type(self.bias) is bool
            and space == {"conv2d": 2, "conv1d": 1}.get(self.kind, 0)
            and (len(self.shape), len(self.dilation), len(self.pads))
            == (2 + space, space, 2 * space)
            and self.shape[0] % self.groups == 0
            and (space > 0 or self.groups == 1)
        )


@dataclass(frozen=True, slots=True)
class LayerKind:
    """One kind of layer: how its weight is read, how its facts are read, and how it runs."""

    weight: Callable[[nn.Module], Tensor]
    facts: Callable[[Any], dict[str, Any]]
    run: Callable[[Site, Tensor, Tensor, Tensor | None], Tensor]


def _conv_facts(m: nn.modules.conv._ConvNd) -> dict[str, Any]:
    return {
        "stride": tuple(m.stride),
        "pads": tuple(m._reversed_padding_repeated_twice),  # noqa: SLF001 (resolves 'same' and 'valid')
        "padding_mode": m.padding_mode,
        "dilation": tuple(m.dilation),
        "groups": m.groups,
    }


def padded(site: Site, x: Tensor) -> Tensor:
    """A conv's input with its border, as the layer itself would pad it."""
    if not any(site.pads):
        return x
    return F.pad(
        x, site.pads, mode="constant" if site.padding_mode == "zeros" else site.padding_mode
    )


def _run_conv(site: Site, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    conv = F.conv1d if len(site.stride) == 1 else F.conv2d
    # [left, right, top, bottom] is symmetric in all but odd 'same' paddings: then the fused padding
    # is faster
    ends = site.pads[::2]
    if site.padding_mode == "zeros" and ends == site.pads[1::2]:
        result: Tensor = conv(x, weight, bias, site.stride, ends[::-1], site.dilation, site.groups)
    else:
        result = conv(padded(site, x), weight, bias, site.stride, 0, site.dilation, site.groups)
    return result


def _run_linear(_: Site, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, bias)


def _run_embedding(_: Site, x: Tensor, weight: Tensor, __: Tensor | None) -> Tensor:
    return F.embedding(x, weight)


def _plain_weight(m: nn.Module) -> Tensor:
    weight = m.weight
    assert isinstance(weight, Tensor)
    return weight


def _transposed_weight(m: nn.Module) -> Tensor:
    return _plain_weight(m).T


def _no_facts(_: nn.Module) -> dict[str, Any]:
    return {}


KINDS: dict[str, LayerKind] = {
    "conv2d": LayerKind(_plain_weight, _conv_facts, _run_conv),
    "conv1d": LayerKind(_plain_weight, _conv_facts, _run_conv),
    "linear": LayerKind(_plain_weight, _no_facts, _run_linear),
    "transposed linear": LayerKind(_transposed_weight, _no_facts, _run_linear),
    "embedding": LayerKind(_plain_weight, _no_facts, _run_embedding),
}


_FACTS = (
    "stride", "pads", "padding_mode", "dilation", "groups", "bias", "calls", "tied", "norm", "heads", "head_positions",
)  # fmt: skip


def _usual(kind: str, shape: Sequence[int]) -> dict[str, Any]:
    """What most layers of a kind are: an unpadded conv of stride 1, with a bias, that runs once."""
    space = len(shape) - 2 if KINDS[kind].run is _run_conv else 0
    ones = (1,) * space
    facts = {"stride": ones, "pads": (0, 0) * space, "dilation": ones, "padding_mode": "zeros"}
    single = {
        "groups": 1,
        "bias": True,
        "calls": 1,
        "tied": (),
        "norm": None,
        "heads": (),
        "head_positions": 0,
    }
    return {**facts, **single}


def kind_of(module: nn.Module) -> str | None:
    """The kind of a layer, or None.

    A subclass counts only while its forward is the one that it inherits.
    """
    forward = getattr(type(module), "forward", None)  # a scripted module has none
    for kind, base in (
        ("conv2d", nn.Conv2d),
        ("conv1d", nn.Conv1d),
        ("linear", nn.Linear),
        ("embedding", nn.Embedding),
    ):
        if isinstance(module, base) and forward is base.forward:
            return kind
    # transformers is not a dependency: its Conv1D is known by name and by what it holds
    if (
        type(module).__name__ == "Conv1D"
        and type(module).__module__ == "transformers.pytorch_utils"
    ):
        return "transposed linear"
    return None


def patches(site: Site, x: Tensor, places: int, generator: torch.Generator) -> Tensor:
    """Rows that the weight meets, [groups, rows, columns]: at most `places` random positions of each example.

    x: [batch, channels, *space] for convs, [..., features] for linears. The same positions serve
    the whole batch.
    """
    if not site.stride:
        rows = x.reshape(-1, x.shape[-1])
        keep = min(len(rows), places * x.shape[0])
        chosen = (
            torch.randperm(len(rows), generator=generator)[:keep].to(x.device)
            if keep < len(rows)
            else slice(None)
        )
        return rows[chosen][None]
    x = padded(site, x)
    kernel, space = site.shape[2:], x.shape[2:]
    extent = [
        (s - d * (k - 1) - 1) // t + 1
        for s, d, k, t in zip(space, site.dilation, kernel, site.stride, strict=True)
    ]
    total = math.prod(extent)
    order = (
        torch.randperm(total, generator=generator)[:places]
        if places < total
        else torch.arange(total)
    )
    index = torch.zeros(
        len(order), math.prod(kernel), dtype=torch.long
    )  # [places, k*k] into the flattened space
    where, inside = order, torch.arange(math.prod(kernel))
    step = 1
    for size, out, k, t, d in reversed(
        list(zip(space, extent, kernel, site.stride, site.dilation, strict=True))
    ):
        index += ((where % out) * t)[:, None] * step + ((inside % k) * d)[None] * step
        where, inside, step = where // out, inside // k, step * size
    found = x.flatten(2)[:, :, index.to(x.device).reshape(-1)]  # [batch, channels, places * k*k]
    found = found.view(len(x), site.groups, site.columns // index.shape[1], *index.shape)
    return found.permute(1, 0, 3, 2, 4).reshape(site.groups, -1, site.columns)
