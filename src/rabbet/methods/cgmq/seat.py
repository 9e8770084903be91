"""A layer that trains on its grids, as `rabbet.gates` has it: every width that a gate may choose, at any time.

Widths come and go while it trains, so a range is one number for all of them; what few bits had
better cover is a fixed share of it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from rabbet.core.plan import LayerPlan, Term
from rabbet.forms import Dense
from rabbet.grids.codebook import uniform
from rabbet.grids.grid import Grid, Quantised, stored
from rabbet.grids.scales import OneScale, PerSlice
from rabbet.layers import Site
from rabbet.model.build import install
from rabbet.model.compressed import Compressed, Numbers, compressed_layers

FLOAT = 32  # a width that is not rounded
WIDEST = 8  # what a file holds; wider gates run in float, and are priced and handed out at 8 bits

TWO = (uniform(2, "half"), uniform(2, "ternary"))  # beside the signed one, at 2 bits

Ranges = Mapping[int, tuple[float, float]]
"""The ends of an input's range, by the bits that it was calibrated for; empty where inputs are not quantised."""


class Seat(nn.Module):
    """A layer that trains on its grids: weight, bias and both ranges are parameters, the widths are not.

    latent: the weight before it is rounded, canonical. reach: the largest weight that its grid
    covers, [1] or [out], negative where the grid is mirrored. low, high: ends of the input's range,
    [1] each; None where inputs are not quantised. Few bits cover less: by how much, the least
    squared error at the start says (`ranges`: ends of the input's range by width). bits: of the
    weight, one number or one for each output. act: of the input.
    """

    def __init__(self, layer: Compressed, weight: Tensor, ranges: Ranges) -> None:
        super().__init__()
        self.site = layer.site
        grid = layer.plan.terms[0].grid
        self.axis = grid.axis
        self.two = "half"
        self.latent: Tensor = nn.Parameter(weight.detach().float().clone())
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().clone())
        self.reach: Tensor = nn.Parameter(_covering(self.latent.detach(), grid.axis))
        ends = [nn.Parameter(torch.tensor([end])) for end in ranges.get(WIDEST, ())]
        self.low: Tensor | None = ends[0] if ends else None
        self.high: Tensor | None = ends[1] if ends else None
        self.start, self.ranges = weight.detach().float(), ranges
        self.covered: dict[Grid, Tensor] = {}
        self.bits, self.act = [FLOAT], FLOAT
        self.fixed: int | None = None
        self.slope: Tensor | None = None  # the gradient by the quantised input, where it is watched
        self.watched = False
        self.shown: Mapping[
            int, Tensor
        ] = {}  # what stands in for the rounded weight, by width, while it is measured

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (torch's name, by which it may be given)
        """The layer on its grids."""
        return self._run(self.site, input, self.bias)

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """What a head makes of x with this table."""
        return self._run(self.site.head, x, bias)

    def _run(self, site: Site, x: Tensor, bias: Tensor | None) -> Tensor:
        if site.looks_up:
            return site.run(x, self._rounded(), bias)
        if self.high is not None and self.act <= WIDEST:
            scale, zero = self.act_range(self.act)
            x = Grid.of(self.act, "unsigned").fake(x, scale, zero)
        if self.watched and x.requires_grad:
            x.register_hook(self._watch)
        return site.run(x, self._rounded(), bias)

    @property
    def weight(self) -> Tensor:
        """What the layer runs with, in its own layout, for code that reads a layer's weight directly."""
        return self.site.native(self._rounded())

    def _rounded(self) -> Tensor:
        """The weight, each output on the grid of its width."""
        found = self.latent
        for bits, rows in _parts(self.bits):
            if bits > WIDEST:
                continue
            made = (
                self.shown[bits]
                if self.shown
                else self.grid(bits).fake(self.latent, self.scale(bits))
            )
            if rows is None:
                return made
            own = torch.zeros(len(self.latent), dtype=torch.bool, device=self.latent.device)
            own[list(rows)] = True
            found = torch.where(own.view(-1, *[1] * (found.ndim - 1)), made, found)
        return found

    def _watch(self, slope: Tensor) -> None:
        self.slope = slope.detach()

    def grid(self, bits: int) -> Grid:
        """The grid of a width: signed; at 2 bits ternary (the paper's) or the half-step one."""
        return Grid.of(bits, self.two if bits == 2 else "signed", self.axis)

    def scale(self, bits: int) -> Tensor:
        """The scale that makes a grid as wide as the reach, or the share of it that so few levels had better cover."""
        reach = torch.where(
            self.reach.abs() < 1e-8, 1e-8, self.reach
        )  # a negative one mirrors the grid
        return self._share(self.grid(bits)) * 2 * reach / (self.grid(bits).levels - 1)

    def _share(self, grid: Grid) -> Tensor:
        if grid not in self.covered:
            with torch.no_grad():
                best = grid.mse(self.start) * (grid.levels - 1) / 2
                self.covered[grid] = (best / _covering(self.start, grid.axis)).to(self.reach.device)
        return self.covered[grid]

    def act_range(self, bits: int) -> tuple[Tensor, Tensor]:
        """Scale, with its gradient, and zero point of the input at a width."""
        assert self.high is not None
        assert self.low is not None
        first, last = (self._end(k, bits) for k in (0, 1))
        # zero is on every grid: padding is exact
        low, high = (self.low * first).clamp(max=0), (self.high * last).clamp_min(1e-8)
        scale = (high - low) / (2**bits - 1)
        return scale, (-low / scale).detach().round()

    def _end(self, place: int, bits: int) -> float:
        """An end of the input's range at a width, as a share of the one at 8 bits."""
        whole = self.ranges[WIDEST][place]
        return self.ranges[bits][place] / whole if abs(whole) > 1e-8 else 1.0

    def sizes(self) -> list[tuple[Tensor, float]]:
        """What learns, each with the magnitude that a rate refers to; biases may start at zero."""
        parts = (
            (self.latent, 0.0),
            (self.reach, 1e-6),
            (self.low, 1e-6),
            (self.high, 1e-6),
            (self.bias, 0.05),
        )
        return [
            (p, max(float(p.detach().abs().mean()), least)) for p, least in parts if p is not None
        ]

    def gated(self, channels: bool) -> int:
        """How many gates the weight has: one, or one for each output of a layer without groups."""
        return len(self.latent) if channels and self.site.groups == 1 else 1

    def take(self, line: LayerPlan) -> None:
        """Take over the widths of a line, its dense terms making every output once."""
        self.axis = line.terms[0].grid.axis
        self.bits = [FLOAT] * (len(self.latent) if line.terms[0].form.partial else 1)
        for term in line.terms:
            if term.grid.bits == 2:
                self.two = term.grid.kind
            for row in term.form.outputs(self.site) if term.form.partial else (0,):
                self.bits[row] = term.grid.bits
        self.act = line.act or FLOAT

    def numbers(self, line: LayerPlan) -> Numbers:
        """The weight on the grids of its line, as a file holds it."""
        found = []
        for term in line.terms:
            scale = stored(self.scale(term.grid.bits).detach())
            scale = scale if term.grid.axis is None else term.form.of_outputs(scale)
            latent = term.form.of_outputs(self.latent.detach())
            found.append([Quantised(term.grid, term.grid.codes(latent, scale), scale)])
        return found

    def adopt(self, layer: Compressed) -> None:
        """Begin with the numbers of a layer that was solved on these widths."""
        with torch.no_grad():
            self.latent.copy_(layer.canonical)
            for term, (factor,) in zip(layer.plan.terms, layer.factors, strict=True):
                grid = self.grid(term.grid.bits)
                partial = term.form.partial and grid.axis is not None
                rows = list(term.form.outputs(self.site)) if partial else slice(None)
                self.reach[rows] = factor.scale * (grid.levels - 1) / (2 * self._share(grid)[rows])
            if self.bias is not None and layer.bias is not None:
                self.bias.copy_(layer.bias)
            if self.low is not None and self.high is not None and layer.quantisers:
                scale, zero = layer.quantisers[0].scale, layer.quantisers[0].zero
                self.low.copy_(-zero * scale / (self._end(0, self.act) or 1.0))
                self.high.copy_((2**self.act - 1 - zero) * scale / (self._end(1, self.act) or 1.0))

    def hand_over(self, layer: Compressed) -> None:
        """Give a layer that was built of `numbers` the bias and the input's range, too."""
        if layer.bias is not None and self.bias is not None:
            layer.bias.data = self.bias.detach().clone()
        if layer.quantisers:
            layer.quantisers[0].set_range(
                *(t.detach() for t in self.act_range(layer.plan.act or WIDEST))
            )

    def line(self, bits: Sequence[int] | None = None, act: int | None = None) -> LayerPlan:
        """The layer's line of a plan at these widths, or at its own; those that no file holds at 8 bits."""
        held = [min(b, WIDEST) for b in (self.bits if bits is None else bits)]
        terms = tuple(Term(Dense(rows), self.grid(b)) for b, rows in _parts(held))
        act = min(self.act if act is None else act, WIDEST)
        return LayerPlan(self.site.name, terms, act if self.high is not None else None)


def seatable(site: Site, line: LayerPlan) -> bool:
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
    """The line at 8 bits: what a seat is built from, and what ranges are calibrated for."""
    grid = replace(line.terms[0].grid, codebook=uniform(WIDEST))
    return LayerPlan(line.name, (Term(Dense(), grid),), None if line.act is None else WIDEST)


def _parts(bits: Sequence[int]) -> list[tuple[int, tuple[int, ...] | None]]:
    """Each width with the outputs that have it, None for all, the smallest first."""
    different = sorted(set(bits))
    if len(different) == 1:
        return [(different[0], None)]
    return [(b, tuple(k for k, own in enumerate(bits) if own == b)) for b in different]


def _covering(weight: Tensor, axis: int | None) -> Tensor:
    rows = weight.reshape(1, -1) if axis is None else weight.flatten(1)
    return rows.abs().amax(1).clamp_min(1e-8)


def seated(
    student: nn.Module, weights: Mapping[str, Tensor], ranges: Mapping[str, Ranges]
) -> tuple[nn.Module, dict[str, Seat]]:
    """A network from `build` with a `Seat` at every layer; weights: canonical; ranges: of inputs. All by site."""
    seats: dict[str, Seat] = {}
    for name, layer in compressed_layers(student).items():
        seats[name] = Seat(layer, weights[name], ranges[name]).to(next(layer.buffers()).device)
        student = install(student, layer.site, seats[name])
    return student, seats
