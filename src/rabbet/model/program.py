"""The layers of a program that `torch.export` wrote, put back where it only has their operators.

An exported program computes with `aten` operators and bare parameters: there is no layer left that
could be compressed. Every operator whose weight is a parameter becomes the layer again that it came
from, under the name of its weight.
"""

from collections.abc import Callable, Mapping
from inspect import signature
from typing import Any

import torch
from torch import Tensor, fx, nn

from rabbet.errors import ModelError

Given = Mapping[str, Any]
"""What an operator is given, by the names in its schema; parameters and buffers as tensors.

rank: the number of axes of what it returns, where the program says it.
"""

TENSORS = "weight", "bias", "running_mean", "running_var"

aten = torch.ops.aten


def layers_of(program: torch.export.ExportedProgram) -> nn.Module:
    """A network that computes what an exported program does, made of layers, in eval mode.

    It may be given other shapes where the program's own operators allow it: what `torch.export`
    was told of shapes is not checked. Raises ModelError for a program that was exported in training
    mode.
    """
    network = program.module(check_guards=False)
    assert isinstance(network, fx.GraphModule)
    layers: dict[str, str] = {}
    for node in list(network.graph.nodes):
        make = _LAYERS.get(node.target) if node.op == "call_function" else None
        if make is None:
            continue
        given = _given(network, node)
        if not isinstance(given["weight"], Tensor):  # it is computed, or there is none
            continue
        layer = make(given)
        places = {k: str(v.target) for k, v in _arguments(node).items() if isinstance(v, fx.Node)}
        inputs = _arguments(node)["indices" if "indices" in given else "input"]
        for name in TENSORS:
            if isinstance(given.get(name), Tensor):
                setattr(layer, name, given[name])
        # One that runs several times with the same numbers and settings is one layer.
        told = f"{layer!r} {[places.get(name) for name in TENSORS]}"
        if told not in layers:
            layers[told] = _free(places["weight"].removesuffix(".weight"), layers)
            network.add_submodule(layers[told], layer)
        with network.graph.inserting_before(node):
            call = network.graph.call_module(layers[told], (inputs,))
        node.replace_all_uses_with(call)
        network.graph.erase_node(node)
    network.graph.eliminate_dead_code()
    network.recompile()
    for name in ("train", "eval"):  # methods that refuse to work, put over those of every module
        vars(network).pop(name, None)
    return network.eval()


def _arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of an operator by name, defaults included."""
    target: Any = node.target
    schema = target._schema.arguments  # noqa: SLF001 (no public way to the names)
    given = dict(zip((a.name for a in schema), node.args, strict=False)) | dict(node.kwargs)
    return {a.name: given.get(a.name, a.default_value) for a in schema}


def _given(network: fx.GraphModule, node: fx.Node) -> Given:
    def read(value: Any) -> Any:
        if not isinstance(value, fx.Node) or value.op != "get_attr":
            return value
        at: Any = network
        for name in str(value.target).split("."):
            at = getattr(at, name)
        return at

    shown = node.meta.get("val")
    rank = shown.ndim if isinstance(shown, Tensor) else None
    return {name: read(value) for name, value in _arguments(node).items()} | {"rank": rank}


def _free(name: str, layers: Mapping[str, str]) -> str:
    """A name that no layer has yet."""
    taken, count, free = set(layers.values()), 1, name
    while free in taken:
        count, free = count + 1, f"{name}_{count}"
    return free


def _conv(kind: Any) -> Callable[[Given], nn.Module]:
    turned = "output_padding" in signature(kind).parameters

    def make(given: Given) -> nn.Module:
        first, second, *size = given["weight"].shape
        groups = given["groups"]
        channels = (first, second * groups) if turned else (second * groups, first)
        settings = {
            name: value if isinstance(value, str) else tuple(value)
            for name, value in given.items()
            if name in {"stride", "padding", "dilation", "output_padding"}
        }
        bias = given["bias"] is not None
        layer: nn.Module = kind(
            *channels, tuple(size), groups=groups, bias=bias, device="meta", **settings
        )
        return layer

    return make


def _linear(given: Given) -> nn.Module:
    outputs, inputs = given["weight"].shape
    return nn.Linear(inputs, outputs, bias=given["bias"] is not None, device="meta")


def _embedding(given: Given) -> nn.Module:
    count, size = given["weight"].shape
    padding = given["padding_idx"] if given["padding_idx"] >= 0 else None
    return nn.Embedding(count, size, padding, device="meta")


def _batch_norm(given: Given) -> nn.Module:
    if given["training"] or given["running_mean"] is None:
        raise ModelError(
            "the program was exported in training mode: its batch norms take the statistics of the "
            "batch; export model.eval()"
        )
    kind = {4: nn.BatchNorm2d, 5: nn.BatchNorm3d}.get(given["rank"], nn.BatchNorm1d)
    layer = kind(len(given["running_mean"]), given["eps"], given["momentum"], device="meta")
    layer.num_batches_tracked = torch.zeros((), dtype=torch.long)
    return layer


_LAYERS: Mapping[Any, Callable[[Given], nn.Module]] = {
    **{getattr(aten, f"conv{n}d").default: _conv(getattr(nn, f"Conv{n}d")) for n in (1, 2, 3)},
    **{getattr(aten, f"conv{n}d").padding: _conv(getattr(nn, f"Conv{n}d")) for n in (1, 2, 3)},
    aten.conv_transpose1d.default: _conv(nn.ConvTranspose1d),
    aten.conv_transpose2d.input: _conv(nn.ConvTranspose2d),
    aten.conv_transpose3d.input: _conv(nn.ConvTranspose3d),
    aten.linear.default: _linear,
    aten.embedding.default: _embedding,
    aten.batch_norm.default: _batch_norm,
}
"""How the layer of an operator is made; its tensors are put in afterwards."""
