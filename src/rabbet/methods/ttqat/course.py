"""Distillation of a float transformer into tensor trains, first in float, then on the grid."""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from rabbet.calibrate.ranges import calibrate_ranges
from rabbet.core.plan import Plan
from rabbet.data.batches import Batch
from rabbet.data.measure import quantity_of, smaller_is_better
from rabbet.errors import DataError, ModelError
from rabbet.grids.grid import stored
from rabbet.jobs import Job
from rabbet.layers.stored import tensor_of
from rabbet.methods.ttqat.settings import Settings
from rabbet.methods.ttqat.start import start_cores
from rabbet.model.build import blank_numbers, build
from rabbet.model.compressed import (
    ActQuant,
    Compressed,
    Factor,
    Numbers,
    compressed_layers,
    stored_weights,
)
from rabbet.reconstruct.network import solve_lines
from rabbet.train.best import Best
from rabbet.train.distil import WHOLE, Recorder, Recording, Stage, Teacher, find_blocks, mask_of
from rabbet.train.loop import Course, run, shard
from rabbet.train.qat import Latent, replace_factors, rounded_together
from rabbet.workpiece import Workpiece

HELD = 0.1  # share of the batches that are held back to choose between epochs


class Teaching(Course):
    """Trains a student whose factors are latents; the best epoch on the grid is kept."""

    fused = True

    def __init__(self, method: Settings, piece: Workpiece, plan: Plan) -> None:
        self.method, self.piece, self.plan = method, piece, plan
        batches, self.axes = piece.task.read(), piece.task.examples
        generator = torch.Generator().manual_seed(piece.seed)
        order = torch.randperm(len(batches), generator=generator).tolist()
        count = 0 if piece.task.evaluate is not None else max(1, round(HELD * len(batches)))
        if len(batches) <= count:
            raise DataError(
                "teaching needs at least two batches, one of them to be held back; "
                "make them smaller"
            )
        self.held = [batches[k] for k in order[:count]]
        self.batches = [batches[k] for k in order[count:]]
        # Only chains are trained in float: matrices already start at the float weights.
        chains = any(line.terms[0].form.contracted for line in plan)
        self.float_steps = method.epochs * len(self.batches) if chains else 0
        self.steps = self.float_steps + method.finish * len(self.batches)
        running = Plan(tuple(line for line in plan if piece.survey[line.name].runs))
        stored = Plan(tuple(line for line in plan if line not in running))
        numbers: dict[str, Numbers] = {
            line.name: blank_numbers(piece.survey[line.name], line) for line in running
        }
        numbers |= solve_lines(piece, "storing", stored)
        self.student = build(piece.model, plan, piece.survey, numbers)
        self.running = running
        self.layers = compressed_layers(self.student)
        self._start()
        distil = method.distil
        if distil.scores is None:
            distil = replace(distil, scores="scores" in piece.answers.kinds)
        self.distil = distil
        names = list(distil.blocks) or find_blocks(piece.model, piece.survey)
        config = getattr(piece.model, "config", None)
        self.decodes = bool(getattr(config, "is_encoder_decoder", False))
        self.recorder = Recorder(self.student, names)
        self.teacher = Teacher(Recorder(piece.model, names), distil.memory)
        recording = self._teacher_recording(shard(self.batches[0], self.axes), 0)
        self.depth = len(recording.hidden)
        if distil.contrast:
            self._require_contrast(recording)
        self.lacks_attention = bool(distil.attention) and not recording.attention
        # The learning rates of scales depend on their size, which has to be known from the start.
        for latent in self._latents():
            latent.move_to_grid()
            latent.on_grid = False
        if self._acts:
            calibrate_ranges(self.student, piece.task, piece.seed)
        self.groups = [{"params": [p], "base": method.rate * size} for p, size in self._sizes()]
        self.best = Best()
        self.last_loss = math.nan

    def _require_contrast(self, recording: Recording) -> None:
        """Raise unless there are examples to tell apart, and hidden states with an axis of them."""
        count = self.axes.count(shard(self.batches[0], self.axes))
        other = next((list(h.shape) for h in recording.hidden if h.shape[:1] != (count,)), None)
        if other is not None:
            raise ModelError(
                f"contrast needs hidden states [examples, ...], of {count} examples here; found "
                f"one of shape {other}: leave it out with Distillation(contrast=0)"
            )
        if max(self.axes.count(shard(b, self.axes)) for b in self.batches) < 2:
            raise DataError(
                "contrast tells the examples of a batch apart; make batches larger than one example"
            )

    @property
    def measure(self) -> str:
        """The name of what chooses between epochs: the held-back loss, or the user's score."""
        judge = self.piece.task.evaluate
        return "loss" if judge is None else quantity_of(judge, "score")

    @property
    def _sign(self) -> int:
        """By which larger is better of what `measure` names."""
        judge = self.piece.task.evaluate
        return -1 if judge is None or smaller_is_better(judge) else 1

    def _start(self) -> None:
        """Replace all factors by latents, which start at the decomposed float weights."""
        piece = self.piece
        jobs: list[Job] = []
        for position, line in enumerate(self.running):
            site = piece.survey[line.name]
            measured = self.method.start == "metric"
            inputs = piece.problem(site) if measured else {"weight": piece.weight(site)}
            term = line.terms[0]
            # Layers of the same shape must not get the same random start.
            seed = piece.seed * 1_000_003 + position
            settings = {"site": site, "term": term, "start": self.method.start, "seed": seed}
            jobs.append((start_cores, inputs, settings))
        solutions = piece.jobs.run("decomposing layers", jobs)
        for line, cores in zip(self.running, solutions, strict=True):
            layer = self.layers[line.name]
            latents = [Latent(cores[str(k)], f.grid) for k, f in enumerate(layer.factors[0])]
            replace_factors(layer, latents)

    def _latents(self) -> list[Latent]:
        """The latents of all layers."""
        return [latent for layer in self.layers.values() for latent in self._of(layer)]

    @staticmethod
    def _of(layer: Compressed) -> list[Latent]:
        """The latents of a layer, which has one term."""
        return [cast(Latent, f) for f in layer.factors[0]]

    @property
    def _acts(self) -> list[ActQuant]:
        return [act for layer in self.layers.values() for act in layer.quantisers]

    def _sizes(self) -> list[tuple[Tensor, float]]:
        """All parameters that train, each with the size that its learning rate refers to.

        For scales and ranges that is their own mean.
        """
        sizes: list[tuple[Tensor, float]] = []
        for layer in self.layers.values():
            share = self.method.dense_rate if layer.forms[0].verbatim else 1.0
            for latent in self._of(layer):
                sizes.append((latent.value, share * _deviation(latent.value)))
                sizes.append((latent.scale, share * _mean(latent.scale)))
            if layer.bias is not None:
                sizes.append((layer.bias, share * _deviation(layer.bias)))
        sizes += [(act.scale, _mean(act.scale)) for act in self._acts]
        layers = [m for m in self.student.modules() if isinstance(m, Compressed)]
        inside = {id(p) for layer in layers for p in layer.parameters()}
        inside |= {id(tensor_of(self.student, name)) for name in stored_weights(self.student)}
        outside = [
            p for p in self.student.parameters() if id(p) not in inside and p.is_floating_point()
        ]
        return sizes + [(p, _deviation(p)) for p in outside]

    def _trained(self) -> list[Tensor]:
        """All parameters that train."""
        return [p for p, _ in self._sizes()]

    def rate(self, step: int) -> float:
        """A cosine over the epochs in float, then one of half the height over those on the grid.

        Both have 50 warm-up steps.
        """
        in_float = step < self.float_steps
        phase_step = step if in_float else step - self.float_steps
        phase_steps = self.float_steps if in_float else self.steps - self.float_steps
        height = 1.0 if in_float else 0.5
        cosine = max(0.5 * (1 + math.cos(math.pi * phase_step / phase_steps)), 0.01)
        return height * cosine * min(1.0, (phase_step + 1) / 50)

    def losses_of(self, step: int) -> Iterator[Tensor]:
        """See `Course.losses_of`."""
        if step == self.float_steps:
            self._move_to_grids()
        epoch, in_epoch = divmod(step, len(self.batches))
        generator = torch.Generator().manual_seed(self.piece.seed * 1_000_003 + epoch)
        k = int(torch.randperm(len(self.batches), generator=generator)[in_epoch])
        generator = torch.Generator().manual_seed(self.piece.seed * 1_000_003 + step)
        loss = self._batch_loss(shard(self.batches[k], self.axes), k, self._stage(step), generator)
        self.last_loss = float(loss.detach())
        yield loss

    def _stage(self, step: int) -> Stage:
        """The stage of a step: if blocks are taught in order, it grows over half of all steps."""
        if self.method.order == "all":
            return WHOLE
        steps_per_block = max(1, self.steps // (2 * (self.depth - 1)))
        depth = min(1 + step // steps_per_block, self.depth)
        top = self.method.order == "top"
        return Stage(depth, top, outputs=depth == self.depth)

    def _batch_loss(
        self, batch: Batch, number: int, stage: Stage, generator: torch.Generator | None = None
    ) -> Tensor:
        """The loss on a batch.

        number: identifies the batch to the teacher. generator: for the variation of the batch that
        the student sees (`Task.vary`); None: it sees the batch itself.
        """
        task = self.piece.task
        theirs = self._teacher_recording(batch, number)
        seen = batch if generator is None else task.varied(batch, generator)
        results: list[object] = []

        def run_student() -> object:
            with rounded_together(self._latents()):
                results.append(task.run(self.student, seen))
            return results[0]

        ours = self.recorder(run_student)
        mask = mask_of(batch, self.decodes)
        mask = None if mask is None else mask.to(ours.outputs[0].device)
        distil = self.distil
        loss = distil.loss(ours, theirs, mask, stage)
        if task.loss is not None and stage.outputs and distil.labels:
            loss = loss + distil.labels * task.judge(self.student, results[0], batch)
        return loss

    def _teacher_recording(self, batch: Batch, number: int) -> Recording:
        """The recording of the float network on a batch."""
        return self.teacher.record(number, lambda: self.piece.task.run(self.piece.model, batch))

    def _move_to_grids(self) -> None:
        """Start to round all factors and, if the plan says so, inputs."""
        with torch.no_grad():
            for latent in self._latents():
                latent.move_to_grid()
            if self._acts:
                calibrate_ranges(self.student, self.piece.task, self.piece.seed)

    def score(self) -> float:
        """The user's score of the student, or the loss on held-back batches.

        With the sign by which larger is better.
        """
        task = self.piece.task
        if task.evaluate is not None:
            with torch.no_grad(), rounded_together(self._latents()):
                return self._sign * task.score(self.student)
        with torch.no_grad():
            losses = [self._batch_loss(b, -1 - k, WHOLE) for k, b in enumerate(self.held)]
        weights = torch.tensor([float(task.examples.count(b)) for b in self.held])
        return self._sign * float((torch.stack(losses).cpu() * weights).sum() / weights.sum())

    def after_step(self, step: int) -> None:
        """See `Course.after_step`."""
        if step >= self.float_steps and (step + 1) % len(self.batches) == 0:
            self.remember()

    def remember(self) -> None:
        """Keep the current state, rounded as a file stores it, if it is the best so far.

        Training goes on from the unrounded state.
        """
        exact = self._copies()
        self._round()
        score = self.score()
        if math.isnan(score):
            raise DataError(
                "the loss of held-back examples is not a number; check the batches and the loss"
            )
        self.best.consider(-score, self._copies)
        self._load(exact)

    def _round(self) -> None:
        """Round scales, and all parameters outside the layers, to the types of the file."""
        inside = {id(p) for layer in self.layers.values() for p in layer.parameters()}
        inside |= {id(tensor_of(self.student, name)) for name in stored_weights(self.student)}
        with torch.no_grad():
            for name, p in self.student.named_parameters():
                if id(p) not in inside:
                    p.copy_(self.piece.held(name, p))
            for latent in self._latents():
                latent.scale.copy_(stored(latent.scale))
            for act in self._acts:
                act.scale.clamp_(min=1e-12)

    def train(self) -> tuple[float, float]:
        """Train, then go back to the best epoch on the grid; returns `measure` before and after.

        Before is that of the start, rounded and not trained, which is kept if no epoch is better.
        """
        piece = self.piece
        before = self._consider_start()
        key = piece.key(
            "ttqat",
            self._copies(),
            {"method": self.method, "plan": self.plan.compact},
            judge=piece.task.evaluate,
        )
        if self.steps:
            run(self, piece.jobs, key, "teaching", min(len(self.batches), 100))
            piece.histories.append(self.loss_history("teaching"))
        if not self._on_grid:  # no epoch was, or none was to be
            self._move_to_grids()
            self.remember()
        self._load(self.best.kept)
        return self._sign * before, -self._sign * self.best.score

    def _consider_start(self) -> float:
        """Score the start on its grids, keep it as the best so far, and leave the grids again."""
        exact = self._copies()
        self._move_to_grids()
        self.remember()
        self._load(exact)
        for latent in self._latents():
            latent.on_grid = False
        for act in self._acts:
            act.observer = _ignore
        return -self.best.score

    @property
    def _on_grid(self) -> bool:
        return any(latent.on_grid for latent in self._latents())

    def _copies(self) -> dict[str, Tensor]:
        """Copies of all parameters that train, and of the zero points that go with them."""
        return {str(k): p.detach().clone() for k, p in enumerate(self._trained() + self._zeros())}

    def _load(self, copies: dict[str, Tensor]) -> None:
        """The inverse of `_copies`."""
        with torch.no_grad():
            for k, p in enumerate(self._trained() + self._zeros()):
                p.copy_(copies[str(k)])

    def _zeros(self) -> list[Tensor]:
        zeros = [act.zero for act in self._acts]
        return zeros + [latent.zero for latent in self._latents() if latent.zero is not None]

    @property
    def detail(self) -> str:
        """See `Course.detail`."""
        return f"loss {self.last_loss:.3g}"

    def state(self) -> dict[str, Tensor]:
        """The best state, zero points, and whether the latents are on their grids."""
        kept = {f"zero.{k}": zero for k, zero in enumerate(self._zeros())}
        return kept | {"on": torch.tensor(self._on_grid)} | self.best.state()

    def restore(self, state: dict[str, Tensor]) -> None:
        """See `Course.restore`."""
        self.best.restore(state)
        for k, zero in enumerate(self._zeros()):
            zero.copy_(state[f"zero.{k}"])
        if state["on"]:
            for act in self._acts:
                act.observer, act.ready = None, True
        for latent in self._latents():
            latent.on_grid = bool(state["on"])

    def network(self) -> nn.Module:
        """The student, with codes in place of the latents; it is as a file stores it."""
        for layer in self.layers.values():
            replace_factors(layer, [Factor(latent.numbers) for latent in self._of(layer)])
        return self.student.requires_grad_(False)


def _ignore(_: Tensor) -> None:
    """An observer that lets activations pass unchanged while the network trains in float."""


def _deviation(p: Tensor) -> float:
    """The root mean square, clamped: a bias may start at zero, and a norm's gain is large."""
    return float(p.detach().square().mean().sqrt().clamp(0.02, 0.2))


def _mean(scale: Tensor) -> float:
    """The mean magnitude of scales.

    They need a rate of their own: per-channel scales are a thousandth of what they scale, and would
    change sign at its rate.
    """
    return float(scale.detach().abs().mean())
