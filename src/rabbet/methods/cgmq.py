"""CGMQ: bit-widths of weights and inputs that train themselves under a constraint (arXiv 2409.20138).

Epochs in which gates move alternate with epochs in which they rest; weights, biases and ranges train in both. A state
is handed on only after its cost was counted in whole numbers, so the budget holds whatever the training does. Where the
integer program puts the gates, from what each width does to the output, they need not move (docs/architecture.md).
"""

import itertools
import math
import statistics
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from rabbet.allocate import Option, allocate, require_feasible
from rabbet.augment import Pool, split
from rabbet.calibrate import range_ends
from rabbet.cost import Budget, Cost
from rabbet.errors import BudgetError, DataError, PlanError, check_fields, check_least
from rabbet.gates import Gates, Gating
from rabbet.grid import Grid
from rabbet.layer import build, compressed_layers, validate
from rabbet.loop import Course, average, run, shared
from rabbet.methods.base import Fitted
from rabbet.methods.joint import solved
from rabbet.methods.rises import measure_rises
from rabbet.plan import LayerPlan, Plan, Term
from rabbet.seat import WIDEST, seatable, seated, widest
from rabbet.site import Site
from rabbet.task import divergence, outputs, tensors
from rabbet.train import block_names, taught
from rabbet.workpiece import Workpiece

HELD = 0.1  # share of the examples that choose between epochs and are not trained on
GOALS = 2**26  # entries that the float network's answers to held-back examples may take, to be kept
RATE = 1e-2  # of Adam where gates move
NEAR = 0.02  # of Adam by the root of the divergence where solved layers start; chosen in docs/architecture.md
PROBE = 500  # held-back examples that tell how much a level is worth; with 128 plans come out a tenth worse


