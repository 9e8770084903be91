"""Uniform grids: the only place that knows what a code stands for.

A grid is a set of integers, a shift, and a rule for which entries share a scale: `value = scale *
(code + shift)`. Its text is what stands after `@` in a plan:

    4      signed, -8 .. 7                      u8     unsigned, 0 .. 255
    2h     half-step (mid-rise), -3/2 .. 3/2    1      binary, -1/2 and 1/2
    t      ternary, -1, 0, 1                    4c     any of them with one scale per slice of axis 0 (`4c1`: axis 1)

Scales are stored as bfloat16, so every scale chosen here already is one; they may be negative,
which mirrors the grid: that matters where it is lopsided and short (-4 .. 3 against -3 .. 4).
"""

import math
import re
from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor

from rabbet.errors import PlanError

Kind = Literal["signed", "unsigned", "half", "ternary"]
_TEXT = re.compile(r"(?:(t)|(u?)([1-8])(h?))(?:c(\d*))?")


@dataclass(frozen=True, slots=True)
class Grid:
    """Bits, the kind of grid, and the axis whose slices have a scale each (None: one scale per tensor)."""

    bits: int
    kind: Kind = "signed"
    axis: int | None = None

    def __post_init__(self) -> None:
        if self.kind == "ternary" and self.bits != 2:
            raise PlanError(f"a ternary grid takes 2 bits of arithmetic, asked for {self.bits}")
        if not 1 <= self.bits <= 8 or (self.bits == 1 and self.kind != "half"):
            raise PlanError(
                f"a {self.kind} grid of {self.bits} bits does not exist; use 1 (binary) or 2 to 8 bits"
            )

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `4`, `4c`, `u8`, `2h`, `1`, `t` ...; raises PlanError for anything else."""
        m = _TEXT.fullmatch(text)
        if m is None:
            raise PlanError(
                f"{text!r} is not a grid; write bits and a mark, such as 4, 4c, 2hc, u8, 1c or tc"
            )
        ternary, unsigned, bits, half, axis = m.groups()
        sliced = None if axis is None else int(axis or 0)
        if ternary:
            return cls(2, "ternary", sliced)
        if unsigned and half:
            raise PlanError(f"{text!r} is both unsigned and half-step; choose one")
        kind: Kind = "unsigned" if unsigned else "half" if half or bits == "1" else "signed"
        return cls(int(bits), kind, sliced)

    def __str__(self) -> str:
        body = {
            "ternary": "t",
            "unsigned": f"u{self.bits}",
            "half": "1" if self.bits == 1 else f"{self.bits}h",
            "signed": str(self.bits),
        }[self.kind]
        return body if self.axis is None else f"{body}c{self.axis or ''}"

    @property
    def levels(self) -> int:
        """How many values an entry can take."""
        return 3 if self.kind == "ternary" else 1 << self.bits

    @property
    def low(self) -> int:
        """The smallest code."""
        return (
            -1
            if self.kind == "ternary"
            else 0
            if self.kind == "unsigned"
            else -(1 << (self.bits - 1))
        )

    @property
    def high(self) -> int:
        """The largest code."""
        return self.low + self.levels - 1

    @property
    def shift(self) -> float:
        """What is added to a code before it is scaled."""
        return 0.5 if self.kind == "half" else 0.0

    @property
    def mirrored(self) -> bool:
        """Whether -x may be nearer to the grid than x, so that both signs of the scale are worth trying."""
        return self.kind == "signed" and self.bits <= 4

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the scale of a tensor of this shape: [1], or [n] along the axis."""
        if self.axis is None:
            return (1,)
        if self.axis >= len(shape):
            raise PlanError(
                f"grid {self} has a scale per slice of axis {self.axis}; the tensor has shape {list(shape)}"
            )
        return (shape[self.axis],)

    def spread(self, scale: Tensor, ndim: int) -> Tensor:
        """A scale, reshaped so that it broadcasts against a tensor of `ndim` axes."""
        if self.axis is None:
            return scale.reshape(())
        return scale.reshape([-1 if d == self.axis else 1 for d in range(ndim)])

    def codes(self, x: Tensor, scale: Tensor, zero: Tensor | float = 0.0) -> Tensor:
        """The nearest codes, as floats: `clip(round(x / scale - shift) + zero, low, high)`."""
        return ((x / self.spread(scale, x.ndim) - self.shift).round() + zero).clamp(
            self.low, self.high
        )

    def values(self, codes: Tensor, scale: Tensor, zero: Tensor | float = 0.0) -> Tensor:
        """What codes stand for: `scale * (codes + shift - zero)`."""
        return (codes + self.shift - zero) * self.spread(scale, codes.ndim)

    def project(self, x: Tensor, scale: Tensor) -> Tensor:
        """The nearest point of the grid."""
        return self.values(self.codes(x, scale), scale)

    def fake(self, x: Tensor, scale: Tensor, zero: Tensor | float = 0.0) -> Tensor:
        """`project` with straight-through gradients.

        The scale gets the gradient of LSQ (Esser et al. 2020, eq. 3), scaled by 1 / sqrt(entries
        per scale * high).
        """
        wide = self.spread(scale, x.ndim)
        if not (torch.is_grad_enabled() and (x.requires_grad or scale.requires_grad)):
            steps = x / wide - self.shift if self.shift else x / wide
            low, high = torch.as_tensor(self.low - zero), torch.as_tensor(self.high - zero)
            steps = steps.round_().clamp_(low, high)
            return (steps.add_(self.shift) if self.shift else steps).mul_(wide)
        share = max(
            1, x.numel() / scale.numel()
        )  # there may be no entries: an expert that no place was sent to
        gain = 1 / math.sqrt(share * max(self.high, 1))
        result: Tensor = _Fake.apply(x, wide, zero, self, gain)  # type: ignore[no-untyped-call]
        return result

    def round_latent(self, latent: Tensor) -> Tensor:
        """Codes from continuous codes, with a straight-through gradient inside the range and none outside."""
        result: Tensor = _Round.apply(latent, self.low, self.high)  # type: ignore[no-untyped-call]
        return result

    def minmax(self, x: Tensor) -> Tensor:
        """The scale that just covers the largest magnitude: `2 m / (levels - 1)`, unsigned `m / (levels - 1)`."""
        reach = self._reach(x)
        return stored((reach if self.kind == "unsigned" else 2 * reach) / (self.levels - 1))

    def mse(self, x: Tensor, weight: Tensor | None = None, steps: int = 80) -> Tensor:
        """The scale of least (weighted) squared error among `steps` fractions of the largest magnitude.

        `weight` broadcasts against x: the diagonal of the metric, say.
        """
        top = self.minmax(x)
        best, least = top, self._loss(x, top, weight)
        for k in range(steps):
            scale = stored(top * (1.05 - 0.9 * k / steps))
            loss = self._loss(x, scale, weight)
            best, least = torch.where(loss < least, scale, best), torch.minimum(loss, least)
        return best

    def refit(
        self, x: Tensor, codes: Tensor, scale: Tensor, metric: Tensor | None = None
    ) -> Tensor:
        """The least-squares scale for given codes; `scale` is kept where the codes say nothing.

        `metric` is None (plain), or [n, n] for x seen as rows [slices, n]: the least error in that
        metric.
        """
        z = self._rows(codes + self.shift)
        hz = z if metric is None else z @ metric
        top, bottom = (hz * self._rows(x)).sum(1), (hz * z).sum(1)
        return stored(torch.where(bottom > 0, top / bottom.clamp_min(1e-30), scale))

    def _rows(self, x: Tensor) -> Tensor:
        return x.reshape(1, -1) if self.axis is None else x.movedim(self.axis, 0).flatten(1)

    def _reach(self, x: Tensor) -> Tensor:
        return self._rows(x).abs().amax(1).clamp_min(1e-12)

    def _loss(self, x: Tensor, scale: Tensor, weight: Tensor | None) -> Tensor:
        square = (self.project(x, scale) - x) ** 2
        return self._rows(square if weight is None else square * weight).sum(1)


