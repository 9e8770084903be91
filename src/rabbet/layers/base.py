"""What a layer kind is, and the facts of one layer.

Every kind presents its weight in one canonical layout, [out, in / groups, *kernel], so that solvers
and forms see only that: a linear is a kernel without places, a transposed conv a kernel whose
inputs lie apart, transformers' Conv1D a linear that stores its transpose.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Site:
    """One layer whose weight can be compressed. All numbers are read from one forward pass.

    shape: canonical weight shape. positions, inputs: output and input places per example, over all
    calls (pixels of a conv, tokens of a linear). pads: as `torch.nn.functional.pad` takes them.
    output_padding: of a transposed conv. tied: further names of this layer. norm: name of the
    BatchNorm that was folded in. heads: linears that share the table of an embedding;
    head_positions: the places per example at which they multiply with it.
    """

    name: str
    kind: "LayerKind"
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
    output_padding: tuple[int, ...] = ()

    @property
    def numel(self) -> int:
        """Entries of the weight."""
        return math.prod(self.shape)

    @property
    def entries(self) -> int:
        """Numbers that the layer takes and gives for one example."""
        if self.looks_up:
            heads = self.head.entries if self.heads else 0
            return self.inputs + self.positions * self.shape[1] + heads
        return self.inputs * self.shape[1] * self.groups + self.positions * self.shape[0]

    @property
    def columns(self) -> int:
        """Inputs that one output sees: the width of the weight as a matrix, and of the metric."""
        return self.numel // self.shape[0]

    @property
    def taps(self) -> int:
        """Places of the kernel: 9 for 3x3, 1 for a linear."""
        return math.prod(self.shape[2:])

    @property
    def space(self) -> int:
        """Axes along which the kernel moves: 2 for a conv over images, none for a linear."""
        return self.kind.space

    @property
    def looks_up(self) -> bool:
        """Whether the layer is given indices of rows of its weight."""
        return self.kind.looks_up

    @property
    def kernel_positions(self) -> int:
        """Places per example at which the kernel multiplies, over all calls."""
        return self.kind.kernel_positions(self)

    @property
    def macs(self) -> int:
        """Multiply-accumulates per example of the dense layer.

        A table look-up has none; the heads of a table do.
        """
        return self.numel * (self.head_positions if self.looks_up else self.kernel_positions)

    @property
    def runs(self) -> bool:
        """Whether a module stands for the layer, which is called; not so for a stored weight."""
        return self.kind.runs

    @property
    def multiplies(self) -> bool:
        """Whether the weight meets inputs that can be quantised; a mere look-up meets indices."""
        return self.runs and (not self.looks_up or bool(self.heads))

    @property
    def head(self) -> "Site":
        """The linear that the heads of a table are: [..., columns] -> [..., rows].

        Their biases are not the table's.
        """
        places = self.head_positions
        return replace(
            self,
            kind=self.kind.head,
            positions=places,
            inputs=places,
            calls=1,
            tied=(),
            heads=(),
        )

    @property
    def names(self) -> tuple[str, ...]:
        """All names of the layer."""
        return (self.name, *self.tied)

    def weight(self, model: nn.Module) -> Tensor:
        """The canonical weight that a network holds for this layer."""
        return self.kind.held(model, self.name)

    @property
    def by_axis(self) -> "tuple[Site, ...]":
        """Layers that move along one axis each and together do what this one does.

        One for each axis along which the kernel has several places, [out, in, *kernel] with one
        place along the others. Empty for groups, a kernel of one place, and where it cannot be told
        at how many places those between would run.
        """
        return () if self.groups > 1 or self.taps == 1 else self.kind.by_axis(self)

    def matrix(self, weight: Tensor) -> Tensor:
        """A canonical weight as [groups, out / groups, columns]: the shape that solvers work on."""
        return weight.reshape(self.groups, self.shape[0] // self.groups, self.columns)

    def native(self, weight: Tensor) -> Tensor:
        """A canonical weight in the layout of the layer itself."""
        return self.kind.native(weight, self.groups)

    def run(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """The layer with this weight, whose first axis may be any multiple of the groups."""
        return self.kind.run(self, x, weight, bias)

    def pointwise(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Mix channels: weight [out, in] at every place of x, an input or output of this layer."""
        return self.kind.pointwise(x, weight, bias)

    def channels_last(self, x: Tensor) -> Tensor:
        """An input or output of this layer with its channels on the last axis."""
        return x.movedim(self.kind.channel_axis, -1)

    def channels_back(self, x: Tensor) -> Tensor:
        """The inverse of `channels_last`."""
        return x.movedim(-1, self.kind.channel_axis)

    def per_channel(self, values: Tensor) -> Tensor:
        """Values [out] in a shape that broadcasts against the output of this layer."""
        return values.view(-1, *[1] * self.space)

    def patches(self, x: Tensor, places: int | None, generator: torch.Generator) -> Tensor:
        """Rows that the weight meets, [groups, rows, columns], of an input of this layer.

        places: at most this many random places of each example, the same for the whole batch; None
        for all.
        """
        return self.kind.patches(self, x, places, generator)


