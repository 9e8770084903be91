"""How a network is called while torch's exporters trace it: example, dynamic axes, names."""

import contextlib
import functools
import inspect
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import transformer

from rabbet.data.batches import Batch, replaced, tensors
from rabbet.data.state import state_kept
from rabbet.data.task import Task, call
from rabbet.errors import ModelError, RabbetError
from rabbet.model.independence import with_axes


class Flat(nn.Module):
    """The user's forward on flat tensors: takes those of a batch, returns those of the output.

    writes: whether the forward writes to the network, which no exporter takes.
    """

    def __init__(self, model: nn.Module, task: Task, batch: Batch, writes: bool = False) -> None:
        super().__init__()
        self.model, self.task, self.batch, self.writes = model, task, batch, writes

    def forward(self, *parts: Tensor) -> tuple[Tensor, ...]:
        """The tensors of the output."""
        given = iter(parts)
        with state_kept(self.model) if self.writes else contextlib.nullcontext():
            result = self.task.forward(self.model, replaced(self.batch, lambda _: next(given)))
        return tuple(tensors(result))


def example(task: Task) -> Batch:
    """What the network is traced with: two examples, or a batch whose examples are not known.

    With one example, the exporter would take the batch axis for a constant.
    """
    batch, axes = task.read()[0], task.examples
    if axes.known and axes.count(batch) == 1:
        batch = axes.join([batch, batch])
    return axes.first(batch, 2)


BATCH = "batch"  # the axis of examples in a file


def axes(task: Task, batch: Batch) -> Iterator[dict[int, Any]]:
    """The dynamic axes of each tensor of a batch."""
    shapes = [[t.shape for t in tensors(b)] for b in task.read()]
    for k, (axis, _) in enumerate(task.examples.shapes(batch)):
        count = tensors(batch)[k].ndim
        same = [s[k] for s in shapes if len(s) > k and len(s[k]) == count]
        dynamic = {d for d in range(count) if d == axis or len({s[d] for s in same}) > 1}
        yield dict.fromkeys(sorted(dynamic), torch.export.Dim.DYNAMIC)


def axis_names(task: Task, batch: Batch) -> list[dict[int, str]]:
    """A name for each dynamic axis of each tensor of a batch: that of examples, or a length."""
    owners = [axis for axis, _ in task.examples.shapes(batch)]
    return [
        {axis: BATCH if axis == owner else "length" for axis in dynamic}
        for owner, dynamic in zip(owners, axes(task, batch), strict=True)
    ]


def input_names(model: nn.Module, task: Task, batch: Batch) -> list[str]:
    """Names for a batch's tensors: keys of a mapping, parameters of the forward, or numbers."""
    parts: list[tuple[str, Any]] = []
    if isinstance(batch, Mapping):
        parts = [(str(k), v) for k, v in batch.items()]
    elif task.forward is call:
        names = [
            p.name
            for p in inspect.signature(model.forward).parameters.values()
            if p.kind != p.VAR_POSITIONAL
        ]
        given = batch if isinstance(batch, tuple | list) else (batch,)
        parts = list(zip(names, given, strict=False))
    named = [name for name, v in parts if isinstance(v, Tensor)]
    count = len(tensors(batch))
    return named if len(named) == count else [f"input_{k}" for k in range(count)]


def output_names(value: Any, taken: Sequence[str] = ()) -> list[str]:
    """Names for the tensors of an output; one that an input has already gets `_out` behind it."""
    count = len(tensors(value))
    names = ["output"] if count == 1 else [f"output_{k}" for k in range(count)]
    if isinstance(value, dict) and len(value) == count:
        names = [str(k) for k in value]
    while clash := next((name for name in names if name in taken), None):
        other = clash + "_out"
        while other in {*taken, *names}:
            other += "_out"
        names[names.index(clash)] = other
    return names


