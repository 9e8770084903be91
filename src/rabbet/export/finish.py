"""What a runtime is given in place of chains of cores: what they make, put together once, on 8 bits."""

import copy

import torch
from torch import nn

from rabbet.forms import Contracted
from rabbet.grid import Grid, Quantised
from rabbet.layer import Compressed, compressed_layers, install
from rabbet.plan import LayerPlan, Term

BITS = 8


def finished(model: nn.Module) -> nn.Module:
    """A copy of a compressed network in which every tensor train is two matrices, as it is exported.

    They are rounded to 8 bits, one scale for each output of a layer, one for each table of a look-up. A network
    without tensor trains is returned as it is.
    """
    layers = [x for x in compressed_layers(model).values() if any(isinstance(f, Contracted) for f in x.forms)]
    if not layers:
        return model
    result = copy.deepcopy(model)
    with torch.no_grad():
        for layer in layers:
            result = install(result, layer.site, _finished(layer))
    return result


def _finished(layer: Compressed) -> Compressed:
    terms: list[Term] = []
    numbers: list[list[Quantised]] = []
    for term, form, factors in zip(layer.plan.terms, layer.forms, layer.factors, strict=True):
        if not isinstance(form, Contracted):
            terms.append(term)
            numbers.append([f.numbers for f in factors])
            continue
        name, modes, made = form.finished(layer.site, [f() for f in factors])
        if [m.shape for m in made] == [f.codes.shape for f in factors]:  # finished already
            terms.append(term)
            numbers.append([f.numbers for f in factors])
            continue
        grid = Grid(BITS, axis=0 if name == "lowrank" else None)
        terms.append(Term(name, grid, len(made[0]), modes))
        numbers.append([Quantised.nearest(m, grid) for m in made])
    found = Compressed(layer.site, LayerPlan(layer.site.name, tuple(terms), layer.plan.act), numbers, layer.bias)
    found.acts = copy.deepcopy(layer.acts)
    return found.to(next(layer.buffers()).device)
