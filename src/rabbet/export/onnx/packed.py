"""Weights in an ONNX file: low bits on disk, 8-bit integers once a runtime has folded constants.

Weights that are floats in the plan are floats of the same type on disk, and float32 at load.

A code c becomes the integer q = c (signed, unsigned and ternary grids) or q = 2c + 1 on half the
scale (half-step grids), so that what follows is `DequantizeLinear(q)` and every runtime that has
int8 kernels can use them. 8 bits are stored as int8, 4 signed bits in ONNX's own type, all others
packed as in the native file (`rabbet.grids.pack`) and unpacked by a function that the file brings
along: nothing but integer arithmetic on a constant, done once at load. For a runtime that reads no
functions (OpenVINO), integers take 4 bits where they fit, else 8.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rabbet.export.onnx.expression import Expression, Names, shape_of
from rabbet.export.onnx.graph import OPSET, Graph
from rabbet.export.onnx.merge import Make, Merged
from rabbet.export.onnx.placeholders import DOMAIN
from rabbet.grids.codebook import Float
from rabbet.grids.grid import Grid
from rabbet.model.compressed import Factor

if TYPE_CHECKING:
    import onnx_ir as ir

_FLOAT, _INT8, _INT32 = 1, 3, 6  # of onnx.TensorProto


@dataclass(frozen=True)
class Move:
    """A weight in another layout: `Transpose` by an order of axes, or `Reshape` to sizes."""

    op: str
    to: tuple[int, ...]

    def __call__(self, tensor: Tensor) -> Tensor:
        """The move applied to a tensor."""
        return tensor.permute(self.to) if self.op == "Transpose" else tensor.reshape(self.to)

    def on(self, graph: Graph, value: "ir.Value", name: str) -> "ir.Value":
        """The move applied to a constant of a graph."""
        if self.op == "Transpose":
            return graph.call("Transpose", value, name=name, perm=list(self.to))
        return graph.call("Reshape", value, shape_of(graph, self.to), name=name)


@dataclass(frozen=True)
class Weight:
    """The codes of one factor in the layout in which a node uses them.

    axis: where its scales lie, None for one scale. scale: of the integers q, half the grid's where
    they are 2c + 1. parts, make, steps: for a weight that is computed when a file is loaded, its
    parts, how they are combined, and the scale it is rounded on. moves: changes of its layout.
    root: the table that it is another layout of, if a file holds it as a table already; shared:
    whether it is such a table. zero: the zero points of its codes, if any.
    """

    name: str
    grid: Grid
    codes: Tensor
    scale: Tensor
    axis: int | None
    parts: tuple["Weight", ...] = ()
    make: Make | None = None
    steps: Tensor | None = None
    moves: tuple[Move, ...] = ()
    shared: bool = False
    root: "Weight | None" = None
    zero: Tensor | None = None

    @classmethod
    def of(cls, name: str, factor: Factor, shared: bool = False) -> "Weight":
        """A factor in its own layout."""
        scale = factor.scale.detach().cpu().float()
        integers = factor.grid.codebook.integers
        scale = scale if integers is None else scale / integers[0]
        zero = None if factor.zero is None else factor.zero.detach().cpu().float()
        codes, axis = factor.codes.detach().cpu(), factor.grid.axis
        weight = cls(name, factor.grid, codes, scale, axis, shared=shared, zero=zero)
        if not isinstance(factor, Merged):
            return weight
        # Two halves of one chain share its cores and their names; a single part shares nothing.
        shared_name = name if len(factor.factors) == 1 else name.rpartition(".")[0]
        parts = [cls.of(f"{shared_name}.part{k}", f) for k, f in enumerate(factor.factors)]
        return replace(weight, parts=tuple(parts), make=factor.make, steps=scale)

    def can_move(self, move: Move) -> bool:
        """Whether the scales still lie along one axis after a transposition or another shape."""
        return len(self.scale) == 1 or self._moved_axis(move) is not None

    def _moved_axis(self, move: Move) -> int | None:
        """The axis along which the scales lie afterwards, if there is one."""
        if self.axis is None:
            return None
        count = len(self.scale)
        shape = [-1 if d == self.axis else 1 for d in range(self.codes.ndim)]
        slices = move(torch.arange(count).view(shape).expand(self.codes.shape))
        for axis, size in enumerate(slices.shape):
            along = slices.movedim(axis, -1)
            if size == count and bool((along == torch.arange(count)).all()):
                return axis
        return None

    def moved(self, move: Move) -> "Weight":
        """The same after a transposition or another shape that `can_move` allows."""
        axis = None if self.axis is None else self._moved_axis(move)
        moves, root = (*self.moves, move), self.root or (self if self.shared else None)
        return replace(
            self,
            name=f"{self.name}.moved",
            codes=move(self.codes),
            axis=axis,
            moves=moves,
            root=root,
        )

    def with_room(self, bias: NDArray[Any], place: str) -> "Weight":
        """The same weight with scales large enough that a bias fits into 31 of 32 bits.

        bias: in units of the input's scale. The last bit is left for the sum. Only scales of
        channels that hardly depend on their inputs grow: 2^30 of their steps are less than the
        bias.
        """
        least = torch.from_numpy(np.abs(bias) / 2**30).float()
        least = least if self.axis is not None else least.max().reshape(1)
        raised = torch.where(self.scale.abs() < least, least, self.scale)
        if raised.equal(self.scale):
            return self
        return replace(self, name=f"{self.name}.{place}", scale=raised)

    @property
    def _gain(self) -> tuple[int, int]:
        """(gain, offset): integers are `gain * code + offset`, the codes of arbitrary points."""
        return self.grid.codebook.integers or (1, 0)

    @property
    def _highest(self) -> int:
        gain, offset = self._gain
        return gain * self.grid.high + offset

    @property
    def integer_type(self) -> str:
        """The type of the integers."""
        return "int8" if self._highest <= 127 or self._gain[0] > 1 else "uint8"

    def integers(self, graph: Graph) -> "ir.Value":
        """The integers q, as a runtime will hold them."""
        if self.root is not None:
            value = self.root.integers(graph)
            for k, move in enumerate(self.moves, 1):
                name = self.name if k == len(self.moves) else f"{self.name}.{k}"
                value = move.on(graph, value, name)
            return value
        if self.make is not None and graph.functions_known:
            return self._put_together(graph)
        gain, offset = self._gain
        codes = (gain * self.codes + offset).numpy()
        if self.integer_type == "uint8" or (self.grid.bits == 8 and gain == 1):
            return graph.constant(self.name, codes.astype(self.integer_type))
        short = gain * self.grid.low + offset >= -8 and self._highest <= 7
        if short and (self.grid.bits == 4 or not graph.functions_known):
            stored = graph.constant(f"{self.name}.int4", codes.astype(np.int8), "INT4")
            return graph.call("Cast", stored, name=self.name, to=_INT8)
        if not graph.functions_known:
            return graph.constant(self.name, codes.astype(self.integer_type))
        return unpacked(graph, self.name, self.grid, self.codes)

    def _put_together(self, graph: Graph) -> "ir.Value":
        """The parts combined and rounded: constants that a runtime folds at load."""
        assert self.steps is not None
        names = Names(self.name)
        product = self._combined(graph, names)
        wide = [-1 if d == self.grid.axis else 1 for d in range(len(product.shape))]
        if self.steps.equal(self.scale):
            scales, shape = self.scales(graph), shape_of(graph, tuple(wide))
            steps = graph.call("Reshape", scales, shape, name=names.next())
        else:
            steps = graph.constant(f"{self.name}.steps", self.steps.view(wide).numpy())
        scaled = graph.call("Div", product.value, steps, name=names.next())
        rounded = graph.call("Round", scaled, name=names.next())
        ends = [
            graph.shared(f"end.{end}", np.array(end, np.float32))
            for end in (self.grid.low, self.grid.high)
        ]
        codes = graph.call("Clip", rounded, *ends, name=names.next())
        for move in self.moves:
            codes = move.on(graph, codes, names.next())
        return graph.call("Cast", codes, name=self.name, to=_INT8)

    def values(self, graph: Graph, ending: str = "values") -> "ir.Value":
        """The weight in float by plain arithmetic.

        A runtime folds that into a constant, which it does not do to a DequantizeLinear.
        """
        name, points = f"{self.name}.{ending}", self._points(graph)
        if not self.grid.scales.along_axis:
            return graph.call("Mul", points, self._for_each(graph, self.scale, "scale"), name=name)
        shape = [-1 if d == self.axis else 1 for d in range(self.codes.ndim)]
        if self.root is None and self.make is None:
            scale = graph.constant(f"{self.name}.scale", self.scale.view(shape).numpy())
        else:
            # The file holds these scales anyway, for another use.
            flat, sizes = self.scales(graph), shape_of(graph, shape)
            scale = graph.call("Reshape", flat, sizes, name=f"{self.name}.scales")
        return graph.call("Mul", points, scale, name=name)

    def _points(self, graph: Graph) -> "ir.Value":
        """What the integers stand for, in float and in units of the scales, less zero points."""
        book = self.grid.codebook
        if isinstance(book, Float):
            return self._floats(graph, book)
        integers = self.integers(graph)
        if book.integers is None:
            table = book.decode(torch.arange(book.low, book.high + 1.0)).numpy()
            places = graph.call("Cast", integers, name=f"{self.name}.index", to=_INT32)
            first = graph.shared(f"low.{book.low}", np.array(book.low, np.int32))
            index = graph.call("Sub", places, first, name=f"{self.name}.place")
            points = graph.shared(f"points.{book.text}", table.astype(np.float32))
            return graph.call("Gather", points, index, name=f"{self.name}.points", axis=0)
        wide = graph.call("Cast", integers, name=f"{self.name}.wide", to=_FLOAT)
        if self.zero is None:
            return wide
        zeros = self._for_each(graph, self._gain[0] * self.zero, "zero")
        return graph.call("Sub", wide, zeros, name=f"{self.name}.points")

    def _floats(self, graph: Graph, book: Float) -> "ir.Value":
        """The numbers of a float grid, in float32."""
        if self.make is not None and graph.functions_known:
            return self._combined(graph, Names(self.name)).value
        kind = {"f32": "FLOAT", "f16": "FLOAT16", "bf16": "BFLOAT16"}[book.text]
        held = graph.constant(f"{self.name}.{book.text}", self.codes.numpy(), kind)
        if book.bits == 32:
            return held
        return graph.call("Cast", held, name=f"{self.name}.numbers", to=_FLOAT)

    def _combined(self, graph: Graph, names: Names) -> Expression:
        """The parts put together: an expression that a runtime folds at load."""
        assert self.make is not None
        combined: Expression = self.make(
            [Expression(graph, w.values(graph), tuple(w.codes.shape), names) for w in self.parts]
        )
        return combined

    def _for_each(self, graph: Graph, values: Tensor, what: str) -> "ir.Value":
        """For each entry the value that it shares with others, by a look-up."""
        shape, layout = tuple(self.codes.shape), self.grid.scales
        count = torch.arange(len(values), dtype=torch.float32)
        places = layout.spread(count, shape).expand(shape).reshape(shape[0], -1).long().numpy()
        first, along = places[:, :1] - places[:1, :1], places[:1]
        text = f"{layout.text}.{places.shape[0]}x{places.shape[1]}"
        # A row and a column that sum to the places take far less room than all of them.
        if (first + along == places).all():
            rows = graph.shared(f"rows.{text}", first)
            index = graph.call("Add", rows, graph.shared(f"columns.{text}", along), name=text)
        else:
            index = graph.shared(text, places)
        flat = graph.constant(f"{self.name}.{what}", values.numpy())
        each = graph.call("Gather", flat, index, name=f"{self.name}.{what}.each", axis=0)
        return graph.call("Reshape", each, shape_of(graph, shape), name=f"{self.name}.{what}.wide")

    def scales(self, graph: Graph) -> "ir.Value":
        """The scale as a constant, [] or [slices]."""
        if self.root is not None and self.scale.equal(self.root.scale):
            return self.root.scales(graph)
        scale = self.scale.numpy()
        scale = scale.reshape(()) if self.axis is None else scale
        return graph.constant(f"{self.name}.scale", scale)

    def dequantised(
        self, graph: Graph, spread: int | None = None, zero: bool = False
    ) -> "ir.Value":
        """The weight in float, as the output of a DequantizeLinear.

        spread: the axis along which a single scale is repeated; onnxruntime fuses a product with
        floats only if there are scales along an axis. zero: whether to write a zero point of zero.
        """
        q, scale, axis = self.integers(graph), self.scales(graph), self.axis
        if spread is not None:
            sizes = shape_of(graph, (self.codes.shape[spread],))
            scale, axis = graph.call("Expand", scale, sizes, name=f"{self.name}.scales"), spread
        shape = () if axis is None else (self.codes.shape[axis],)
        parts = [q, scale, *([zeros(graph, shape, self.integer_type)] if zero else [])]
        extra: dict[str, Any] = {} if axis is None else {"axis": axis}
        return graph.call("DequantizeLinear", *parts, name=f"{self.name}.float", **extra)


def zeros(graph: Graph, shape: tuple[int, ...], kind: str) -> "ir.Value":
    """A zero point that is zero, shared by all of the same shape and type."""
    return graph.shared(f"none.{kind}.{'x'.join(map(str, shape))}", np.zeros(shape, kind))


def unpacked(graph: Graph, name: str, grid: Grid, codes: Tensor) -> "ir.Value":
    """Integers as a node of the file's own function, which is given the digits of their grid.

    A byte is split into digits: of base 2^bits if the bits divide a byte evenly, of base 3 for
    ternary codes, else into bits, of which every `bits` consecutive ones are a code.
    """
    bits = grid.levels.bit_length() - 1
    ternary, even = grid.levels == 3, 8 % bits == 0
    base, each = (3, 5) if ternary else (2**bits, 8 // bits) if even else (2, 8)
    gain, offset = grid.codebook.integers or (1, 0)
    weights = [gain * 2**k for k in range(1 if ternary or even else bits)]
    numbers = {
        "powers": [base**k for k in range(each)],
        "base": [base],
        "weights": weights,
        "low": [gain * grid.low + offset],
    }
    graph.function("unpack", UNPACK)
    settings = [
        graph.shared(f"{what}.{'.'.join(map(str, value))}", np.array(value, np.int32))
        for what, value in numbers.items()
    ]
    stored = graph.constant(f"{name}.packed", grid.codebook.pack(codes).numpy())
    shape = list(codes.shape)
    return graph.call("unpack", stored, *settings, name=name, domain=DOMAIN, s=shape)


UNPACK = f"""
    <domain: "{DOMAIN}", opset_import: ["" : {OPSET}]>
    unpack <s> (a, p, b, w, l) => (z)
    {{
        y = Constant <value_ints: ints = @s> ()
        o = Constant <value_ints = [0]> ()
        i = Constant <value_ints = [1]> ()
        m = Constant <value_ints = [-1]> ()
        c = Cast <to = {_INT32}> (a)
        d = Unsqueeze(c, i)
        e = Div(d, p)
        f = Mod(e, b)
        g = Reshape(f, m)
        h = Shape(w)
        j = ReduceProd(y)
        k = Mul(j, h)
        n = Slice(g, o, k)
        q = Concat <axis = 0> (m, h)
        r = Reshape(n, q)
        t = Mul(r, w)
        u = ReduceSum <keepdims = 0> (t, i)
        v = Add(u, l)
        x = Cast <to = {_INT8}> (v)
        z = Reshape(x, y)
    }}"""
"""The function `<shape> (packed uint8 [bytes], powers, base, weights, low) -> int8 [*shape]`.

Bytes become digits `byte / power mod base`, in a row; as many as there are weights make a code,
their weighted sum and the lowest integer. Names are short since the file holds them.
"""
