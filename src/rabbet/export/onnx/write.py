"""The ONNX file: weights at their own bits on disk, integer kernels at run time.

Ranges are measured, and the result is compared with the network, before a file is written.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rabbet.calibrate.ranges import Sample
from rabbet.data.batches import replaced, tensors
from rabbet.data.task import Task
from rabbet.export.base import Parcel, Written
from rabbet.export.onnx.compare import compare, compare_openvino, compare_plain
from rabbet.export.onnx.graph import OPSET, Graph
from rabbet.export.onnx.merge import merged
from rabbet.export.onnx.qdq import QDQPlacement, Range
from rabbet.export.onnx.short import shortened
from rabbet.export.onnx.trace import trace
from rabbet.export.onnx.weights import write_weights
from rabbet.export.signature import call_notes, exporting, unlabelled
from rabbet.files import write_whole
from rabbet.grids.grid import Grid
from rabbet.model.compressed import Factor, all_layers
from rabbet.model.surgery import on_cpu
from rabbet.runtime.openvino import openvino_known
from rabbet.runtime.session import KERNELS, Session, kernels, require_onnx

EXAMPLES = 256  # of the user's data, on which ranges are measured
CHUNK = 8  # examples at a time: all their quantised tensors are held at once
VALUES = 2**16  # sampled from each tensor


def write_onnx(parcel: Parcel, path: Path) -> Written:
    """Write a file for onnxruntime.

    Notes name the layers that do not run on an integer kernel there, and why. Raises FileError if
    the packages are missing; ModelError if torch cannot export the network, or if the file's output
    is not the network's, naming the value from which they differ.
    """
    return _write(parcel, path, functions=True)


def write_openvino(parcel: Parcel, path: Path) -> Written:
    """Write a file for OpenVINO; see `write_onnx`.

    OpenVINO reads no functions in a file: weights take 4 bits where they fit, else 8. If OpenVINO
    is installed, the file is run there, too, and compared with the network; if not, a note says so.
    Raises ModelError if OpenVINO cannot run the file.
    """
    return _write(parcel, path, functions=False)


def write_float(model: nn.Module, task: Task, path: Path, opset: int = OPSET) -> Written:
    """Write a float network unchanged, as the reference for what an export gains.

    opset: an older one for tools that do not know the newest. Raises as `write_onnx` does.
    """
    require_onnx()
    task, labels = unlabelled(task, model)
    content = float_content(model, task, opset)
    return Written(write_whole(path, [content]), call_notes(model, task, labels))


def float_content(model: nn.Module, task: Task, opset: int = OPSET) -> bytes:
    """A float network as the bytes of a file."""
    require_onnx()
    with exporting("ONNX", model, task):
        return trace(model, unlabelled(task, model)[0], opset)[0].bytes()


def _write(parcel: Parcel, path: Path, functions: bool) -> Written:
    require_onnx()
    task, labels = unlabelled(parcel.task, parcel.model)
    with exporting("ONNX", parcel.model, task):
        parcel = replace(parcel, model=merged(on_cpu(parcel.model)), task=task)
        assembled = assemble(parcel.model, task, functions)
        compare_plain(assembled.plain, parcel.model, task)
        error, saturated = compare(assembled.content, assembled.plain, parcel.model, task)
        content = shortened(assembled.content)
        parcel.require("onnx" if functions else "openvino", len(content))
        Session(content)  # raises unless the runtime can open it
        ran = kernels(assembled.content) if functions else None
        notes = _floats(ran, parcel, assembled.written)
        if functions:  # what onnxruntime's kernels do says nothing of another runtime
            notes = (*notes, *saturated)
        if not functions and openvino_known():
            error, saturated = compare_openvino(content, parcel.model, task)
            notes = (*notes, *saturated)
        elif not functions:
            notes = (*notes, "not tried in OpenVINO, which is not installed: rabbet[openvino]")
    return Written(
        write_whole(path, [content]), (*notes, *call_notes(parcel.model, task, labels)), error
    )


@dataclass(frozen=True)
class Assembled:
    """A compressed network as bytes, the same in float, and the factor that each constant holds."""

    content: bytes
    plain: bytes
    written: dict[str, str]


def assemble(model: nn.Module, task: Task, functions: bool = True) -> Assembled:
    """Trace, measure and quantise a network; nothing is compared yet."""
    graph, factors, acts = trace(merged(model), task)
    graph.functions_known = functions
    plain = _plain(graph, factors)
    placement = QDQPlacement(graph, {name: Range.of(act) for name, act in acts.items()})
    placement.insert(_measure(plain, [str(v.name) for v in placement.open], task))
    written = write_weights(graph, factors)
    return Assembled(graph.bytes(), plain, written)


def assemble_alone(layer: nn.Module, task: Task) -> bytes:
    """One layer as it runs among others.

    If its input is quantised, integers go in; from a conv, integers come out, too.
    """
    graph, factors, acts = trace(merged(layer), task)
    placement = QDQPlacement(graph, {name: Range.of(act) for name, act in acts.items()})
    placement.insert({str(v.name): Range(0.05, 128) for v in placement.open})
    write_weights(graph, factors)
    graph.strip()
    return graph.bytes()


def _plain(graph: Graph, factors: Mapping[str, Factor]) -> bytes:
    """The network in float: weights dequantised, activations not rounded."""
    graph = graph.copy()
    for name, placeholder in list(graph.placeholders("weight")):
        weight = graph.constant(name, factors[name]().detach().cpu().numpy())
        graph.swap(placeholder.outputs[0], weight)
    for _, placeholder in list(graph.placeholders("act")):
        source = placeholder.inputs[0]
        assert source is not None
        graph.swap(placeholder.outputs[0], source)
    return graph.bytes()


def _measure(plain: bytes, names: Sequence[str], task: Task) -> dict[str, Range]:
    """Ranges of least squared error for the given values of the float graph."""
    if not names:
        return {}
    graph = Graph.read(plain)
    graph.expose([v for v in graph.all_values() if v.name in set(names)])
    session = Session(graph.bytes())
    chunks = list(itertools.islice(_chunks(task), EXAMPLES // CHUNK))
    generator = torch.Generator().manual_seed(0)
    samples = {name: Sample(-(-VALUES // len(chunks)), generator) for name in names}
    for chunk in chunks:
        for name, array in zip(names, session.run(session.feed(chunk), names), strict=True):
            samples[name](torch.from_numpy(array))
    grid = Grid.of(8, "unsigned")
    ranges = {name: sample.range(grid) for name, sample in samples.items()}
    return {name: Range(float(scale), int(zero)) for name, (scale, zero) in ranges.items()}


def _chunks(task: Task) -> Any:
    """The user's batches, a few examples at a time."""
    for batch in task.read():
        whole = replaced(batch, lambda t: t.float() if t.is_floating_point() else t)
        for start in range(0, task.examples.count(batch), CHUNK):
            yield tensors(task.examples.cut(whole, slice(start, start + CHUNK)))