@dataclass(frozen=True, slots=True)
class Quantised:
    """A tensor on a grid: its codes (floats that hold integers) and its scale are one value, and stay together."""

    grid: Grid
    codes: Tensor
    scale: Tensor

    @classmethod
    def nearest(cls, x: Tensor, grid: Grid) -> "Quantised":
        """Rounded to nearest on the scale of least squared error."""
        scale = grid.mse(x)
        return cls(grid, grid.codes(x, scale), scale)

    @property
    def values(self) -> Tensor:
        """The tensor that is meant."""
        return self.grid.values(self.codes, self.scale)


def stored(scale: Tensor) -> Tensor:
    """A scale as the file will hold it: rounded to bfloat16, never zero."""
    rounded = scale.to(torch.bfloat16).to(torch.float32)
    return torch.where(
        rounded == 0, torch.full_like(rounded, 1e-30).to(torch.bfloat16).to(torch.float32), rounded
    )


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx, latent, low, high):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN205
        ctx.save_for_backward((latent >= low - 0.5) & (latent <= high + 0.5))
        return latent.round().clamp(low, high)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN205
        (inside,) = ctx.saved_tensors
        return grad * inside, None, None


class _Fake(torch.autograd.Function):
    """One fused pass forward, one backward: activations are large and this runs on every step of a tuning loop."""

    @staticmethod
    def forward(ctx, x, scale, zero, grid, gain):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN205
        # steps from zero rather than codes: codes are `steps + zero`, as ONNX's QuantizeLinear
        # defines them
        low, high = grid.low - zero, grid.high - zero
        scaled = x / scale - grid.shift
        steps = scaled.round().clamp_(low, high)
        ctx.save_for_backward(scaled, steps, scale)
        ctx.low, ctx.high, ctx.shift, ctx.gain = low, high, grid.shift, gain
        return (steps + grid.shift) * scale

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN205
        scaled, steps, scale = ctx.saved_tensors
        inside = (scaled >= ctx.low) & (scaled <= ctx.high)
        slope = None
        if ctx.needs_input_grad[1]:
            # inside: (step - x / scale); outside: the end of the range
            slope = torch.where(inside, steps - scaled, steps + ctx.shift) * grad
            slope = slope.sum_to_size(scale.shape) * ctx.gain
        return grad * inside, slope, None, None, None