@dataclass(frozen=True)
class CGMQ:
    """Gates under a budget, usually `bops`.

    start: of the gates, where the integer "program" puts them by what each width does to the output, or at the "widest"
    (the paper's). epochs: pairs of an epoch with moving gates and one without; updates "continuous" moves them in both.
    direction: how fast a gate moves, by 1 the gradient of its tensor, 2 gradient and size, 3 what the output loses for
    what is saved. gates: how far one of mean speed moves in an epoch, in widths. finish: epochs after the choice, with
    widths fixed. steps: of an epoch, None for as many as all examples take. batch: examples of a step; batches that
    differ in more than their number of examples are taken as they are.

    widths: that a gate can choose; 16 and 32 run in float and are handed out at 8. granularity: a weight has one gate
    ("layer"), or one for each output ("channel", which needs epochs; layers with groups keep one). image: bits of the
    first layer's input, "gate" to let it choose, None for float. scales: one per tensor (the paper's) or output
    channel. two: the grid at 2 bits, "half" or the paper's "ternary". rate: Adam's, relative to the mean magnitude of
    what it moves; None: 0.01 where gates move, else the less, the nearer solved layers are to the float network. Trains
    on the task's loss if it has one, else on the float network's outputs and `features` times the error of its blocks',
    images augmented if `augment`.

    As in the paper: `CGMQ(start="widest", epochs=6, finish=6, direction=1, widths=(2, 4, 8, 16, 32), scales="tensor",
    two="ternary")`.
    """

    start: Literal["widest", "program"] = "program"
    epochs: int = 0
    updates: Literal["alternating", "continuous"] = "alternating"
    direction: Literal[1, 2, 3] = 3
    gates: float = 1.0
    finish: int = 18
    steps: int | None = None
    widths: tuple[int, ...] = (2, 3, 4, 5, 6, 7, 8)
    granularity: Literal["layer", "channel"] = "layer"
    image: int | Literal["gate"] | None = "gate"
    scales: Literal["tensor", "channel"] = "channel"
    two: Literal["half", "ternary"] = "half"
    batch: int = 128
    rate: float | None = None
    features: float = 2.0
    augment: bool = True

    def __post_init__(self) -> None:
        check_fields(self)
        check_least(self, 0, "epochs", "finish", "features", "gates", "rate")
        check_least(self, 1, "steps", "batch")
        if not self.widths or sorted(set(self.widths)) != list(self.widths):
            raise PlanError(f"widths are different numbers of bits in rising order; found {self.widths}")
        for bits in self.widths:
            if bits not in (16, 32):
                Grid(bits)
        if self.widths[0] > WIDEST:
            raise PlanError(f"the smallest width must be one that a file holds, 2 to 8 bits; found {self.widths[0]}")
        if isinstance(self.image, int):
            Grid(self.image, "unsigned")
        if self.granularity == "channel" and not self.epochs:
            raise PlanError(
                "gates of channels learn which outputs matter: granularity='channel' needs epochs of theirs"
            )

    def plan(self, piece: Workpiece, budget: Budget) -> Plan:
        """Train with gates; the plan of the best state met that keeps the budget. See `Method.plan`."""
        return self.search(piece, budget).plan

    def search(self, piece: Workpiece, budget: Budget) -> Gating:
        """The same, with what was seen on the way; `rabbet.report.draw_gates` draws it."""
        lines = [self._line(k, site) for k, site in enumerate(piece.survey)]
        if self.granularity == "channel" and any(limit.metric == "latency" for limit in budget.limits):
            raise BudgetError("outputs of several widths run apart, and take longer: a latency needs gates of layers")
        self._require(piece, budget, lines)
        course = _Gated(self, piece, lines, budget)
        found = course.train(piece)
        if self.epochs:
            piece.engine.keep(_key(piece, self, found.plan.compact), course.weights())
        return found

    def fit(self, piece: Workpiece, plan: Plan) -> Fitted:
        """Train at the plan's widths, from where gates that moved ended with it, else solved in order; see `Method`."""
        validate(plan, piece.survey)
        other = next((x for x in plan if not seatable(piece.survey[x.name], x)), None)
        if other is not None:
            raise PlanError(f"CGMQ trains dense weights, every output on one signed grid; {other} is not one")
        course = _Course(self, piece, [plan[s.name] for s in piece.survey if plan.get(s.name)], self.finish)
        kept = piece.engine.kept(_key(piece, self, plan.compact))
        if kept is not None:
            course.take(kept)
        else:
            for name, layer in compressed_layers(solved(piece, plan)).items():
                course.seats[name].adopt(layer)
            if self.rate is None:
                course.pace = NEAR * math.sqrt(max(0.0, course.judged(PROBE, labels=False)))
        before, after = course.train_fixed(piece)
        return Fitted(course.network(piece, plan), (f"trained {course.walked} at these widths: held-back loss "
                                                    f"{before:.4g} -> {after:.4g}",))  # fmt: skip

    def _line(self, place: int, site: Site) -> LayerPlan:
        """A layer at the widest that a file holds: what a gate starts with."""
        own = self.image if _is_image(place, site) else "gate"
        act = None if not site.multiplies else WIDEST if isinstance(own, str) else own
        return LayerPlan(site.name, (Term("dense", self._grid(WIDEST)),), act)

    def _grid(self, bits: int) -> Grid:
        kind = self.two if bits == 2 else "signed"
        return Grid(bits, kind, 0 if self.scales == "channel" else None)

    def _require(self, piece: Workpiece, budget: Budget, lines: list[LayerPlan]) -> None:
        """Refuse a budget below the smallest widths at once."""
        stored = [b for b in self.widths if b <= WIDEST]
        table = []
        for k, line in enumerate(lines):
            fixed = self.image != "gate" and _is_image(k, piece.survey[line.name])
            acts = [line.act] if line.act is None or fixed else stored
            plans = [
                LayerPlan(line.name, (Term("dense", self._grid(b)),), a) for b, a in itertools.product(stored, acts)
            ]
            table.append([Option(p, piece.layer_cost(piece.survey[line.name], p)) for p in plans])
        require_feasible(table, budget, piece.float_cost, piece.cost)


def _is_image(place: int, site: Site) -> bool:
    """Whether a layer's input is the network's own; indices, which a table has, are no numbers to be rounded."""
    return place == 0 and site.kind != "embedding"


def _key(piece: Workpiece, method: CGMQ, plan: str) -> str:
    weights = {s.name: piece.weight(s) for s in piece.survey}
    return piece.key("cgmq", weights, {"method": method, "plan": plan})


