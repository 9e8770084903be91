"""Writes the weights of a traced graph as packed integers, or floats, biases as 32-bit integers."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rabbet.export.onnx.graph import WHOLE, Graph, values
from rabbet.export.onnx.packed import Move, Weight, zeros
from rabbet.export.onnx.placeholders import MOVING
from rabbet.layers import KINDS
from rabbet.model.compressed import Factor

if TYPE_CHECKING:
    import onnx_ir as ir

# Operators for which onnxruntime has an integer kernel only where zero points are written.
NEED_ZERO = {"Gemm"}
OUTPUT_AXES = {k.operator: k.output_axis for k in KINDS.values() if k.output_axis is not None}


def write_weights(graph: Graph, factors: Mapping[str, Factor]) -> dict[str, str]:
    """Replace every weight placeholder by packed integers, and biases by 32-bit integers.

    Returns the name of the factor that each constant holds, by the constant's name, without tables,
    which nothing multiplies.
    """
    written: dict[str, str] = {}
    placeholders = list(graph.placeholders("weight"))
    tables = {
        name
        for name, placeholder in placeholders
        if any(_looks_up(use.node, use.idx) for use in placeholder.outputs[0].uses())
    }
    for name, placeholder in placeholders:
        source = Weight.of(name, factors[name], name in tables)
        for weight in _write_weight(graph, source, placeholder.outputs[0]):
            written[weight.name] = name
    return written


def _write_weight(graph: Graph, weight: Weight, place: "ir.Value") -> Iterator[Weight]:
    for use in list(place.uses()):
        node = use.node
        move = _move(node)
        if weight.grid.codebook.floats or (move is not None and not weight.can_move(move)):
            # Either it is float, or its scales lie on no axis of the new layout: then it becomes
            # float before the move, when the file is loaded.
            whole = weight.values(graph, WHOLE)
            node.replace_input_with(use.idx, whole)
            yield replace(weight, name=str(whole.name))
        elif move is not None:
            yield from _write_weight(graph, weight.moved(move), node.outputs[0])
        elif _looks_up(node, use.idx):
            _write_table(graph, weight, node)
        elif _in_float(node, use.idx, weight):
            whole = weight.values(graph, WHOLE)
            node.replace_input_with(use.idx, whole)
            yield replace(weight, name=str(whole.name))
        else:
            unit = _unit(node) if node.op_type in ("Conv", "Gemm") and use.idx == 1 else None
            if unit is not None and (bias := _bias(node)) is not None:
                weight = weight.with_room(bias / float(values(unit)), str(node.name))
                if node.op_type == "Conv" and not graph.functions_known:
                    _add_bias(graph, node, bias)
                else:
                    _write_bias(graph, weight, node, bias, unit)
            product = node.op_type == "MatMul" and use.idx == 1
            alone = product and weight.axis is None and _unit(node) is None
            spread, zero = 1 if alone else None, node.op_type in NEED_ZERO
            node.replace_input_with(use.idx, weight.dequantised(graph, spread, zero))
            yield weight


def _looks_up(node: "ir.Node", place: int) -> bool:
    """Whether a node looks up rows of the input at this place."""
    return node.op_type == "Gather" and place == 0


def _in_float(node: "ir.Node", place: int, weight: Weight) -> bool:
    """Whether a weight at this place of a node's inputs should become float at load.

    Runtimes assume that the scales of a weight belong to its outputs, on whatever axis they lie.
    Among the nodes with float inputs, onnxruntime fuses the MatMul; any other would dequantise its
    weight in every run.
    """
    if weight.axis is not None and weight.axis != _outputs(node, place, weight.axis):
        return True
    if weight.axis is None and len(weight.scale) > 1:  # groups share scales
        return True
    return place == 1 and _unit(node) is None and node.op_type != "MatMul"


def _outputs(node: "ir.Node", place: int, usual: int) -> int:
    """The axis of the outputs in a weight at this place of a node's inputs.

    usual: the answer for operators that are not known.
    """
    if node.op_type == "Gemm":
        flipped = node.attributes.get("transB")
        return 0 if flipped is not None and flipped.as_int() else 1
    return (OUTPUT_AXES | {"MatMul": place}).get(node.op_type, usual)


def _move(node: "ir.Node") -> Move | None:
    """What a node does to the layout of a weight; None if it does more than that."""
    if node.op_type not in MOVING:
        return None
    if node.op_type == "Transpose":
        return Move("Transpose", tuple(node.attributes["perm"].as_ints()))
    shape = node.outputs[0].shape
    assert shape is not None  # a weight's shape is a constant
    return Move("Reshape", tuple(int(n) for n in shape))  # type: ignore[arg-type]


def _unit(node: "ir.Node") -> "ir.Value | None":
    """The scale of a node's input, if that is quantised."""
    source = node.inputs[0].producer() if node.inputs[0] is not None else None
    return source.inputs[1] if source is not None and source.op_type == "DequantizeLinear" else None


def _bias(node: "ir.Node") -> NDArray[Any] | None:
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    return None if bias is None or bias.const_value is None else values(bias)


def _write_bias(
    graph: Graph, weight: Weight, node: "ir.Node", bias: NDArray[Any], unit: "ir.Value"
) -> None:
    """A bias as int32 on the product of the scales of weight and input, as integer kernels want."""
    real = weight.scale.numpy().astype(np.float64) * float(values(unit))
    shape = () if weight.axis is None else real.shape
    codes = np.round(bias / real)
    axis: dict[str, Any] = {} if weight.axis is None else {"axis": 0}
    product = graph.call("Mul", weight.scales(graph), unit, name=f"{node.name}.unit")
    parts = [graph.constant(f"{node.name}.bias", codes.astype(np.int32)), product]
    if node.op_type in NEED_ZERO:
        parts.append(zeros(graph, shape, "int32"))
    value = graph.call("DequantizeLinear", *parts, name=f"{node.name}.bias.float", **axis)
    node.replace_input_with(2, value)


def _add_bias(graph: Graph, node: "ir.Node", bias: NDArray[Any]) -> None:
    """A conv's bias as a float addition behind it, for OpenVINO.

    From a bias inside the conv, OpenVINO 2026.4 gives every channel that of channel 0 where the
    conv meets a part of other sizes in a Concat.
    """
    out, weight = node.outputs[0], node.inputs[1]
    assert weight is not None
    assert weight.shape is not None
    wide = bias.astype(np.float32).reshape(-1, *[1] * (len(weight.shape) - 2))
    added = graph.call(
        "Add", out, graph.constant(f"{node.name}.bias", wide), name=f"{out.name}.sum"
    )
    added.type, added.shape = out.type, out.shape
    node.resize_inputs(2)
    graph.swap(out, added, keep=[added.producer()])  # type: ignore[list-item]


def _write_table(graph: Graph, weight: Weight, node: "ir.Node") -> None:
    """An embedding: rows of integers are looked up, and only those become float."""
    index = node.inputs[1]
    assert index is not None
    rows = graph.call("Gather", weight.integers(graph), index, name=f"{node.name}.rows", axis=0)
    scale = weight.scales(graph)
    if weight.axis == 0:
        # A value of its own: onnxruntime does not fuse a classifier whose scales are also read
        # elsewhere.
        last = graph.shared("axis.last", np.array([-1]))
        each = graph.call("Unsqueeze", scale, last, name=f"{node.name}.scales")
        scale = graph.call("Gather", each, index, name=f"{node.name}.scale", axis=0)
    wide = graph.call("Cast", rows, name=f"{node.name}.wide", to=1)
    graph.swap(node.outputs[0], graph.call("Mul", wide, scale, name=f"{node.name}.values"))
