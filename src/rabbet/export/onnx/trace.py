"""A compressed network as an ONNX graph with placeholders for every weight and every input range.

Placeholders are nodes that no optimiser can fold: one that stands for a weight of any form, or for
the place where an input is quantised, is found again by its name, however the exporter has moved or
transposed it.
"""

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rabbet.data.batches import suited, tensors
from rabbet.data.task import Task
from rabbet.export.onnx.graph import OPSET, Graph
from rabbet.export.onnx.padding import absorb_borders
from rabbet.export.onnx.placeholders import DOMAIN
from rabbet.export.signature import (
    Flat,
    afresh,
    axes,
    axis_names,
    example,
    exporting,
    input_names,
    output_names,
    quiet,
)
from rabbet.layers.stored import tensor_of
from rabbet.model.compressed import ActQuant, Factor, all_layers, stored_weights
from rabbet.model.surgery import on_cpu


def trace(
    model: nn.Module, task: Task, opset: int = OPSET
) -> tuple[Graph, dict[str, Factor], dict[str, ActQuant]]:
    """The graph, and what its placeholders `weight` and `act` stand for, by name.

    The batch axis is dynamic, and so is every axis in which the user's batches differ. Raises
    ModelError if torch's exporter cannot follow the network.
    """
    model = on_cpu(model)
    marked = copy.deepcopy(model)
    for module in marked.modules():  # of transformers: its other ways are no operators of ONNX
        config: Any = getattr(module, "config", None)
        if hasattr(config, "_experts_implementation"):
            config._experts_implementation = "batched_mm"  # noqa: SLF001
    weights: dict[str, Factor] = {}
    acts: dict[str, ActQuant] = {}
    for name, layer in all_layers(marked).items():
        for t, term in enumerate(layer.factors):
            for f, factor in enumerate(term):
                key = f"{name}.{t}.{f}".lstrip(".")
                weights[key] = factor
                cast(nn.ModuleList, layer.terms[t])[f] = _Weight(key, factor)
        for k, act in enumerate(layer.quantisers):
            key = f"{name}.in.{k}".lstrip(".")
            acts[key] = act
            layer.acts[k] = _Act(key, act.grid.bits)
    batch = suited(example(task), model)
    names = input_names(model, task, batch)
    with torch.no_grad():
        answer, seen = task.watched(model, batch)
    flat = Flat(marked, task, batch, seen.wrote)
    given = tuple(t.clone() for t in tensors(batch))
    settings: dict[str, Any] = {
        "opset_version": opset,
        "input_names": names,
        "output_names": output_names(answer, names),
        "dynamic_shapes": (tuple(axes(task, batch)),),
    }
    with exporting("ONNX", model, task), quiet(), afresh():
        flat.forward = _unpacking(flat.forward, marked)  # type: ignore[method-assign]
        program = torch.onnx.export(flat, given, dynamo=True, verbose=False, **settings)
    assert program is not None
    graph = Graph(program.model)
    graph.name_axes(dict(zip(names, axis_names(task, batch), strict=True)))
    absorb_borders(graph)
    return graph, weights, acts


def _unpacking(
    run: Callable[..., tuple[Tensor, ...]], model: nn.Module
) -> Callable[..., tuple[Tensor, ...]]:
    """A forward that makes the stored weights of a network of their numbers first."""

    @functools.wraps(run)  # the exporter asks for the names of its arguments
    def unpacking(*args: Tensor) -> tuple[Tensor, ...]:
        with _unpacked(model):
            return run(*args)

    return unpacking


@contextlib.contextmanager
def _unpacked(model: nn.Module) -> Iterator[None]:
    """Make the stored weights of a network of their numbers, then put its own tensors back."""
    layers = stored_weights(model)
    own: dict[nn.Module, tuple[dict[str, Any], dict[str, Any]]] = {}
    try:
        for name, layer in layers.items():
            tensor = tensor_of(model, name)
            value = layer.canonical.reshape(tensor.shape)
            for module in model.modules():  # layers that share a weight each hold it
                held = (module._parameters, module._buffers)  # noqa: SLF001 (no public way)
                leaves = [leaf for each in held for leaf, t in each.items() if t is tensor]
                if leaves:
                    own.setdefault(module, (dict(held[0]), dict(held[1])))
                for leaf in leaves:
                    for each in held:
                        each.pop(leaf, None)
                    setattr(module, leaf, value)
        yield
    finally:
        for module, (parameters, buffers) in own.items():
            for leaf in [n for n in (*parameters, *buffers) if n in vars(module)]:
                delattr(module, leaf)
            module._parameters.clear()  # noqa: SLF001
            module._buffers.clear()  # noqa: SLF001
            module._buffers.update(buffers)  # noqa: SLF001
            for leaf, parameter in parameters.items():
                setattr(module, leaf, parameter)  # a recurrent layer keeps a list of them, too


class _Weight(Factor):
    def __init__(self, name: str, factor: Factor) -> None:
        super().__init__(factor.numbers)
        self.name = name

    def forward(self) -> Tensor:
        attributes: dict[str, Any] = {"name": self.name}
        return torch.onnx.ops.symbolic(
            f"{DOMAIN}::weight",
            (),
            attrs=attributes,
            dtype=torch.float32,
            shape=tuple(self.codes.shape),
            version=1,
        )

    def lookup(self, places: Tensor) -> Tensor:
        return F.embedding(places, self())


class _Act(ActQuant):
    def __init__(self, name: str, bits: int) -> None:
        super().__init__(bits)
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        attributes: dict[str, Any] = {"name": self.name}
        return torch.onnx.ops.symbolic(
            f"{DOMAIN}::act", (x,), attrs=attributes, dtype=x.dtype, shape=x.shape, version=1
        )
