"""A compressed network from a plan, and the plan read back from a compressed network."""

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from rabbet.core.layout import factor_shapes
from rabbet.core.plan import LayerPlan, Plan, Term, quoted
from rabbet.core.survey import Survey
from rabbet.errors import PlanError, near
from rabbet.grids.grid import Grid, Quantised
from rabbet.layers import Site
from rabbet.model.bn_fold import fold
from rabbet.model.compressed import Compressed, Head, Numbers, all_layers, store
from rabbet.model.surgery import leave_fast_path, replace_module


def validate(plan: Plan, survey: Survey) -> None:
    """Raise PlanError if a plan does not fit a network.

    It names an unknown layer, or a form, rank or scale layout that a layer cannot take.
    """
    known = {s.name: s for s in survey}
    if not len(plan):
        raise PlanError("the plan is empty; it must have a line for at least one layer")
    for layer in plan:
        validate_line(layer, known)


def validate_line(layer: LayerPlan, sites: Mapping[str, Site]) -> None:
    """Raise PlanError if a line does not fit its site, or there is none of its name."""
    site = sites.get(layer.name)
    if site is None:
        raise PlanError(
            f"the plan has a line for {quoted(layer.name)}, which is not a layer that can be "
            f"compressed here{near(layer.name, sites)}"
        )
    if layer.act is not None and not site.multiplies:
        why = "the input of an embedding is an index and" if site.runs else "its input"
        raise PlanError(f"{layer}: {why} cannot be quantised; remove act")
    for term in layer.terms:
        _require(layer, term, site)
        for shape in factor_shapes(site, term):
            term.grid.scale_shape(shape)


def _require(layer: LayerPlan, term: Term, site: Site) -> None:
    try:
        term.form.require(site)
    except PlanError as e:
        raise PlanError(f"{layer}: {e}") from None


def build(
    model: nn.Module, plan: Plan, survey: Survey, numbers: Mapping[str, Numbers] | None = None
) -> nn.Module:
    """A copy of a float network, BatchNorms folded, with a `Compressed` for each line of the plan.

    numbers: the factors of each layer; a layer without any is decomposed and rounded to nearest,
    each term on what the terms before it leave. Input ranges are not calibrated yet. Raises
    PlanError if the plan does not fit.
    """
    validate(plan, survey)
    result = fold(model, survey)
    given = numbers or {}
    with torch.no_grad():
        for site in (s for s in survey if plan.get(s.name) is not None):
            line, weight = plan[site.name], site.weight(result)
            terms = given.get(site.name) or rounded_to_nearest(site, weight, line)
            layer = result.get_submodule(site.name) if site.runs else None
            bias = getattr(layer, "bias", None)
            module = Compressed(site, line, terms, bias if isinstance(bias, Tensor) else None)
            result = install(result, site, module.to(weight.device))
    return result


FACTS = (
    "in_features", "out_features", "in_channels", "out_channels", "kernel_size", "stride",
    "padding", "dilation", "groups", "padding_mode", "num_embeddings", "embedding_dim",
    "padding_idx", "nf", "nx",
)  # fmt: skip
"""Attributes that a network may read from one of its layers besides weight and bias."""


def install(model: nn.Module, site: Site, module: nn.Module) -> nn.Module:
    """Put a layer under all names of its site, and heads that share it under theirs, in place."""
    module.eval()
    if isinstance(module, Compressed) and not site.runs:
        store(model, module)
        return model
    known = vars(model.get_submodule(site.name))
    vars(module).update({name: known[name] for name in FACTS if name in known})
    for name in site.names:
        model = replace_module(model, name, module)
    for name in site.heads:
        bias = cast(nn.Parameter | None, model.get_submodule(name).bias)
        model = replace_module(model, name, Head(module, bias).eval())
    leave_fast_path(model)
    return model


def rounded_to_nearest(site: Site, weight: Tensor, plan: LayerPlan) -> list[list[Quantised]]:
    """The simplest numbers of a layer: each term decomposed in the plain error, then rounded."""
    left, terms = weight, []
    for term in plan.terms:
        form = term.form
        factors = [Quantised.nearest(f, term.grid) for f in form.decompose(site, left, None)]
        left = left - form.contract(site, [f.values for f in factors])
        terms.append(factors)
    return terms


def plan_of(model: nn.Module, survey: Survey) -> Plan:
    """The plan, read back from a network: it cannot disagree with what runs."""
    layers = all_layers(model)
    return Plan(tuple(layers[s.name].plan for s in survey if s.name in layers))


def empty(site: Site, plan: LayerPlan) -> Compressed:
    """A layer of the right shapes with blank numbers, to load a file into."""
    bias = torch.zeros(site.shape[0]) if site.bias else None
    return Compressed(site, plan, blank_numbers(site, plan), bias)


def blank_numbers(site: Site, plan: LayerPlan) -> list[list[Quantised]]:
    """Numbers of the right shapes, all zero, for whoever brings the real ones later."""
    return [[_blank(shape, t.grid) for shape in factor_shapes(site, t)] for t in plan.terms]


def _blank(shape: tuple[int, ...], grid: Grid) -> Quantised:
    scale = torch.ones(grid.scale_shape(shape))
    zero = torch.zeros_like(scale) if grid.scales.zeros else None
    return Quantised(grid, torch.zeros(shape), scale, zero)
