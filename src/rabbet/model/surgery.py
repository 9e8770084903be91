"""Changes to a copy of a network: modules replaced, fused paths that bypass layers switched off."""

import copy
import itertools
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from rabbet.errors import ModelError

WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)
"""They spread a network over devices or processes; a copy of it is that of what they hold, and so
is that of a compiled network."""


def copied(model: nn.Module, shared: dict[int, Any] | None = None) -> nn.Module:
    """A deep copy without the wrappers of data parallelism and of `torch.compile`.

    Raises ModelError for what cannot be copied.

    Activations that the model keeps are copied as plain numbers, without the graph behind them, and
    what was made in inference mode as tensors that gradients may reach. shared: by their `id`, what
    is not copied.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"model must be a torch.nn.Module, found {model!r}")
    try:
        with torch.inference_mode(False), torch.no_grad(), _Detached():
            # Of the wrappers, those of processes cannot be copied.
            result = copy.deepcopy(_bare(model), shared)
    except Exception as e:
        raise ModelError(
            f"the model cannot be copied ({e}); a compressed network is a changed copy"
        ) from e
    return _unwrapped(result)


def on_cpu(model: nn.Module) -> nn.Module:
    """A network for what runs on the CPU alone: itself if it lies there, else a copy there."""
    held = itertools.chain(model.parameters(), model.buffers())
    return model if all(t.device.type == "cpu" for t in held) else copied(model).cpu()


def _bare(model: nn.Module) -> nn.Module:
    while True:
        if isinstance(model, WRAPPERS):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = cast(nn.Module, model._orig_mod)  # noqa: SLF001 (no public way to it)
        else:
            return model


def _unwrapped(model: nn.Module) -> nn.Module:
    """Put what a wrapper inside a copy holds in its place."""
    while True:
        named = model.named_modules(remove_duplicate=False)
        found = next(((name, m) for name, m in named if _bare(m) is not m), None)
        if found is None:
            return model
        model = replace_module(model, found[0], _bare(found[1]))


class _Detached(TorchFunctionMode):
    """Copies tensors that lie inside a graph, which torch refuses to."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__deepcopy__ and not args[0].is_leaf:
            tensor, memo = args
            memo[id(tensor)] = memo.get(id(tensor), tensor.detach().clone())
            return memo[id(tensor)]
        return func(*args, **(kwargs or {}))


def leave_fast_path(model: nn.Module) -> None:
    """Keep torch's encoder, in place, from its fused layer.

    That layer reads the weights of the linears and never calls them. The encoder's nested tensors
    go too: only the fused layer takes the packed sequences that it makes from a padding mask.
    """
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False


def replace_module(model: nn.Module, name: str, new: nn.Module) -> nn.Module:
    """Put a module under a name, in place; for the root ("") the new module is returned instead."""
    if not name:
        return new
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)
    return model
