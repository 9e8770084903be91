"""Training at fixed widths, which training with gates begins from."""

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from rabbet.calibrate.ranges import range_ends
from rabbet.core.plan import LayerPlan, Plan
from rabbet.data.augment import Pool
from rabbet.data.batches import outputs
from rabbet.errors import DataError
from rabbet.layers import Site
from rabbet.methods.cgmq.layer import gated_layers, widest
from rabbet.methods.cgmq.settings import Settings
from rabbet.model.build import build
from rabbet.model.compressed import compressed_layers, stored_state
from rabbet.reconstruct.network import solve_lines
from rabbet.train.best import Best
from rabbet.train.loop import Course, run, shard
from rabbet.train.losses import block_names, distillation_losses
from rabbet.train.nested import NestedWeight
from rabbet.train.qat import WIDEST
from rabbet.workpiece import Workpiece

HELD = 0.1  # share of the examples that are held back to choose between epochs
KEPT_ENTRIES = 2**26  # entries of the float network's outputs on held-back examples that are kept
RATE = 1e-2  # Adam's learning rate while gates move
# Adam's learning rate after solving, divided by the root of the divergence at that start; chosen in
# docs/architecture.md.
NEAR = 0.02
EACH = "/each"  # ends the names under which the widths of entries are kept
# Held-back examples for measuring sensitivities; with 128, plans come out a tenth worse.
PROBE = 500


def is_image(position: int, site: Site) -> bool:
    """Whether a layer's input is the network's own; the indices of a table do not count."""
    return position == 0 and site.runs and not site.looks_up


def cache_key(piece: Workpiece, method: Settings, plan: str) -> str:
    """The key under which a search keeps its final weights for the fit that follows."""
    weights = {s.name: piece.weight(s) for s in piece.survey}
    return piece.key("cgmq", weights, {"method": method, "plan": plan})


