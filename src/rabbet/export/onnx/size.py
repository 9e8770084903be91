"""How many bytes a graph takes in a file, before its numbers are known.

What the file of a network holds is the same whatever the numbers are, but for zero points, of which
equal ones are stored once: here all are taken to differ. So the size is that of the file or a few
bytes more for each quantised value.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count
from typing import Any

from torch import nn

from rabbet.data.task import Task
from rabbet.export.onnx.graph import SHARED, Graph
from rabbet.export.onnx.merge import merged
from rabbet.export.onnx.placeholders import name_of
from rabbet.export.onnx.qdq import QDQPlacement, Range
from rabbet.export.onnx.short import shorten
from rabbet.export.onnx.trace import trace
from rabbet.export.onnx.weights import write_weights
from rabbet.model.compressed import Factor, all_layers

OWN = "zero."  # constants that are counted with each layer, though some are shared
FUNCTION = "function"  # what the file's own function is called among what layers share


@dataclass(frozen=True)
class Size:
    """Bytes of a graph: its own, and by name those of what other layers use as well."""

    own: int
    shared: Mapping[str, int]


def traced(model: nn.Module, task: Task) -> tuple[Graph, dict[str, int]]:
    """The marked graph of a network that is merged, and the bits of its quantised inputs."""
    graph, _, acts = trace(model, task)
    return graph, {name: act.grid.bits for name, act in acts.items()}


def factors_of(model: nn.Module) -> dict[str, Factor]:
    """The factors of a network by the names that they have in its traced graph."""
    return {
        f"{name}.{t}.{f}".lstrip("."): factor
        for name, layer in all_layers(model).items()
        for t, term in enumerate(layer.factors)
        for f, factor in enumerate(term)
    }


def size_of(
    graph: Graph,
    acts: Mapping[str, int],
    factors: Mapping[str, Factor],
    functions: bool,
    digits: int,
) -> Size:
    """The size of a marked graph, which stays as it is, with these factors.

    digits: the signs of a numbered name that is not shared.
    """
    import onnx

    graph = Graph.read(_written(graph, acts, factors, functions))
    named = [v for v in graph.model.graph.initializers.values() if str(v.name).startswith(SHARED)]
    told = [(str(v.name).removeprefix(SHARED), v) for v in named]
    shorten(graph, digits)
    content = graph.bytes()
    proto = onnx.load_from_string(content)
    sizes = {tensor.name: _framed(tensor) for tensor in proto.graph.initializer}
    shared = {
        name: sizes[str(value.name)]
        for name, value in told
        if str(value.name) in sizes and not name.startswith(OWN)
    }
    if proto.functions:
        shared[FUNCTION] = sum(map(_framed, [*proto.functions, proto.opset_import[-1]]))
    return Size(len(content) - sum(shared.values()), shared)


def file_size(model: nn.Module, task: Task, functions: bool) -> tuple[int, int]:
    """The bytes of the file of a compressed network, and the signs of its longest numbered name."""
    model = merged(model)
    graph, acts = traced(model, task)
    short = Graph.read(_written(graph, acts, factors_of(model), functions))
    longest = shorten(short)
    return len(short.bytes()), longest


def _written(
    graph: Graph, acts: Mapping[str, int], factors: Mapping[str, Factor], functions: bool
) -> bytes:
    """A marked graph with its weights and with ranges that all differ."""
    graph = graph.copy()
    graph.functions_known = functions
    placement = QDQPlacement(graph, {})
    zeros = count(1)
    ranges = {}
    for readers in placement.pins.values():
        zero = next(zeros)
        for name in map(name_of, readers):
            ranges[name] = Range(1 / 256, zero % 2 ** acts[name], acts[name])
    placement.acts = ranges
    placement.insert({str(v.name): Range(1 / 256, next(zeros) % 256) for v in placement.open})
    write_weights(graph, factors)
    return graph.bytes()


def _framed(message: Any) -> int:
    """The bytes of a part of a file with its tag and its length."""
    size = int(message.ByteSize())
    return size + 1 + max(1, -(-size.bit_length() // 7))
