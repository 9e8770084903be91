"""Ranks by gradient: a soft threshold on the singular values of what rounding leaves (CoRa, arXiv 2408.00923).

Layer l runs with `Q(W) + left diag(gain^2) right`, left @ right being the whole residual in order
of its singular values, and the gain a low-pass Butterworth kernel that one number, the cut-off,
moves. The weight is put together once a step and runs as one layer: the adapters' own convs, as
large as the layer's, are never run.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rabbet.data.augment import Pool
from rabbet.data.batches import outputs
from rabbet.errors import DataError, check_fields, check_least
from rabbet.layers import Site
from rabbet.model.compressed import Compressed, compressed_layers
from rabbet.model.hooks import Hook, hooked
from rabbet.train.loop import ADAM, Course, run
from rabbet.train.qat import SoftAdapter, replace_factors
from rabbet.workpiece import Norm, Workpiece

LARGEST = (
    1.0  # a multiplicative step moves the logarithm of a cut-off by at most the rate times this
)
LEAST = 0.25  # rank: a cut-off below it would never be felt again
MEMORY = 0.9  # of the gradient, for multiplicative steps
CHECKPOINT = 10


@dataclass(frozen=True)
class Ranking:
    """Settings of the search for ranks (arXiv 2408.00923, section 3)."""

    steps: int = 100
    """Batches of random calibration examples; in the paper up to 250."""
    batch: int = 64
    """Examples of a step."""
    order: int = 4
    """Of the Butterworth kernel."""
    offset: float = 0.5
    """Where the first singular value lies on the kernel's axis.

    0 (the paper's) always lets it pass; at 0.5 a layer can go without adapter.
    """
    start: float | None = None
    """The cut-off that all layers begin with, a share of the full rank; None: what the budget allows."""
    steering: Literal["multiplicative", "hinge"] = "multiplicative"
    """What keeps the budget.

    "multiplicative" stays on it, and moves cut-offs until one more byte brings the same everywhere;
    "hinge" is the paper's: Adam on loss + penalty * exp(excess), gradients clipped at 0.2.
    """
    rate: float = 0.1
    """Learning rate of either."""
    penalty: float = 1.0
    """Of "hinge"."""
    loss: Literal["teacher", "labels"] = "teacher"
    """Divergence from the float network's outputs, or the task's own loss (the paper's code)."""
    norm: Literal["frozen", "batch"] = "frozen"
    """BatchNorms at their statistics, or on those of the batch (as the paper's code leaves them)."""

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
    """Move the cut-off of every residual under a budget; the student, a network of its bases, is used up.

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
        course = _Searching(student, piece, residuals, steer, settings)
        kept = course.train(f"{key}-steps")
        piece.jobs.keep(key, kept)
    values = tuple(r.values for r in residuals.values())
    return Search(tuple(residuals), kept["cutoffs"], kept["losses"], kept["excess"], values, settings.order,
                  settings.offset)  # fmt: skip


class _Searching(Course):
    """The cut-offs of a network, moved by its steering; every layer runs as one weight, on inputs in float."""

    def __init__(
        self,
        student: nn.Module,
        piece: Workpiece,
        residuals: Mapping[str, Residual],
        steer: "_Steering",
        settings: Ranking,
    ) -> None:
        self.student, self.piece, self.steer, self.settings = student, piece, steer, settings
        self.steps = settings.steps
        self.pool = Pool.of(piece.task.read())
        self.layers = compressed_layers(student)
        for name, layer in self.layers.items():
            replace_factors(layer, [_soft(layer, residuals.get(name), settings)], [])
        self.tuned = [_cutoff(self.layers[name]) for name in residuals]
        self.groups = [{"params": self.tuned, "base": settings.rate}]
        self.seen: dict[str, list[Tensor]] = {"cutoffs": [], "losses": [], "excess": []}
        self._show()

    def train(self, key: str) -> dict[str, Tensor]:
        """Search to the end; what was seen."""
        with hooked(self._norms()):
            run(self, self.piece.jobs, key, "searching ranks", CHECKPOINT)
        return {name: torch.stack(each) for name, each in self.seen.items()}

    def _norms(self) -> list[Hook]:
        norms = self.piece.norms if self.settings.norm == "batch" else {}
        return [(self.layers[n], _renormed(norm)) for n, norm in norms.items() if n in self.layers]

    def loss(self, step: int) -> Tensor:
        """See `Course.loss`."""
        task, labels = self.piece.task, self.settings.loss == "labels"
        generator = torch.Generator().manual_seed(self.piece.seed * 1_000_003 + step)
        batch = self.pool.draw(self.settings.batch, generator, augment=not labels)
        answers = task.run(self.student, batch)
        if labels:
            loss = task.judge(self.student, answers, batch)
        else:
            with torch.no_grad():
                goal = outputs(task.run(self.piece.model, batch))
            loss = self.piece.answers.divergence(outputs(answers), goal)
        self.seen["losses"].append(loss.detach().double().cpu())
        return loss

    def update(self, adam: torch.optim.Optimizer) -> None:
        """By the steering; a layer that a forward under `torch.no_grad` keeps the gradient from has a slope of zero."""
        slopes = [torch.zeros_like(c) if c.grad is None else c.grad for c in self.tuned]
        self.seen["excess"].append(self.steer.excess)
        self.steer.step(torch.stack([slope.double().cpu() for slope in slopes]))
        self._show()

    def _show(self) -> None:
        """Give the layers the cut-offs of the steering."""
        self.seen["cutoffs"].append(self.steer.cutoffs)
        with torch.no_grad():
            for own, cutoff in zip(self.tuned, self.steer.cutoffs, strict=True):
                own.copy_(cutoff)

    def state(self) -> dict[str, Tensor]:
        """See `Course.state`."""
        seen = {f"seen.{name}": torch.stack(each) for name, each in self.seen.items()}
        return seen | {f"steer.{name}": tensor for name, tensor in self.steer.state().items()}

    def restore(self, state: dict[str, Tensor]) -> None:
        """See `Course.restore`."""
        self.seen = {name: list(state[f"seen.{name}"]) for name in self.seen}
        self.steer.restore(
            {k.removeprefix("steer."): t for k, t in state.items() if k.startswith("steer.")}
        )


def _soft(layer: Compressed, residual: Residual | None, settings: Ranking) -> SoftAdapter:
    """What a layer of one dense term runs with during the search."""
    base = layer.factors[0][0].numbers
    if residual is None:
        return SoftAdapter(base)
    gain = functools.partial(
        butterworth, full=len(residual.values), order=settings.order, offset=settings.offset
    )
    return SoftAdapter(base, (residual.left, residual.right), gain)


def _cutoff(layer: Compressed) -> Tensor:
    cutoff = cast(SoftAdapter, layer.factors[0][0]).cutoff
    assert cutoff is not None
    return cutoff


def _renormed(norm: Norm) -> Callable[[Compressed, object, Tensor], Tensor]:
    """A hook that gives a layer's output the mean and spread of a folded BatchNorm, from the batch's own."""

    def hook(layer: Compressed, _: object, out: Tensor) -> Tensor:
        moved = layer.site.channels_last(out)
        flat = moved.reshape(-1, moved.shape[-1])
        mean, spread = norm.mean.to(out.device), norm.spread.to(out.device)
        fresh = F.batch_norm(flat, None, None, spread, mean, training=True).view(moved.shape)
        return layer.site.channels_back(fresh)

    return hook


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

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps of it."""
        return {"shares": self.shares}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state`."""
        self.shares = state["shares"]

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

    def state(self) -> dict[str, Tensor]:
        """See `_Steering.state`."""
        return super().state() | ({} if self.mean is None else {"mean": self.mean})

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """See `_Steering.restore`."""
        super().restore(state)
        self.mean = state.get("mean")


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

    def state(self) -> dict[str, Tensor]:
        """See `_Steering.state`."""
        moments = {name: t.clone() for name, t in self.adam.state[self.tuned].items()}
        return super().state() | moments

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """See `_Steering.restore`."""
        super().restore(state)
        with torch.no_grad():
            self.tuned.copy_(self.shares)
        self.adam.state[self.tuned] = {name: state[name].clone() for name in ADAM}


STEERING: dict[str, type[_Steering]] = {"multiplicative": _Multiplicative, "hinge": _Hinge}


def heuristic(sites: Sequence[Site], share: float) -> list[int]:
    """CoRa-H: ranks `floor(share * min(in, out))`, one a site."""
    return [math.floor(share * min(s.shape[0], s.shape[1])) for s in sites]
