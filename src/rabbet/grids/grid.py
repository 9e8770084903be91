"""Grids: a codebook and a scale layout, together what a tensor may be.

The text of a grid, what stands after `@` in a plan, is that of its codebook (`4`, `u8`, `2h`, `1`,
`t`, `f32`; see `codebook`) and that of its layout (nothing, `c`, `g64`; see `scales`): `4c`, `tc`,
`4g64z`. A value is `scale * (point of the code)`; with zero points `scale * (code + shift - zero)`.

Scales are stored as bfloat16, so every scale chosen here is already rounded to it. A scale may be
negative, which mirrors the grid: that matters where it is asymmetric and short (-4 .. 3 against
-3 .. 4).
"""

import math
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from rabbet.errors import PlanError
from rabbet.grids.codebook import (
    FLOAT_BITS,
    Codebook,
    Float,
    nearest,
    points,
    read_codebook,
    uniform,
)
from rabbet.grids.scales import OneScale, PerSlice, Scales, read_scales

MANY = 2**22  # entries whose values are worked out at once
Zero = Tensor | float
LONGEST = 32  # signs in the text of a grid
COARSE, FINE = (
    20,
    10,
)  # shares of the magnitude that are tried as scales: from far, and near the best
DEAD = 1e-6  # weight, as a share of the largest, of an entry that counts for nothing
ENTRIES = 2**17  # entries of all trials at once that stay in a processor's cache