class _Course(Course):
    """Training at widths that stay: the seats, the batches, the loss, and the best state by held-back examples."""

    def __init__(self, method: CGMQ, piece: Workpiece, lines: list[LayerPlan], epochs: int) -> None:
        self.method, self.piece = method, piece
        self.blocks = block_names(piece.survey)
        kept, held = split(piece.task.read(), HELD)
        if not kept:
            raise DataError("training needs at least two examples, one of them to be held back")
        self.pool, self.held = Pool.of(kept), held
        self.epoch = method.steps or self.pool.draws(method.batch)
        self.steps = epochs * self.epoch
        student = build(piece.model, Plan(tuple(widest(line) for line in lines)), piece.survey)
        weights = {line.name: piece.weight(piece.survey[line.name]) for line in lines}
        widths = {WIDEST, *(b for b in method.widths if b < WIDEST), *(x.act for x in lines if x.act is not None)}
        self.student, seats = seated(student, weights, range_ends(student, piece.task, widths, piece.seed))
        self.seats = {line.name: seats[line.name] for line in lines}  # in the order of the lines: that of running
        for line in lines:
            self.seats[line.name].two = method.two
            self.seats[line.name].take(line)
        sizes = [pair for seat in self.seats.values() for pair in seat.sizes()]
        self.groups = [{"params": [p], "base": size} for p, size in sizes]
        self.pace = RATE if method.rate is None else method.rate
        self.goals: dict[int, list[Tensor]] = {}
        self.best: dict[str, Tensor] = {}
        self.least = torch.tensor(math.inf)
        self.now = math.nan

    def rate(self, step: int) -> float:
        return self.pace * super().rate(step)

    def loss(self, step: int) -> Tensor:
        task = self.piece.task
        generator = torch.Generator().manual_seed(self.piece.seed * 1_000_003 + step)
        batch = shared(self.pool.draw(self.method.batch, generator, augment=self.method.augment and task.loss is None))
        if task.loss is None:
            found = taught(self.student, self.piece.model, task, batch, self.blocks, self.method.features)
        else:
            found = task.judge(self.student, task.run(self.student, batch), batch)
        if not torch.isfinite(found):
            raise DataError(f"the loss of step {step + 1} is not finite; a smaller rate may help, or check the batches")
        self.now = float(found.detach())
        return found

    def _on_held(self, place: int, labels: bool = True) -> Tensor:
        """The loss of a held-back batch; without labels what it is apart from the float network, that is asked once."""
        task, batch = self.piece.task, self.held[place]
        found = task.run(self.student, batch)
        if labels and task.loss is not None:
            return task.judge(self.student, found, batch)
        goal = self.goals[place] if place in self.goals else outputs(task.run(self.piece.model, batch))
        if sum(t.numel() for t in goal) * len(self.held) <= GOALS:
            self.goals[place] = goal
        return divergence(outputs(found), goal)

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
            raise DataError("the loss of held-back examples is not finite; check the batches and the loss")
        return mean

    def weights(self) -> dict[str, Tensor]:
        """The numbers of all seats."""
        return {f"{n}/{k}": p.detach().clone() for n, s in self.seats.items() for k, p in s.named_parameters()}

    def take(self, kept: dict[str, Tensor]) -> None:
        """The inverse of `weights`."""
        with torch.no_grad():
            for name, seat in self.seats.items():
                for part, p in seat.named_parameters():
                    p.copy_(kept[f"{name}/{part}"])

    def remember(self) -> float:
        """Keep the state if it is the best so far; its held-back loss."""
        found = self.judged()
        if found < float(self.least):
            self.least, self.best = torch.tensor(found), self.weights()
        return found

    def train_fixed(self, piece: Workpiece) -> tuple[float, float]:
        """Train to the end and go back to the best epoch; the held-back losses before and after."""
        self.remember()
        before = float(self.least)
        if self.steps:
            widths = [(s.two, s.bits, s.act) for s in self.seats.values()]
            key = piece.key("cgmq train", self.weights(), {"method": self.method, "widths": widths})
            run(self, piece.engine, key, "training", self.epoch)
        self.take(self.best)
        return before, float(self.least)

    def stepped(self, step: int) -> None:
        if (step + 1) % self.epoch == 0:
            self.remember()

    def state(self) -> dict[str, Tensor]:
        return {"least": self.least} | {f"best.{k}": v for k, v in self.best.items()}

    def restore(self, state: dict[str, Tensor]) -> None:
        self.least = state["least"]
        self.best = {k.removeprefix("best."): v for k, v in state.items() if k.startswith("best.")}

    def network(self, piece: Workpiece, plan: Plan) -> nn.Module:
        """The network as it is handed out."""
        numbers = {name: seat.numbers(plan[name]) for name, seat in self.seats.items()}
        found = build(piece.model, plan, piece.survey, numbers)
        for name, layer in compressed_layers(found).items():
            self.seats[name].hand_over(layer)
        return found


