"""Short tuning without labels: distils the float network into the compressed one, on its grid."""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rabbet.calibrate.ranges import calibrate_inner
from rabbet.data.answers import UnlikeError
from rabbet.data.augment import Pool, judging_parts
from rabbet.errors import RabbetError, check_fields, check_least
from rabbet.grids.grid import stored
from rabbet.model.compressed import Compressed, compressed_layers, layers_kept, stored_state
from rabbet.train.loop import Course, Group, run, shard
from rabbet.train.losses import block_names, distillation_losses
from rabbet.workpiece import UNABLE, Workpiece

HELD = 0.125  # share of the calibration examples that are held back, to accept or undo the tuning
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
    """Tune a compressed network in place; kept only if held-back examples improve for certain.

    The loss is what outputs are judged by (`Answers.judged`) plus `features` times the mean
    relative error of the blocks' outputs. Adam, a cosine schedule; images are augmented.
    Checkpoints are kept in the jobs, and a run that was stopped resumes from the last. Returns a
    note on what was done.
    """
    axes = piece.task.examples
    train, held = axes.hold_back(piece.task.read(), HELD)
    if not train:
        return "not tuned: too few examples to hold one back"
    if settings.steps == 0:
        return "not tuned: no steps were asked for"
    judges = judging_parts(held, axes, piece.seed)
    put_back, pool = layers_kept(student), Pool.of(train, axes)
    try:
        start = piece.distance(student, judges)
        batch, blocks = pool.draw(settings.batch, torch.Generator()), block_names(piece.survey)
        with torch.no_grad():
            for _ in distillation_losses(student, piece, batch, blocks, settings.features):
                pass
    except UnlikeError as e:
        return f"not tuned: {e}"
    except RabbetError:
        raise
    except Exception as e:  # the forward is the user's: it may not take such parts of the batches
        return f"not tuned: {UNABLE} ({type(e).__name__})"
    loop = _Loop(student, piece, pool, settings)
    try:
        loop.train(piece)
        end = piece.distance(student, judges)
    except UnlikeError as e:  # whether shapes differ may show only in training
        put_back()
        return f"tuning undone: {e}"
    if end.is_below(start):
        steps = f"tuned {settings.steps} steps"
        return f"{steps}: divergence on held-back examples {end.since(start)}"
    put_back()
    return f"tuning undone: {end.refused(start)}"


class _Loop(Course):
    """Trains codes, scales, biases and input ranges of all compressed layers."""

    def __init__(self, student: nn.Module, piece: Workpiece, pool: Pool, settings: Tuning) -> None:
        self.student, self.piece = student, piece
        self.pool, self.settings = pool, settings
        self.layers = compressed_layers(student)
        self.blocks = block_names(piece.survey)
        self.steps = settings.steps
        self.groups: list[Group] = []
        with torch.no_grad():
            for name, layer in self.layers.items():
                start_codes(layer, layer.site.kind.weight(piece.model.get_submodule(name)))
        self._collect()

    def _collect(self) -> None:
        rates = self.settings
        for layer in self.layers.values():
            for factor in itertools.chain.from_iterable(layer.factors):
                if factor.grid.codebook.floats:  # they move as codes of 8 bits would
                    step = float(factor.codes.abs().amax()) / 127
                    self._add(factor.codes, rates.codes * step)
                    continue
                self._add(factor.codes, rates.codes)
                self._add(factor.scale, rates.scales * float(factor.scale.abs().mean()))
            if layer.bias is not None:
                self._add(layer.bias, rates.biases * max(float(layer.bias.abs().mean()), 0.05))
            for act in layer.quantisers:
                self._add(act.scale, rates.ranges * float(act.scale))

    def _add(self, tensor: Tensor, rate: float) -> None:
        self.groups.append({"params": [tensor], "base": rate})

    def train(self, piece: Workpiece) -> None:
        """Train to the end, then round the codes and measure the inner ranges again.

        Meanwhile chains of convs run as one layer, which is several times as fast.
        """
        parameters = [p for group in self.groups for p in group["params"]]
        state = {str(k): p.detach() for k, p in enumerate(parameters)}
        inputs = state | stored_state(self.student)  # it computes with them
        key = piece.key("tune", inputs, {"settings": self.settings})
        chains = [
            layer
            for layer in self.layers.values()
            if layer.site.space and any(f.gaps(layer.site) for f in layer.forms)
        ]
        try:
            for layer in chains:
                layer.whole = True
            run(self, piece.jobs, key, "tuning", CHECKPOINT)
            piece.histories.append(self.loss_history("tuning"))
        finally:
            for layer in chains:
                layer.whole = False
        with torch.no_grad():
            round_codes(self.layers.values())
            calibrate_inner(self.student, self.piece.task, self.piece.seed)

    def losses_of(self, step: int) -> Iterator[Tensor]:
        """See `Course.losses_of`."""
        generator = torch.Generator().manual_seed(self.piece.seed * 1_000_003 + step)
        batch = shard(self.pool.draw(self.settings.batch, generator), self.pool.axes)
        given = self.student, self.piece, batch, self.blocks, self.settings.features
        return distillation_losses(*given, self.piece.answers.judged)


def start_codes(layer: Compressed, weight: Tensor) -> None:
    """Make the codes of a dense layer continuous: where the float weight lies in its code's cell.

    If error feedback chose a code that is not the nearest, it starts in the middle of its cell: at
    the edge the first noise would undo a choice that compensates for the errors of other codes.
    """
    if len(layer.forms) > 1 or not layer.forms[0].whole:
        return
    factor = layer.factors[0][0]
    codebook = factor.grid.codebook.uniform
    if codebook is None:
        return
    zero = 0.0 if factor.zero is None else factor.grid.spread(factor.zero, weight.shape)
    exact = weight / factor.grid.spread(factor.scale, weight.shape) - codebook.shift + zero
    offset = exact - factor.codes
    factor.codes.add_(torch.where(offset.abs() < 0.5, offset.clamp(-0.45, 0.45), 0.0))


def round_codes(layers: Iterable[Compressed]) -> None:
    """Bring codes back to integers, and scales to the values that a file stores."""
    for layer in layers:
        for factor in itertools.chain.from_iterable(layer.factors):
            factor.codes.copy_(factor.grid.round_latent(factor.codes))
            factor.scale.copy_(stored(factor.scale))
        for act in layer.quantisers:
            act.scale.clamp_(min=1e-12)
