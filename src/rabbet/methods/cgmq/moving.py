"""Training while gates move the widths (CGMQ, arXiv 2409.20138).

A state is kept only after its cost was counted in whole numbers, so the budget holds whatever the
training does.
"""

import itertools
from dataclasses import replace

import torch
from torch import Tensor

from rabbet.choose.program import Option, allocate
from rabbet.core.budget import Budget
from rabbet.core.cost import Cost
from rabbet.core.plan import LayerPlan, Plan
from rabbet.methods.cgmq.course import PROBE, FixedWidths, is_image
from rabbet.methods.cgmq.entries import Entries
from rabbet.methods.cgmq.gates import Gates, Gating
from rabbet.methods.cgmq.probe import measure_sensitivity
from rabbet.methods.cgmq.settings import Settings
from rabbet.train.loop import average, run
from rabbet.workpiece import Workpiece


class MovingGates(FixedWidths):
    """Training while gates move the widths, with epochs in which they rest (arXiv 2409.20138)."""

    def __init__(
        self, method: Settings, piece: Workpiece, lines: list[LayerPlan], budget: Budget
    ) -> None:
        single = method.granularity == "weight"
        super().__init__(method, piece, lines, 2 * method.epochs, {} if single else None)
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
        stored = (piece.layer_cost(piece.survey[x.name], x) for x in self.stored)
        fixed = replace(sum(stored, Cost()), bytes=total.bytes - own)
        own_layers = list(self.layers.values())
        self.gates = (Entries if single else Gates)(
            own_layers, method.widths, budget, whole, fixed, method.fourfold
        )
        if isinstance(self.gates, Entries):
            self.gates.stored = method.counts == "stored"
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
        landed = bool(self.history) and not self.best.kept
        if not self.best.kept:  # no epoch ran, or none ended under the budget
            self.land()
            self.remember()
        self.load_weights(self.best.kept)
        self.gates.set_levels(self.best.kept["levels"])
        count = len(self.gates.names)
        history = torch.stack(self.history)
        return Gating(
            plan=self.plan,
            names=self.gates.names,
            gates=history[:, :count],
            widths=history[:, count:-2],
            shares=history[:, -2],
            losses=history[:, -1],
            landed=landed,
        )

    @property
    def detail(self) -> str:
        """See `Course.detail`."""
        gates = self.gates
        weights = " ".join(f"{x.weight.mean_bits:.3g}" for x in gates.layers)
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
        breaks a limit, 64 bytes more are reserved for it. The smallest file may not be that of the
        lowest widths: then it is the integer program that finds a plan which keeps the budget.
        """
        self.gates.land(self.method.direction)
        fixed = self.gates.fixed
        while self._is_over():
            if not any(self.gates.levels):
                self.gates.move_to(self._allocated())
                break
            self.gates.fixed = replace(self.gates.fixed, bytes=self.gates.fixed.bytes + 64)
            self.gates.land(self.method.direction)
        self.gates.fixed = fixed

    def _is_over(self) -> bool:
        if isinstance(self.gates, Entries):  # bit operations alone, which they count exactly
            return self.gates.excess() > 0
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
        values, bits = gates.shown
        row = [*values, *bits, 1 + gates.excess(), loss]
        self.history.append(torch.tensor(row, dtype=torch.float64))
        return loss

    def snapshot(self) -> dict[str, Tensor]:
        """See `FixedWidths.snapshot`."""
        return self.weights() | {"levels": torch.as_tensor(self.gates.levels, dtype=torch.long)}

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