def unlabelled(task: Task, model: nn.Module) -> tuple[Task, tuple[str, ...]]:
    """A task whose batches hold no labels, its axes told, and the names of those labels.

    Labels are what a forward need not be given, and without which it answers the same but for
    single numbers such as a loss. They are told where batches and answers are mappings. A forward
    that leaves answers out, as that of a decoder may, is taken as its `whole`.
    """
    batch, task = task.first(), with_axes(model, task)
    task = replace(task, forward=getattr(task.forward, "whole", task.forward))
    if task.forward is not call or not isinstance(batch, Mapping):
        return task, ()
    known = inspect.signature(model.forward).parameters.values()
    optional = [p.name for p in known if p.default is not p.empty and p.name in batch]
    with torch.no_grad():
        whole = task.run(model, batch) if optional else None
    names = tuple(name for name in optional if _only_judges(task, model, name, whole))
    if not names:
        return task, ()
    short = [{k: v for k, v in b.items() if k not in names} for b in task.read()]
    owners = [name for name, value in batch.items() for _ in tensors(value)]
    each = zip(owners, task.examples.each, strict=False)
    axes = tuple(axis for name, axis in each if name not in names)
    return replace(task, batches=short, axes=axes), names


def _only_judges(task: Task, model: nn.Module, name: str, whole: Any) -> bool:
    """Whether without this part of a batch an answer only lacks numbers, and nothing changes."""
    if not isinstance(whole, Mapping):
        return False
    batch = task.read()[0]
    try:
        with torch.no_grad():
            less = task.run(model, {k: v for k, v in batch.items() if k != name})
    except Exception:  # the forward is the user's: without this it may raise anything
        return False
    if not isinstance(less, Mapping):
        return False
    gone = [v for k, v in whole.items() if v is not None and less.get(k) is None]
    numbers = bool(gone) and all(isinstance(v, Tensor) and v.numel() == 1 for v in gone)
    ours = tensors({k: whole.get(k) for k in less if less[k] is not None})
    theirs = tensors(less)
    return (
        numbers
        and len(ours) == len(theirs)
        and all(
            a.shape == b.shape and torch.allclose(a.double(), b.double(), equal_nan=True)
            for a, b in zip(ours, theirs, strict=True)
        )
    )


def call_notes(model: nn.Module, task: Task, labels: Sequence[str]) -> tuple[str, ...]:
    """What to say of how a file is called: labels that are left out, lengths that are fixed."""
    notes = []
    if labels:
        verb = "is no input" if len(labels) == 1 else "are no inputs"
        notes.append(f"{', '.join(labels)} {verb} of the file: only the loss depends on it")
    batch = example(task)
    names, free = input_names(model, task, batch), list(axes(task, batch))
    fixed: dict[int, list[str]] = {}
    for name, t, dynamic in zip(names, tensors(batch), free, strict=True):
        sizes = [size for d, size in enumerate(t.shape) if d not in dynamic]
        if not t.is_floating_point() and len(sizes) == 1 and sizes[0] > 1:  # words, not a picture
            fixed.setdefault(sizes[0], []).append(name)
    for size, each in fixed.items():
        notes.append(
            f"the file takes {size} numbers of {', '.join(each)} an example, as all batches "
            "have; for one that takes any length, give batches of different lengths"
        )
    return tuple(notes)


@contextlib.contextmanager
def exporting(what: str, model: nn.Module, task: Task) -> Iterator[None]:
    """Make one sentence of whatever fails in an export, and say where chance is the cause."""
    try:
        yield
    except OSError:
        raise
    except Exception as e:  # the exporter runs the user's code, which may raise anything
        told = isinstance(e, RabbetError)
        if not str(e).startswith(DRAWS) and draws(model, task):
            raise ModelError(
                f"{DRAWS}, which no file can repeat; draw them outside and pass them as an input, "
                f"or not at all in eval mode ({e if told else reason(e)})"
            ) from e
        if told:
            raise
        raise ModelError(f"torch cannot export this network to {what}: {reason(e)}") from e


