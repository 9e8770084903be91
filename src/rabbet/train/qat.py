"""What stands in a compressed layer while it trains: factors and quantisers, each with a strategy of its own.

`Latent` trains in float, then on its grid with a scale that is learnt (LSQ, arXiv 1902.08153).
`GatedWeight` and `GatedRange` have every width that a gate may choose, at any time. `SoftAdapter`
lets through of a residual what its cut-off says. Whichever they are, the layer around them is the
one that is handed out (`exchange`).
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
WIDEST = 8  # what a file holds; wider gates run in float, and are priced and handed out at 8 bits

Ranges = Mapping[int, tuple[float, float]]
"""The ends of an input's range, by the bits that it was calibrated for; empty where inputs are not quantised."""


def exchange(
    layer: Compressed, factors: Sequence[Factor], acts: Sequence[ActQuant] | None = None
) -> None:
    """Put other factors into a layer of one term, and other quantisers if any are given, in place."""
    assert len(layer.forms) == 1
    place = next(layer.buffers()).device
    layer.terms = nn.ModuleList([nn.ModuleList(factor.to(place) for factor in factors)])
    if acts is not None:
        layer.acts = nn.ModuleList(act.to(place) for act in acts)


class Latent(Factor):
    """A factor that trains: a float tensor and, once it is on its grid, the scale."""

    def __init__(self, value: Tensor, grid: Grid) -> None:
        scale = torch.ones(grid.scale_shape(tuple(value.shape)))
        zero = torch.zeros_like(scale) if grid.scales.zeros else None
        super().__init__(Quantised(grid, torch.zeros_like(value), scale, zero))
        # one layout, whether computed now or read from a folder: sums in another order would be
        # other bytes
        self.value = nn.Parameter(value.detach().float().contiguous().clone(), requires_grad=False)
        self.on = False
        # the values, where they were made together with those of others
        self.shown: Tensor | None = None

    def forward(self) -> Tensor:
        """The values."""
        return super().forward() if self.shown is None else self.shown

    @property
    def held(self) -> Tensor:
        """The float tensor."""
        return self.value

    def show(self, held: Tensor, scale: Tensor) -> Tensor:
        """The values of it, or of some rows of it."""
        zero = 0.0 if self.zero is None else self.zero
        return self.grid.fake(held, scale, zero) if self.on else held

    def settle(self) -> None:
        """Put on the grid, with the scale of least squared error."""
        scale, zero = self.grid.search(self.value.detach())
        self.scale.copy_(scale)
        if self.zero is not None and zero is not None:
            self.zero.copy_(zero)
        self.on = True

    @property
    def numbers(self) -> Quantised:
        """As a file holds them."""
        scale = stored(self.scale.detach())
        zero = 0.0 if self.zero is None else self.zero
        codes = self.grid.codes(self.value.detach(), scale, zero)
        return Quantised(self.grid, codes, scale, self.zero)


@contextlib.contextmanager
def together(latents: Iterable[Latent]) -> Iterator[None]:
    """While this lasts, latents show what they are now; those of one shape and grid are rounded in one operation.

    Cores are small, and many: one by one, their rounding takes a sixth of a step of 32 short
    sentences.
    """
    alike: dict[tuple[Grid, torch.Size], list[Latent]] = {}
    for latent in latents:
        if latent.on and latent.grid.scales.single:
            alike.setdefault((latent.grid, latent.value.shape), []).append(latent)
    for (grid, _), group in alike.items():
        values, scales = torch.stack([x.value for x in group]), torch.cat([x.scale for x in group])
        for latent, shown in zip(
            group, grid.with_axis(0).fake(values, scales).unbind(), strict=True
        ):
            latent.shown = shown
    try:
        yield
    finally:
        for group in alike.values():
            for latent in group:
                latent.shown = None


