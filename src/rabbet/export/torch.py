"""A torch program: the compressed network as plain torch operations on float weights.

It runs without rabbet and computes what `result.model` computes, rounding of activations included.
It is not smaller than the float network: it is there to be read, run and lowered by torch's own
tools.
"""

import copy
import functools
import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from rabbet.data.batches import replaced, suited, tensors
from rabbet.data.state import state_kept
from rabbet.data.task import Task, call
from rabbet.errors import FileError
from rabbet.export.base import Parcel, Written
from rabbet.export.signature import (
    Flat,
    afresh,
    axes,
    call_notes,
    example,
    exporting,
    quiet,
    reason,
    unlabelled,
)
from rabbet.files import write_whole
from rabbet.model.compressed import ActQuant, Factor, compressed_layers
from rabbet.model.surgery import on_cpu


def write_torch(parcel: Parcel, path: Path) -> Written:
    """Write a program that `torch.export.load(path).module()` brings back.

    It takes batches as the model did; its batch axis is dynamic. Raises ModelError if torch cannot
    export the network.
    """
    content = io.BytesIO()
    task, labels = unlabelled(parcel.task, parcel.model)
    exported = program(unroll(parcel.model), task)
    with exporting("a torch program", parcel.model, task), quiet():
        torch.export.save(exported, content)
    return Written(write_whole(path, [content.getvalue()]), call_notes(parcel.model, task, labels))


def read_program(path: Path) -> torch.export.ExportedProgram:
    """A program that `torch.export.save` wrote; FileError for a file that is none."""
    if not path.is_file():
        raise FileError(f"there is no file {path}")
    try:
        with quiet():  # torch logs what it then raises, page by page
            return torch.export.load(path)
    except Exception as e:  # it says in many ways that a file is not what it should be
        raise FileError(f"{path} is damaged or not a program of torch.export: {reason(e)}") from e


def program(model: nn.Module, task: Task) -> torch.export.ExportedProgram:
    """A network as a program of torch's; ModelError if torch cannot export it."""
    task, _ = unlabelled(task, model)
    with exporting("a torch program", model, task), quiet(), torch.no_grad():
        return _program(copy.deepcopy(on_cpu(model)), task)


def _program(model: nn.Module, task: Task) -> torch.export.ExportedProgram:
    batch = suited(example(task), model)
    _, seen = task.watched(model, batch)
    flat = Flat(model, task, batch, seen.wrote)
    if task.forward is not call:
        return _exported(flat, tuple(tensors(batch)), {}, (tuple(axes(task, batch)),))
    if seen.wrote:
        model.forward = _leaving_no_trace(model, model.forward)
    dynamic = axes(task, batch)
    shapes: Any = replaced(batch, lambda _: next(dynamic))
    if isinstance(batch, Mapping):
        return _exported(model, (), dict(batch), dict(shapes))
    if isinstance(batch, tuple | list):
        return _exported(model, tuple(batch), {}, tuple(shapes))
    return _exported(model, (batch,), {}, (shapes,))


def _exported(
    model: nn.Module, args: tuple[Any, ...], named: dict[str, Any], shapes: Any
) -> torch.export.ExportedProgram:
    with afresh():
        return torch.export.export(model, args, named, dynamic_shapes=shapes)


def _leaving_no_trace(model: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    """A forward that writes nothing to the network, which no exporter takes."""

    @functools.wraps(forward)  # the exporter asks for the names of its arguments
    def run(*args: Any, **named: Any) -> Any:
        with state_kept(model):
            return forward(*args, **named)

    return run


def unroll(model: nn.Module) -> nn.Module:
    """A copy in which every weight is a plain parameter and every quantiser plain arithmetic."""
    result = copy.deepcopy(model)
    for layer in compressed_layers(result).values():
        for term, factors in zip(layer.terms, layer.factors, strict=True):
            for k, factor in enumerate(factors):
                cast(nn.ModuleList, term)[k] = _Value(factor)
        for k, act in enumerate(layer.quantisers):
            layer.acts[k] = _Rounded(act)
    return result


class _Value(nn.Module):
    def __init__(self, factor: Factor) -> None:
        super().__init__()
        self.weight = nn.Parameter(factor().detach().clone(), requires_grad=False)

    def forward(self) -> Tensor:
        return self.weight


class _Rounded(nn.Module):
    """The arithmetic of `Grid.fake` in operations that every exporter knows."""

    def __init__(self, act: ActQuant) -> None:
        super().__init__()
        self.scale, self.zero = float(act.scale), float(act.zero)
        self.low, self.high = act.grid.low - self.zero, act.grid.high - self.zero

    def forward(self, x: Tensor) -> Tensor:
        return (x / self.scale).round().clamp(self.low, self.high) * self.scale