DRAWS = "the network draws random numbers in its forward"


def draws(model: nn.Module, task: Task) -> bool:
    """Whether a forward is known to draw random numbers."""
    with contextlib.suppress(Exception), torch.no_grad():  # asked only to explain another error
        return task.watched(model, task.read()[0])[1].drew
    return False


RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu")


@contextlib.contextmanager
def afresh() -> Iterator[None]:
    """Let torch trace recurrent layers as in a process that has exported nothing yet.

    For dynamic lengths its exporter puts rules of its own in the place of the usual ones, which
    take a layer apart place by place; but an operator that has been traced once remembers what it
    was dispatched to, so that they would only hold for the first export of a process.
    """
    packets = [getattr(torch.ops.aten, name) for name in RECURRENT]
    operators = [getattr(packet, name) for packet in packets for name in packet.overloads()]
    detect = transformer._detect_is_causal_mask  # noqa: SLF001 (torch has no public way)
    attend = F.scaled_dot_product_attention
    try:
        _forget(operators)
        transformer._detect_is_causal_mask = _as_hinted  # noqa: SLF001
        F.scaled_dot_product_attention = _attention_of(attend)
        yield
    finally:
        F.scaled_dot_product_attention = attend
        transformer._detect_is_causal_mask = detect  # noqa: SLF001
        _forget(operators)  # nor may what comes after depend on this


def _as_hinted(mask: Tensor | None, is_causal: bool | None = None, size: int | None = None) -> bool:
    """Torch's Transformer looks into a mask for whether it is causal, which no exporter can follow.

    That only tells it of a faster way to the same.
    """
    return is_causal is True


def _attention_of(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Torch's attention with keys for every head and a mask for every query.

    Runtimes do not spread a single one over all, as torch does.
    """

    @functools.wraps(attend)
    def run(  # noqa: PLR0913, PLR0917 (the arguments of torch's)
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if query.ndim == 4 and key.shape[1] == 1:
            key, value = (t.expand(-1, query.shape[1], -1, -1) for t in (key, value))
        if attn_mask is not None and attn_mask.ndim > 1 and attn_mask.shape[-2] == 1:
            attn_mask = attn_mask.expand(*attn_mask.shape[:-2], query.shape[-2], -1)
        more = {"scale": scale} | ({"enable_gqa": True} if enable_gqa else {})
        return attend(query, key, value, attn_mask, dropout_p, is_causal, **more)

    return run


def _forget(operators: Sequence[Any]) -> None:
    for operator in operators:
        operator._dispatch_cache.clear()  # noqa: SLF001 (torch has no public way)


CHATTY = (
    "torch",
    "torch.onnx",
    "torch.export",
    "torch._dynamo",
    "torch.fx",
    "onnxscript",
    "onnx_ir",
)
"""Loggers of torch's exporters."""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the exporter's own messages: packages that it misses, values that it cannot fold.

    Only its own loggers: other threads log and print meanwhile.
    """
    loggers = [logging.getLogger(name) for name in CHATTY]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


FIXED = ("inferred a static shape", "specialized it to be a constant")
"""What torch's exporters say of a network that fixes the size of a dynamic axis."""


def reason(error: BaseException) -> str:
    """The start of the innermost cause's message, and what to do, if known.

    The exporter wraps an error into pages of text.
    """
    last = list(_causes(error))[-1]
    text = " ".join(str(last).split())
    if not isinstance(last, RuntimeError | ValueError):  # others say little without their type
        text = f"{type(last).__name__}: {text}"
    fixed = (
        ". Where the network makes a number of a size that varies, "
        "write x.shape[0], not len(x) or int(x.shape[0])"
    )
    advice = fixed if any(said in text for said in FIXED) else ""
    return (text[:300] or type(last).__name__) + advice


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__
