"""Training at fixed widths, and training while gates move the widths.

A state is kept only after its cost was counted in whole numbers, so the budget holds whatever the
training does.
"""

import itertools
import math
import statistics
from dataclasses import replace

import torch
from torch import Tensor, nn

from rabbet.calibrate.ranges import range_ends
from rabbet.choose.program import Option, allocate
from rabbet.core.budget import Budget
from rabbet.core.cost import Cost
from rabbet.core.plan import LayerPlan, Plan
from rabbet.data.augment import Pool
from rabbet.data.batches import outputs
from rabbet.errors import DataError
from rabbet.layers import Site
from rabbet.methods.cgmq.gates import Gates, Gating
from rabbet.methods.cgmq.layer import gated_layers, widest
from rabbet.methods.cgmq.probe import measure_sensitivity
from rabbet.methods.cgmq.settings import Settings
from rabbet.model.build import build
from rabbet.model.compressed import compressed_layers, stored_state
from rabbet.reconstruct.network import solve_lines
from rabbet.train.best import Best
from rabbet.train.loop import Course, average, run, shard
from rabbet.train.losses import block_names, distillation_loss
from rabbet.train.qat import WIDEST
from rabbet.workpiece import Workpiece

HELD = 0.1  # share of the examples that are held back to choose between epochs
KEPT_ENTRIES = 2**26  # entries of the float network's outputs on held-back examples that are kept
RATE = 1e-2  # Adam's learning rate while gates move
# Adam's learning rate after solving, divided by the root of the divergence at that start; chosen in
# docs/architecture.md.
NEAR = 0.02
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
        self, method: Settings, piece: Workpiece, lines: list[LayerPlan], epochs: int
    ) -> None:
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
        gated = gated_layers(self.student, weights, ranges)
        # In the order of the lines, which is that of running.
        self.layers = {line.name: gated[line.name] for line in lines}
        for line in lines:
            self.layers[line.name].weight.two = method.two
            self.layers[line.name].set_widths(line)
        sizes = [pair for layer in self.layers.values() for pair in layer.sizes()]
        self.groups = [{"params": [p], "base": size} for p, size in sizes]
        self.learning_rate = RATE if method.rate is None else method.rate
        self.float_outputs: dict[int, list[Tensor]] = {}
        self.best = Best()
        self.last_loss = math.nan

    def rate(self, step: int) -> float:
        """See `Course.rate`."""
        return self.learning_rate * super().rate(step)

    def loss(self, step: int) -> Tensor:
        """See `Course.loss`."""
        task = self.piece.task
        generator = torch.Generator().manual_seed(self.piece.seed * 1_000_003 + step)
        augment = self.method.augment and task.loss is None
        batch = shard(self.pool.draw(self.method.batch, generator, augment=augment), self.pool.axes)
        if task.loss is None:
            loss = distillation_loss(
                self.student, self.piece, batch, self.blocks, self.method.features
            )
        else:
            loss = task.judge(self.student, task.run(self.student, batch), batch)
        if not torch.isfinite(loss):
            raise DataError(
                f"the loss of step {step + 1} is not finite; a smaller rate may help, "
                "or check the batches"
            )
        self.last_loss = float(loss.detach())
        return loss

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
            inputs = self.weights() | stored_state(self.student)
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


