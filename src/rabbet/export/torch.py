"""A torch program: the compressed network as plain torch operations on float weights.

It runs without rabbet and computes what `result.model` computes, rounding of activations included.
It is not smaller than the float network: it is there to be read, run and lowered by torch's own
tools.
"""

import copy
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from rabbet.data.batches import replaced, suited, tensors
from rabbet.data.task import Task, call
from rabbet.errors import ModelError
from rabbet.export.base import Parcel, Written
from rabbet.export.signature import Flat, axes, quiet, reason, two
from rabbet.files import write_whole
from rabbet.model.compressed import ActQuant, Factor, compressed_layers


def write_torch(parcel: Parcel, path: Path) -> Written:
    """Write a program that `torch.export.load(path).module()` brings back.

    It takes batches as the model did; its batch axis is dynamic. Raises ModelError if torch cannot
    export the network.
    """
    content = io.BytesIO()
    try:
        with quiet(), torch.no_grad():
            torch.export.save(_program(unroll(parcel.model), parcel.task), content)
    except Exception as e:  # the exporter runs the user's code, which may raise anything
        raise ModelError(f"torch cannot export this network: {reason(e)}") from e
    return Written(write_whole(path, [content.getvalue()]))


def _program(model: nn.Module, task: Task) -> torch.export.ExportedProgram:
    batch = suited(two(task.read()[0]), model)
    dynamic = axes(task, batch)
    if task.forward is not call:
        flat = Flat(model, task, batch)
        return torch.export.export(flat, tuple(tensors(batch)), dynamic_shapes=(tuple(dynamic),))
    shapes: Any = replaced(batch, lambda _: next(dynamic))
    if isinstance(batch, Mapping):
        return torch.export.export(model, (), dict(batch), dynamic_shapes=dict(shapes))
    if isinstance(batch, tuple | list):
        return torch.export.export(model, tuple(batch), dynamic_shapes=tuple(shapes))
    return torch.export.export(model, (batch,), dynamic_shapes=(shapes,))


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
