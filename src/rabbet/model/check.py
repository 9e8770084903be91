"""Whether a network can be compressed at all, asked before it is copied or run."""

import itertools

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]

from rabbet.core.survey import Survey
from rabbet.errors import ModelError

MAGNITUDES = 1e-10, 1e10
"""What the largest weight of a layer may be: float32 holds the squares of its errors."""


@torch.no_grad()
def check(model: nn.Module) -> None:
    """Raise ModelError, naming the layer in the way, for a model that cannot be compressed."""
    if not isinstance(model, nn.Module):
        raise ModelError(f"model must be a torch.nn.Module, found {type(model).__name__}")
    for name, module in model.named_modules():
        _require_layers(name or "the model", module)
    named = [*model.named_parameters(), *model.named_buffers()]
    devices: dict[torch.device, str] = {}
    for name, tensor in named:
        if isinstance(tensor, UninitializedTensorMixin):
            raise ModelError(
                f"{name} is not initialised yet; run the model once before compressing it"
            )
        devices.setdefault(tensor.device, name)
    if len(devices) > 1:
        places = " and ".join(f"{name} on {device}" for device, name in devices.items())
        raise ModelError(f"the model lies on several devices ({places}); move it to one")
    for device in devices:
        _require_doubles(device)
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    numbers = {id(t) for t in itertools.chain(model.parameters(), *(m.buffers() for m in norms))}
    for name, tensor in named:
        _require_numbers(name, tensor, masks=id(tensor) not in numbers)


@torch.no_grad()
def check_magnitudes(model: nn.Module, survey: Survey) -> None:
    """Raise ModelError, naming the layer, where weights are too small or large to be solved for."""
    for site in survey:
        weight = site.weight(model)
        largest = float(weight.abs().max()) if weight.numel() else 0.0
        if largest and not MAGNITUDES[0] <= largest <= MAGNITUDES[1]:
            raise ModelError(
                f"{site.name or 'the network'}: the largest of its weights, batch norm folded in, "
                f"is {largest:.3g}, and it has to lie between {MAGNITUDES[0]:g} and "
                f"{MAGNITUDES[1]:g}; set weights that mean nothing to zero, or put the factor into "
                "the layers around it"
            )


def _require_layers(name: str, module: nn.Module) -> None:
    """Raise ModelError for a module that hides its layers or their weights."""
    if isinstance(module, torch.jit.ScriptModule):
        raise ModelError(
            f"{name} is scripted, which hides its layers; pass the eager module it was made from"
        )
    if type(module).__name__ == "FullyShardedDataParallel":
        raise ModelError(
            f"{name} is spread over processes; gather its state_dict and pass a plain network that "
            "has loaded it"
        )


def _require_doubles(device: torch.device) -> None:
    """Raise ModelError for a device without float64, in which layers are solved (Apple's: mps)."""
    try:
        torch.zeros(1, dtype=torch.float64, device=device)
    except (TypeError, RuntimeError) as e:
        raise ModelError(
            f"the model lies on {device}, which has no double precision, and layers are solved in "
            "it; move the model to the CPU: model.cpu()"
        ) from e


def _require_numbers(name: str, tensor: torch.Tensor, masks: bool) -> None:
    """Raise ModelError for a tensor without numbers to compute with; masks may hold infinities."""
    if tensor.is_meta:
        raise ModelError(
            f"{name} lies on the meta device and holds no numbers; load the weights first"
        )
    if tensor.layout != torch.strided:
        raise ModelError(f"{name} is sparse; make it dense with .to_dense()")
    if not tensor.is_floating_point():
        return
    if tensor.element_size() < 2:
        raise ModelError(
            f"{name} is of type {tensor.dtype}, in which networks are stored and not computed; "
            "pass the network in its own type, such as model.to(torch.bfloat16)"
        )
    if not (~tensor.isnan() if masks else tensor.isfinite()).all():
        raise ModelError(
            f"{name} holds NaN or infinite values; a network must be finite to be compressed"
        )
