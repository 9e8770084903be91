"""A compressed layer whose widths gates decide, while it trains: its weight, its input's range, its line of a plan."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from rabbet.core.plan import LayerPlan, Term
from rabbet.forms import Dense
from rabbet.grids.codebook import uniform
from rabbet.grids.scales import OneScale, PerSlice
from rabbet.layers import Site
from rabbet.model.compressed import Compressed, Numbers, compressed_layers
from rabbet.train.qat import (
    FLOAT,
    WIDEST,
    GatedRange,
    GatedWeight,
    Ranges,
    replace_factors,
    rows_by_width,
)

TWO = (uniform(2, "half"), uniform(2, "ternary"))  # beside the signed one, at 2 bits


@dataclass(frozen=True, eq=False)
class GatedLayer:
    """A layer of a network that trains: what gates move, and what they are asked.

    given: the range of its input; None where that is not quantised.
    """

    layer: Compressed
    weight: GatedWeight
    given: GatedRange | None

    @property
    def site(self) -> Site:
        """The layer's own facts."""
        return self.layer.site

    @property
    def act(self) -> int:
        """The bits of the input."""
        return FLOAT if self.given is None else self.given.bits[0]

    def sizes(self) -> list[tuple[Tensor, float]]:
        """What learns, each with the magnitude that a rate refers to; biases may start at zero."""
        ends = () if self.given is None else ((self.given.low, 1e-6), (self.given.high, 1e-6))
        parts = [(self.weight.latent, 0.0), (self.weight.reach, 1e-6), *ends]
        if self.layer.bias is not None:
            parts.append((self.layer.bias, 0.05))
        return [(p, max(float(p.detach().abs().mean()), least)) for p, least in parts]

    def gates(self, channels: bool) -> int:
        """How many gates the weight has: one, or one for each output of a layer without groups."""
        return len(self.weight.latent) if channels and self.site.groups == 1 else 1

    def take(self, line: LayerPlan) -> None:
        """Take over the widths of a line, its dense terms making every output once."""
        weight = self.weight
        weight.bits = [FLOAT] * (len(weight.latent) if line.terms[0].form.partial else 1)
        for term in line.terms:
            if term.grid.bits == 2:
                weight.two = term.grid.kind
            for row in term.form.outputs(self.site) if term.form.partial else (0,):
                weight.bits[row] = term.grid.bits
        if self.given is not None:
            self.given.bits = [line.act or FLOAT]

    def numbers(self, line: LayerPlan) -> Numbers:
        """The weight on the grids of its line, as a file holds it."""
        return [[self.weight.numbers_of(term)] for term in line.terms]

    def start_from(self, layer: Compressed) -> None:
        """Begin with the numbers of a layer that was solved on these widths."""
        with torch.no_grad():
            self.weight.start_from(layer)
            if self.layer.bias is not None and layer.bias is not None:
                self.layer.bias.copy_(layer.bias)
            if self.given is not None and layer.quantisers:
                self.given.start_from(layer.quantisers[0])

    def hand_over(self, layer: Compressed) -> None:
        """Give a layer that was built of `numbers` the bias and the input's range, too."""
        if layer.bias is not None and self.layer.bias is not None:
            layer.bias.data = self.layer.bias.detach().clone()
        if layer.quantisers and self.given is not None:
            scale, zero = self.given.range_of(layer.plan.act or WIDEST)
            layer.quantisers[0].set_range(scale.detach(), zero)

    def line(self, bits: Sequence[int] | None = None, act: int | None = None) -> LayerPlan:
        """The layer's line of a plan at these widths, or at its own; those that no file holds at 8 bits."""
        held = [min(b, WIDEST) for b in (self.weight.bits if bits is None else bits)]
        terms = tuple(Term(Dense(rows), self.weight.grid_of(b)) for b, rows in rows_by_width(held))
        act = min(self.act if act is None else act, WIDEST)
        return LayerPlan(self.site.name, terms, None if self.given is None else act)


def takes_gates(site: Site, line: LayerPlan) -> bool:
    """Whether dense terms make every output of a layer once, on grids that gates can choose."""
    rows = [row for t in line.terms for row in t.form.outputs(site)]
    known = all(
        t.grid.bits > 1 and t.grid.codebook in (uniform(t.grid.bits), *TWO) for t in line.terms
    )
    layouts = {t.grid.scales for t in line.terms}
    twos = {t.grid.codebook for t in line.terms if t.grid.bits == 2}
    alike = layouts in ({OneScale()}, {PerSlice(0)}) and len(twos) < 2
    return (
        {t.form.name for t in line.terms} == {Dense.name}
        and sorted(rows) == list(range(site.shape[0]))
        and known
        and alike
    )


def widest(line: LayerPlan) -> LayerPlan:
    """The line at 8 bits: what a layer with gates is built from, and what ranges are calibrated for."""
    grid = replace(line.terms[0].grid, codebook=uniform(WIDEST))
    return LayerPlan(line.name, (Term(Dense(), grid),), None if line.act is None else WIDEST)


def gated_layers(
    student: nn.Module, weights: Mapping[str, Tensor], ranges: Mapping[str, Ranges]
) -> dict[str, GatedLayer]:
    """The layers of a network from `build`, by name, now with gated weights (canonical) and ranges, in place."""
    gated: dict[str, GatedLayer] = {}
    for name, layer in compressed_layers(student).items():
        weight = GatedWeight(weights[name], layer.plan.terms[0].grid.axis)
        given = GatedRange(ranges[name]) if ranges[name] else None
        replace_factors(layer, [weight], [] if given is None else [given])
        gated[name] = GatedLayer(layer, weight, given)
    return gated
