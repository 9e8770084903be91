"""Terms that need not run one by one, merged for a runtime.

Chains of cores are contracted into two matrices. An adapter is added to the dense weight beside it,
which runs anyway; rows on different grids become one weight. The file holds the cores and terms
themselves; weights on 8 bits, or in float32 if they are floats, are computed from them when a
runtime loads it. So an adapter costs bytes and no time, a tensor train the time of its two matrices
and the bytes of its cores.
"""

import copy
import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import nn

from rabbet.core.layout import FINISHED
from rabbet.core.plan import LayerPlan, Term
from rabbet.forms import Dense, Form
from rabbet.grids.codebook import Float
from rabbet.grids.grid import Grid, Quantised
from rabbet.model.build import install
from rabbet.model.compressed import Compressed, Factor, Numbers, compressed_layers

Make = Callable[[Sequence[Any]], Any]


class Merged(Factor):
    """A weight that a file holds as several factors, which `make` combines: on 8 bits or float."""

    def __init__(self, factors: Sequence[Factor], make: Make, grid: Grid) -> None:
        super().__init__(Quantised.nearest(make([f() for f in factors]), grid))
        self.factors, self.make = list(factors), make


def merged(model: nn.Module) -> nn.Module:
    """A copy of a compressed network with its tensor trains contracted and its adapters added in.

    The resulting weights are on 8 bits, with one scale for each output of a layer, or one for each
    table of a look-up; they are float32 where a factor is a float. A network without such terms is
    returned itself.
    """
    layers = [
        layer
        for layer in compressed_layers(model).values()
        if _summed(layer) or _chained(layer) or _unfit(layer)
    ]
    if not layers:
        return model
    result = copy.deepcopy(model)
    with torch.no_grad():
        for layer in layers:
            whole = _sum(layer) if _summed(layer) else _contracted(layer)
            result = install(result, layer.site, whole)
    return result


def _summed(layer: Compressed) -> bool:
    """Whether some terms only add to the weight of another, or have only some of its rows.

    The whole weight runs anyway, so what is added to it costs no time.
    """
    several = len(layer.terms) > 1 or any(form.partial for form in layer.forms)
    whole = any(form.verbatim for form in layer.forms)
    return several and whole and all(form.adds for form in layer.forms)


def _chained(layer: Compressed) -> bool:
    """Whether there are chains that are not merged yet."""
    done = any(isinstance(f, Merged) for factors in layer.factors for f in factors)
    return not done and any(form.contracted for form in layer.forms)


def _unfit(layer: Compressed) -> bool:
    """Whether some factor is on a grid that no integer kernel multiplies with."""
    return any(_needs_merging(f) for factors in layer.factors for f in factors)


def _needs_merging(factor: Factor) -> bool:
    grid = factor.grid
    return not (grid.scales.along_axis and (grid.codebook.integers or grid.codebook.floats))


def _finished(factors: Sequence[Factor], axis: int | None) -> Grid:
    """The grid of what is made of some factors: 8 bits with scales along an axis, or float32."""
    floats = any(f.grid.codebook.floats for f in factors)
    return Grid(Float(32)) if floats else Grid.of(FINISHED, axis=axis)


def _sum(layer: Compressed) -> Compressed:
    def make(factors: Sequence[Any]) -> Any:
        left = iter(factors)
        parts = [
            form.contract(layer.site, [next(left) for _ in held])
            for form, held in zip(layer.forms, layer.factors, strict=True)
        ]
        return functools.reduce(operator.add, parts)

    every = [f for factors in layer.factors for f in factors]
    whole = Merged(every, make, _finished(every, 0))
    return _made(layer, [Term(Dense(), whole.grid)], [[whole]], 1)


def _contracted(layer: Compressed) -> Compressed:
    terms: list[Term] = []
    factors: list[list[Factor]] = []
    for term, held in zip(layer.plan.terms, layer.factors, strict=True):
        if not term.form.contracted:
            unfit = any(map(_needs_merging, held))
            grid = Grid.of(FINISHED, axis=0) if unfit else term.grid
            terms.append(Term(term.form, grid))
            alone = operator.itemgetter(0)
            factors.append([Merged([f], alone, grid) if unfit else f for f in held])
            continue
        form, parts = term.form.for_runtime(layer.site, [f() for f in held])
        # What is still a chain is looked up core by core: no axis of a core is that of the outputs.
        grid = _finished(held, None if form.contracted else 0)
        terms.append(Term(form, grid))
        make = [functools.partial(_part, term.form, layer, k) for k in range(len(parts))]
        factors.append([Merged(held, one, grid) for one in make])
    return _made(layer, terms, factors, None)


def _part(form: Form, layer: Compressed, place: int, factors: Sequence[Any]) -> Any:
    return form.for_runtime(layer.site, factors)[1][place]


def _made(
    layer: Compressed, terms: list[Term], factors: list[list[Factor]], acts: int | None
) -> Compressed:
    """A layer of other terms with the same bias and the first `acts` quantisers (None: all)."""
    numbers: Numbers = [[f.numbers for f in held] for held in factors]
    plan = LayerPlan(layer.site.name, tuple(terms), layer.plan.act)
    result = Compressed(layer.site, plan, numbers, layer.bias)
    for term, held in zip(result.terms, factors, strict=True):
        for k, factor in enumerate(held):
            cast(nn.ModuleList, term)[k] = factor
    result.acts = copy.deepcopy(layer.acts[:acts])
    return result.to(next(layer.buffers()).device)