class FixedWidths(Course):
    """Training at fixed widths; the epoch that is best on held-back examples is kept."""

    def __init__(
        self,
        method: Settings,
        piece: Workpiece,
        lines: list[LayerPlan],
        epochs: int,
        each: Mapping[str, Tensor] | None = None,
    ) -> None:
        """each: from the names of layers to the width of every entry; None: that of its line."""
        self.method, self.piece = method, piece
        self.blocks = block_names(piece.survey)
        axes = piece.task.examples
        train, held = axes.hold_back(piece.task.read(), HELD)
        if not train:
            raise DataError("training needs at least two examples, one of them to be held back")
        self.pool, self.held = Pool.of(train, axes), held
        self.epoch = method.steps or self.pool.draws(method.batch)
        self.steps = epochs * self.epoch
        # What is only stored has no gates and is not trained.
        self.stored = tuple(line for line in lines if not piece.survey[line.name].runs)
        lines = [line for line in lines if line not in self.stored]
        self.stored_numbers = solve_lines(piece, "storing", Plan(self.stored))
        wide = Plan((*map(widest, lines), *self.stored))
        self.student = build(piece.model, wide, piece.survey, self.stored_numbers)
        weights = {line.name: piece.weight(piece.survey[line.name]) for line in lines}
        widths = {
            WIDEST,
            *(b for b in method.widths if b < WIDEST),
            *(x.act for x in lines if x.act is not None),
        }
        ranges = range_ends(self.student, piece.task, widths, piece.seed)
        nested = () if each is None else method.widths
        gated = gated_layers(self.student, weights, ranges, nested)
        # In the order of the lines, which is that of running.
        self.layers = {line.name: gated[line.name] for line in lines}
        for line in lines:
            self.layers[line.name].weight.two = method.two
            self.layers[line.name].set_widths(line)
            weight = self.layers[line.name].weight
            if isinstance(weight, NestedWeight) and each:
                weight.each.copy_(each[line.name])
        sizes = [pair for layer in self.layers.values() for pair in layer.sizes()]
        self.groups = [{"params": [p], "base": size} for p, size in sizes]
        self.learning_rate = RATE if method.rate is None else method.rate
        self.float_outputs: dict[int, list[Tensor]] = {}
        self.best = Best()
        self.last_loss = math.nan

    def rate(self, step: int) -> float:
        """See `Course.rate`."""
        return self.learning_rate * super().rate(step)

    def losses_of(self, step: int) -> Iterator[Tensor]:
        """See `Course.losses_of`. What a user's loss makes of a part of a batch is not known."""
        task = self.piece.task
        generator = torch.Generator().manual_seed(self.piece.seed * 1_000_003 + step)
        augment = self.method.augment and task.loss is None
        batch = shard(self.pool.draw(self.method.batch, generator, augment=augment), self.pool.axes)
        self.last_loss = 0.0
        for layer in self.layers.values():
            if layer.input_range is not None:
                layer.input_range.forget()
        for loss in (
            distillation_losses(self.student, self.piece, batch, self.blocks, self.method.features)
            if task.loss is None
            else [task.judge(self.student, task.run(self.student, batch), batch)]
        ):
            self.last_loss += float(loss.detach())
            yield loss

    def _batch_loss(self, number: int, labels: bool) -> Tensor:
        """The loss on a held-back batch.

        Without labels it is the divergence from the float network, whose outputs are computed once
        if they are small enough to be kept.
        """
        task, batch = self.piece.task, self.held[number]
        result = task.run(self.student, batch)
        if labels and task.loss is not None:
            return task.judge(self.student, result, batch)
        goal = self.float_outputs.get(number)
        if goal is None:
            goal = outputs(task.run(self.piece.model, batch))
        if sum(t.numel() for t in goal) * len(self.held) <= KEPT_ENTRIES:
            self.float_outputs[number] = goal
        return self.piece.answers.divergence(outputs(result), goal)

    def held_back_loss(self, limit: float = math.inf, labels: bool = True) -> float:
        """Mean loss over held-back batches, the task's own if it has one.

        limit: examples after which no further batch is used. labels: if not, the loss is always the
        divergence from the float network. Raises DataError if the mean is not finite.
        """
        losses, count = [], 0
        with torch.no_grad():
            for number, batch in enumerate(self.held):
                losses.append(self._batch_loss(number, labels))
                count += self.piece.task.examples.count(batch)
                if count >= limit:
                    break
        mean = float(torch.stack(losses).mean())
        if not math.isfinite(mean):
            raise DataError(
                "the loss of held-back examples is not finite; check the batches and the loss"
            )
        return mean

    def weights(self) -> dict[str, Tensor]:
        """A copy of the parameters of all layers."""
        return {
            f"{name}/{part}": p.detach().clone()
            for name, gated in self.layers.items()
            for part, p in gated.layer.named_parameters()
        }

    def entries(self) -> dict[str, Tensor]:
        """The width of every entry of each weight whose entries have widths of their own."""
        weights = {name: gated.weight for name, gated in self.layers.items()}
        return {
            f"{name}{EACH}": w.each.clone()
            for name, w in weights.items()
            if isinstance(w, NestedWeight)
        }

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """The inverse of `weights`; other tensors among them are ignored."""
        with torch.no_grad():
            for name, gated in self.layers.items():
                for part, p in gated.layer.named_parameters():
                    p.copy_(weights[f"{name}/{part}"])

    def remember(self) -> float:
        """Keep the current state if it is the best so far; returns its held-back loss."""
        loss = self.held_back_loss()
        self.best.consider(loss, self.snapshot)
        return loss

    def snapshot(self) -> dict[str, Tensor]:
        """A copy of the current state, for `remember`."""
        return self.weights()

    def train_fixed(self, piece: Workpiece) -> tuple[float, float]:
        """Train, then go back to the best epoch; returns the held-back losses before and after."""
        before = self.remember()
        if self.steps:
            widths = [(x.weight.two, x.weight.bits, x.act) for x in self.layers.values()]
            inputs = self.weights() | self.entries() | stored_state(self.student)
            key = piece.key("cgmq train", inputs, {"method": self.method, "widths": widths})
            run(self, piece.jobs, key, "training", self.epoch)
            piece.histories.append(self.loss_history("training at these widths"))
        self.load_weights(self.best.kept)
        return before, self.best.score

    def after_step(self, step: int) -> None:
        """See `Course.after_step`."""
        if (step + 1) % self.epoch == 0:
            self.remember()

    def state(self) -> dict[str, Tensor]:
        """See `Course.state`."""
        return self.best.state()

    def restore(self, state: dict[str, Tensor]) -> None:
        """See `Course.restore`."""
        self.best.restore(state)

    def network(self, piece: Workpiece, plan: Plan) -> nn.Module:
        """A new network with the current weights, at the widths of a plan."""
        numbers = {name: gated.numbers(plan[name]) for name, gated in self.layers.items()}
        numbers |= self.stored_numbers
        network = build(piece.model, plan, piece.survey, numbers)
        for name, layer in compressed_layers(network).items():
            self.layers[name].copy_to(layer)
        return network
