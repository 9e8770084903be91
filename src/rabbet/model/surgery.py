"""Changes to a copy of a network: modules replaced, fused paths that bypass layers switched off."""

import copy
from typing import Any

from torch import nn

from rabbet.errors import ModelError


def copied(model: nn.Module, shared: dict[int, Any] | None = None) -> nn.Module:
    """A deep copy; raises ModelError for a model that holds what cannot be copied.

    shared: by their `id`, what is not copied.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"model must be a torch.nn.Module, found {model!r}")
    try:
        return copy.deepcopy(model, shared)
    except Exception as e:
        raise ModelError(
            f"the model cannot be copied ({e}); a compressed network is a changed copy"
        ) from e


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
