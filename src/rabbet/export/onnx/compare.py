"""Whether a file computes the same as the network does, and if not, where they diverge."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rabbet.data.batches import relative_error, suited, tensors
from rabbet.data.task import Task
from rabbet.errors import FileError, ModelError
from rabbet.export.onnx.graph import Graph
from rabbet.model.compressed import ActQuant
from rabbet.runtime.bench import EXACT, cpu
from rabbet.runtime.openvino import run_openvino
from rabbet.runtime.session import Session

EXAMPLES = 8
SAME = 1e-3  # relative error that float arithmetic in another order may cause
KERNELS = 0.02  # from which it is asked whether integer kernels are the cause
NEAR = 0.25  # relative error that more 8-bit tensors may cause; a broken kernel causes far more


def compare_plain(plain: bytes, model: nn.Module, task: Task) -> None:
    """Raise ModelError unless the traced graph computes what the network does, without rounding."""
    acts = [m for m in model.modules() if isinstance(m, ActQuant)]
    batch = task.examples.first(task.read()[0], EXAMPLES)
    for act in acts:
        act.observer = _ignore
    try:
        wanted = _answer(model, task, batch)
    finally:
        for act in acts:
            act.observer = None
    session = Session(plain)
    outputs = session.run(session.feed(_flat(model, batch)))
    error = _error(outputs, wanted)
    if not error <= SAME:
        raise ModelError(
            f"torch's exporter made another network: its output differs by {100 * error:.3g} % "
            "before anything is rounded; look for code in the forward that depends on values or on "
            "the batch size"
        )


def _ignore(_: Tensor) -> None:
    """An observer that only keeps a quantiser from rounding."""


def compare(
    content: bytes, plain: bytes, model: nn.Module, task: Task
) -> tuple[float, tuple[str, ...]]:
    """How far the file's answers lie from the compressed network's, relative to them, and a note.

    Raises ModelError, naming the first node that differs, if that is too far. Where only the
    integer kernels of this processor differ, a note says so: the file is right, and other
    processors run it as it is.
    """
    batch = task.examples.first(task.read()[0], EXAMPLES)
    flat = _flat(model, batch)
    session, answer = Session(content), _answer(model, task, batch)
    error = _error(session.run(session.feed(flat)), answer)
    note = _saturated(error, content, flat, answer)
    if note:
        return error, note
    if error <= NEAR:
        return error, ()
    whole, exact = Graph.read(content), Graph.read(plain)
    known = {str(out.name): str(node.name) for node in whole.nodes for out in node.outputs}
    names = [
        n
        for n in (str(out.name) for node in exact.nodes for out in node.outputs)
        if f"{n}.quantised" in known
    ]
    ours = _inner(whole, [f"{n}.quantised" for n in names], flat)
    theirs = _inner(exact, names, flat)
    bad = next(
        (n for n, a, b in zip(names, ours, theirs, strict=True) if not _error([a], [b]) <= NEAR),
        None,
    )
    where = f"first at {bad}" if bad else "after the last quantised value"
    raise ModelError(
        f"the file's output differs from the network's by {100 * error:.3g} %, {where}: "
        "more representative batches give better ranges; if that does not help, take more bits "
        "for its inputs or weights: a file holds biases in steps of both scales multiplied"
    )


def compare_openvino(content: bytes, model: nn.Module, task: Task) -> tuple[float, tuple[str, ...]]:
    """How far OpenVINO's answers lie from the compressed network's, and a note as `compare` has.

    Raises ModelError if that is too far, whatever the reason: OpenVINO cannot be asked to run the
    file without its integer kernels.
    """
    batch = task.examples.first(task.read()[0], EXAMPLES)
    flat = _flat(model, batch)
    try:
        result = run_openvino(content, Session(content).feed(flat))
    except FileError as e:
        raise ModelError(f"{e}; the target 'onnx' is for onnxruntime") from e
    answer = _answer(model, task, batch)
    error = _error(result, answer)
    if not error <= NEAR:
        raise ModelError(
            f"in OpenVINO the file's output differs from the network's by {100 * error:.3g} %, "
            "though not in onnxruntime: use the target 'onnx' with that"
        )
    exact = cpu()["instructions"] in EXACT
    return error, () if exact else _saturated(error, content, flat, answer)


def _saturated(
    error: float, content: bytes, flat: Sequence[Tensor], answer: Sequence[NDArray[Any]]
) -> tuple[str, ...]:
    """A note where an error is that of kernels which saturate: without them it is small."""
    instructions = cpu()["instructions"]
    if error <= KERNELS:
        return ()
    exact = Session(content, exact=True)
    without = _error(exact.run(exact.feed(flat)), answer)
    if not without <= min(error / 2, NEAR):
        return ()
    return (
        f"the integer kernels of this processor ({instructions}) saturate at 16 "
        f"bits: here the file's answers differ from the network's by {100 * error:.2g} % "
        f"(relative error), without that by {100 * without:.2g} %. The file is right: a "
        "processor with VNNI, or ARM, runs it as it is; for this one compress with "
        "Joint(widest=7), whose weights do not saturate",
    )


def _inner(graph: Graph, names: Sequence[str], flat: Sequence[Tensor]) -> list[Any]:
    graph.expose([out for node in graph.nodes for out in node.outputs if out.name in set(names)])
    session = Session(graph.bytes())
    return session.run(session.feed(flat), names)


def _answer(model: nn.Module, task: Task, batch: Any) -> list[NDArray[Any]]:
    with torch.no_grad():
        return [t.detach().cpu().numpy() for t in tensors(task.run(model, batch))]


def _flat(model: nn.Module, batch: Any) -> list[Tensor]:
    return [t.float() if t.is_floating_point() else t for t in tensors(suited(batch, model))]


def _error(outputs: Sequence[Any], wanted: Sequence[Any]) -> float:
    """The largest relative error among the floating outputs."""
    pairs = [
        (torch.from_numpy(a), torch.from_numpy(b)) for a, b in zip(outputs, wanted, strict=True)
    ]
    if any(a.shape != b.shape for a, b in pairs):
        return math.inf
    return max((relative_error(a, b) for a, b in pairs if b.is_floating_point()), default=0.0)