def _floats(
    ran: Mapping[str, str] | None, parcel: Parcel, written: Mapping[str, str]
) -> tuple[str, ...]:
    """The layers that do not run on an integer kernel, and why.

    ran: the kernel of each weight in onnxruntime; None for another runtime, of which only the plan
    is known.
    """
    layers = all_layers(parcel.model)
    notes = []
    for weight, name in written.items():
        layer = layers[name.rpartition(".")[0].rpartition(".")[0]]
        site = layer.site
        if not site.runs:
            continue  # stored weights are float when they are used
        told = site.name or "the network"
        if ran is None:
            if not layer.quantisers:
                notes.append(f"{told} runs in float: its plan has no act")
            continue
        # onnxruntime renames what it transposes, and what it rounds for lack of a kernel.
        unknown = "unknown kernel" if site.kind.integer_kernel else site.kind.operator
        kernel = ran.get(weight, ran.get(f"{weight}_T", unknown))
        if kernel not in KERNELS:
            why = "onnxruntime has no integer kernel for it here"
            if not site.kind.integer_kernel:
                why = f"onnxruntime has no integer kernel for a {site.kind.name}"
            elif not layer.quantisers:
                why = "its plan has no act"
            elif any(t.grid.codebook.floats for t in layer.plan.terms):
                why = "its weight is a float"
            notes.append(f"{told} runs in float ({kernel}): {why}")
    return tuple(dict.fromkeys(notes))
