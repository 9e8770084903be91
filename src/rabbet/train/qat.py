"""Factors and quantisers that train, put into a compressed layer for the time of training.

`Latent` trains in float, then on its grid with a scale that is learnt (LSQ, arXiv 1902.08153).
`GatedWeight` and `GatedRange` can take every width that a gate may choose, at any time.
`SoftAdapter` adds a softly thresholded residual to a weight. The layer that holds them
(`replace_factors`) is the same `Compressed` layer that users get.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rabbet.core.plan import Term
from rabbet.forms import Dense
from rabbet.grids.grid import Grid, Quantised, stored
from rabbet.model.compressed import ActQuant, Compressed, Factor

FLOAT = 32  # a width that is not rounded
TINY = 1e-12  # the smallest reach of a range, of either sign
# The widest that a file holds. Wider gates run in float, but are priced and stored at this width.
WIDEST = 8

Ranges = Mapping[int, tuple[float, float]]
"""Both ends of an input's range, by the bits that they were calibrated for.

It is empty if the input is not quantised.
"""


def replace_factors(
    layer: Compressed, factors: Sequence[Factor], acts: Sequence[ActQuant] | None = None
) -> None:
    """Replace the factors of a layer of one term, in place, and its quantisers unless None."""
    assert len(layer.forms) == 1
    place = next(layer.buffers()).device
    layer.terms = nn.ModuleList([nn.ModuleList(factor.to(place) for factor in factors)])
    if acts is not None:
        layer.acts = nn.ModuleList(act.to(place) for act in acts)


class Latent(Factor):
    """A factor that trains: a float tensor and, once it is on its grid, the scale.

    on_grid: whether `forward` rounds the tensor; if not, it trains in float.
    """

    def __init__(self, value: Tensor, grid: Grid) -> None:
        scale = torch.ones(grid.scale_shape(tuple(value.shape)))
        zero = torch.zeros_like(scale) if grid.scales.zeros else None
        super().__init__(Quantised(grid, torch.zeros_like(value), scale, zero))
        # Contiguous, whether it was computed now or read from a folder: another memory layout
        # changes the order of sums, and so the bytes of the result.
        self.value = nn.Parameter(value.detach().float().contiguous().clone(), requires_grad=False)
        self.on_grid = False
        # The rounded values, while `rounded_together` has computed them.
        self.cached: Tensor | None = None

    def forward(self) -> Tensor:
        """The values, on the grid if `on_grid`."""
        return super().forward() if self.cached is None else self.cached

    @property
    def held(self) -> Tensor:
        """The float tensor."""
        return self.value

    def show(self, held: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """The values of the float tensor, or of some rows of it."""
        if not self.on_grid:
            return held
        return self.grid.fake(held, scale, 0.0 if zero is None else zero)

    def move_to_grid(self) -> None:
        """Start to round, with the scale of least squared error."""
        scale, zero = self.grid.search(self.value.detach())
        self.scale.copy_(scale)
        if self.zero is not None and zero is not None:
            self.zero.copy_(zero)
        self.on_grid = True

    @property
    def numbers(self) -> Quantised:
        """Codes and scale as a file holds them."""
        scale = stored(self.scale.detach())
        zero = 0.0 if self.zero is None else self.zero
        codes = self.grid.codes(self.value.detach(), scale, zero)
        return Quantised(self.grid, codes, scale, self.zero)


@contextlib.contextmanager
def rounded_together(latents: Iterable[Latent]) -> Iterator[None]:
    """Round all latents of one shape and grid in one operation, for the forward passes inside.

    Inside, a change of a latent or its scale has no effect. Cores are small and numerous: rounding
    them one by one takes a sixth of a training step on 32 short sentences.
    """
    groups: dict[tuple[Grid, torch.Size], list[Latent]] = {}
    for latent in latents:
        floats = latent.grid.codebook.floats
        if latent.on_grid and latent.grid.scales.single and not floats:
            groups.setdefault((latent.grid, latent.value.shape), []).append(latent)
    for (grid, _), group in groups.items():
        values, scales = torch.stack([x.value for x in group]), torch.cat([x.scale for x in group])
        rounded = grid.with_axis(0).fake(values, scales).unbind()
        for latent, part in zip(group, rounded, strict=True):
            latent.cached = part
    try:
        yield
    finally:
        for group in groups.values():
            for latent in group:
                latent.cached = None


class GatedWeight(Factor):
    """A dense weight that trains on a grid of whatever width its gates choose.

    Widths change during training, so all of them share one range. A grid of few bits covers only a
    part of it: the part that gave the starting weight the least squared error.

    latent: the weight before it is rounded, canonical. reach: the largest weight that its grid
    covers, [1] or [out], negative if the grid is mirrored. bits: one number, or one for each
    output. two: the kind of the grid at 2 bits. substitutes: by width, a weight to use in place of
    the rounded one, while the effect of that width is measured.
    """

    def __init__(self, weight: Tensor, axis: int | None) -> None:
        grid = Grid.of(WIDEST, axis=axis)
        scale = torch.ones(grid.scale_shape(tuple(weight.shape)))
        super().__init__(Quantised(grid, torch.zeros_like(weight), scale))
        self.start = weight.detach().float()
        self.latent: Tensor = nn.Parameter(self.start.clone(), requires_grad=False)
        self.reach: Tensor = nn.Parameter(_largest(self.start, axis), requires_grad=False)
        self.two = "half"
        self.bits = [FLOAT]
        self.substitutes: Mapping[int, Tensor] = {}
        self._shares: dict[Grid, Tensor] = {}

    def forward(self) -> Tensor:
        """The weight, each output on the grid of its width."""
        weight = self.latent
        for bits, rows in rows_by_width(self.bits):
            if bits > WIDEST:
                continue
            rounded = self.substitutes[bits] if self.substitutes else self.rounded(bits)
            if rows is None:
                return rounded
            mask = torch.zeros(len(self.latent), dtype=torch.bool, device=self.latent.device)
            mask[list(rows)] = True
            weight = torch.where(mask.view(-1, *[1] * (weight.ndim - 1)), rounded, weight)
        return weight

    def lookup(self, places: Tensor) -> Tensor:
        """The rows of a table at the given indices, [..., columns]."""
        return F.embedding(places, self())

    @property
    def gates(self) -> int:
        """How many gates set its widths."""
        return len(self.bits)

    @property
    def mean_bits(self) -> float:
        """The mean of its widths."""
        return sum(self.bits) / len(self.bits)

    @property
    def slope(self) -> Tensor | None:
        """The gradient of the loss by the weight, from the last step."""
        return self.latent.grad

    @property
    def size(self) -> Tensor:
        """The magnitude of every entry, as a share of the reach."""
        reach = self.reach.detach().abs()
        wide = reach.view(-1, *[1] * (self.latent.ndim - 1)) if len(reach) > 1 else reach
        return self.latent.detach().abs() / wide

    def grid_of(self, bits: int) -> Grid:
        """The grid of a width: signed; at 2 bits ternary (the paper's) or with half-steps."""
        return Grid.of(bits, self.two if bits == 2 else "signed", self.grid.axis)

    def rounded(self, bits: int) -> Tensor:
        """The whole weight on the grid of a width, with straight-through gradients."""
        return self.grid_of(bits).fake(self.latent, self.scale_of(bits))

    def scale_of(self, bits: int) -> Tensor:
        """The scale at a width.

        Its grid covers the reach, or the share of it that is best for so few levels.
        """
        # A negative reach mirrors the grid.
        reach = torch.where(self.reach.abs() < TINY, TINY, self.reach)
        grid = self.grid_of(bits)
        return self._share(grid) * 2 * reach / (grid.levels - 1)

    def _share(self, grid: Grid) -> Tensor:
        """The share of the reach that a grid covers, [1] or [out]."""
        if grid not in self._shares:
            with torch.no_grad():
                best = grid.mse(self.start) * (grid.levels - 1) / 2
                self._shares[grid] = best / _largest(self.start, grid.axis)
        return self._shares[grid]

    @property
    def numbers(self) -> Quantised:
        """The whole weight at 8 bits."""
        return self.numbers_of(Term(Dense(), self.grid))

    def numbers_of(self, term: Term) -> Quantised:
        """The rows of a dense term on its grid, as a file holds them."""
        scale = stored(self.scale_of(term.grid.bits).detach())
        scale = scale if term.grid.axis is None else term.form.of_outputs(scale)
        latent = term.form.of_outputs(self.latent.detach())
        return Quantised(term.grid, term.grid.codes(latent, scale), scale)

    def start_from(self, layer: Compressed) -> None:
        """Take over the weight and scales of a solved layer of the same widths.

        Its dense terms hold every output once. Call it under `torch.no_grad`.
        """
        self.latent.copy_(layer.canonical)
        for term, (factor,) in zip(layer.plan.terms, layer.factors, strict=True):
            grid = self.grid_of(term.grid.bits)
            partial = term.form.partial and grid.axis is not None
            rows = list(term.form.outputs(layer.site)) if partial else slice(None)
            self.reach[rows] = factor.scale * (grid.levels - 1) / (2 * self._share(grid)[rows])


class GatedRange(ActQuant):
    """Quantises the input of a layer to whatever width its gate chooses, in a range that trains.

    low, high: ends of the range at 8 bits, [1] each; a narrower width covers a part of it, in
    proportion to the ranges that were calibrated for each width. bits: one number. moves: whether
    there is a gate.
    """

    def __init__(self, ranges: Ranges) -> None:
        super().__init__(WIDEST)
        self.ranges = ranges
        low, high = (nn.Parameter(torch.tensor([x]), requires_grad=False) for x in ranges[WIDEST])
        self.low: Tensor = low
        self.high: Tensor = high
        self.bits = [FLOAT]
        self.moves = True
        self.records_slope = False
        self.forget()

    def forget(self) -> None:
        """Begin to add up anew what `slope` tells."""
        self._felt: Tensor | None = None
        self._places = 0

    @property
    def slope(self) -> Tensor | None:
        """The mean magnitude of the gradient of the loss by the quantised input, a scalar.

        Of all calls since `forget`, if `records_slope`; None if no gradient came.
        """
        return None if self._felt is None else self._felt / self._places

    def forward(self, x: Tensor) -> Tensor:
        """X of any shape, on the grid of its width."""
        bits = self.bits[0]
        if bits <= WIDEST:
            x = Grid.of(bits, "unsigned").fake(x, *self.range_of(bits))
        if self.records_slope and x.requires_grad:
            x.register_hook(self._record_slope)
        return x

    def _record_slope(self, slope: Tensor) -> None:
        felt = slope.detach().abs().sum()
        self._felt = felt if self._felt is None else self._felt + felt
        self._places += slope.numel()

    def range_of(self, bits: int) -> tuple[Tensor, Tensor]:
        """Scale (differentiable) and zero point at a width, [1] each."""
        low_share, high_share = (self._share(end, bits) for end in (0, 1))
        # Zero lies on every grid, so that padding is exact.
        low = (self.low * low_share).clamp(max=0)
        high = (self.high * high_share).clamp_min(TINY)
        scale = (high - low) / (2**bits - 1)
        return scale, (-low / scale).detach().round()

    def _share(self, end: int, bits: int) -> float:
        """An end of the calibrated range at a width, as a share of that at 8 bits; end: 0 or 1."""
        widest = self.ranges[WIDEST][end]
        return self.ranges[bits][end] / widest if abs(widest) > TINY else 1.0

    def start_from(self, act: ActQuant) -> None:
        """Take over a range that was calibrated for the current width.

        Call it under `torch.no_grad`.
        """
        bits = self.bits[0]
        self.low.copy_(-act.zero * act.scale / (self._share(0, bits) or 1.0))
        self.high.copy_((2**bits - 1 - act.zero) * act.scale / (self._share(1, bits) or 1.0))


class SoftAdapter(Factor):
    """A weight on its grid plus its rounding residual, softly thresholded (CoRa, arXiv 2408.00923).

    residual: left [out, rank] and right [rank, n], whose product is the whole residual; None for a
    layer without an adapter. gain: from the cut-off, a scalar that trains, to the gain of each
    rank.
    """

    def __init__(
        self,
        base: Quantised,
        residual: tuple[Tensor, Tensor] | None = None,
        gain: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__(base)
        left, right = (None, None) if residual is None else residual
        self.left: Tensor | None
        self.right: Tensor | None
        self.register_buffer("left", left)
        self.register_buffer("right", right)
        self.gain = gain
        cutoff = None if residual is None else nn.Parameter(torch.zeros(()), requires_grad=False)
        self.cutoff: Tensor | None = cutoff

    def forward(self) -> Tensor:
        """The base plus the thresholded residual."""
        base = super().forward()
        if self.left is None or self.right is None or self.cutoff is None or self.gain is None:
            return base
        shares = self.gain(self.cutoff).square()
        return base + ((self.left * shares) @ self.right).view(base.shape)

    def lookup(self, places: Tensor) -> Tensor:
        """The rows of a table at the given indices, [..., columns]."""
        return F.embedding(places, self())


def rows_by_width(bits: Sequence[int]) -> list[tuple[int, tuple[int, ...] | None]]:
    """Each width with the indices of its outputs, None for all; the smallest width first."""
    widths = sorted(set(bits))
    if len(widths) == 1:
        return [(widths[0], None)]
    return [(b, tuple(k for k, own in enumerate(bits) if own == b)) for b in widths]


def _largest(weight: Tensor, axis: int | None) -> Tensor:
    """The largest magnitude in a weight, [1], or in each of its rows, [out]."""
    rows = weight.reshape(1, -1) if axis is None else weight.flatten(1)
    return rows.abs().amax(1).clamp_min(TINY)