class GatedWeight(Factor):
    """A dense weight that trains on its grids, whatever widths its gates choose.

    Widths come and go while it trains, so its range is one number for all of them; few bits cover
    less: the share of it that, at the start, had the least squared error.

    latent: the weight before it is rounded, canonical. reach: the largest weight that its grid
    covers, [1] or [out], negative where the grid is mirrored. bits: one number, or one for each
    output. two: the kind of the grid at 2 bits. shown: what stands in for the rounded weight, by
    width, while a width is measured.
    """

    def __init__(self, weight: Tensor, axis: int | None) -> None:
        grid = Grid.of(WIDEST, axis=axis)
        scale = torch.ones(grid.scale_shape(tuple(weight.shape)))
        super().__init__(Quantised(grid, torch.zeros_like(weight), scale))
        self.start = weight.detach().float()
        self.latent: Tensor = nn.Parameter(self.start.clone(), requires_grad=False)
        self.reach: Tensor = nn.Parameter(_covering(self.start, axis), requires_grad=False)
        self.two = "half"
        self.bits = [FLOAT]
        self.shown: Mapping[int, Tensor] = {}
        self._shares: dict[Grid, Tensor] = {}

    def forward(self) -> Tensor:
        """The weight, each output on the grid of its width."""
        weight = self.latent
        for bits, rows in rows_by_width(self.bits):
            if bits > WIDEST:
                continue
            rounded = self.shown[bits] if self.shown else self.rounded(bits)
            if rows is None:
                return rounded
            own = torch.zeros(len(self.latent), dtype=torch.bool, device=self.latent.device)
            own[list(rows)] = True
            weight = torch.where(own.view(-1, *[1] * (weight.ndim - 1)), rounded, weight)
        return weight

    def lookup(self, places: Tensor) -> Tensor:
        """The rows of a table at some places, [..., columns]."""
        return F.embedding(places, self())

    @property
    def slope(self) -> Tensor | None:
        """The gradient of the last step."""
        return self.latent.grad

    @property
    def size(self) -> Tensor:
        """The magnitude of every entry, as a share of the reach."""
        reach = self.reach.detach().abs()
        wide = reach.view(-1, *[1] * (self.latent.ndim - 1)) if len(reach) > 1 else reach
        return self.latent.detach().abs() / wide

    def grid_of(self, bits: int) -> Grid:
        """The grid of a width: signed; at 2 bits ternary (the paper's) or the half-step one."""
        return Grid.of(bits, self.two if bits == 2 else "signed", self.grid.axis)

    def rounded(self, bits: int) -> Tensor:
        """The whole weight on the grid of a width."""
        return self.grid_of(bits).fake(self.latent, self.scale_of(bits))

    def scale_of(self, bits: int) -> Tensor:
        """The scale that makes a grid as wide as the reach, or the share of it that so few levels had better cover."""
        reach = torch.where(
            self.reach.abs() < 1e-8, 1e-8, self.reach
        )  # a negative one mirrors the grid
        grid = self.grid_of(bits)
        return self._share(grid) * 2 * reach / (grid.levels - 1)

    def _share(self, grid: Grid) -> Tensor:
        if grid not in self._shares:
            with torch.no_grad():
                best = grid.mse(self.start) * (grid.levels - 1) / 2
                share = best / _covering(self.start, grid.axis)
                self._shares[grid] = share.to(self.reach.device)
        return self._shares[grid]

    @property
    def numbers(self) -> Quantised:
        """The whole weight on 8 bits."""
        return self.numbers_of(Term(Dense(), self.grid))

    def numbers_of(self, term: Term) -> Quantised:
        """The rows of a dense term on its grid, as a file holds them."""
        scale = stored(self.scale_of(term.grid.bits).detach())
        scale = scale if term.grid.axis is None else term.form.of_outputs(scale)
        latent = term.form.of_outputs(self.latent.detach())
        return Quantised(term.grid, term.grid.codes(latent, scale), scale)

    def adopt(self, layer: Compressed) -> None:
        """Begin with the weight of a layer that was solved, every output once, on these widths; without gradients."""
        self.latent.copy_(layer.canonical)
        for term, (factor,) in zip(layer.plan.terms, layer.factors, strict=True):
            grid = self.grid_of(term.grid.bits)
            partial = term.form.partial and grid.axis is not None
            rows = list(term.form.outputs(layer.site)) if partial else slice(None)
            self.reach[rows] = factor.scale * (grid.levels - 1) / (2 * self._share(grid)[rows])


