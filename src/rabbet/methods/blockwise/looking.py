"""What is measured of the float network, block by block: moments of inputs, and what errors do.

What an error D of one weight does to the output is the divergence of the scores, in nats a word. To
second order it is half the Fisher information: `1/2 E (g . D)^2` with g the gradient of the log
probability of words drawn from the network's own scores. (Of values it is the squared error
relative to the variance of each channel, with random signs in place of drawn words.)

Errors such as rounding leaves are white in the metric H of the layer's inputs, with rows as large
as the row's largest weight. In the mean over these `E (g . D)^2 = sum over rows of s^2 g_r H^-1
g_r`, and their error in the metric is `n s^2` a row. The quotient of the two is what one unit of a
layer's error costs.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from rabbet.calibrate.moments import Moments, twofold
from rabbet.core.survey import Survey
from rabbet.data.answers import Answers
from rabbet.data.batches import Batch
from rabbet.data.task import Task
from rabbet.errors import DataError, ModelError
from rabbet.jobs import Jobs
from rabbet.layers import Site
from rabbet.methods.blockwise.gathering import Felt, Gathering, Sites, gathered, learning
from rabbet.methods.blockwise.shelf import MEMORY, Shelf
from rabbet.methods.blockwise.stack import Call, Stack
from rabbet.model.hooks import hooked
from rabbet.reconstruct.candidates import metric_of
from rabbet.spread import portions, spread

STAGE = "measuring blocks"
KEPT = 2**26  # entries of second moments that memory keeps


@dataclass
class Seen:
    """What is known of a network after `look`.

    moments: of the inputs of each site, see `Workpiece.moments`. ratios: the divergence of the
    scores, in nats a word, that one unit of a site's error in its metric costs. begun: the hidden
    states before the first block, by batch. calls: what each block is given besides, by batch.
    channels: of each block, what an error in a channel of the hidden states behind it costs,
    relative to the mean, [width].
    """

    moments: Moments = field(default_factory=lambda: Moments(KEPT))
    ratios: dict[str, float] = field(default_factory=dict)
    begun: Shelf = field(default_factory=Shelf)
    calls: list[list[Call]] = field(default_factory=list)


def by_block(stack: Stack, survey: Survey) -> tuple[list[Site], list[list[Site]]]:
    """The sites outside of the blocks, and those of each block."""
    outside: list[Site] = []
    inside: list[list[Site]] = [[] for _ in range(len(stack))]
    for site in survey:
        place = stack.is_inside(site.name)
        (outside if place is None else inside[place]).append(site)
    return outside, inside


def placed(stack: Stack, block: nn.Module, sites: Sequence[Site]) -> list[tuple[Site, nn.Module]]:
    """The sites of one block with their modules."""
    return [(s, block.get_submodule(stack.within(s.name))) for s in sites]


class Look:
    """Measures a float network: forth over all batches, and back over the first `scored`."""

    def __init__(  # noqa: PLR0913 (all that it takes)
        self,
        stack: Stack,
        survey: Survey,
        task: Task,
        batches: Sequence[Batch],
        *,
        scored: int,
        jobs: Jobs,
        answers: Answers | None = None,
    ) -> None:
        """answers: what the outputs are; None: scores of words. jobs: where blocks run."""
        self.stack, self.task, self.batches, self.answers = stack, task, batches, answers
        self.jobs = jobs
        self.outside, self.inside = by_block(stack, survey)
        self.scored = min(scored, len(batches))
        self.forth = [Shelf(MEMORY // (len(stack) + 1)) for _ in range(len(stack) + 1)]
        self.back = Shelf(half=False)
        self.seen, self.words = Seen(), 0
        self.now = self.seen.begun

    def __call__(self, seed: int) -> Seen:
        """All that there is to see.

        Raises ModelError for a network whose blocks are no chain, or whose first output is not
        scores of words, DataError for inputs that are not finite.
        """
        count, progress = len(self.stack), self.jobs.progress
        with self.stack.ends():
            self.stack.require_a_chain(self.task, self.batches[0])
            self._enter()
        for k in range(count):
            progress(STAGE, k, 3 * count)
            self._forth(k)
        with self.stack.ends() as model:
            felt = self._leave(model, seed)
        for k in reversed(range(count)):
            progress(STAGE, 3 * count - 2 * (k + 1), 3 * count)
            self._back(k)
        with self.stack.ends() as model:
            self._return(model, felt)
        progress(STAGE, 3 * count, 3 * count)
        return self.seen

    def _enter(self) -> None:
        for i, batch in enumerate(self.batches):
            with torch.no_grad():
                hidden, calls = self.stack.enter(self.task, batch)
            self.seen.begun.put(i, hidden)
            self.seen.calls.append(calls)

    def _forth(self, k: int) -> None:
        gathering, reached = Gathering(), Shelf()
        with self.stack.block(k) as block:
            shared = block, [(s, self.stack.within(s.name)) for s in self.inside[k]]
            parts = portions(self._given(k), len(self.batches))
            done = 0
            for outs, part in spread(self.jobs, STAGE, gathered, shared, parts):
                gathering.add(part)
                for out in outs:
                    reached.put(done, out)
                    done += 1
        self.now = reached
        for name, second in gathering.means(self.jobs, STAGE):
            self.seen.moments.add(name, second)

    def _given(self, k: int) -> Iterator[tuple[Tensor, Call]]:
        """What a block is given, by batch; what gradients are taken of is kept."""
        for i in range(len(self.batches)):
            given = self.now[i]
            if i < self.scored:
                self.forth[k].put(i, given)
            yield given, self.seen.calls[i][k]

    def _leave(self, model: nn.Module, seed: int) -> dict[str, Felt]:
        """The scores, the gradient that they leave at the last block, and at what is behind it."""
        generator = torch.Generator().manual_seed(seed)
        places = [(s, model.get_submodule(s.name)) for s in self.outside]
        heads = [(model.get_submodule(h), s) for s in self.outside for h in s.heads]
        gathering = Gathering()
        before = [(m, gathering.hook(s)) for m, s in heads]
        before += [(m, gathering.hook(s)) for s, m in places if not s.looks_up]
        last = len(self.stack)
        for i in range(self.scored):
            self.forth[last].put(i, self.now[i])
        with torch.no_grad(), hooked(before=before):  # what the metric of the ends is made of
            for i in range(self.scored):
                scores = self.stack.leave(self.task, self.batches[i], self.forth[last][i])
                gathering.done()
                _require_scores(scores, self._values)
        for name, second in gathering.means(self.jobs, STAGE):
            site = next(s for s in self.outside if s.name == name)
            table = site.weight(model).float() if site.heads else None
            self.seen.moments.add(name, second if table is None else twofold(table, second))
        felt = {s.name: self._felt(s, m) for s, m in places}
        for i in range(self.scored):
            with learning(places) as hand_on:
                hidden = self.forth[last][i].requires_grad_()
                scores = self.stack.leave(self.task, self.batches[i], hidden)
                self.words += scores.numel() // scores.shape[-1]
                slope = self._slope(i, scores.detach(), generator)
                (scores * slope).sum().backward()
                hand_on(felt)
                self.back.put(i, _grad(hidden))
        return felt

    @property
    def _values(self) -> bool:
        """Whether the first output is values, not scores."""
        return self.answers is not None and self.answers.kinds[0] == "values"

    def _slope(self, i: int, output: Tensor, generator: torch.Generator) -> Tensor:
        """A random gradient by the first output whose mean square is what an error costs."""
        if not self._values:
            return _drawn(output, generator)
        assert self.answers is not None
        count = self.task.examples.count(self.batches[i])
        signs = torch.randint(0, 2, output.shape, generator=generator).to(output) * 2 - 1
        return signs * self.answers.element_weights(0, output, count).sqrt()

    def _back(self, k: int) -> None:
        with self.stack.block(k) as block:
            felt = {s.name: self._felt(s, m) for s, m in placed(self.stack, block, self.inside[k])}
            shared = block, [(s, self.stack.within(s.name)) for s in self.inside[k]], felt
            given = (
                (self.forth[k][i], self.seen.calls[i][k], self.back[i]) for i in range(self.scored)
            )
            done = 0
            parts = portions(given, self.scored)
            for slopes, totals in spread(self.jobs, STAGE, _back, shared, parts):
                for slope in slopes:
                    self.back.put(done, slope)
                    done += 1
                for name, total in totals.items():
                    felt[name].total += total
        self.forth[k] = Shelf(0)  # of no more use
        self.seen.ratios |= {name: each.ratio(self.words) for name, each in felt.items()}

    def _return(self, model: nn.Module, felt: dict[str, Felt]) -> None:
        """What the gradient at the first block says of what lies before it."""
        places = [(s, model.get_submodule(s.name)) for s in self.outside]
        for i in range(self.scored):
            with learning(places) as hand_on:
                hidden, _ = self.stack.enter(self.task, self.batches[i])
                if hidden.requires_grad:
                    (hidden * self.back[i].to(hidden)).sum().backward()
                    hand_on(felt)
        self.seen.ratios |= {name: each.ratio(self.words) for name, each in felt.items()}

    def _felt(self, site: Site, module: nn.Module) -> Felt:
        second = self.seen.moments.get(site.name)
        weight = site.kind.weight(module).detach().float()
        return Felt(site, weight, metric_of(site, weight, second))


def _back(
    shared: tuple[nn.Module, Sites, dict[str, Felt]],
    part: Sequence[tuple[Tensor, Call, Tensor]],
) -> tuple[list[Tensor], dict[str, float]]:
    """Gradients by hidden states before a block; what errors of its sites cost."""
    block, sites, felt = shared
    before = {name: each.total for name, each in felt.items()}
    places = [(s, block.get_submodule(n)) for s, n in sites]
    slopes: list[Tensor] = []
    for given, call, slope in part:
        with learning(places) as hand_on:
            hidden = given.requires_grad_()
            out = call(block, hidden)
            (out * slope.to(out)).sum().backward()
            hand_on(felt)
            slopes.append(_grad(hidden))
    totals = {name: each.total - before[name] for name, each in felt.items()}
    for name, each in felt.items():
        each.total = before[name]
    return slopes, totals


def _grad(x: Tensor) -> Tensor:
    if x.grad is None:
        raise ModelError("no gradient reaches the hidden states of a block")
    return x.grad


def _require_scores(scores: Tensor, values: bool) -> None:
    flat = scores.ndim < 2 or scores.shape[-1] < 2
    if not scores.is_floating_point() or (flat and not values):
        raise ModelError(
            f"the first output is {scores.dtype} {[*scores.shape]}, not scores [..., words] as a "
            "language model gives them; if they are values, say so: Task(batches, outputs='values')"
        )
    if not bool(torch.isfinite(scores).all()):
        raise DataError("the scores hold NaN or infinite values on the given batches")


def _drawn(scores: Tensor, generator: torch.Generator) -> Tensor:
    """The gradient by scores [..., words] of the log probabilities of words drawn from them."""
    rows = scores.float().flatten(0, -2).softmax(1)
    words = torch.multinomial(rows.cpu(), 1, generator=generator).to(rows.device)
    slope = rows.neg_()
    slope.scatter_add_(1, words, torch.ones_like(slope[:, :1]))
    return slope.view(scores.shape).to(scores)
