"""All codes and scales of a block tuned so that it answers as the float block does."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rabbet.jobs import ONCE, Jobs
from rabbet.methods.blockwise.shelf import Shelf
from rabbet.methods.blockwise.stack import Call
from rabbet.model.compressed import Compressed
from rabbet.train.loop import Course, Group, run
from rabbet.train.tuning import round_codes, start_codes

HELD = 8  # of so many batches one is held back, to judge whether tuning helps
TINY = 1e-12
LEAST_BIAS = 0.05  # that a bias counts for when its learning rate is set


@dataclass(frozen=True)
class Pacing:
    """How a block is tuned: passes over the batches, and learning rates as in `Tuning`."""

    epochs: int
    codes: float
    scales: float


@dataclass(frozen=True)
class Given:
    """What a block is tuned on: its calls, the hidden states it meets, and those wanted behind it.

    All by batch.
    """

    calls: Sequence[Call]
    ours: Shelf
    wanted: Shelf


def held_back(count: int) -> tuple[list[int], list[int]]:
    """The batches that are trained on, and those that judge."""
    held = list(range(count))[HELD - 1 :: HELD] or [count - 1]
    return [i for i in range(count) if i not in held], held


def in_turn(batches: Sequence[int], step: int) -> int:
    """The batch of a step: all in each pass, every time in another order."""
    number, place = divmod(step, len(batches))
    order = torch.randperm(len(batches), generator=torch.Generator().manual_seed(number))
    return batches[int(order[place])]


def tuned(course: "BlockCourse", jobs: Jobs, stage: str) -> bool:
    """Train a block in place; False if the batches that are held back do not agree that it helps.

    Its layers then hold numbers that are of no use.
    """
    if not course.used:
        return False
    before = course.distance()
    course.begin()
    run(course, jobs, ONCE, stage)  # a block takes minutes, and is kept once it is finished
    with torch.no_grad():
        round_codes(course.layers.values())
    return course.distance() < before


class BlockCourse(Course):
    """Trains the codes, scales and biases of one block; a batch a step."""

    fused = True

    def __init__(
        self,
        block: nn.Module,
        layers: Mapping[str, Compressed],
        weights: Mapping[str, Tensor],
        given: Given,
        pacing: Pacing,
    ) -> None:
        """Layers stand in the block already; weights: the float ones, canonical, by their names."""
        self.block, self.layers, self.weights = block, layers, weights
        self.given, self.pacing = given, pacing
        self.used, self.held = held_back(len(given.calls))
        self.steps = pacing.epochs * len(self.used)
        self.groups: list[Group] = []

    def begin(self) -> None:
        """Make codes continuous, and collect what is trained."""
        with torch.no_grad():
            for name, layer in self.layers.items():
                start_codes(layer, self.weights[name])
        for layer in self.layers.values():
            for factor in itertools.chain.from_iterable(layer.factors):
                floats = factor.grid.codebook.floats
                unit = float(factor.codes.abs().amax()) / 127 if floats else 1.0
                self._add(factor.codes, self.pacing.codes * unit)
                if not floats:
                    self._add(factor.scale, self.pacing.scales * float(factor.scale.abs().mean()))
            if layer.bias is not None:
                size = max(float(layer.bias.abs().mean()), LEAST_BIAS)
                self._add(layer.bias, self.pacing.scales * size)

    def _add(self, tensor: Tensor, rate: float) -> None:
        self.groups.append({"params": [tensor], "base": rate})

    def losses_of(self, step: int) -> Iterator[Tensor]:
        """The error at each place, relative to what is wanted there."""
        yield self._error(in_turn(self.used, step))

    def _error(self, i: int) -> Tensor:
        given = self.given
        wanted = given.wanted[i]
        off = (given.calls[i](self.block, given.ours[i]) - wanted).square().sum(-1)
        return (off / wanted.square().sum(-1).clamp_min(TINY)).mean()

    @torch.no_grad()
    def distance(self) -> float:
        """The mean of the same over the batches that are held back."""
        return sum(float(self._error(i)) for i in self.held) / len(self.held)