class GatedRange(ActQuant):
    """Quantises the input of a layer to whatever width its gate chooses, between ends that train.

    low, high: ends of the range, [1] each. Few bits cover less: by how much, the ranges that were
    calibrated for each width say. bits: one number. moves: whether there is a gate. slope: the
    gradient by the quantised input, where it is `watched`.
    """

    def __init__(self, ranges: Ranges) -> None:
        super().__init__(WIDEST)
        self.ranges = ranges
        low, high = (nn.Parameter(torch.tensor([x]), requires_grad=False) for x in ranges[WIDEST])
        self.low: Tensor = low
        self.high: Tensor = high
        self.bits = [FLOAT]
        self.moves = True
        self.watched = False
        self.slope: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """X of any shape, on the grid of its width."""
        bits = self.bits[0]
        if bits <= WIDEST:
            x = Grid.of(bits, "unsigned").fake(x, *self.range_of(bits))
        if self.watched and x.requires_grad:
            x.register_hook(self._watch)
        return x

    def _watch(self, slope: Tensor) -> None:
        self.slope = slope.detach()

    def range_of(self, bits: int) -> tuple[Tensor, Tensor]:
        """Scale, with its gradient, and zero point at a width."""
        first, last = (self._share(end, bits) for end in (0, 1))
        # zero is on every grid: padding is exact
        low, high = (self.low * first).clamp(max=0), (self.high * last).clamp_min(1e-8)
        scale = (high - low) / (2**bits - 1)
        return scale, (-low / scale).detach().round()

    def _share(self, end: int, bits: int) -> float:
        """An end of the range at a width, as a share of the one at 8 bits."""
        whole = self.ranges[WIDEST][end]
        return self.ranges[bits][end] / whole if abs(whole) > 1e-8 else 1.0

    def adopt(self, act: ActQuant) -> None:
        """Begin with a range that was calibrated for this width; without gradients."""
        bits = self.bits[0]
        self.low.copy_(-act.zero * act.scale / (self._share(0, bits) or 1.0))
        self.high.copy_((2**bits - 1 - act.zero) * act.scale / (self._share(1, bits) or 1.0))


class SoftAdapter(Factor):
    """A weight on its grid, and softly thresholded what rounding left of it, as one weight.

    left, right: [out, rank] and [rank, n], whose product is the whole residual. gain: from the
    cut-off, which trains, the gain of every rank. Where nothing was left, there is only the base.
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
        """Base and softly thresholded residual."""
        base = super().forward()
        if self.left is None or self.right is None or self.cutoff is None or self.gain is None:
            return base
        kept = self.gain(self.cutoff).square()
        return base + ((self.left * kept) @ self.right).view(base.shape)

    def lookup(self, places: Tensor) -> Tensor:
        """The rows of a table at some places, [..., columns]."""
        return F.embedding(places, self())


def rows_by_width(bits: Sequence[int]) -> list[tuple[int, tuple[int, ...] | None]]:
    """Each width with the outputs that have it, None for all, the smallest first."""
    different = sorted(set(bits))
    if len(different) == 1:
        return [(different[0], None)]
    return [(b, tuple(k for k, own in enumerate(bits) if own == b)) for b in different]


def _covering(weight: Tensor, axis: int | None) -> Tensor:
    rows = weight.reshape(1, -1) if axis is None else weight.flatten(1)
    return rows.abs().amax(1).clamp_min(1e-8)