class _Gated(_Course):
    """The same with gates that move."""

    def __init__(self, method: CGMQ, piece: Workpiece, lines: list[LayerPlan], budget: Budget) -> None:
        super().__init__(method, piece, lines, 2 * method.epochs)
        for k, seat in enumerate(self.seats.values()):
            seat.bits = [method.widths[-1]] * seat.gated(method.granularity == "channel")
            if seat.high is not None and not (isinstance(method.image, int) and _is_image(k, seat.site)):
                seat.act = method.widths[-1]
            else:
                seat.fixed = seat.act
            seat.watched = method.direction < 3
        whole = piece.float_cost
        rest = piece.cost(Plan(tuple(lines)))
        own = sum(piece.layer_cost(piece.survey[x.name], x).bytes for x in lines)
        fixed = replace(Cost(), bytes=rest.bytes - own)
        self.gates = Gates(list(self.seats.values()), method.widths, budget, whole, fixed)
        self.budget = budget
        self.over = True
        self.levels: list[int] = []
        self.seen: list[Tensor] = []  # after each epoch: gates, widths, share of the budget, held-back loss

    def rate(self, step: int) -> float:
        return self.pace * min(1.0, (step + 1) / 10)

    @property
    def plan(self) -> Plan:
        """The widths as a plan."""
        return Plan(tuple(seat.line() for seat in self.seats.values()))

    def train(self, piece: Workpiece) -> Gating:
        """Train to the end, and go back to the best state that kept the budget."""
        if self.method.direction == 3 or self.method.start == "program":
            measure_rises(piece, self.gates, self.weights(), lambda: self.judged(PROBE, labels=False))
        if self.method.start == "program":
            self.gates.move_to(self._allocated())
        key = piece.key("cgmq gates", self.weights(), {"method": self.method, "budget": str(self.budget)})
        run(self, piece.engine, key, "training with gates", self.epoch)
        if not self.seen:  # no epoch: the start, landed
            self.land()
            self.remember()
        self.take(self.best)
        self.gates.set_levels(self.levels)
        count = len(self.gates)
        seen = torch.stack(self.seen)
        return Gating(self.plan, self.gates.names, seen[:, :count], seen[:, count:-2], seen[:, -2], seen[:, -1])

    @property
    def detail(self) -> str:
        gates = self.gates
        weights = " ".join(f"{statistics.mean(s.bits):.3g}" for s in gates.seats)
        inputs = " ".join(str(s.seat.act) for s in gates.spans if s.inner)
        share = 100 * (1 + gates.excess())
        return f"loss {self.now:.3g}, {share:.0f} % of the budget, weights {weights}, inputs {inputs}"

    def stepped(self, step: int) -> None:
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
        while any(limit.broken_by(self.piece.cost(self.plan), whole) for limit in self.budget.limits):
            self.gates.fixed = replace(self.gates.fixed, bytes=self.gates.fixed.bytes + 64)  # the header is padded
            self.gates.land(self.method.direction)
        self.gates.fixed = fixed

    def _allocated(self) -> list[int]:
        """The levels of least rise of the loss under the budget, weight and input of a layer chosen together."""
        harms = self.gates.harms()
        table, scores = list[list[Option]](), list[list[float]]()
        for site in self.piece.survey:
            seat, weight, given = self.seats[site.name], *harms[site.name]
            pairs = list(itertools.product(weight, given))
            lines = [seat.line([bits], act) for bits, act in pairs]
            table.append([Option(line, self.piece.layer_cost(site, line)) for line in lines])
            scores.append([weight[bits] + given[act] for bits, act in pairs])
        found = allocate(scores, table, self.budget, self.piece.float_cost, self.piece.cost)
        return self.gates.levels_of(found)

    def remember(self) -> float:
        least = float(self.least)
        found = super().remember()
        if float(self.least) < least:
            self.levels = self.gates.levels
        gates = self.gates
        bits = [float(gates.widths[k]) for k in gates.levels]
        self.seen.append(torch.tensor([*gates.values.tolist(), *bits, 1 + gates.excess(), found], dtype=torch.float64))
        return found

    def state(self) -> dict[str, Tensor]:
        kept = super().state() | {f"gates.{k}": v for k, v in self.gates.state().items()}
        kept |= {"seen": torch.stack(self.seen)} if self.seen else {}
        return kept | {"over": torch.tensor(self.over), "levels": torch.tensor(self.levels, dtype=torch.long)}

    def restore(self, state: dict[str, Tensor]) -> None:
        super().restore(state)
        self.gates.restore({k.removeprefix("gates."): v for k, v in state.items() if k.startswith("gates.")})
        self.over, self.levels = bool(state["over"]), state["levels"].tolist()
        self.seen = list(state["seen"]) if "seen" in state else []
