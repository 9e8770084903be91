"""Scales and biases of all blocks tuned together, so that the scores are the float network's.

What each block was fitted for is its own answer; what the errors of many blocks do to each other,
and to the words, only the scores tell. Codes stay, scales are trained by the divergence from the
float network: the second stage of EfficientQAT (arXiv 2407.11062, section 3.3), without labels and
with one block at a time. A step goes forth over the blocks, whose hidden states are kept, and back
over them, where each block runs once more.
"""

import contextlib
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from rabbet.core.plan import Plan
from rabbet.data.answers import scores_divergence
from rabbet.grids.grid import stored
from rabbet.jobs import Tensors
from rabbet.methods.blockwise.bench import Bench
from rabbet.methods.blockwise.fitting import Finished, swapped_block, swapped_ends
from rabbet.methods.blockwise.looking import by_block
from rabbet.methods.blockwise.shelf import MEMORY, Shelf
from rabbet.methods.blockwise.tuning import LEAST_BIAS, held_back, in_turn
from rabbet.model.compressed import Compressed
from rabbet.train.loop import Course, Group, run

STAGE = "tuning all blocks"
CHECKPOINTS = 50  # of a run
JUDGED = "judged"  # among what is kept: the divergence on held-back batches, before and after


def tuned_together(
    bench: Bench,
    plan: Plan,
    fitted: Generator[Finished, None, Shelf],
    passes: int,
    rate: float,
) -> Iterator[Finished]:
    """What `fit_blocks` gives, scales and biases tuned; as it was, unless held-back batches agree.

    passes: over the batches. rate: of learning, relative to the mean magnitude of each tensor.
    Scales, their gradients and Adam's moments are held in memory: 16 bytes for each scale. What is
    tuned is kept in the jobs, in the middle of it, too.
    """
    before, wanted = _collected(fitted)
    last = before[-1]
    settings = {
        "passes": passes,
        "rate": rate,
        "plan": str(plan),
        "last": last.keys,
        "ends": before[0].keys,
    }
    key = bench.key("blockwise.together", settings, {})
    found = bench.jobs.kept(key)
    if found is None:
        course = Together(bench, plan, before, wanted, passes, rate)
        found = course.tuned(f"{key}-steps") if course.used else {}
        bench.jobs.keep(key, found)
    if JUDGED in found:
        bench.notes = (*bench.notes, _said(*found[JUDGED].tolist()))
    better = {name: t for name, t in found.items() if name != JUDGED}
    for each in before:
        keys = (*each.keys, key) if better else each.keys
        yield Finished(keys, each.names, bench.numbers(each.keys) | better)


def _said(before: float, after: float) -> str:
    done = "all blocks tuned together" if after < before else "tuning of all blocks together undone"
    return f"{done}: divergence on held-back batches {before:.3g} -> {after:.3g}"


def _collected(fitted: Generator[Finished, None, Shelf]) -> tuple[list[Finished], Shelf]:
    """What a generator gives, without the numbers, and what it returns."""
    found: list[Finished] = []
    while True:
        try:
            each = next(fitted)
        except StopIteration as e:
            return found, e.value
        found.append(Finished(each.keys, each.names, {}))
        del each  # or its numbers would be held while the next are found


