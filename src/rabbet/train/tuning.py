"""Short tuning without labels: the compressed network learns to answer as the float network does, on its grid."""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rabbet.calibrate.ranges import calibrate_inner
from rabbet.data.augment import Pool, hold_back
from rabbet.data.batches import Batch, examples, outputs
from rabbet.errors import check_fields, check_least
from rabbet.forms import Dense
from rabbet.grids.grid import stored
from rabbet.model.compressed import Compressed, compressed_layers
from rabbet.train.best import Best
from rabbet.train.loop import Course, Group, run, shared
from rabbet.train.losses import block_names, divergence, taught
from rabbet.workpiece import Workpiece

HELD = 0.125  # share of the calibration examples that judge the tuning and take no part in it
CHECKPOINT = 100


@dataclass(frozen=True)
class Tuning:
    """Settings of the tuning loop: Adam with a cosine schedule, images augmented."""

    steps: int = 600
    """How many; 0: no tuning."""
    batch: int = 64
    """Examples of a step."""
    codes: float = 4e-3
    """Learning rate of the codes, in steps of the grid."""
    scales: float = 1e-3
    """Learning rate of the scales, relative to their mean magnitude (LSQ, arXiv 1902.08153)."""
    biases: float = 1e-3
    """Learning rate of the biases, relative to their mean magnitude."""
    ranges: float = 1e-3
    """Learning rate of the scales of inputs, relative to themselves."""
    features: float = 2.0
    """Weight of the error of the blocks' outputs beside the divergence of the network's."""

    def __post_init__(self) -> None:
        check_fields(self)
        check_least(self, 0, "steps")
        check_least(self, 1, "batch")
        check_least(self, 0, "features")


def tune(student: nn.Module, piece: Workpiece, settings: Tuning) -> str:
    """Tune a compressed network in place; keep the result only if held-back examples agree. Returns what came of it.

    The loss is the divergence of the outputs plus `features` times the mean relative error of the
    blocks' outputs. Adam, a cosine schedule; images are augmented. Checkpoints are kept in the
    jobs, and a run that is started again goes on from the last.
    """
    kept, back = hold_back(piece.task.read(), HELD)
    if not kept or settings.steps == 0:
        return "not tuned: " + (
            "no steps were asked for" if kept else "too few examples to hold one back"
        )
    held = versions(back, piece.seed)

    def copied() -> dict[str, Tensor]:
        return {k: v.clone() for k, v in student.state_dict().items()}

    best = Best()
    start = judge(student, piece, held)
    best.consider(start, copied)
    loop = _Loop(student, piece, Pool.of(kept), settings)
    loop.train(piece)
    end = judge(student, piece, held)
    if best.consider(end, copied):
        return f"tuned {settings.steps} steps: divergence on held-back examples {start:.4g} -> {end:.4g}"
    student.load_state_dict(best.kept)
    return f"tuning undone: held-back examples got worse ({start:.4g} -> {end:.4g})"


def versions(batches: Sequence[Batch], seed: int) -> list[Batch]:
    """Held-back examples as they are and, if they are images, augmented.

    On images that it was trained with a network is too sure for small differences to show.
    """
    pool = Pool.of(batches)
    if pool.image is None:
        return list(batches)
    generator = torch.Generator().manual_seed(seed)
    whole = examples(pool.parts[0])
    return [*batches, *(pool.draw(whole, generator) for _ in range(4))]


def judge(student: nn.Module, piece: Workpiece, batches: Sequence[Batch]) -> float:
    """Mean divergence of the outputs over batches."""
    with torch.no_grad():
        apart = [
            divergence(outputs(piece.task.run(student, b)), outputs(piece.task.run(piece.model, b)))
            for b in batches
        ]
    return float(torch.stack(apart).mean())


class _Loop(Course):
    def __init__(self, student: nn.Module, piece: Workpiece, pool: Pool, settings: Tuning) -> None:
        self.student, self.teacher, self.task, self.seed = (
            student,
            piece.model,
            piece.task,
            piece.seed,
        )
        self.pool, self.settings = pool, settings
        self.layers = compressed_layers(student)
        self.blocks = block_names(piece.survey)
        self.steps = settings.steps
        self.groups: list[Group] = []
        with torch.no_grad():
            for name, layer in self.layers.items():
                _start_latents(layer, layer.site.kind.weight(piece.model.get_submodule(name)))
        self._collect()

    def _collect(self) -> None:
        rates = self.settings
        for layer in self.layers.values():
            for factor in itertools.chain.from_iterable(layer.factors):
                self._add(factor.codes, rates.codes)
                self._add(factor.scale, rates.scales * float(factor.scale.abs().mean()))
            if layer.bias is not None:
                self._add(layer.bias, rates.biases * max(float(layer.bias.abs().mean()), 0.05))
            for act in layer.quantisers:
                self._add(act.scale, rates.ranges * float(act.scale))

    def _add(self, tensor: Tensor, rate: float) -> None:
        self.groups.append({"params": [tensor], "base": rate})

    def train(self, piece: Workpiece) -> None:
        parameters = [p for group in self.groups for p in group["params"]]
        state = {str(k): p.detach() for k, p in enumerate(parameters)}
        key = piece.key("tune", state, {"settings": self.settings})
        chains = [
            layer
            for layer in self.layers.values()
            if layer.site.space and any(f.gaps for f in layer.forms)
        ]
        try:
            for layer in chains:
                layer.whole = True
            run(self, piece.jobs, key, "tuning", CHECKPOINT)
        finally:
            for layer in chains:
                layer.whole = False
        with torch.no_grad():
            _settle(self.layers.values())
            calibrate_inner(self.student, self.task, self.seed)

    def loss(self, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        batch = shared(self.pool.draw(self.settings.batch, generator))
        return taught(
            self.student, self.teacher, self.task, batch, self.blocks, self.settings.features
        )


def _start_latents(layer: Compressed, weight: Tensor) -> None:
    """Continuous codes: where the float weight lies within the cell that its code stands for.

    A code that error feedback chose against the nearest one starts in the middle of its cell: at
    the edge, the first noise would undo what makes good the errors of others.
    """
    if layer.forms != [Dense()]:
        return
    factor = layer.factors[0][0]
    book = factor.grid.codebook.uniform
    if book is None:
        return
    zero = 0.0 if factor.zero is None else factor.grid.spread(factor.zero, weight.shape)
    exact = weight / factor.grid.spread(factor.scale, weight.shape) - book.shift + zero
    offset = exact - factor.codes
    factor.codes.add_(torch.where(offset.abs() < 0.5, offset.clamp(-0.45, 0.45), 0.0))


def _settle(layers: Iterable[Compressed]) -> None:
    """Back to integers and to scales as the file stores them."""
    for layer in layers:
        for factor in itertools.chain.from_iterable(layer.factors):
            factor.codes.copy_(factor.grid.round_latent(factor.codes))
            factor.scale.copy_(stored(factor.scale))
        for act in layer.quantisers:
            act.scale.clamp_(min=1e-12)
