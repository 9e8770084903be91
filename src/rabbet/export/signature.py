"""How a network is called while torch's exporters trace it: example, dynamic axes, names."""

import contextlib
import inspect
import itertools
import logging
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rabbet.data.batches import Batch, examples, first_examples, join, replaced, tensors
from rabbet.data.task import Task, call


class Flat(nn.Module):
    """The user's forward on flat tensors: takes those of a batch, returns those of the output."""

    def __init__(self, model: nn.Module, task: Task, batch: Batch) -> None:
        super().__init__()
        self.model, self.task, self.batch = model, task, batch

    def forward(self, *parts: Tensor) -> tuple[Tensor, ...]:
        """The tensors of the output."""
        given = iter(parts)
        return tuple(
            tensors(self.task.forward(self.model, replaced(self.batch, lambda _: next(given))))
        )


def two(batch: Batch) -> Batch:
    """Two examples: with one, the exporter would take the batch axis for a constant."""
    return first_examples(batch if examples(batch) > 1 else join([batch, batch]), 2)


def axes(task: Task, batch: Batch) -> Iterator[dict[int, Any]]:
    """The dynamic axes of each tensor of a batch."""
    size = examples(batch)
    shapes = [[t.shape for t in tensors(b)] for b in task.read()]
    for k, tensor in enumerate(tensors(batch)):
        same = [s[k] for s in shapes if len(s) > k and len(s[k]) == tensor.ndim]
        differing = {d for d in range(1, tensor.ndim) if len({s[d] for s in same}) > 1}
        batched = {0} if tensor.ndim and len(tensor) == size else set()
        yield dict.fromkeys(sorted(batched | differing), torch.export.Dim.DYNAMIC)


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


def output_names(value: Any) -> list[str]:
    """Names for the tensors of an output."""
    count = len(tensors(value))
    if isinstance(value, dict) and len(value) == count:
        return [str(k) for k in value]
    return ["output"] if count == 1 else [f"output_{k}" for k in range(count)]


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
    chain = list(itertools.takewhile(lambda e: e is not None, _causes(error)))
    text = " ".join(str(chain[-1]).split())
    fixed = (
        ". Where the network makes a number of a size that varies, "
        "write x.shape[0], not len(x) or int(x.shape[0])"
    )
    advice = fixed if any(said in text for said in FIXED) else ""
    return (text[:300] or type(chain[-1]).__name__) + advice


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__