class LayerKind(ABC):
    """One kind of layer: where its weight lies, what it meets, and how it runs.

    A kind has no state: two of one class and fields are the same, and it can be sent to other
    processes. Weights are canonical, [out, in / groups, *kernel], unless said otherwise.
    """

    name: str
    """What files and surveys call it."""
    space: int = 0
    """Axes along which the kernel moves."""
    channel_axis: ClassVar[int] = -1
    """Where the channels of inputs and outputs lie."""
    looks_up: ClassVar[bool] = False
    """Whether the layer is given indices of rows of its weight."""
    operator: ClassVar[str] = "MatMul"
    """What an ONNX graph runs it as."""
    output_axis: ClassVar[int | None] = None
    """The axis of that operator's weight on which the outputs lie, if it is always the same."""
    integer_kernel: ClassVar[bool] = True
    """Whether onnxruntime has an integer kernel for that operator."""
    runs: ClassVar[bool] = True
    """Whether a layer of this kind is a module, which a replacement can stand for."""
    shares_table: ClassVar[bool] = False
    """Whether a layer of this kind may have the table of a look-up as its weight."""

    @property
    def head(self) -> "LayerKind":
        """The kind of a layer that multiplies with a table of this kind."""
        raise NotImplementedError(f"{self.name} has no heads")

    @abstractmethod
    def fits(self, module: nn.Module) -> bool:
        """Whether a module is of this kind.

        A subclass counts only while its forward is the one that it inherits.
        """

    def weight(self, module: nn.Module) -> Tensor:
        """The canonical weight of a module."""
        weight = module.weight
        assert isinstance(weight, Tensor)
        return weight

    def held(self, model: nn.Module, name: str) -> Tensor:
        """The canonical weight that a network holds under the name of a layer."""
        return self.weight(model.get_submodule(name))

    def native(self, weight: Tensor, groups: int = 1) -> Tensor:
        """A canonical weight in the layout of the module."""
        return weight

    def facts(self, module: Any) -> dict[str, Any]:
        """The fields of a `Site` that can be read from the module alone."""
        return {}

    def usual(self, shape: Sequence[int]) -> dict[str, Any]:
        """The usual facts of this kind; a file states only what differs from them."""
        return {
            "stride": (),
            "pads": (),
            "padding_mode": "zeros",
            "dilation": (),
            "groups": 1,
            "output_padding": (),
        }

    def sound(self, site: Site) -> bool:
        """Whether facts from a file have the lengths that this kind has."""
        fields = (site.stride, site.dilation, site.pads, site.output_padding)
        return len(site.shape) == 2 and not any(fields) and site.groups == 1

    def obstacle(self, module: nn.Module) -> str | None:
        """Why a module of this kind cannot be compressed, in words; None if it can."""
        return None

    def least_axes(self, module: nn.Module) -> int:
        """The fewest axes of an input that has a batch axis; 0 if that cannot be told."""
        return 0

    def places(self, value: Tensor) -> int:
        """Examples times places of an input or output."""
        return math.prod(value.shape[:-1])

    def kernel_positions(self, site: Site) -> int:
        """Places per example at which the kernel multiplies, over all calls."""
        return site.positions

    def by_axis(self, site: Site) -> tuple[Site, ...]:
        """See `Site.by_axis`, of a kernel of several places."""
        return ()

    def foldable(self, module: nn.Module, output: Tensor) -> bool:
        """Whether a BatchNorm that sees this output can be folded into the layer."""
        return False

    @abstractmethod
    def run(self, site: Site, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer, with this weight; its first axis may be any multiple of the groups."""

    def pointwise(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Mix channels: weight [out, in] at every place of x."""
        return nn.functional.linear(x, weight, bias)

    @abstractmethod
    def patches(
        self, site: Site, x: Tensor, places: int | None, generator: torch.Generator
    ) -> Tensor:
        """See `Site.patches`."""