class MovingGates(FixedWidths):
    """Training while gates move the widths, with epochs in which they rest (arXiv 2409.20138)."""

    def __init__(
        self, method: Settings, piece: Workpiece, lines: list[LayerPlan], budget: Budget
    ) -> None:
        super().__init__(method, piece, lines, 2 * method.epochs)
        for k, layer in enumerate(self.layers.values()):
            count = layer.gate_count(method.granularity == "channel")
            layer.weight.bits = [method.widths[-1]] * count
            if layer.input_range is None:
                continue
            fixed_bits = isinstance(method.image, int) and is_image(k, layer.site)
            layer.input_range.moves = not fixed_bits
            layer.input_range.records_slope = method.direction < 3
            if layer.input_range.moves:
                layer.input_range.bits = [method.widths[-1]]
        whole = piece.float_cost
        total = piece.cost(Plan(tuple(lines)))
        gated = [line for line in lines if line.name in self.layers]
        own = sum(piece.layer_cost(piece.survey[x.name], x).bytes for x in gated)
        fixed = replace(Cost(), bytes=total.bytes - own)
        own_layers = list(self.layers.values())
        self.gates = Gates(own_layers, method.widths, budget, whole, fixed, method.fourfold)
        self.budget = budget
        self.over_budget = True
        # After each epoch: gates, widths, share of the budget, held-back loss.
        self.history: list[Tensor] = []

    def rate(self, step: int) -> float:
        """See `Course.rate`."""
        return self.learning_rate * min(1.0, (step + 1) / 10)

    @property
    def plan(self) -> Plan:
        """The current widths as a plan."""
        return Plan((*(layer.line() for layer in self.layers.values()), *self.stored))

    def train(self, piece: Workpiece) -> Gating:
        """Train to the end, then go back to the best state that kept the budget."""

        def loss() -> float:
            return self.held_back_loss(PROBE, labels=False)

        if self.method.direction == 3 or self.method.start == "program":
            measure_sensitivity(piece, self.gates, self.weights(), loss)
        if self.method.start == "program":
            self.gates.move_to(self._allocated())
        key = piece.key(
            "cgmq gates", self.weights(), {"method": self.method, "budget": str(self.budget)}
        )
        run(self, piece.jobs, key, "training with gates", self.epoch)
        if not self.best.kept:  # no epoch ran, or none ended under the budget
            self.land()
            self.remember()
        self.load_weights(self.best.kept)
        self.gates.set_levels(self.best.kept["levels"].tolist())
        count = len(self.gates)
        history = torch.stack(self.history)
        return Gating(
            plan=self.plan,
            names=self.gates.names,
            gates=history[:, :count],
            widths=history[:, count:-2],
            shares=history[:, -2],
            losses=history[:, -1],
        )

    @property
    def detail(self) -> str:
        """See `Course.detail`."""
        gates = self.gates
        weights = " ".join(f"{statistics.mean(x.weight.bits):.3g}" for x in gates.layers)
        inputs = " ".join(str(s.layer.act) for s in gates.spans if s.is_input)
        share = 100 * (1 + gates.excess())
        return (
            f"loss {self.last_loss:.3g}, {share:.0f} % of the budget, "
            f"weights {weights}, inputs {inputs}"
        )

    def after_step(self, step: int) -> None:
        """See `Course.after_step`."""
        epoch, in_epoch = divmod(step, self.epoch)
        moving = epoch % 2 == 0 or self.method.updates == "continuous"
        if moving:
            if in_epoch == 0:
                self.over_budget = self.gates.excess() > 0
            self.gates.update_statistics()
            average([self.gates.slopes])
            rate = self.method.gates / self.epoch
            self.gates.move(self.method.direction, rate, self.over_budget)
            self.gates.update_widths()
        if in_epoch + 1 < self.epoch:
            return
        if moving and self.method.landing == "epoch":
            self.land()
        self.remember()

    def land(self) -> None:
        """Bring the widths under the budget, as it is counted on the whole file.

        The gates count a header of fixed size, but its real size depends on the plan; while that
        breaks a limit, 64 bytes more are reserved for it.
        """
        self.gates.land(self.method.direction)
        fixed = self.gates.fixed
        while self._is_over():
            self.gates.fixed = replace(self.gates.fixed, bytes=self.gates.fixed.bytes + 64)
            self.gates.land(self.method.direction)
        self.gates.fixed = fixed

    def _is_over(self) -> bool:
        cost, whole = self.piece.cost(self.plan), self.piece.float_cost
        return any(limit.broken_by(cost, whole) for limit in self.budget.limits)

    def _allocated(self) -> list[int]:
        """The levels of least total harm under the budget, by the integer program.

        The widths of a layer's weight and input are chosen together.
        """
        harms = self.gates.harm_by_width()
        table, scores = list[list[Option]](), list[list[float]]()
        for name, layer in self.layers.items():
            site = self.piece.survey[name]
            of_weight, of_input = harms[site.name]
            pairs = list(itertools.product(of_weight, of_input))
            lines = [layer.line([bits], act) for bits, act in pairs]
            table.append([Option(line, self.piece.layer_cost(site, line)) for line in lines])
            scores.append([of_weight[bits] + of_input[act] for bits, act in pairs])
        for line in self.stored:
            site = self.piece.survey[line.name]
            table.append([Option(line, self.piece.layer_cost(site, line))])
            scores.append([0.0])
        plan = allocate(scores, table, self.budget, self.piece)
        return self.gates.levels_of(plan)

    def remember(self) -> float:
        """See `FixedWidths.remember`; a state over the budget is none to keep."""
        loss = self.held_back_loss() if self._is_over() else super().remember()
        gates = self.gates
        bits = [float(gates.widths[k]) for k in gates.levels]
        row = [*gates.values.tolist(), *bits, 1 + gates.excess(), loss]
        self.history.append(torch.tensor(row, dtype=torch.float64))
        return loss

    def snapshot(self) -> dict[str, Tensor]:
        """See `FixedWidths.snapshot`."""
        return self.weights() | {"levels": torch.tensor(self.gates.levels, dtype=torch.long)}

    def state(self) -> dict[str, Tensor]:
        """See `Course.state`."""
        kept = super().state() | {f"gates.{k}": v for k, v in self.gates.state().items()}
        kept |= {"seen": torch.stack(self.history)} if self.history else {}
        return kept | {"over": torch.tensor(self.over_budget)}

    def restore(self, state: dict[str, Tensor]) -> None:
        """See `Course.restore`."""
        super().restore(state)
        self.gates.restore(
            {k.removeprefix("gates."): v for k, v in state.items() if k.startswith("gates.")}
        )
        self.over_budget = bool(state["over"])
        self.history = list(state["seen"]) if "seen" in state else []
