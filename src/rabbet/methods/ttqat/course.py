"""How a student of tensor trains is taught: what learns, from what, and which epoch is kept."""

import math
from typing import cast

import torch
from torch import Tensor, nn

from rabbet.calibrate.ranges import calibrate_ranges
from rabbet.core.plan import Plan
from rabbet.data.batches import Batch, examples
from rabbet.errors import DataError
from rabbet.forms import Dense
from rabbet.grids.grid import stored
from rabbet.jobs import Job
from rabbet.methods.ttqat.settings import Settings
from rabbet.methods.ttqat.start import start_cores
from rabbet.model.build import build
from rabbet.model.compressed import ActQuant, Compressed, Factor, compressed_layers
from rabbet.train.best import Best
from rabbet.train.distil import WHOLE, Recorder, Recording, Stage, Teacher, find_blocks, mask_of
from rabbet.train.loop import Course, run, shard
from rabbet.train.qat import Latent, replace_factors, rounded_together
from rabbet.workpiece import Workpiece

HELD = 0.1  # share of the batches that choose between epochs and are not trained on


class Teaching(Course):
    """A student of latents, its teacher, and the best state on the grid."""

    fused = True

    def __init__(self, method: Settings, piece: Workpiece, plan: Plan) -> None:
        self.method, self.piece, self.plan = method, piece, plan
        batches = piece.task.read()
        order = torch.randperm(
            len(batches), generator=torch.Generator().manual_seed(piece.seed)
        ).tolist()
        count = 0 if piece.task.evaluate is not None else max(1, round(HELD * len(batches)))
        if len(batches) <= count:
            raise DataError(
                "teaching needs at least two batches, one of them to be held back; make them smaller"
            )
        self.held = [batches[k] for k in order[:count]]
        self.batches = [batches[k] for k in order[count:]]
        chains = any(line.terms[0].form.contracted for line in plan)
        self.turn = (
            method.epochs * len(self.batches) if chains else 0
        )  # matrices start where these lead
        self.steps = self.turn + method.finish * len(self.batches)
        self.student = build(piece.model, plan, piece.survey)
        self.layers = compressed_layers(self.student)
        self._start()
        distil = method.distil
        names = list(distil.blocks) or find_blocks(piece.model, piece.survey)
        self.decodes = bool(
            getattr(getattr(piece.model, "config", None), "is_encoder_decoder", False)
        )
        self.look = Recorder(self.student, names)
        self.teacher = Teacher(Recorder(piece.model, names), distil.memory)
        shown = self._theirs(shard(self.batches[0]), 0)
        self.depth, self.blind = len(shown.hidden), bool(distil.attention) and not shown.attention
        for (
            latent
        ) in self._latents():  # scales have their size, and so their rate, before they are used
            latent.settle()
            latent.on_grid = False
        if self._acts:
            calibrate_ranges(self.student, piece.task, piece.seed)
        self.groups = [{"params": [p], "base": method.rate * size} for p, size in self._sizes()]
        self.best = Best()
        self.now = math.nan

    @property
    def measure(self) -> str:
        """What chooses between epochs, in words."""
        return "loss" if self.piece.task.evaluate is None else "score"

    def _start(self) -> None:
        """Latents in place of all factors, at their start."""
        piece, moments = self.piece, self.piece.moments() if self.method.start == "metric" else {}
        jobs: list[Job] = []
        for place, line in enumerate(self.plan):
            site = piece.survey[line.name]
            given = {"weight": piece.weight(site)} | (
                {"second": moments[site.name]} if site.name in moments else {}
            )
            term = line.terms[0]
            seed = piece.seed * 1_000_003 + place  # layers of one shape do not start alike
            settings = {"site": site, "term": term, "start": self.method.start, "seed": seed}
            jobs.append((start_cores, given, settings))
        for line, cores in zip(self.plan, piece.jobs.run("decomposing layers", jobs), strict=True):
            layer = self.layers[line.name]
            latents = [Latent(cores[str(k)], f.grid) for k, f in enumerate(layer.factors[0])]
            replace_factors(layer, latents)

    def _latents(self) -> list[Latent]:
        return [latent for layer in self.layers.values() for latent in self._of(layer)]

    @staticmethod
    def _of(layer: Compressed) -> list[Latent]:
        return [cast(Latent, f) for f in layer.factors[0]]

    @property
    def _acts(self) -> list[ActQuant]:
        return [act for layer in self.layers.values() for act in layer.quantisers]

    def _sizes(self) -> list[tuple[Tensor, float]]:
        """Everything that moves, and the size that its rate refers to: of scales and ranges their own."""
        sizes: list[tuple[Tensor, float]] = []
        for layer in self.layers.values():
            share = self.method.dense_rate if layer.forms[0].name == Dense.name else 1.0
            for latent in self._of(layer):
                sizes += [
                    (latent.value, share * _spread(latent.value)),
                    (latent.scale, share * _mean(latent.scale)),
                ]
            sizes += [] if layer.bias is None else [(layer.bias, share * _spread(layer.bias))]
        sizes += [(act.scale, _mean(act.scale)) for act in self._acts]
        inside = {
            id(p)
            for m in self.student.modules()
            if isinstance(m, Compressed)
            for p in m.parameters()
        }
        free = [
            p for p in self.student.parameters() if id(p) not in inside and p.is_floating_point()
        ]
        return sizes + [(p, _spread(p)) for p in free]

    def _learning(self) -> list[Tensor]:
        return [p for p, _ in self._sizes()]

    def rate(self, step: int) -> float:
        """A cosine over the epochs in float, and half as high a one over those on the grid."""
        first = step < self.turn
        place, whole = (step, self.turn) if first else (step - self.turn, self.steps - self.turn)
        height = 1.0 if first else 0.5
        return (
            height
            * max(0.5 * (1 + math.cos(math.pi * place / whole)), 0.01)
            * min(1.0, (place + 1) / 50)
        )

    def loss(self, step: int) -> Tensor:
        """See `Course.loss`."""
        if step == self.turn:
            self._settle()
        epoch, place = divmod(step, len(self.batches))
        generator = torch.Generator().manual_seed(self.piece.seed * 1_000_003 + epoch)
        k = int(torch.randperm(len(self.batches), generator=generator)[place])
        generator = torch.Generator().manual_seed(self.piece.seed * 1_000_003 + step)
        loss = self.on(shard(self.batches[k]), k, self._stage(step), generator)
        self.now = float(loss.detach())
        return loss

    def _stage(self, step: int) -> Stage:
        if self.method.order == "all":
            return WHOLE
        each = max(1, self.steps // (2 * (self.depth - 1)))  # half the steps walk the blocks
        depth = min(1 + step // each, self.depth)
        top = self.method.order == "top"
        return Stage(depth, top, outputs=depth == self.depth)

    def on(
        self, batch: Batch, place: int, stage: Stage, generator: torch.Generator | None = None
    ) -> Tensor:
        """The loss of a batch; `place` tells the teacher which it is; generator: for what the student is shown."""
        task, theirs = self.piece.task, self._theirs(batch, place)
        given = batch if generator is None else task.varied(batch, generator)
        held: list[object] = []

        def ours() -> object:
            with rounded_together(self._latents()):
                held.append(task.run(self.student, given))
            return held[0]

        shown = self.look(ours)
        mask = mask_of(batch, self.decodes)
        mask = None if mask is None else mask.to(shown.outputs[0].device)
        distil = self.method.distil
        loss = distil.loss(shown, theirs, mask, stage)
        if task.loss is not None and stage.outputs and distil.labels:
            loss = loss + distil.labels * task.judge(self.student, held[0], batch)
        return loss

    def _theirs(self, batch: Batch, place: int) -> Recording:
        """What the float network shows of a batch."""
        return self.teacher.record(place, lambda: self.piece.task.run(self.piece.model, batch))

    def _settle(self) -> None:
        """From float onto the grids."""
        with torch.no_grad():
            for latent in self._latents():
                latent.settle()
            if self._acts:
                calibrate_ranges(self.student, self.piece.task, self.piece.seed)

    def judged(self) -> float:
        """The user's own score of the student, or the negative loss of held-back batches; larger is better."""
        task = self.piece.task
        if task.evaluate is not None:
            with torch.no_grad(), rounded_together(self._latents()):
                return task.score(self.student)
        with torch.no_grad():
            losses = [self.on(b, -1 - k, WHOLE) for k, b in enumerate(self.held)]
        weights = torch.tensor([float(examples(b)) for b in self.held])
        return -float((torch.stack(losses).cpu() * weights).sum() / weights.sum())

    def after_step(self, step: int) -> None:
        """See `Course.after_step`."""
        if step >= self.turn and (step + 1) % len(self.batches) == 0:
            self.remember()

    def remember(self) -> None:
        """Keep the state, as a file holds it, if it is the best so far; training goes on from the exact one."""
        exact = self._copies()
        self._round()
        score = self.judged()
        if math.isnan(score):
            raise DataError(
                "the loss of held-back examples is not a number; check the batches and the loss"
            )
        self.best.consider(-score, self._copies)
        self._take(exact)

    def _round(self) -> None:
        """Everything that is not on a grid to the types of the file."""
        inside = {id(p) for layer in self.layers.values() for p in layer.parameters()}
        with torch.no_grad():
            for name, p in self.student.named_parameters():
                if id(p) not in inside:
                    p.copy_(self.piece.held(name, p))
            for latent in self._latents():
                latent.scale.copy_(stored(latent.scale))
            for act in self._acts:
                act.scale.clamp_(min=1e-12)

    def train(self) -> tuple[float, float]:
        """Train to the end and go back to the best epoch; how the start and the end are judged."""
        piece = self.piece
        for act in self._acts:
            act.observer = _unseen
        before = self.judged()
        key = piece.key("ttqat", self._copies(), {"method": self.method, "plan": self.plan.compact})
        if self.steps:
            run(self, piece.jobs, key, "teaching", min(len(self.batches), 100))
        if not self.best.kept:  # no epoch on the grid
            self._settle()
            self.remember()
        self._take(self.best.kept)
        sign = 1 if piece.task.evaluate is not None else -1
        return sign * before, -sign * self.best.score

    def _copies(self) -> dict[str, Tensor]:
        """What learns, as it is now; the inverse of `_take`."""
        return {str(k): p.detach().clone() for k, p in enumerate(self._learning())}

    def _take(self, kept: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for k, p in enumerate(self._learning()):
                p.copy_(kept[str(k)])

    @property
    def detail(self) -> str:
        """See `Course.detail`."""
        return f"loss {self.now:.3g}"

    def state(self) -> dict[str, Tensor]:
        """The best state, and whether the latents are on their grids."""
        kept = {"on": torch.tensor(any(x.on_grid for x in self._latents()))}
        kept |= {f"zero.{k}": act.zero for k, act in enumerate(self._acts)}
        kept |= {
            f"group.{k}": z for k, z in enumerate(x.zero for x in self._latents()) if z is not None
        }
        return kept | self.best.state()

    def restore(self, state: dict[str, Tensor]) -> None:
        """See `Course.restore`."""
        self.best.restore(state)
        for k, act in enumerate(self._acts):
            act.zero.copy_(state[f"zero.{k}"])
            if state["on"]:
                act.observer, act.ready = None, True
        for k, latent in enumerate(self._latents()):
            latent.on_grid = bool(state["on"])
            if latent.zero is not None:
                latent.zero.copy_(state[f"group.{k}"])

    def network(self) -> nn.Module:
        """The student with integers in place of the latents, and what stays as it is on the types of the file."""
        for layer in self.layers.values():
            replace_factors(layer, [Factor(latent.numbers) for latent in self._of(layer)])
        return self.student.requires_grad_(False)


def _unseen(_: Tensor) -> None:
    """Lets activations pass while a network learns in float."""


def _spread(p: Tensor) -> float:
    """The deviation, but neither that of a bias that starts at zero nor that of a norm's gain."""
    return float(p.detach().square().mean().sqrt().clamp(0.02, 0.2))


def _mean(scale: Tensor) -> float:
    """Of scales: per-channel ones are a thousandth of what they scale, and moved as it is they would change sign."""
    return float(scale.detach().abs().mean())
