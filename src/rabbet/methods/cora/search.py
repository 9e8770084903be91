"""Ranks by gradient: a soft threshold on the residual's singular values (CoRa, arXiv 2408.00923).

The residual is what rounding leaves of a weight. A layer runs with `Q(W) + left diag(gain^2)
right`, where left @ right is the whole residual in order of its singular values, and the gain is a
low-pass Butterworth kernel with one parameter, the cut-off. The weight is computed once for a pass
and runs as one layer; the adapters' own convs, as large as the layer's, are never run.
"""

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rabbet.core.history import History
from rabbet.data.augment import Pool
from rabbet.errors import DataError, PlanError, check_fields, check_least
from rabbet.layers import Site
from rabbet.model.compressed import Compressed, compressed_layers, stored_state
from rabbet.model.hooks import Hook, hooked
from rabbet.reconstruct.norms import on_batch
from rabbet.train.loop import ADAM, Course, run
from rabbet.train.losses import distillation_loss, distillation_losses
from rabbet.train.qat import SoftAdapter, replace_factors
from rabbet.workpiece import Workpiece

# A multiplicative step changes the logarithm of a cut-off by at most the learning rate times this.
LARGEST = 1.0
LEAST = 0.25  # the smallest cut-off, in ranks: below it the gradient vanishes
MEMORY = 0.9  # momentum of the gradient in multiplicative steps
CHECKPOINT = 10  # steps


@dataclass(frozen=True)
class Ranking:
    """Settings of the search for ranks (arXiv 2408.00923, section 3)."""

    steps: int = 100
    """Batches of random calibration examples; in the paper up to 250."""
    batch: int = 64
    """Examples of a step."""
    order: int = 4
    """Order of the Butterworth kernel."""
    offset: float = 0.5
    """Where the first singular value lies on the kernel's axis.

    0 (the paper's) always lets it pass; with 0.5 a layer can go without an adapter.
    """
    start: float | None = None
    """The first cut-off of all layers, a share of the full rank; None: what the budget allows."""
    steering: Literal["multiplicative", "hinge"] = "multiplicative"
    """How the search keeps the budget.

    "multiplicative" stays on it, and moves cut-offs until one more byte helps equally everywhere;
    "hinge" is the paper's: Adam on loss + penalty * exp(excess), gradients clipped at 0.2.
    """
    rate: float = 0.1
    """Learning rate of either."""
    penalty: float = 1.0
    """Weight of the excess with "hinge"."""
    loss: Literal["teacher", "labels"] = "teacher"
    """Divergence from the float network's outputs, or the task's own loss (the paper's code)."""
    norm: Literal["frozen", "batch"] = "frozen"
    """BatchNorms use their own statistics, or those of the batch (as in the paper's code)."""

    def __post_init__(self) -> None:
        check_fields(self)
        check_least(self, 1, "steps", "batch", "order")
        check_least(self, 0, "offset", "rate", "penalty")
        if self.start is not None and self.start <= 0:
            raise PlanError(f"start is a share of the full rank above 0; found {self.start}")


@dataclass(frozen=True)
class Residual:
    """The rounding residual of a weight, `left @ right`, the largest singular value first.

    left, right: [out, full] and [full, n]. values: the singular values, [full]. prices: the cost of
    the adapter of full rank by each limit, in that limit's unit, [limits].
    """

    left: Tensor
    right: Tensor
    values: Tensor
    prices: Tensor


