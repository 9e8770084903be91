"""A compressed layer whose widths are decided by gates while it trains."""

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
from rabbet.train.nested import NestedWeight
from rabbet.train.qat import (
    FLOAT,
    WIDEST,
    GatedRange,
    GatedWeight,
    Ranges,
    replace_factors,
    rows_by_width,
)

TWO = (uniform(2, "half"), uniform(2, "ternary"))  # grids at 2 bits besides the signed one


@dataclass(frozen=True, eq=False)
class GatedLayer:
    """A layer during training, with its gated weight and the gated range of its input.

    input_range: None if the input is not quantised.
    """

    layer: Compressed
    weight: GatedWeight
    input_range: GatedRange | None

    @property
    def site(self) -> Site:
        """The layer's site."""
        return self.layer.site

    @property
    def act(self) -> int:
        """The bits of the input."""
        return FLOAT if self.input_range is None else self.input_range.bits[0]

    def sizes(self) -> list[tuple[Tensor, float]]:
        """The parameters that train, each with the magnitude that its learning rate refers to.

        That is its mean magnitude, but not less than a minimum: biases may start at zero.
        """
        parts = [(self.weight.latent, 0.0), (self.weight.reach, 1e-6)]
        if self.input_range is not None:
            parts += [(self.input_range.low, 1e-6), (self.input_range.high, 1e-6)]
        if self.layer.bias is not None:
            parts.append((self.layer.bias, 0.05))
        return [(p, max(float(p.detach().abs().mean()), least)) for p, least in parts]

    def gate_count(self, channels: bool) -> int:
        """The number of gates of the weight: one, or with `channels` one for each output.

        A layer with groups has one gate in either case.
        """
        return len(self.weight.latent) if channels and self.site.groups == 1 else 1

    def set_widths(self, line: LayerPlan) -> None:
        """Set the widths of a line, whose dense terms hold every output once (`takes_gates`)."""
        weight = self.weight
        bits = [FLOAT] * (len(weight.latent) if line.terms[0].form.partial else 1)
        for term in line.terms:
            if term.grid.bits == 2:
                weight.two = term.grid.kind
            for row in term.form.outputs(self.site) if term.form.partial else (0,):
                bits[row] = term.grid.bits
        weight.bits = bits
        if self.input_range is not None:
            self.input_range.bits = [line.act or FLOAT]

    def numbers(self, line: LayerPlan) -> Numbers:
        """The weight on the grids of the line, as a file holds it."""
        return [[self.weight.numbers_of(term)] for term in line.terms]

    def start_from(self, layer: Compressed) -> None:
        """Take over weight, bias and input range of a solved layer of the same widths."""
        with torch.no_grad():
            self.weight.start_from(layer)
            if self.layer.bias is not None and layer.bias is not None:
                self.layer.bias.copy_(layer.bias)
            if self.input_range is not None and layer.quantisers:
                self.input_range.start_from(layer.quantisers[0])

    def copy_to(self, layer: Compressed) -> None:
        """Copy the bias and the input range to a layer that was built from `numbers`."""
        if layer.bias is not None and self.layer.bias is not None:
            layer.bias.data = self.layer.bias.detach().clone()
        if layer.quantisers and self.input_range is not None:
            scale, zero = self.input_range.range_of(layer.plan.act or WIDEST)
            layer.quantisers[0].set_range(scale.detach(), zero)

    def line(self, bits: Sequence[int] | None = None, act: int | None = None) -> LayerPlan:
        """The layer's line of a plan at the given widths; None: at its current ones.

        Widths above 8 bits, which no file holds, become 8.
        """
        stored = [min(b, WIDEST) for b in (self.weight.bits if bits is None else bits)]
        terms = tuple(
            Term(Dense(rows), self.weight.grid_of(b)) for b, rows in rows_by_width(stored)
        )
        act = min(self.act if act is None else act, WIDEST)
        return LayerPlan(self.site.name, terms, None if self.input_range is None else act)


def takes_gates(site: Site, line: LayerPlan) -> bool:
    """Whether a line has dense terms only, each output once, on grids that gates can choose."""
    if not all(t.form.verbatim for t in line.terms):
        return False
    rows = [row for t in line.terms for row in t.form.outputs(site)]
    if sorted(rows) != list(range(site.shape[0])):
        return False
    grids = [t.grid for t in line.terms]
    if not all(
        g.bits > 1 and g.codebook.uniform and g.codebook in (uniform(g.bits), *TWO) for g in grids
    ):
        return False
    layouts = {g.scales for g in grids}
    two_bit_codebooks = {g.codebook for g in grids if g.bits == 2}
    return layouts in ({OneScale()}, {PerSlice(0)}) and len(two_bit_codebooks) < 2


def widest(line: LayerPlan) -> LayerPlan:
    """The line at 8 bits, from which a layer with gates is built."""
    grid = replace(line.terms[0].grid, codebook=uniform(WIDEST))
    return LayerPlan(line.name, (Term(Dense(), grid),), None if line.act is None else WIDEST)


def gated_layers(
    student: nn.Module,
    weights: Mapping[str, Tensor],
    ranges: Mapping[str, Ranges],
    nested: Sequence[int] = (),
) -> dict[str, GatedLayer]:
    """Put gated weights and input ranges into all layers of a network from `build`, in place.

    weights: canonical. nested: the widths that each entry of a weight can have for itself; none:
    entries have those of their outputs. Returns the layers by name.
    """
    gated: dict[str, GatedLayer] = {}
    for name, layer in compressed_layers(student).items():
        values, axis = weights[name], layer.plan.terms[0].grid.axis
        weight = NestedWeight(values, axis, nested) if nested else GatedWeight(values, axis)
        input_range = GatedRange(ranges[name]) if ranges[name] else None
        replace_factors(layer, [weight], [] if input_range is None else [input_range])
        gated[name] = GatedLayer(layer, weight, input_range)
    return gated