@dataclass
class Together(Course):
    """Trains the scales and biases of all that is compressed; a batch a step.

    fitted: keys of the numbers of the ends, then of each block. wanted: the float network's hidden
    states behind the last block, by batch.
    """

    bench: Bench
    plan: Plan
    fitted: Sequence[Finished]
    wanted: Shelf
    passes: int
    learning_rate: float
    trained: dict[str, Tensor] = field(default_factory=dict)

    fused = True

    def __post_init__(self) -> None:
        self.used, self.held = held_back(len(self.bench.batches))
        self.steps = self.passes * len(self.used)
        outside, inside = by_block(self.bench.stack, self.bench.survey)
        self.sites = [[s for s in each if self.plan.get(s.name)] for each in (outside, *inside)]
        self.groups: list[Group] = []

    def tuned(self, key: str) -> Tensors:
        """The numbers that are better; none if the batches that are held back do not agree.

        With `JUDGED`, their divergence before and after; nothing at all if nothing can be trained.
        """
        before = self.distance()
        for k in range(len(self.sites)):
            with self._standing(k) as (_, own):
                self.trained |= {name: t.detach().clone() for name, t in own.items()}
        if not self.trained:
            return {}  # all in floats, without biases
        for name, t in self.trained.items():
            size = float(t.abs().mean())
            rate = self.learning_rate * (max(size, LEAST_BIAS) if name.endswith("/bias") else size)
            self.groups.append({"params": [t], "base": rate})
        run(self, self.bench.jobs, key, STAGE, max(1, self.steps // CHECKPOINTS))
        for name, t in self.trained.items():
            if not name.endswith("/bias"):
                t.copy_(stored(t))
        after = self.distance()
        judged = {JUDGED: torch.tensor([before, after], dtype=torch.float64)}
        return judged | (self.trained if after < before else {})

    def losses_of(self, step: int) -> Iterator[Tensor]:
        """The divergence of one batch, whose gradients were taken block by block."""
        divergence, slopes = self._felt(in_turn(self.used, step))
        # zero, with these gradients
        felt = [((self.trained[n] - self.trained[n].detach()) * g).sum() for n, g in slopes.items()]
        yield torch.stack(felt).sum() + divergence

    def _felt(self, i: int) -> tuple[Tensor, Tensors]:
        """The divergence of a batch, and its gradients by what is trained."""
        bench, task, batch = self.bench, self.bench.task, self.bench.batches[i]
        states = list(self._forth([i]))
        slopes: Tensors = {}

        def back(value: Tensor, own: Mapping[str, Tensor], *hidden: Tensor) -> Tensor:
            """Adds up the gradients by numbers; gives that by hidden states."""
            found = torch.autograd.grad(value, [*own.values(), *hidden], allow_unused=True)
            for name, slope in zip(own, found, strict=False):
                if slope is not None:
                    slopes[name] = slopes[name] + slope if name in slopes else slope
            return found[-1]

        goal = self._goal(i)
        with self._standing(0) as (_, own):
            hidden = states[-1][0].requires_grad_()
            divergence = self._apart(bench.stack.leave(task, batch, hidden), goal, i)
            slope = back(divergence, own, hidden)
        for k in reversed(range(len(bench.stack))):
            with self._standing(k + 1) as (block, own):
                hidden = states[k][0].requires_grad_()
                out = bench.begun[1][i][k](block, hidden)
                slope = back((out * slope).sum(), own, hidden)
        with self._standing(0) as (_, own):
            hidden = bench.stack.enter(task, batch)[0]
            if hidden.requires_grad:
                back((hidden * slope).sum(), own)
        return divergence.detach(), slopes

    @torch.no_grad()
    def distance(self) -> float:
        """The mean divergence over the batches that are held back."""
        bench, total = self.bench, 0.0
        reached = deque(self._forth(self.held), maxlen=1).pop()
        for j, i in enumerate(self.held):
            goal = self._goal(i)
            with self._standing(0):
                scores = bench.stack.leave(bench.task, bench.batches[i], reached[j])
                total += float(self._apart(scores, goal, i))
        return total / len(self.held)

    @torch.no_grad()
    def _goal(self, i: int) -> Tensor:
        """The float network's answer to a batch."""
        with self.bench.stack.ends():
            return self.bench.stack.leave(self.bench.task, self.bench.batches[i], self.wanted[i])

    def _apart(self, ours: Tensor, goal: Tensor, i: int) -> Tensor:
        answers = self.bench.answers
        if answers is None or answers.kinds[0] == "scores":
            return scores_divergence(ours, goal)
        count = self.bench.task.examples.count(self.bench.batches[i])
        return ((ours - goal).square() * answers.element_weights(0, goal, count)).sum() / count

    def _forth(self, some: Sequence[int]) -> Iterator[Shelf]:
        """The hidden states of batches before each compressed block, then behind the last."""
        bench, room = self.bench, MEMORY // (len(self.bench.stack) + 1)
        now = Shelf(room)
        with torch.no_grad(), self._standing(0):
            for j, i in enumerate(some):
                now.put(j, bench.stack.enter(bench.task, bench.batches[i])[0])
        yield now
        for k in range(len(bench.stack)):
            reached = Shelf(room)
            with torch.no_grad(), self._standing(k + 1) as (block, _):
                for j, i in enumerate(some):
                    reached.put(j, bench.begun[1][i][k](block, now[j]))
            now = reached
            yield now

    @contextlib.contextmanager
    def _standing(self, part: int) -> Iterator[tuple[nn.Module, dict[str, Tensor]]]:
        """The ends or a block with compressed layers, and those of their numbers that are trained.

        part: 0 for the ends, then the blocks. A block is in float32, and so are its numbers.
        """
        bench, sites = self.bench, self.sites[part]
        found = bench.numbers(self.fitted[part].keys) | self.trained
        with contextlib.ExitStack() as opened:
            if part == 0:
                module = opened.enter_context(bench.stack.ends())
                layers = opened.enter_context(swapped_ends(module, sites, self.plan, found))
            else:
                module = opened.enter_context(bench.stack.block(part - 1))
                layers = opened.enter_context(
                    swapped_block(bench.stack, module, sites, self.plan, found)
                )
            own = dict(_trained(layers))
            for t in own.values():
                t.requires_grad_()
            yield module, own


def _trained(layers: Sequence[Compressed]) -> Iterator[tuple[str, Tensor]]:
    """Scales and biases, by the names of numbers; those of floats are all one, and stay."""
    for layer in layers:
        for t, factors in enumerate(layer.factors):
            for f, factor in enumerate(factors):
                if not factor.grid.codebook.floats:
                    yield f"{layer.site.name}/{t}.{f}.scale", factor.scale
        if layer.bias is not None:
            yield f"{layer.site.name}/bias", layer.bias