@dataclass(frozen=True, slots=True)
class Grid:
    """What an entry may be (`codebook`), and which entries share a scale (`scales`)."""

    codebook: Codebook
    scales: Scales = OneScale()  # noqa: RUF009 (frozen)

    def __post_init__(self) -> None:
        if self.scales.zeros and self.codebook.uniform is None:
            raise PlanError(f"{self}: zero points need a grid of equal distances")
        if self.codebook.floats and not self.scales.single:
            own = self.codebook.text
            raise PlanError(f"{self}: a float has an exponent of its own, so write {own} alone")

    @classmethod
    def of(cls, bits: int, kind: str = "signed", axis: int | None = None) -> Self:
        """A uniform grid by its bits and family; one scale, or one for each slice of an axis."""
        return cls(uniform(bits, kind), OneScale() if axis is None else PerSlice(axis))

    @classmethod
    def of_weights(cls, bits: int, kind: str = "signed", axis: int | None = None) -> Self:
        """The same for weights, which may stay floats: of 16 bits (float16) or 32, with no axis."""
        return cls(Float(bits)) if bits in FLOAT_BITS else cls.of(bits, kind, axis)

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `4`, `4c`, `2h`, `t`, `4g64`, `f32` ...; raises PlanError for anything else."""
        if len(text) > LONGEST:  # every cut of it is tried
            raise PlanError(f"{text[:LONGEST]!r}... is not a grid; none has so long a name")
        # The layout is the longest suffix that is one: no codebook ends the way a layout begins.
        for cut in range(1, len(text) + 1):
            book, scales = read_codebook(text[:cut]), read_scales(text[cut:])
            if book is not None and scales is not None:
                return cls(book, scales)
        raise PlanError(
            f"{text!r} is not a grid; write bits and a mark, such as 4, 4c, 2hc, u8, 1c, tc or "
            "4g64, or a type of floats: f32, f16 or bf16"
        )

    def __str__(self) -> str:
        return f"{self.codebook.text}{self.scales.text}"

    @property
    def bits(self) -> int:
        """Of the arithmetic."""
        return self.codebook.bits

    @property
    def kind(self) -> str:
        """The family of the codebook."""
        return self.codebook.name

    @property
    def axis(self) -> int | None:
        """The axis whose slices have a scale each, if that is the layout."""
        return self.scales.axis if isinstance(self.scales, PerSlice) else None

    @property
    def levels(self) -> int:
        """How many values an entry can take."""
        return self.codebook.levels

    @property
    def low(self) -> int:
        """The smallest code."""
        return self.codebook.low

    @property
    def high(self) -> int:
        """The largest code."""
        return self.codebook.high

    @property
    def mirrored(self) -> bool:
        """Whether both signs of a scale are worth trying."""
        return self.codebook.mirrored and not self.scales.zeros

    def with_axis(self, axis: int | None) -> "Grid":
        """The same codebook with one scale, or one for each slice of an axis."""
        return replace(self, scales=OneScale() if axis is None else PerSlice(axis))

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the scale of a tensor; raises PlanError if the layout does not fit its shape."""
        try:
            return (self.scales.count(tuple(shape)),)
        except PlanError as e:
            raise PlanError(f"grid {self}: {e}") from None

    def spread(self, scale: Tensor, shape: tuple[int, ...]) -> Tensor:
        """A scale, or a zero point, so that it broadcasts against a tensor of this shape."""
        return self.scales.spread(scale, tuple(shape))

    def _zero(self, zero: Zero, shape: tuple[int, ...]) -> Zero:
        return self.spread(zero, shape) if isinstance(zero, Tensor) and self.scales.zeros else zero

    def codes(self, x: Tensor, scale: Tensor, zero: Zero = 0.0) -> Tensor:
        """The nearest codes, as floats: `clip(round(x / scale - shift) + zero, low, high)`."""
        return self._encode(x, self.spread(scale, x.shape), self._zero(zero, x.shape))

    def values(self, codes: Tensor, scale: Tensor, zero: Zero = 0.0) -> Tensor:
        """What codes stand for: `scale * (codes + shift - zero)`; else scale times their points."""
        return self._decode(codes, self.spread(scale, codes.shape), self._zero(zero, codes.shape))

    def _encode(self, x: Tensor, wide: Tensor, zero: Zero) -> Tensor:
        """`codes` for scales and zero points that broadcast against the values."""
        book = self.codebook.uniform
        if book is None:
            return self.codebook.encode(x / wide)
        codes = nearest(x / wide, book.shift)
        return codes.add_(zero).clamp_(self.low, self.high)

    def _decode(self, codes: Tensor, wide: Tensor, zero: Zero) -> Tensor:
        """`values` for scales and zero points that broadcast against the codes."""
        book = self.codebook.uniform
        if book is None:
            return self.codebook.decode(codes) * wide
        if not isinstance(zero, Tensor) and zero == 0.0:
            return points(codes, book.shift, wide)
        return points(codes + book.shift, -zero, wide)

    def project(self, x: Tensor, scale: Tensor, zero: Zero = 0.0) -> Tensor:
        """The nearest point of the grid."""
        return self.values(self.codes(x, scale, zero), scale, zero)

    def fake(self, x: Tensor, scale: Tensor, zero: Zero = 0.0) -> Tensor:
        """`project` with straight-through gradients.

        The scale gets the gradient of LSQ (Esser et al. 2020, eq. 3), scaled by 1 / sqrt(entries
        per scale * high), that of floats none.
        """
        wide, zero = self.spread(scale, x.shape), self._zero(zero, x.shape)
        if self.codebook.floats:
            return self.round_latent(x / wide.detach()) * wide.detach()
        book = self.codebook.uniform
        moving = torch.is_grad_enabled() and (x.requires_grad or scale.requires_grad)
        if book is not None and not moving:
            steps = nearest(x / wide, book.shift)
            ends: Any = self.low - zero, self.high - zero  # both numbers, or both tensors
            steps.clamp_(*ends)
            return (steps.add_(book.shift) if book.shift else steps).mul_(wide)
        if book is None and not moving:
            return self.project(x, scale)
        # There may be no entries: an expert that no token was routed to.
        share = max(1, x.numel() / scale.numel())
        gain = 1 / math.sqrt(share * max(self.high, 1))
        result: Tensor = _Fake.apply(  # type: ignore[no-untyped-call]
            x, wide, zero, self.codebook, gain
        )
        return result

    def round_latent(self, latent: Tensor) -> Tensor:
        """Codes from continuous codes; gradients pass straight through inside the range only."""
        if self.codebook.floats:
            rounded: Tensor = _RoundFloat.apply(  # type: ignore[no-untyped-call]
                latent, self.codebook
            )
            return rounded
        result: Tensor = _Round.apply(  # type: ignore[no-untyped-call]
            latent, self.low, self.high
        )
        return result

    def minmax(self, x: Tensor) -> Tensor:
        """The scale that just covers the largest magnitude; that of floats is 1."""
        if self.codebook.floats:
            return torch.ones(1, device=x.device)
        return stored(_covering(self.scales.slices(x), self.codebook.span))

    def mse(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        """The scale of least (weighted) squared error among fractions of the largest magnitude.

        weight: broadcasts against x; the diagonal of the metric, say. Layouts with zero points are
        searched by `search`.
        """
        return self.search(x, weight)[0]

    def search(self, x: Tensor, weight: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Scale, and zero point if the layout has any, of least (weighted) squared error.

        See `mse`; with zero points fractions of the range are tried. Shares of 0.15 to 1.05 are
        tried from far to near: every slice tries finer ones around its best. That takes 31 trials,
        and finds less error than 80 at equal distances. The scale of floats is 1.
        """
        if self.codebook.floats:
            return torch.ones(1, device=x.device), None
        rows = self.scales.slices(x)
        if weight is not None:
            weight = self.scales.slices(weight.expand_as(x))
            # What counts for nothing has no say in how far a grid must reach.
            rows = torch.where(weight >= DEAD * weight.amax(1, keepdim=True), rows, 0.0)
        elif rows.numel() != x.numel():
            weight = self.scales.slices(torch.ones_like(x))  # padding counts for nothing
        step = 0.9 / COARSE
        coarse = torch.tensor([1.0, *(1.05 - step * k for k in range(COARSE))], device=x.device)
        best, share = self._best(rows, weight, coarse[:, None].expand(-1, len(rows)))
        fine = torch.linspace(-step, step, FINE + 2, device=x.device)[1:-1]
        nearer, _ = self._best(rows, weight, (share + fine[:, None]).clamp_min(step))
        take = nearer[0] < best[0]
        scale, zero = (torch.where(take, b, a) for a, b in zip(best[1:], nearer[1:], strict=True))
        return scale, zero if self.scales.zeros else None

    def _best(
        self, rows: Tensor, weight: Tensor | None, shares: Tensor
    ) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
        """Least loss, its scale and its zero point of each slice, and its share; [slices] each.

        rows: [slices, n]; shares of the magnitude, or of the range, to try: [trials, slices].
        """
        if self.scales.zeros:
            low, high = rows.amin(1).clamp(max=0) * shares, rows.amax(1).clamp_min(0) * shares
            scales = stored(((high - low) / (self.levels - 1)).clamp_min(1e-12))
            zeros = (self.low - low / scales).round().clamp(self.low, self.high)
        else:
            scales = stored(stored(_covering(rows, self.codebook.span)) * shares)
            zeros = torch.zeros_like(scales)
        # As many slices, or of a long one as many trials, at once as stay in the cache.
        count, size = len(shares), max(1, rows.shape[1])
        several, some = max(1, ENTRIES // (count * size)), max(1, ENTRIES // size)
        losses = torch.empty_like(scales)
        for k in range(0, len(rows), several):
            mine = slice(k, k + several)
            own = None if weight is None else weight[mine]
            for t in range(0, count, some):
                part = slice(t, t + some), mine
                losses[part] = self._losses(rows[mine], own, scales[part], zeros[part])
        least, first = losses.min(0)
        scale, zero, share = (t.gather(0, first[None])[0] for t in (scales, zeros, shares))
        return (least, scale, zero), share

    def _losses(self, rows: Tensor, weight: Tensor | None, scales: Tensor, zeros: Tensor) -> Tensor:
        """The (weighted) squared error of each slice on each of its trials, [trials, slices]."""
        wide, zero = scales[..., None], zeros[..., None] if self.scales.zeros else 0.0
        square = self._decode(self._encode(rows, wide, zero), wide, zero).sub_(rows).square_()
        return (square if weight is None else square.mul_(weight)).sum(2)

    def refit(
        self, x: Tensor, codes: Tensor, scale: Tensor, metric: Tensor | None = None
    ) -> Tensor:
        """The least-squares scale for given codes; `scale` is kept where the codes say nothing.

        That of floats is kept, too: what it could tell is in the codes already.
        metric: None (plain), or [n, n] for x seen as rows [slices, n]: the least error in that.
        """
        if self.codebook.floats:
            return scale
        z = self.scales.slices(self.codebook.decode(codes))
        hz = z if metric is None else z @ metric
        top, bottom = (hz * self.scales.slices(x)).sum(1), (hz * z).sum(1)
        return stored(torch.where(bottom > 0, top / bottom.clamp_min(1e-30), scale))


@dataclass(frozen=True, slots=True)
class Quantised:
    """A tensor on a grid: its codes (integers, held as floats) and its scale are one value.

    zero: the zero point beside each scale, an integer code; None where the layout has none.
    """

    grid: Grid
    codes: Tensor
    scale: Tensor
    zero: Tensor | None = None

    @classmethod
    def nearest(cls, x: Tensor, grid: Grid, weight: Tensor | None = None) -> "Quantised":
        """Rounded to nearest on the scale of least (weighted) squared error."""
        scale, zero = grid.search(x, weight)
        return cls(grid, grid.codes(x, scale, 0.0 if zero is None else zero), scale, zero)

    @property
    def values(self) -> Tensor:
        """The tensor that is meant."""
        codes, zero = self.codes, self.zero
        columns = math.prod(codes.shape[1:])
        parts = self.grid.scales.parts(columns) if codes.numel() > MANY else None
        if parts is None:
            return self.grid.values(codes, self.scale, 0.0 if zero is None else zero)
        # of a large table, scales that are spread over all entries would be as many numbers again
        found = torch.empty_like(codes)
        step = max(1, MANY // columns)
        for k in range(0, len(codes), step):
            own = slice(k * parts, (k + step) * parts)
            near = 0.0 if zero is None else zero.reshape(-1)[own]
            scale = self.scale.reshape(-1)[own]
            found[k : k + step] = self.grid.values(codes[k : k + step], scale, near)
        return found


def _covering(rows: Tensor, span: float) -> Tensor:
    return rows.abs().amax(1).clamp_min(1e-12) / span


def stored(scale: Tensor) -> Tensor:
    """A scale as the file will hold it: rounded to bfloat16, never zero."""
    rounded = scale.to(torch.bfloat16).to(torch.float32)
    least = torch.full_like(rounded, 1e-30).to(torch.bfloat16).to(torch.float32)
    return torch.where(rounded == 0, least, rounded)


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, latent: Tensor, low: int, high: int) -> Any:
        ctx.save_for_backward((latent >= low - 0.5) & (latent <= high + 0.5))
        return latent.round().clamp(low, high)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (inside,) = ctx.saved_tensors
        return grad * inside, None, None


class _RoundFloat(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, latent: Tensor, book: Codebook) -> Any:
        ctx.save_for_backward(latent.abs() <= book.span)
        return book.encode(latent)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (inside,) = ctx.saved_tensors
        return grad * inside, None


class _Fake(torch.autograd.Function):
    """One fused pass forward, one backward.

    Activations are large and this runs on every step of a tuning loop.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero: Any, book: Codebook, gain: float) -> Any:
        even = book.uniform
        if even is None:
            ends = book.decode(torch.tensor([float(book.low), float(book.high)]))
            low, high, shift = float(ends[0]), float(ends[1]), 0.0
            scaled = x / scale
            steps = book.decode(book.encode(scaled))
        else:
            # Steps from zero rather than codes: codes are `steps + zero`, as ONNX's QuantizeLinear
            # defines them.
            low, high, shift = book.low - zero, book.high - zero, even.shift
            scaled = x / scale - shift
            steps = scaled.round().clamp_(low, high)
        ctx.save_for_backward(scaled, steps, scale)
        ctx.low, ctx.high, ctx.shift, ctx.gain = low, high, shift, gain
        return points(steps, shift, scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        scaled, steps, scale = ctx.saved_tensors
        inside = (scaled >= ctx.low) & (scaled <= ctx.high)
        slope = None
        if ctx.needs_input_grad[1]:
            # inside: (step - x / scale); outside: the end of the range
            slope = torch.where(inside, steps - scaled, steps + ctx.shift) * grad
            slope = slope.sum_to_size(scale.shape) * ctx.gain
        return grad * inside, slope, None, None, None
