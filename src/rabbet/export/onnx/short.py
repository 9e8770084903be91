"""Graphs are written short: in a small network names and settings take more room than weights.

What a user meets keeps its name: inputs, outputs, and the weights by which a runtime tells of its
kernels. All else gets a number, the shortest where it is named most often; names of nodes,
attributes at their defaults and second copies of small constants are left out.
"""

import itertools
import string
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rabbet.export.onnx.graph import OPSET, SHARED, WHOLE, Graph

if TYPE_CHECKING:
    import onnx_ir as ir

DIGITS = string.digits + string.ascii_letters
SMALL = 64  # bytes that a constant has at most of which equal ones become one
MULTIPLYING = {"Conv", "ConvTranspose", "Gemm", "MatMul"}


def shortened(content: bytes) -> bytes:
    """The bytes of a file that computes the same."""
    graph = Graph.read(content)
    shorten(graph)
    return graph.bytes()


def shorten(graph: Graph, least: int = 1) -> int:
    """Shorten a graph, in place; returns the signs of the longest name that was given.

    least: the signs of a name at least, but for those of constants that belong to no layer.
    """
    _share(graph)
    longest = _rename(graph, least)
    for node in graph.model.graph.all_nodes():
        node.name = ""
        for name in [a.name for a in node.attributes.values() if _usual(node, a)]:
            del node.attributes[name]
    for value in (*graph.inputs, *graph.outputs):
        value.metadata_props.clear()
        value.doc_string = None
    return longest


def _share(graph: Graph) -> None:
    """Make one of small whole-number constants that are equal, such as shapes and axes.

    Scales stay apart: onnxruntime does not fuse a layer whose scales are also read elsewhere.
    """
    import onnx_ir as ir

    known: dict[tuple[object, ...], ir.Value] = {}
    for value in list(graph.model.graph.initializers.values()):
        content = value.const_value
        if content is None or content.dtype is not ir.DataType.INT64 or content.nbytes > SMALL:
            continue
        if value.is_graph_output():
            continue
        same = known.setdefault((tuple(content.shape.numpy()), content.tobytes()), value)
        if same is not value:
            value.replace_all_uses_with(same)


def _rename(graph: Graph, least: int) -> int:
    """Number the values that no user meets, shared ones first; returns the signs of the longest."""
    inner = graph.model.graph
    kept = {id(v) for v in (*graph.inputs, *graph.outputs)}
    every = [*inner.initializers.values(), *(out for node in graph.nodes for out in node.outputs)]
    free = [v for v in every if v.name and id(v) not in kept and not _is_met(v)]
    taken = {v.name for v in (*graph.inputs, *graph.outputs)}
    taken |= {v.name for v in every if v not in set(free)} | set(_deeper(graph))
    order = sorted(free, key=lambda v: (not _is_shared(v), -len(list(v.uses()))))
    first = sum(map(_is_shared, order))
    for k, value in enumerate(free):
        value.name = f"\0{k}"  # out of the way of the new names
    names = (name for name in _numbers() if name not in taken)
    longest = 0
    for k, value in enumerate(order):
        value.name = next(names)
        while k >= first and len(value.name) < least:
            value.name = next(names)
        longest = max(longest, len(value.name))
    return longest


def _is_shared(value: "ir.Value") -> bool:
    return str(value.name).startswith(SHARED)


def _numbers() -> Iterator[str]:
    """Names, the shortest first."""
    for length in itertools.count(1):
        yield from map("".join, itertools.product(DIGITS, repeat=length))


def _deeper(graph: Graph) -> Iterator[str]:
    """Names inside the bodies of conditions and loops."""
    outside = set(graph.model.graph)
    for node in graph.model.graph.all_nodes():
        if node not in outside:
            yield from (str(v.name) for v in (*node.inputs, *node.outputs) if v is not None)


def _is_met(value: "ir.Value") -> bool:
    """Whether a runtime knows a layer by this value's name: it is the layer's weight."""
    node = value.producer()
    if node is not None and node.op_type == "Mul" and str(value.name).endswith(f".{WHOLE}"):
        return True
    if node is not None and node.op_type == "QuantizeLinear":
        return False
    uses = list(value.uses())
    if node is None and any(u.node.op_type in MULTIPLYING and u.idx == 1 for u in uses):
        return True
    floats = [u.node.outputs[0] for u in uses if u.node.op_type == "DequantizeLinear" and not u.idx]
    return any(use.idx < 2 for out in floats for use in out.uses())  # what comes third is a bias


def _usual(node: "ir.Node", attribute: "ir.Attr") -> bool:
    """Whether an attribute has the value that it would have without being written."""
    import onnx
    import onnx_ir as ir

    name = attribute.name
    if node.op_type in ("Conv", "ConvTranspose"):
        if name in ("strides", "dilations"):
            return set(attribute.as_ints()) == {1}
        if name in ("pads", "output_padding"):
            return set(attribute.as_ints()) == {0}
    if node.domain or attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
        return False
    known = onnx.defs.get_schema(node.op_type, OPSET, "").attributes.get(name)
    if known is None or known.required or known.default_value.type == 0:
        return False
    usual = ir.from_proto(known.default_value)
    return (
        isinstance(usual, ir.Attr)
        and usual.type == attribute.type
        and usual.value == attribute.value
    )
