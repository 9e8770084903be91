"""The copy that is worked on: BatchNorms folded, and nothing left that runs a layer without calling it."""

import copy

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from rabbet.errors import ModelError
from rabbet.survey import Survey


def copied(model: nn.Module) -> nn.Module:
    """A deep copy; raises ModelError for a model that holds what cannot be copied."""
    if not isinstance(model, nn.Module):
        raise ModelError(f"model must be a torch.nn.Module, found {model!r}")
    try:
        return copy.deepcopy(model)
    except Exception as e:
        raise ModelError(f"the model cannot be copied ({e}); a compressed network is a changed copy") from e


def fold(model: nn.Module, survey: Survey) -> nn.Module:
    """A float32 copy in eval mode, each BatchNorm that the survey names folded into the layer before it, exactly.

    With `g = weight / sqrt(var + eps)` the layer becomes `g * W`, `g * (b - mean) + bias`, computed in float64.
    """
    folded = own_biases(copied(model).float().eval().requires_grad_(False), survey)
    leave_fast_path(folded)
    tables = [s for s in survey if s.kind == "embedding"]
    for name, first in ((n, s.name) for s in tables for n in s.tied):  # that share one are one layer
        folded = replace_module(folded, name, folded.get_submodule(first))
    modules = dict(folded.named_modules())
    for site in survey:
        if site.norm is None:
            continue
        layer, norm = modules[site.name], modules[site.norm]
        if isinstance(norm, nn.Identity):
            continue  # folded already
        assert isinstance(norm, _BatchNorm)
        assert norm.running_mean is not None
        gain = norm_gain(norm)
        bias = -norm.running_mean.double() if layer.bias is None else layer.bias.double() - norm.running_mean.double()
        bias = bias * gain if norm.bias is None else bias * gain + norm.bias.double()
        weight = layer.weight
        assert isinstance(weight, Tensor)
        weight.data = (weight.double() * gain.view(-1, *[1] * (weight.ndim - 1))).float()
        layer.bias = nn.Parameter(bias.float(), requires_grad=False)
    return drop_norms(folded, survey)


def leave_fast_path(model: nn.Module) -> None:
    """Keep torch's encoder, in place, from its fused layer, which reads weights and never calls the linears.

    Only that layer can take the packed sentences that the encoder makes of a mask of padding.
    """
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False


def norm_gain(norm: _BatchNorm) -> Tensor:
    """What a BatchNorm multiplies each channel with, [out], in float64."""
    assert norm.running_var is not None
    gain = (norm.running_var.double() + norm.eps).rsqrt()
    return gain if norm.weight is None else gain * norm.weight.double()


def own_biases(model: nn.Module, survey: Survey) -> nn.Module:
    """Give every site a bias of its own, in place: layers may share one, and a plan may cover only some of them."""
    for site in survey:
        layer = model.get_submodule(site.name)
        if isinstance(layer.bias if site.kind != "embedding" else None, nn.Parameter):
            layer.bias = nn.Parameter(layer.bias.detach().clone(), requires_grad=False)  # type: ignore[operator]
    return model


def drop_norms(model: nn.Module, survey: Survey) -> nn.Module:
    """Put an Identity where a folded BatchNorm was, in place."""
    for site in survey:
        if site.norm is not None:
            model = replace_module(model, site.norm, nn.Identity().eval())
    return model


def replace_module(model: nn.Module, name: str, new: nn.Module) -> nn.Module:
    """Seat a module under a name, in place; the root ("") is replaced by returning the new module."""
    if not name:
        return new
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)
    return model
