"""Training at widths that stay, and training while gates move the widths.

A state is remembered only after its cost was counted in whole numbers, so the budget holds whatever
the training does.
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
from rabbet.data.augment import Pool, hold_back
from rabbet.data.batches import outputs, tensors
from rabbet.errors import DataError
from rabbet.layers import Site
from rabbet.methods.cgmq.gates import Gates, Gating
from rabbet.methods.cgmq.layer import gated_layers, widest
from rabbet.methods.cgmq.probe import measure_sensitivity
from rabbet.methods.cgmq.settings import Settings
from rabbet.model.build import build
from rabbet.model.compressed import compressed_layers
from rabbet.train.best import Best
from rabbet.train.loop import Course, average, run, shard
from rabbet.train.losses import block_names, distillation_loss
from rabbet.train.qat import WIDEST
from rabbet.workpiece import Workpiece

HELD = 0.1  # share of the examples that choose between epochs and are not trained on
GOALS = 2**26  # entries that the float network's answers to held-back examples may take, to be kept
RATE = 1e-2  # of Adam where gates move
# of Adam by the root of the divergence where solved layers start; chosen in docs/architecture.md
NEAR = 0.02
# held-back examples that tell how much a level is worth; with 128 plans come out a tenth worse
PROBE = 500


def is_image(place: int, site: Site) -> bool:
    """Whether a layer's input is the network's own; indices, which a table has, are no numbers to be rounded."""
    return place == 0 and not site.looks_up


def cache_key(piece: Workpiece, method: Settings, plan: str) -> str:
    """Where the weights that a search ended with are kept, for the fit that follows."""
    weights = {s.name: piece.weight(s) for s in piece.survey}
    return piece.key("cgmq", weights, {"method": method, "plan": plan})


class FixedWidths(Course):
    """Training at widths that stay: the layers, the batches, the loss, and the best state by held-back examples."""

    def __init__(
        self, method: Settings, piece: Workpiece, lines: list[LayerPlan], epochs: int
    ) -> None:
        self.method, self.piece = method, piece
        self.blocks = block_names(piece.survey)
        kept, held = hold_back(piece.task.read(), HELD)
        if not kept:
            raise DataError("training needs at least two examples, one of them to be held back")
        self.pool, self.held = Pool.of(kept), held
        self.epoch = method.steps or self.pool.draws(method.batch)
        self.steps = epochs * self.epoch
        wide = Plan(tuple(widest(line) for line in lines))
        self.student = build(piece.model, wide, piece.survey)
        weights = {line.name: piece.weight(piece.survey[line.name]) for line in lines}
        widths = {
            WIDEST,
            *(b for b in method.widths if b < WIDEST),
            *(x.act for x in lines if x.act is not None),
        }
        ranges = range_ends(self.student, piece.task, widths, piece.seed)
        gated = gated_layers(self.student, weights, ranges)
        # in the order of the lines: that of running
        self.layers = {line.name: gated[line.name] for line in lines}
        for line in lines:
            self.layers[line.name].weight.two = method.two
            self.layers[line.name].take(line)
        sizes = [pair for layer in self.layers.values() for pair in layer.sizes()]
        self.groups = [{"params": [p], "base": size} for p, size in sizes]
        self.pace = RATE if method.rate is None else method.rate
        self.goals: dict[int, list[Tensor]] = {}
        self.best = Best()
        self.now = math.nan

    def rate(self, step: int) -> float:
        """See `Course.rate`."""
        return self.pace * super().rate(step)

    def loss(self, step: int) -> Tensor:
        """See `Course.loss`."""
        task = self.piece.task
        generator = torch.Generator().manual_seed(self.piece.seed * 1_000_003 + step)
        batch = shard(
            self.pool.draw(
                self.method.batch, generator, augment=self.method.augment and task.loss is None
            )
        )
        if task.loss is None:
            loss = distillation_loss(
                self.student, self.piece, batch, self.blocks, self.method.features
            )
        else:
            loss = task.judge(self.student, task.run(self.student, batch), batch)
        if not torch.isfinite(loss):
            raise DataError(
                f"the loss of step {step + 1} is not finite; a smaller rate may help, or check the batches"
            )
        self.now = float(loss.detach())
        return loss

    def _on_held(self, place: int, labels: bool = True) -> Tensor:
        """The loss of a held-back batch; without labels what it is apart from the float network, that is asked once."""
        task, batch = self.piece.task, self.held[place]
        answers = task.run(self.student, batch)
        if labels and task.loss is not None:
            return task.judge(self.student, answers, batch)
        goal = (
            self.goals[place] if place in self.goals else outputs(task.run(self.piece.model, batch))
        )
        if sum(t.numel() for t in goal) * len(self.held) <= GOALS:
            self.goals[place] = goal
        return self.piece.answers.divergence(outputs(answers), goal)

    def judged(self, limit: float = math.inf, labels: bool = True) -> float:
        """Mean loss of held-back batches, the first of them up to a limit; or how far they are from float."""
        total, seen = [], 0
        with torch.no_grad():
            for place, batch in enumerate(self.held):
                total.append(self._on_held(place, labels))
                seen += len(tensors(batch)[0])
                if seen >= limit:
                    break
        mean = float(torch.stack(total).mean())
        if not math.isfinite(mean):
            raise DataError(
                "the loss of held-back examples is not finite; check the batches and the loss"
            )
        return mean

    def weights(self) -> dict[str, Tensor]:
        """The numbers of all layers."""
        return {
            f"{name}/{part}": p.detach().clone()
            for name, gated in self.layers.items()
            for part, p in gated.layer.named_parameters()
        }

    def take(self, kept: dict[str, Tensor]) -> None:
        """The inverse of `weights`."""
        with torch.no_grad():
            for name, gated in self.layers.items():
                for part, p in gated.layer.named_parameters():
                    p.copy_(kept[f"{name}/{part}"])

    def remember(self) -> float:
        """Keep the state if it is the best so far; its held-back loss."""
        loss = self.judged()
        self.best.consider(loss, self.snapshot)
        return loss

    def snapshot(self) -> dict[str, Tensor]:
        """What is kept of a state that may be the best."""
        return self.weights()

    def train_fixed(self, piece: Workpiece) -> tuple[float, float]:
        """Train to the end and go back to the best epoch; the held-back losses before and after."""
        before = self.remember()
        if self.steps:
            widths = [(x.weight.two, x.weight.bits, x.act) for x in self.layers.values()]
            key = piece.key("cgmq train", self.weights(), {"method": self.method, "widths": widths})
            run(self, piece.jobs, key, "training", self.epoch)
        self.take(self.best.kept)
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
        """The network as it is handed out."""
        numbers = {name: gated.numbers(plan[name]) for name, gated in self.layers.items()}
        network = build(piece.model, plan, piece.survey, numbers)
        for name, layer in compressed_layers(network).items():
            self.layers[name].hand_over(layer)
        return network


class MovingGates(FixedWidths):
    """The same with gates that move."""

    def __init__(
        self, method: Settings, piece: Workpiece, lines: list[LayerPlan], budget: Budget
    ) -> None:
        super().__init__(method, piece, lines, 2 * method.epochs)
        for k, layer in enumerate(self.layers.values()):
            count = layer.gates(method.granularity == "channel")
            layer.weight.bits = [method.widths[-1]] * count
            if layer.given is None:
                continue
            layer.given.moves = not (isinstance(method.image, int) and is_image(k, layer.site))
            layer.given.records_slope = method.direction < 3
            if layer.given.moves:
                layer.given.bits = [method.widths[-1]]
        whole = piece.float_cost
        rest = piece.cost(Plan(tuple(lines)))
        own = sum(piece.layer_cost(piece.survey[x.name], x).bytes for x in lines)
        fixed = replace(Cost(), bytes=rest.bytes - own)
        self.gates = Gates(list(self.layers.values()), method.widths, budget, whole, fixed)
        self.budget = budget
        self.over = True
        self.seen: list[
            Tensor
        ] = []  # after each epoch: gates, widths, share of the budget, held-back loss

    def rate(self, step: int) -> float:
        """See `Course.rate`."""
        return self.pace * min(1.0, (step + 1) / 10)

    @property
    def plan(self) -> Plan:
        """The widths as a plan."""
        return Plan(tuple(layer.line() for layer in self.layers.values()))

    def train(self, piece: Workpiece) -> Gating:
        """Train to the end, and go back to the best state that kept the budget."""
        if self.method.direction == 3 or self.method.start == "program":
            measure_sensitivity(
                piece, self.gates, self.weights(), lambda: self.judged(PROBE, labels=False)
            )
        if self.method.start == "program":
            self.gates.move_to(self._allocated())
        key = piece.key(
            "cgmq gates", self.weights(), {"method": self.method, "budget": str(self.budget)}
        )
        run(self, piece.jobs, key, "training with gates", self.epoch)
        if not self.seen:  # no epoch: the start, landed
            self.land()
            self.remember()
        self.take(self.best.kept)
        self.gates.set_levels(self.best.kept["levels"].tolist())
        count = len(self.gates)
        seen = torch.stack(self.seen)
        return Gating(
            self.plan,
            self.gates.names,
            seen[:, :count],
            seen[:, count:-2],
            seen[:, -2],
            seen[:, -1],
        )

    @property
    def detail(self) -> str:
        """See `Course.detail`."""
        gates = self.gates
        weights = " ".join(f"{statistics.mean(x.weight.bits):.3g}" for x in gates.layers)
        inputs = " ".join(str(s.layer.act) for s in gates.spans if s.inner)
        share = 100 * (1 + gates.excess())
        return (
            f"loss {self.now:.3g}, {share:.0f} % of the budget, weights {weights}, inputs {inputs}"
        )

    def after_step(self, step: int) -> None:
        """See `Course.after_step`."""
        epoch, place = divmod(step, self.epoch)
        moving = epoch % 2 == 0 or self.method.updates == "continuous"
        if moving:
            if place == 0:
                self.over = self.gates.excess() > 0
            self.gates.measured()
            average([self.gates.slopes])
            self.gates.move(self.method.direction, self.method.gates / self.epoch, self.over)
            self.gates.follow()
        if place + 1 < self.epoch:
            return
        if moving:
            self.land()
        self.remember()

    def land(self) -> None:
        """Bring the widths under the budget, counted on the whole file."""
        self.gates.land(self.method.direction)
        whole, fixed = self.piece.float_cost, self.gates.fixed
        while any(
            limit.broken_by(self.piece.cost(self.plan), whole) for limit in self.budget.limits
        ):
            self.gates.fixed = replace(
                self.gates.fixed, bytes=self.gates.fixed.bytes + 64
            )  # the header is padded
            self.gates.land(self.method.direction)
        self.gates.fixed = fixed

    def _allocated(self) -> list[int]:
        """The levels of least harm under the budget, weight and input of a layer chosen together."""
        harms = self.gates.harms()
        table, scores = list[list[Option]](), list[list[float]]()
        for site in self.piece.survey:
            layer, weight, given = self.layers[site.name], *harms[site.name]
            pairs = list(itertools.product(weight, given))
            lines = [layer.line([bits], act) for bits, act in pairs]
            table.append([Option(line, self.piece.layer_cost(site, line)) for line in lines])
            scores.append([weight[bits] + given[act] for bits, act in pairs])
        plan = allocate(scores, table, self.budget, self.piece.float_cost, self.piece.cost)
        return self.gates.levels_of(plan)

    def remember(self) -> float:
        """See `FixedWidths.remember`."""
        loss = super().remember()
        gates = self.gates
        bits = [float(gates.widths[k]) for k in gates.levels]
        self.seen.append(
            torch.tensor(
                [*gates.values.tolist(), *bits, 1 + gates.excess(), loss], dtype=torch.float64
            )
        )
        return loss

    def snapshot(self) -> dict[str, Tensor]:
        """See `FixedWidths.snapshot`."""
        return self.weights() | {"levels": torch.tensor(self.gates.levels, dtype=torch.long)}

    def state(self) -> dict[str, Tensor]:
        """See `Course.state`."""
        kept = super().state() | {f"gates.{k}": v for k, v in self.gates.state().items()}
        kept |= {"seen": torch.stack(self.seen)} if self.seen else {}
        return kept | {"over": torch.tensor(self.over)}

    def restore(self, state: dict[str, Tensor]) -> None:
        """See `Course.restore`."""
        super().restore(state)
        self.gates.restore(
            {k.removeprefix("gates."): v for k, v in state.items() if k.startswith("gates.")}
        )
        self.over = bool(state["over"])
        self.seen = list(state["seen"]) if "seen" in state else []
