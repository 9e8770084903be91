"""Where activations are quantised in an exported graph, and with which range.

A runtime has an integer kernel for a node only if everything around the node is quantised: a conv
needs a quantised output as well as a quantised input, a residual add needs both of its inputs. A
plan only knows the inputs of its layers. The rest follows from the graph: the output of a conv, and
what lies between quantised tensors on a path that the runtime can compute in integers, is quantised
too, in 8 unsigned bits, with a range measured on the user's batches.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from rabbet.export.onnx.graph import Graph, values
from rabbet.export.onnx.padding import adds_zeros
from rabbet.export.onnx.placeholders import DOMAIN, is_placeholder, name_of
from rabbet.layers import KINDS
from rabbet.model.compressed import ActQuant

if TYPE_CHECKING:
    import onnx_ir as ir

# Operators that move or pick values and change none: one range serves both sides.
PASSING = {
    "DepthToSpace", "Expand", "Flatten", "Identity", "MaxPool", "Reshape", "Slice", "SpaceToDepth",
    "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze",
}  # fmt: skip
# Operators between a layer's quantised input and the layer that add a border other than zeros.
BORDER = {"Concat", "Pad", "Slice"}
# Operators that onnxruntime computes in integers if inputs and output are quantised.
INTEGER = {"Add", "AveragePool", "Concat", "GlobalAveragePool", "LeakyRelu", "Mul", "Sigmoid"}
# Operators whose integer kernel needs a quantised output, too.
CONVS = {kind.operator for kind in KINDS.values() if kind.space and kind.integer_kernel}
# Operators that only clip: if their output is quantised, their input need not be.
CUTTING = {"Clip", "Relu"}


@dataclass(frozen=True)
class Range:
    """Unsigned integers of `bits` bits around a zero point: `value = scale * (code - zero)`."""

    scale: float
    zero: int
    bits: int = 8

    @classmethod
    def of(cls, act: ActQuant) -> "Range":
        """The range of a layer's input, as it was calibrated and tuned."""
        return cls(float(act.scale), int(act.zero), act.grid.bits)

    @property
    def top(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    def union(self, other: "Range") -> "Range":
        """The range that holds both; both have the same bits."""
        low = min(-self.zero * self.scale, -other.zero * other.scale)
        high = max((self.top - self.zero) * self.scale, (other.top - other.zero) * other.scale)
        scale = (high - low) / self.top
        return Range(scale, round(-low / scale), self.bits)

    def within(self, floor: float, ceiling: float) -> "Range":
        """The same without what no value reaches.

        A runtime can then drop the ReLU or the clip before it.
        """
        if self.zero and floor >= 0:
            positive = Range((self.top - self.zero) * self.scale / self.top, 0, self.bits)
            return positive.within(floor, ceiling)
        if self.zero or self.scale * self.top <= ceiling:
            return self
        scale = float(np.nextafter(np.float32(ceiling / self.top), np.float32(0)))
        return Range(scale, 0, self.bits)


class QDQPlacement:
    """The quantised values of a marked graph, grouped by the range that they share."""

    def __init__(self, graph: Graph, acts: Mapping[str, Range]) -> None:
        self.graph, self.acts = graph, acts
        self.nodes = graph.nodes
        self.pins: dict[ir.Value, list[ir.Node]] = {}
        for _, placeholder in graph.placeholders("act"):
            self.pins.setdefault(_first(placeholder), []).append(placeholder)
        self._wanted: dict[ir.Value, bool] = {}
        self.root: dict[ir.Value, ir.Value] = {}
        # Values that integer kernels compute: they exist in integers only.
        self.made: set[ir.Value] = set()
        for node in self.nodes:
            self._visit(node)

    @property
    def open(self) -> "list[ir.Value]":
        """One value of each group whose range no layer's plan gives: these must be measured."""
        pinned = {self._root(v) for v in self.pins}
        return [v for v in self.root if self._root(v) is v and v not in pinned]

    def insert(self, measured: Mapping[str, Range]) -> None:
        """Put a QDQ pair behind every quantised value and remove the placeholders."""
        ranges = self._ranges(measured)
        for value in self.root:
            bounds = ranges[self._root(value)].within(*_ends(self._root(value)))
            quantised = self._pair(value, bounds, str(value.name))
            for k, placeholder in enumerate(self.pins.get(value, ())):
                own, result = self.acts[name_of(placeholder)], quantised
                # A layer that reads the tensor in fewer bits has it quantised once more.
                if own.bits != bounds.bits:
                    result = self._rounded(quantised, own, f"{value.name}.{k}")
                self.graph.swap(placeholder.outputs[0], result)
                placeholder.graph.remove(placeholder, safe=True)  # type: ignore[union-attr]

    def _visit(self, node: "ir.Node") -> None:
        """Decide whether the outputs of a node are quantised; nodes come in order."""
        data = [v for v in node.inputs if v is not None and v.const_value is None]
        # What is computed of constants alone is one; the exporter does not fold large ones.
        if node.domain == DOMAIN:
            if node.op_type == "act":
                self._take(_first(node))
        elif (
            node.op_type in CONVS
            and _bordered(node.inputs[0])
            and is_placeholder(node.inputs[1], "weight")
        ):
            self._make(_settled(node.outputs[0]))
        elif data and node.op_type in BORDER and all(map(_bordered, data)):
            self._make(node.outputs[0], _source(data[0]))
        elif _passes(node) and data and data[0] in self.root:
            for out in filter(self._is_wanted, node.outputs):
                self._make(out, data[0])
        elif data and all(v in self.root for v in data):
            if node.op_type in INTEGER and len(data) == len(node.inputs) and self._pays(node, data):
                self._make(_settled(node.outputs[0]))
            elif node.op_type in CUTTING and self._is_wanted(node.outputs[0]):
                self._make(node.outputs[0])

    def _pays(self, node: "ir.Node", data: "list[ir.Value]") -> bool:
        """Whether a node should run in integers.

        It should on the way to a layer, and where its inputs exist in integers only.
        """
        output = node.outputs[0]
        inside = all(v in self.made for v in data) and not _settled(output).is_graph_output()
        return self._is_wanted(output) or inside

    def _make(self, value: "ir.Value", source: "ir.Value | None" = None) -> None:
        """Note a value that an integer kernel computes.

        source: the input of a kernel that only moves values, whose range the output shares.
        """
        self.made.add(value)
        self._take(value)
        if source is not None:
            self.root[self._root(value)] = self._root(source)

    def _take(self, value: "ir.Value") -> None:
        self.root.setdefault(value, value)

    def _root(self, value: "ir.Value") -> "ir.Value":
        while self.root[value] is not value:
            value = self.root[value]
        return value

    def _is_wanted(self, value: "ir.Value") -> bool:
        """Whether some path in integers leads from a value to the input of a layer."""
        if value not in self._wanted:
            self._wanted[value] = any(
                is_placeholder(use.node.outputs[0], "act")
                or (
                    (_passes(use.node) or use.node.op_type in INTEGER | CUTTING)
                    and any(map(self._is_wanted, use.node.outputs))
                )
                for use in value.uses()
            )
        return self._wanted[value]

    def _ranges(self, measured: Mapping[str, Range]) -> "dict[ir.Value, Range]":
        """The range of each group.

        It is the plan's if a layer reads a member of the group; if several do, the union of those
        with the most bits.
        """
        ranges: dict[ir.Value, Range] = {}
        for value, placeholders in self.pins.items():
            root = self._root(value)
            for own in (self.acts[name_of(placeholder)] for placeholder in placeholders):
                seen = ranges.get(root)
                if seen is None or own.bits > seen.bits:
                    ranges[root] = own
                elif own.bits == seen.bits and own != seen:
                    ranges[root] = seen.union(own)
        return ranges | {v: measured[str(v.name)] for v in self.open}

    def _pair(self, value: "ir.Value", bounds: Range, name: str) -> "ir.Value":
        """A QDQ pair that all nodes that can use integers read in place of a value."""
        known = {use.node for use in value.uses()}
        result = self._rounded(value, bounds, name)
        keep = {
            *(use.node for use in value.uses() if use.node not in known),
            *self.pins.get(value, ()),
        }
        # If the float value exists anyway, nodes that compute in floats go on reading that.
        if value not in self.made:
            keep |= {node for node in known if not any(map(self.root.__contains__, node.outputs))}
        self.graph.swap(value, result, keep, outputs=value in self.made)
        return result

    def _rounded(self, value: "ir.Value", bounds: Range, name: str) -> "ir.Value":
        graph = self.graph
        scale = graph.constant(f"{name}.scale", np.array(bounds.scale, np.float32))
        zero = graph.shared(f"zero.{bounds.zero}", np.array(bounds.zero, np.uint8))
        codes = graph.call("QuantizeLinear", value, scale, zero, name=f"{name}.codes")
        if bounds.bits < 8:
            ends = (graph.shared(f"zero.{k}", np.array(k, np.uint8)) for k in (0, bounds.top))
            codes = graph.call("Clip", codes, *ends, name=f"{name}.cut")
        return graph.call("DequantizeLinear", codes, scale, zero, name=f"{name}.quantised")


def _passes(node: "ir.Node") -> bool:
    """Whether a node only moves values; padding with zeros counts."""
    return node.op_type in PASSING or adds_zeros(node)


def _bordered(value: "ir.Value | None") -> bool:
    """Whether a value is the quantised input of a layer, with or without a border."""
    node = None if value is None else value.producer()
    if node is not None and node.op_type in BORDER:
        inner = [v for v in node.inputs if v is not None and v.const_value is None]
        return bool(inner) and all(map(_bordered, inner))  # parts of constants are no layer's input
    return is_placeholder(value, "act")


def _source(value: "ir.Value") -> "ir.Value":
    """The value that was quantised and then given a border."""
    node = value.producer()
    assert node is not None
    return _first(node) if is_placeholder(value, "act") else _source(_first(node))


def _first(node: "ir.Node") -> "ir.Value":
    value = node.inputs[0]
    assert value is not None
    return value


def _settled(value: "ir.Value") -> "ir.Value":
    """The value behind a clip that is the only user of a value; else the value itself."""
    uses = list(value.uses())
    if len(uses) == 1 and uses[0].node.op_type in CUTTING and not value.is_graph_output():
        return _settled(uses[0].node.outputs[0])
    return value


def _ends(value: "ir.Value") -> tuple[float, float]:
    """The bounds of a value that comes from a ReLU or a clip; infinite for others."""
    node = value.producer()
    if node is None or node.op_type not in CUTTING:
        return -np.inf, np.inf
    if node.op_type == "Relu":
        return 0.0, np.inf
    low, high = [*node.inputs, None, None][1:3]
    return (
        -np.inf if low is None or low.const_value is None else float(values(low)),
        np.inf if high is None or high.const_value is None else float(values(high)),
    )