@dataclass(frozen=True)
class Search:
    """The history of a rank search.

    cutoffs: in ranks, before each step and after the last, [steps + 1, layers]. losses: of each
    step's batch, [steps]. excess: over the budget, in the unit of `Residual.prices`, [steps].
    values: the singular values of each layer.
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
        """The final cut-off of each layer, in ranks."""
        return dict(zip(self.names, self.cutoffs[-1].tolist(), strict=True))

    @property
    def histories(self) -> tuple[History, ...]:
        """The cut-offs of all layers, and the loss, for a report."""
        ranks = dict(zip(self.names, map(tuple, self.cutoffs.T.tolist()), strict=True))
        losses = {"": tuple(self.losses.tolist())}
        return (
            History("search for ranks", "step", "cut-off of each layer, in ranks", ranks, 0),
            History("search for ranks", "step", "loss of the step's batch", losses),
        )


def butterworth(cutoff: Tensor, full: int, order: int, offset: float = 0.0) -> Tensor:
    """Gains [full] of a low-pass kernel: `1 / sqrt(1 + ((i + offset) / cutoff)^(2 order))`.

    cutoff: a scalar, in ranks. At the cut-off the squared gain is a half. In logarithms: the power
    itself overflows float32 at order 8.
    """
    positions = torch.arange(full, dtype=cutoff.dtype, device=cutoff.device) + offset
    return (-F.softplus(2 * order * (positions.log() - cutoff.log())) / 2).exp()


def search_ranks(
    student: nn.Module,
    piece: Workpiece,
    residuals: Mapping[str, Residual],
    room: Tensor,
    settings: Ranking,
) -> Search:
    """Find the cut-off of every residual under a budget.

    student: a network without adapters; it is changed and of no further use. room: what adapters
    may cost by each limit, in the unit of `Residual.prices`, [limits]. Inputs of layers are not
    quantised during the search. Raises DataError if labels are asked for and the task has no loss.
    """
    if settings.loss == "labels" and piece.task.loss is None:
        raise DataError(
            "a search by labels needs Task(batches, loss=...), a function of the outputs and the "
            "batch (on the command line --data names a function that returns it); Ranking(loss="
            '"teacher") needs none'
        )
    fulls = torch.tensor([len(r.values) for r in residuals.values()], dtype=torch.float64)
    prices = torch.stack([r.prices for r in residuals.values()], 1)  # [limits, layers]
    steering = STEERING[settings.steering](settings, fulls, prices, room)
    inputs = {
        f"{n}.{part}": getattr(r, part)
        for n, r in residuals.items()
        for part in ("left", "right", "prices")
    }
    inputs |= {"room": room} | stored_state(student)
    key = piece.key("search", inputs, {"settings": settings})
    history = piece.jobs.kept(key)
    if history is None:
        course = _RankSearch(student, piece, residuals, steering, settings)
        history = course.train(f"{key}-steps")
        piece.jobs.keep(key, history)
    return Search(
        names=tuple(residuals),
        cutoffs=history["cutoffs"],
        losses=history["losses"],
        excess=history["excess"],
        values=tuple(r.values.cpu() for r in residuals.values()),
        order=settings.order,
        offset=settings.offset,
    )


class _RankSearch(Course):
    """Trains the cut-offs of all residuals; every layer runs as one weight, on float inputs."""

    def __init__(
        self,
        student: nn.Module,
        piece: Workpiece,
        residuals: Mapping[str, Residual],
        steering: "_Steering",
        settings: Ranking,
    ) -> None:
        self.student, self.piece, self.steering, self.settings = student, piece, steering, settings
        self.steps = settings.steps
        self.pool = Pool.of(piece.task.read(), piece.task.examples)
        self.layers = compressed_layers(student)
        for name, layer in self.layers.items():
            replace_factors(layer, [_soft(layer, residuals.get(name), settings)], [])
        self.cutoffs = [_cutoff(self.layers[name]) for name in residuals]
        self.groups = [{"params": self.cutoffs, "base": settings.rate}]
        self.history: dict[str, list[Tensor]] = {"cutoffs": [], "losses": [], "excess": []}
        self._copy_cutoffs()

    def train(self, key: str) -> dict[str, Tensor]:
        """Search to the end; returns the history, see `Search`."""
        with hooked(self._norms()):
            run(self, self.piece.jobs, key, "searching ranks", CHECKPOINT)
        return {name: torch.stack(each) for name, each in self.history.items()}

    def _norms(self) -> list[Hook]:
        """Hooks that run BatchNorms on the statistics of the batch, if the settings say so."""
        norms = self.piece.norms if self.settings.norm == "batch" else {}
        return [(self.layers[n], on_batch(norm)) for n, norm in norms.items() if n in self.layers]

    def losses_of(self, step: int) -> Iterator[Tensor]:
        """See `Course.losses_of`. Statistics of a batch, and a user's loss, are of all of it."""
        piece, student, labels = self.piece, self.student, self.settings.loss == "labels"
        generator = torch.Generator().manual_seed(piece.seed * 1_000_003 + step)
        batch = self.pool.draw(self.settings.batch, generator, augment=not labels)
        if labels:
            loss = piece.task.judge(student, piece.task.run(student, batch), batch)
            if not loss.requires_grad:
                raise DataError(
                    "no gradient comes through the loss: it is cut off from the outputs, or the "
                    "network runs under torch.no_grad; a search by labels needs one"
                )
            losses = iter([loss])
        elif self.settings.norm == "batch":
            losses = iter([distillation_loss(student, piece, batch)])
        else:
            losses = distillation_losses(student, piece, batch)
        self.history["losses"].append(torch.zeros((), dtype=torch.float64))
        for loss in losses:
            self.history["losses"][-1] += loss.detach().double().cpu()
            yield loss

    def update(self, adam: torch.optim.Optimizer) -> None:
        """Move the cut-offs by the steering, not by Adam.

        A layer that runs under `torch.no_grad` has no gradient, which counts as zero.
        """
        slopes = [torch.zeros_like(c) if c.grad is None else c.grad for c in self.cutoffs]
        self.history["excess"].append(self.steering.excess)
        self.steering.step(torch.stack([slope.double().cpu() for slope in slopes]))
        self._copy_cutoffs()

    def _copy_cutoffs(self) -> None:
        """Copy the cut-offs of the steering to the layers, and record them."""
        self.history["cutoffs"].append(self.steering.cutoffs)
        with torch.no_grad():
            for own, cutoff in zip(self.cutoffs, self.steering.cutoffs, strict=True):
                own.copy_(cutoff)

    def state(self) -> dict[str, Tensor]:
        """See `Course.state`."""
        history = {f"seen.{name}": torch.stack(each) for name, each in self.history.items()}
        return history | {f"steer.{name}": t for name, t in self.steering.state().items()}

    def restore(self, state: dict[str, Tensor]) -> None:
        """See `Course.restore`."""
        self.history = {name: list(state[f"seen.{name}"]) for name in self.history}
        self.steering.restore(
            {k.removeprefix("steer."): t for k, t in state.items() if k.startswith("steer.")}
        )


