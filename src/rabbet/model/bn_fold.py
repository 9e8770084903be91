"""The working copy of a network, its BatchNorms folded into the layers before them."""

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from rabbet.core.survey import Survey
from rabbet.model.surgery import copied, leave_fast_path, replace_module


def fold(model: nn.Module, survey: Survey) -> nn.Module:
    """A float32 copy in eval mode, each BatchNorm that the survey names folded into its layer.

    The fold is exact: with `g = weight / sqrt(var + eps)` the layer becomes `g * W`,
    `g * (b - mean) + bias`, computed in float64.
    """
    folded = own_biases(copied(model).float().eval().requires_grad_(False), survey)
    leave_fast_path(folded)
    # Embeddings that share a table become one layer.
    for table in (s for s in survey if s.looks_up):
        for name in table.tied:
            folded = replace_module(folded, name, folded.get_submodule(table.name))
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
        mean = norm.running_mean.double()
        bias = -mean if layer.bias is None else layer.bias.double() - mean
        bias = bias * gain if norm.bias is None else bias * gain + norm.bias.double()
        weight = site.kind.weight(layer)
        scaled = (weight.double() * gain.view(-1, *[1] * (weight.ndim - 1))).float()
        # A transposed conv stores another layout; the result is a tensor of its own.
        layer.weight.data = site.native(scaled).contiguous()
        layer.bias = nn.Parameter(bias.float(), requires_grad=False)
    return drop_norms(folded, survey)


def norm_gain(norm: _BatchNorm) -> Tensor:
    """What a BatchNorm multiplies each channel with, [out], in float64."""
    assert norm.running_var is not None
    gain = (norm.running_var.double() + norm.eps).rsqrt()
    return gain if norm.weight is None else gain * norm.weight.double()


def own_biases(model: nn.Module, survey: Survey) -> nn.Module:
    """Give every site a bias of its own, in place.

    Layers may share one, and a plan may cover only some of them.
    """
    for site in survey:
        if not site.runs:
            continue
        layer = model.get_submodule(site.name)
        bias = getattr(layer, "bias", None)
        if isinstance(bias, nn.Parameter):
            layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return model


def drop_norms(model: nn.Module, survey: Survey) -> nn.Module:
    """Put an Identity where a folded BatchNorm was, in place."""
    for site in survey:
        if site.norm is not None:
            model = replace_module(model, site.norm, nn.Identity().eval())
    return model
