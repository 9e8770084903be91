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

rank: the number of axes of its output, where the program says it.
"""

TENSORS = "weight", "bias", "running_mean", "running_var"
COUNT = "num_batches_tracked"

aten = torch.ops.aten


def layers_of(program: torch.export.ExportedProgram) -> nn.Module:
    """A network that computes what an exported program does, made of layers, in eval mode.

    Its parameters are the program's own tensors. Inputs of other sizes than the program was
    exported for are refused when it runs, but where an axis is dynamic. Raises ModelError for a
    program whose batch norms take the statistics of the batch.
    """
    network = program.module(check_guards=False)
    assert isinstance(network, fx.GraphModule)
    layers: dict[str, str] = {}
    for node in list(network.graph.nodes):
        make = _LAYERS.get(node.target) if node.op == "call_function" else None
        if make is None:
            continue
        given = _given(network, node)
        if given.get("training"):
            raise ModelError(
                "a batch norm of the program takes the statistics of the batch: it was exported in "
                "training mode (export model.eval()), or keeps none (track_running_stats=False)"
            )
        if not _is_layer(given):
            continue
        layer, arguments = make(given), _arguments(node)
        places = {k: str(v.target) for k, v in arguments.items() if isinstance(v, fx.Node)}
        inputs = arguments["indices" if "indices" in given else "input"]
        for name in TENSORS:
            if hasattr(layer, name):
                setattr(layer, name, given.get(name))
        # One that runs several times with the same numbers and settings is one layer.
        key = f"{layer!r} {[places.get(name) for name in TENSORS]}"
        if key not in layers:
            taken = set(layers.values())
            layers[key] = _name_for(network, places["weight"], taken, {*places.values()})
            network.add_submodule(layers[key], layer)
        with network.graph.inserting_before(node):
            call = network.graph.call_module(layers[key], (inputs,))
        node.replace_all_uses_with(call)
        network.graph.erase_node(node)
    _require_sizes(network)
    network.graph.eliminate_dead_code()
    _drop_unused(network, set(layers.values()))
    network.recompile()
    # What an export puts over a module's own: methods that refuse, and a check that copies lack.
    for name in ("train", "eval"):
        vars(network).pop(name, None)
    network._forward_pre_hooks.clear()  # noqa: SLF001 (no public way)
    return network.eval()


def _is_layer(given: Given) -> bool:
    """Whether the weight of an operator is a parameter, and its bias one or none."""
    weight, bias = given["weight"], given.get("bias")
    known = isinstance(weight, nn.Parameter) and (bias is None or isinstance(bias, nn.Parameter))
    stored = all(isinstance(given.get(n), Tensor | None) for n in TENSORS[2:])
    return known and stored


def _name_for(network: fx.GraphModule, weight: str, taken: set[str], mine: set[str]) -> str:
    """A name for the layer of a weight: its own, if nothing but its tensors stands there.

    mine: where the tensors of the layer stand.
    """
    name = weight.removesuffix(".weight") if weight.endswith(".weight") else f"{weight}_layer"
    name = "layer" if name == "weight_layer" else name
    free, count = name, 1
    read = {str(n.target) for n in network.graph.nodes if n.op == "get_attr" and n.users}
    others = {place.rpartition(".")[0] for place in read - mine}  # who has tensors that others read
    while free in taken or not _stands_free(network, free, free == name and name not in others):
        count += 1
        free = f"{name}_{count}"
    return free


def _stands_free(network: fx.GraphModule, name: str, own: bool) -> bool:
    """Whether a layer can take a name: nothing stands there, or (own) what is left of itself.

    An export leaves bare tensors of a layer.
    """
    at: Any = network
    for part in name.split("."):
        if not hasattr(at, part):
            return True
        at = getattr(at, part)
        if not isinstance(at, nn.Module):
            return False
    held = {n for n, _ in (*at.named_parameters(), *at.named_buffers())}
    return own and type(at) is nn.Module and not list(at.children()) and held <= {*TENSORS, COUNT}


def _require_sizes(network: fx.GraphModule) -> None:
    """Let the network refuse inputs of other sizes than its operators were written down for."""
    for node in [n for n in network.graph.nodes if n.op == "placeholder"]:
        shown = node.meta.get("val")
        if not isinstance(shown, Tensor) or not node.users:
            continue
        sizes = tuple(size if isinstance(size, int) else None for size in shown.shape)
        with network.graph.inserting_after(node):
            checked = network.graph.call_function(sized, (node, sizes))
        node.replace_all_uses_with(checked)
        checked.args = (node, sizes)  # its own input was replaced as well


def sized(x: Tensor, sizes: tuple[int | None, ...]) -> Tensor:
    """A tensor of the sizes that a program was exported for; None stands for any.

    Raises ModelError for others.
    """
    if len(x.shape) != len(sizes) or any(
        b is not None and a != b for a, b in zip(x.shape, sizes, strict=True)
    ):
        wanted = ", ".join("any" if size is None else str(size) for size in sizes)
        raise ModelError(
            f"the program was exported for inputs of [{wanted}], found {list(x.shape)}: pass such "
            "batches (batch=...), or export with dynamic_shapes"
        )
    return x


def _drop_unused(network: fx.GraphModule, layers: set[str]) -> None:
    """Delete the tensors that only the operators read that are layers now."""
    used = {str(node.target) for node in network.graph.nodes if node.op == "get_attr"}
    for path in [n for n, _ in (*network.named_parameters(), *network.named_buffers())]:
        owner, _, name = path.rpartition(".")
        if path not in used and owner not in layers:
            delattr(network.get_submodule(owner), name)


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
