"""Ranks by gradient: a soft threshold on the singular values of what rounding leaves (CoRa, arXiv 2408.00923).

Layer l runs with `Q(W) + left diag(gain^2) right`, left @ right being the whole residual in order
of its singular values, and the gain a low-pass Butterworth kernel that one number, the cut-off,
moves. The weight is put together once a step and runs as one layer: the adapters' own convs, as
large as the layer's, are never run.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rabbet.data.augment import Pool
from rabbet.data.batches import outputs
from rabbet.errors import DataError, check_fields, check_least
from rabbet.layers import Site
from rabbet.model.build import install
from rabbet.model.compressed import compressed_layers
from rabbet.train.losses import divergence
from rabbet.workpiece import Norm, Workpiece

LARGEST = (
    1.0  # a multiplicative step moves the logarithm of a cut-off by at most the rate times this
)
LEAST = 0.25  # rank: a cut-off below it would never be felt again
MEMORY = 0.9  # of the gradient, for multiplicative steps


@dataclass(frozen=True)
class Ranking:
    """Settings of the search.

    steps, batch: batches of random calibration examples. order: of the Butterworth kernel. offset:
    where the first singular value lies on the kernel's axis; 0 (the paper's) always lets it pass,
    0.5 lets a layer go without adapter. start: the cut-off that all layers begin with, as a share
    of the full rank; None: the one that meets the budget. steering: "multiplicative" keeps the
    search on the budget and moves cut-offs until one more byte brings the same everywhere; "hinge"
    is the paper's: Adam on loss + penalty * exp(excess), gradients clipped at 0.2. rate: of either.
    loss: the float network's outputs, or the task's own. norm: BatchNorms "frozen" at their
    statistics, or "batch", on those of the batch, as the released code leaves them.
    """

    steps: int = 100
    batch: int = 64
    order: int = 4
    offset: float = 0.5
    start: float | None = None
    steering: Literal["multiplicative", "hinge"] = "multiplicative"
    rate: float = 0.1
    penalty: float = 1.0
    loss: Literal["teacher", "labels"] = "teacher"
    norm: Literal["frozen", "batch"] = "frozen"

    def __post_init__(self) -> None:
        check_fields(self)
        check_least(self, 1, "steps", "batch", "order")


@dataclass(frozen=True)
class Residual:
    """What quantising leaves of a weight: `left @ right`, [out, full] and [full, n], the largest singular value first.

    values: [full]. prices: what the adapter of full rank costs, as a share of each limit's unit.
    """

    left: Tensor
    right: Tensor
    values: Tensor
    prices: Tensor


@dataclass(frozen=True)
class Search:
    """What a rank search saw.

    cutoffs: in ranks, before each step and after the last, [steps + 1, layers]; losses, excess:
    [steps], of the batch and of the budget (in the unit of `Residual.prices`). values: the singular
    values of each layer.
    """

    names: tuple[str, ...]
    cutoffs: Tensor
    losses: Tensor
    excess: Tensor
    values: tuple[Tensor, ...]
    order: int
    offset: float

    @property
    def ranks(self) -> dict[str, float]:
        """The cut-off of each layer that the search ended with, in ranks."""
        return dict(zip(self.names, self.cutoffs[-1].tolist(), strict=True))


def butterworth(cutoff: Tensor, full: int, order: int, offset: float = 0.0) -> Tensor:
    """Gains [full] of a low-pass kernel over the places i + offset: `1 / sqrt(1 + ((i + offset) / cutoff)^(2 order))`.

    cutoff: in places. At the cut-off the squared gain is a half.
    """
    places = torch.arange(full, dtype=cutoff.dtype, device=cutoff.device) + offset
    return (1 + (places / cutoff) ** (2 * order)).rsqrt()


def search_ranks(
    student: nn.Module,
    piece: Workpiece,
    residuals: Mapping[str, Residual],
    room: Tensor,
    settings: Ranking,
) -> Search:
    """Move the cut-off of every residual under a budget; the student, a network with its bases seated, is used up.

    room: what adapters may cost, one entry a limit, in the unit of `Residual.prices`. During the
    search inputs of layers are not quantised. Raises DataError if labels are asked for and the task
    has no loss.
    """
    if settings.loss == "labels" and piece.task.loss is None:
        raise DataError(
            "a search by labels needs Task(batches, loss=...), a function of the outputs and the batch"
        )
    fulls = torch.tensor([len(r.values) for r in residuals.values()], dtype=torch.float64)
    prices = torch.stack([r.prices for r in residuals.values()], 1)  # [limits, layers]
    steer = STEERING[settings.steering](settings, fulls, prices, room)
    given = {
        f"{n}.{part}": getattr(r, part)
        for n, r in residuals.items()
        for part in ("left", "right", "prices")
    }
    key = piece.key("search", given | {"room": room}, {"settings": settings})
    kept = piece.jobs.kept(key)
    if kept is None:
        kept = _searched(student, piece, residuals, steer, settings)
        piece.jobs.keep(key, kept)
    values = tuple(r.values for r in residuals.values())
    return Search(tuple(residuals), kept["cutoffs"], kept["losses"], kept["excess"], values, settings.order,
                  settings.offset)  # fmt: skip


def _searched(
    student: nn.Module,
    piece: Workpiece,
    residuals: Mapping[str, Residual],
    steer: "_Steering",
    settings: Ranking,
) -> dict[str, Tensor]:
    seats = compressed_layers(student)
    soft: list[_Soft] = []
    for name, seat in seats.items():
        norm = piece.norms.get(name) if settings.norm == "batch" else None
        soft_seat = _Soft(seat.site, seat.canonical, seat.bias, residuals.get(name), norm, settings)
        student = install(student, seat.site, soft_seat)
        if name in residuals:
            soft.append(soft_seat)
    soft.sort(key=lambda s: list(residuals).index(s.name))
    pool = Pool.of(piece.task.read())
    cutoffs, losses, excess = [steer.cutoffs], [], []
    for step in range(settings.steps):
        generator = torch.Generator().manual_seed(piece.seed * 1_000_003 + step)
        batch = pool.draw(settings.batch, generator, augment=settings.loss == "teacher")
        tuned = [c.clone().to(torch.float32).requires_grad_() for c in steer.cutoffs]
        for layer, cutoff in zip(soft, tuned, strict=True):
            layer.cutoff = cutoff
        loss = _loss(student, piece, batch, settings)
        if not torch.isfinite(loss):
            raise DataError(
                "the loss of the rank search is not finite; check the batches and the task's loss"
            )
        slopes = torch.stack([g.double().cpu() for g in _gradients(loss, tuned)])
        losses.append(loss.detach().double().cpu())
        excess.append(steer.excess)
        steer.step(slopes)
        cutoffs.append(steer.cutoffs)
        piece.jobs.progress("searching ranks", step + 1, settings.steps)
    return {
        "cutoffs": torch.stack(cutoffs),
        "losses": torch.stack(losses),
        "excess": torch.stack(excess),
    }


def _gradients(loss: Tensor, cutoffs: Sequence[Tensor]) -> list[Tensor]:
    """Zero for layers that a forward under `torch.no_grad` keeps the gradient from."""
    if not loss.requires_grad:
        return [torch.zeros_like(c) for c in cutoffs]
    found = torch.autograd.grad(loss, cutoffs, allow_unused=True)
    return [torch.zeros_like(c) if g is None else g for g, c in zip(found, cutoffs, strict=True)]


def _loss(student: nn.Module, piece: Workpiece, batch: object, settings: Ranking) -> Tensor:
    with torch.enable_grad():
        found = piece.task.run(student, batch)
        if settings.loss == "labels":
            return piece.task.judge(student, found, batch)
        with torch.no_grad():
            goal = outputs(piece.task.run(piece.model, batch))
        return divergence(outputs(found), goal)


class _Soft(nn.Module):
    """A layer with its base and a softly thresholded residual, put together into one weight."""

    def __init__(
        self,
        site: Site,
        base: Tensor,
        bias: Tensor | None,
        residual: Residual | None,
        norm: Norm | None,
        settings: Ranking,
    ) -> None:
        super().__init__()
        self.name, self.site, self.order, self.offset = (
            site.name,
            site,
            settings.order,
            settings.offset,
        )
        self.register_buffer("base", base.detach())
        self.register_buffer("bias", None if bias is None else bias.detach())
        for part in ("left", "right"):
            value = None if residual is None else getattr(residual, part).to(base.device)
            self.register_buffer(part, value)
        self.norm = norm
        self.cutoff: Tensor | None = None

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """What a head makes of x with this table, which has no adapter."""
        return self.site.head.run(x, self.base, bias)  # type: ignore[arg-type]

    def canonical(self) -> Tensor:
        """Base and softly thresholded residual."""
        weight: Tensor = self.base  # type: ignore[assignment]
        if self.cutoff is None:
            return weight
        left, right = self.left, self.right
        assert isinstance(left, Tensor)
        assert isinstance(right, Tensor)
        gain = butterworth(self.cutoff.to(left.device), len(right), self.order, self.offset)
        return weight + ((left * gain.square()) @ right).view(weight.shape)

    @property
    def weight(self) -> Tensor:
        """The same in the layer's own layout, for code that reads a layer's weight directly."""
        return self.site.native(self.canonical())

    def forward(self, x: Tensor) -> Tensor:
        out = self.site.run(x, self.canonical(), self.bias)  # type: ignore[arg-type]
        if self.norm is None:
            return out
        moved = self.site.channels_last(out)
        flat = moved.reshape(-1, moved.shape[-1])
        mean, spread = self.norm.mean.to(out.device), self.norm.spread.to(out.device)
        fresh = F.batch_norm(flat, None, None, spread, mean, training=True).view(moved.shape)
        return self.site.channels_back(fresh)


class _Steering:
    """Holds the cut-offs, in ranks, and moves them by the gradient of the loss."""

    def __init__(self, settings: Ranking, fulls: Tensor, prices: Tensor, room: Tensor) -> None:
        self.settings, self.fulls, self.prices, self.room = settings, fulls, prices, room
        self.shares = (
            self._on_budget(torch.ones_like(fulls))
            if settings.start is None
            else fulls * 0 + settings.start
        )

    @property
    def cutoffs(self) -> Tensor:
        """In ranks, [layers]."""
        return self.shares * self.fulls

    @property
    def excess(self) -> Tensor:
        """By how much the limit that is broken most is broken."""
        return (self.prices @ self.shares - self.room).max()

    def step(self, slopes: Tensor) -> None:
        """Take the gradient of the loss by the cut-offs in ranks, [layers]."""
        raise NotImplementedError

    def _on_budget(self, shares: Tensor) -> Tensor:
        """Shares of the full ranks in given proportions, as large as all limits allow."""
        low, high = 0.0, float(1 / shares.min().clamp_min(1e-12))
        for _ in range(60):
            middle = (low + high) / 2
            fits = bool((self.prices @ (shares * middle).clamp(max=1) <= self.room).all())
            low, high = (middle, high) if fits else (low, middle)
        return torch.minimum((shares * low).clamp_min(LEAST / self.fulls), torch.ones_like(shares))


class _Multiplicative(_Steering):
    """Cut-offs grow where a unit of the budget brings more than the mean, and shrink where less; all stay on it."""

    mean: Tensor | None = None

    def step(self, slopes: Tensor) -> None:
        gains = (-slopes * self.cutoffs).clamp_min(0)  # of the loss, by the logarithm of a cut-off
        self.mean = gains if self.mean is None else MEMORY * self.mean + (1 - MEMORY) * gains
        tightest = int((self.prices @ self.shares / self.room).argmax())
        costs = self.prices[tightest] * self.shares
        worth = (self.mean / costs) / (self.mean.sum() / costs.sum()).clamp_min(1e-30)
        move = worth.clamp_min(1e-9).log().clamp(-LARGEST, LARGEST)
        self.shares = self._on_budget(self.shares * (self.settings.rate * move).exp())


class _Hinge(_Steering):
    """Adam on the loss and `penalty * exp(relu(excess))`; gradients clipped at 0.2, shares in [1 / full, 1]."""

    def __init__(self, settings: Ranking, fulls: Tensor, prices: Tensor, room: Tensor) -> None:
        super().__init__(settings, fulls, prices, room)
        self.tuned = nn.Parameter(self.shares.clone())
        self.adam = torch.optim.Adam([self.tuned], settings.rate)

    def step(self, slopes: Tensor) -> None:
        over = (self.prices @ self.shares - self.room).clamp_min(0)
        hinge = self.settings.penalty * (self.prices * (over.exp() * (over > 0))[:, None]).sum(0)
        self.tuned.grad = (slopes * self.fulls + hinge).clamp(-0.2, 0.2)
        self.adam.step()
        with torch.no_grad():
            self.tuned.copy_(
                torch.minimum(
                    torch.maximum(self.tuned, 1 / self.fulls), torch.ones_like(self.fulls)
                )
            )
        self.shares = self.tuned.detach().clone()


STEERING: dict[str, type[_Steering]] = {"multiplicative": _Multiplicative, "hinge": _Hinge}


def heuristic(sites: Sequence[Site], share: float) -> list[int]:
    """CoRa-H: ranks `floor(share * min(in, out))`, one a site."""
    return [math.floor(share * min(s.shape[0], s.shape[1])) for s in sites]