def _soft(layer: Compressed, residual: Residual | None, settings: Ranking) -> SoftAdapter:
    """The factor that takes the place of a layer's dense weight during the search."""
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


class _Steering:
    """Holds the cut-offs and moves them by the gradient of the loss.

    fulls: the full ranks, [layers]. prices: [limits, layers], see `Residual`. room: [limits].
    shares: the cut-offs as shares of the full ranks, [layers].
    """

    def __init__(self, settings: Ranking, fulls: Tensor, prices: Tensor, room: Tensor) -> None:
        self.settings, self.fulls, self.prices, self.room = settings, fulls, prices, room
        if settings.start is None:
            self.shares = self._on_budget(torch.ones_like(fulls))
        else:
            self.shares = fulls * 0 + settings.start

    @property
    def cutoffs(self) -> Tensor:
        """The cut-offs in ranks, [layers]."""
        return self.shares * self.fulls

    @property
    def excess(self) -> Tensor:
        """The amount above the limit that is broken most; negative if all are kept."""
        return (self.prices @ self.shares - self.room).max()

    def step(self, slopes: Tensor) -> None:
        """Move the cut-offs; slopes: the gradient of the loss by `cutoffs`, [layers]."""
        raise NotImplementedError

    def state(self) -> dict[str, Tensor]:
        """The tensors of a checkpoint."""
        return {"shares": self.shares}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state`."""
        self.shares = state["shares"]

    def _on_budget(self, shares: Tensor) -> Tensor:
        """Shares scaled to the largest that all limits allow, each at least `LEAST` ranks."""
        low, high = 0.0, float(1 / shares.min().clamp_min(1e-12))
        for _ in range(60):
            middle = (low + high) / 2
            fits = bool((self.prices @ (shares * middle).clamp(max=1) <= self.room).all())
            low, high = (middle, high) if fits else (low, middle)
        return torch.minimum((shares * low).clamp_min(LEAST / self.fulls), torch.ones_like(shares))


class _Multiplicative(_Steering):
    """Cut-offs stay on the budget, and move towards equal gain per unit of it.

    They grow where a unit of the budget brings more than on average, and shrink where it brings
    less. mean: the running mean of the gains, [layers].
    """

    mean: Tensor | None = None

    def step(self, slopes: Tensor) -> None:
        # The decrease of the loss by the logarithm of each cut-off.
        gains = (-slopes * self.cutoffs).clamp_min(0)
        self.mean = gains if self.mean is None else MEMORY * self.mean + (1 - MEMORY) * gains
        tightest = int((self.prices @ self.shares / self.room).argmax())
        costs = self.prices[tightest] * self.shares
        worth = (self.mean / costs) / (self.mean.sum() / costs.sum()).clamp_min(1e-30)
        change = worth.clamp_min(1e-9).log().clamp(-LARGEST, LARGEST)
        self.shares = self._on_budget(self.shares * (self.settings.rate * change).exp())

    def state(self) -> dict[str, Tensor]:
        """See `_Steering.state`."""
        return super().state() | ({} if self.mean is None else {"mean": self.mean})

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """See `_Steering.restore`."""
        super().restore(state)
        self.mean = state.get("mean")


class _Hinge(_Steering):
    """The paper's: Adam on the loss plus `penalty * exp(relu(excess))`.

    Gradients are clipped at 0.2, shares to [1 / full, 1].
    """

    def __init__(self, settings: Ranking, fulls: Tensor, prices: Tensor, room: Tensor) -> None:
        super().__init__(settings, fulls, prices, room)
        self.parameter = nn.Parameter(self.shares.clone())
        self.adam = torch.optim.Adam([self.parameter], settings.rate)

    def step(self, slopes: Tensor) -> None:
        over = (self.prices @ self.shares - self.room).clamp_min(0)
        hinge = self.settings.penalty * (self.prices * (over.exp() * (over > 0))[:, None]).sum(0)
        self.parameter.grad = (slopes * self.fulls + hinge).clamp(-0.2, 0.2)
        self.adam.step()
        with torch.no_grad():
            raised = torch.maximum(self.parameter, 1 / self.fulls)
            self.parameter.copy_(torch.minimum(raised, torch.ones_like(self.fulls)))
        self.shares = self.parameter.detach().clone()

    def state(self) -> dict[str, Tensor]:
        """See `_Steering.state`."""
        moments = {name: t.clone() for name, t in self.adam.state[self.parameter].items()}
        return super().state() | moments

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """See `_Steering.restore`."""
        super().restore(state)
        with torch.no_grad():
            self.parameter.copy_(self.shares)
        self.adam.state[self.parameter] = {name: state[name].clone() for name in ADAM}


STEERING: dict[str, type[_Steering]] = {"multiplicative": _Multiplicative, "hinge": _Hinge}


def heuristic(sites: Sequence[Site], share: float) -> list[int]:
    """The ranks of CoRa-H, `floor(share * min(in, out))`, one for each site."""
    return [math.floor(share * min(s.shape[0], s.shape[1])) for s in sites]
