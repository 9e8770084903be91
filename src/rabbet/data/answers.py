"""What the outputs of a network are, and how far two sets of them are apart.

Scores of classes are compared by their softmax, values by their squared error. Which of the two an
output holds is declared by the user, or told from the float network's own answers by a test that
can say no: the scores of one example exclude each other, so giving each class the scores of other
examples makes the softmax less certain; with values it changes nothing.

The squared error of values counts relative to how much each channel varies over the examples, and
each output counts as much as another. So neither units nor offsets matter: boxes in pixels do not
drown the classes beside them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from rabbet.errors import DataError, ModelError

Kind = Literal["scores", "values"]

ROWS = 2048  # rows of scores that the test looks at
FEWEST = 16  # with fewer rows the test says no
SHUFFLES = 4
CERTAIN = 0.85  # share of the shuffled entropy below which outputs are scores
DOUBT = 3.0  # over the root of the rows: what chance may take from that share
SHARPNESS = 3.0  # of the softmax that the test looks at: scores a deviation apart differ by this
NOISE = 1e-10  # smallest variance of a channel, as a share of its mean square


class UnlikeError(ModelError):
    """Outputs of a compressed network that cannot be compared with the float one's."""


@dataclass(frozen=True)
class Answers:
    """What each floating output of a network is, told from its answers to some examples.

    kinds: of each output. declared: whether the user said so. axes: the axis of each output that
    channels lie on; None if it has none but that of examples. variances: of each output, one for
    each channel, [channels] or [1]. weights: what each output counts, 1 on average.
    """

    kinds: tuple[Kind, ...]
    declared: bool
    axes: tuple[int | None, ...]
    variances: tuple[Tensor, ...]
    weights: tuple[float, ...]

    @classmethod
    def of(
        cls,
        answers: Sequence[Sequence[Tensor]],
        kinds: Kind | Sequence[Kind] | None = None,
        weights: Sequence[float] | None = None,
        examples: Sequence[int | None] = (),
    ) -> "Answers":
        """From the outputs of a float network for each of some batches, [batches][outputs].

        kinds: what the user says of all outputs, or of each. weights: what each output counts.
        examples: the axis of each output along which examples lie, the first if nothing is said.
        Raises DataError if the user speaks of another number of outputs than there are.
        """
        # Lists of images have as many outputs as there are images: those that all batches have.
        columns = [list(column) for column in zip(*answers, strict=False)]
        if isinstance(kinds, str):
            kinds = [kinds] * len(columns)
        for name, given in (("outputs", kinds), ("weights", weights)):
            if given is not None and len(given) != len(columns):
                raise DataError(
                    f"Task({name}=...) is about {len(given)} outputs; the network has "
                    f"{len(columns)} floating ones"
                )
        told = kinds or ["scores" if _are_scores(column) else "values" for column in columns]
        places = [*examples, *[0] * len(columns)][: len(columns)]
        axes = [_channel_axis(column, place) for column, place in zip(columns, places, strict=True)]
        variances = [_variances(c, axis) for c, axis in zip(columns, axes, strict=True)]
        given = [1.0] * len(columns) if weights is None else list(weights)
        mean = sum(given) / len(given)
        shares = tuple(weight / mean for weight in given)
        return cls(tuple(told), kinds is not None, tuple(axes), tuple(variances), shares)

    def divergence(self, ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> Tensor:
        """How far outputs are from the float network's, a scalar; the sum over the outputs.

        Of scores the KL divergence, of values `error`.
        """
        return self._sum(ours, theirs, self.kinds, self.weights)

    def error(self, ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> Tensor:
        """The squared error of all outputs as values, relative to the variance of each channel."""
        return self._sum(ours, theirs, ["values"] * len(self.kinds), self.weights)

    def judged(self, ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> Tensor:
        """What falls where both are judged: the divergence, and of scores only told `error`, too.

        See `Distance.is_below`.
        """
        divergence = self.divergence(ours, theirs)
        if self.declared or "scores" not in self.kinds:
            return divergence
        pairs = zip(self.weights, self.kinds, strict=True)
        only = tuple(weight if said == "scores" else 0.0 for weight, said in pairs)
        return divergence + self._sum(ours, theirs, ["values"] * len(self.kinds), only)

    def _sum(
        self,
        ours: Sequence[Tensor],
        theirs: Sequence[Tensor],
        kinds: Sequence[str],
        weights: Sequence[float],
    ) -> Tensor:
        total = theirs[0].new_zeros(())
        if [t.shape for t in ours] != [t.shape for t in theirs]:
            raise UnlikeError(
                "the compressed network's outputs have other shapes than the float one's: they "
                "depend on values (a selection by scores, say), and cannot be compared; give "
                "Task(batches, forward=...) that returns what is selected from"
            )
        for k, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            place = self._place(k)
            if not b.numel() or not weights[place]:
                continue
            scores = kinds[place] == "scores"
            apart = scores_divergence(a, b) if scores else self._relative(place, a, b)
            total = total + weights[place] * apart
        return total

    def _place(self, k: int) -> int:
        return min(k, len(self.kinds) - 1)

    def _relative(self, place: int, ours: Tensor, theirs: Tensor) -> Tensor:
        return ((ours - theirs).square() / self._spread(place, theirs)).mean()

    def element_weights(self, place: int, answer: Tensor, count: int) -> Tensor:
        """What the squared error of each element of an output counts, broadcastable to it.

        count: examples that the output is of. Where every element errs by the deviation of its
        channel, the sum over an example is the weight of the output.
        """
        place = self._place(place)
        inner = max(1, answer.numel() // count)
        return self.weights[place] / (inner * self._spread(place, answer))

    def _spread(self, place: int, answer: Tensor) -> Tensor:
        axis, variance = self.axes[place], self.variances[place].to(answer)
        if axis is None or answer.ndim <= axis or answer.shape[axis] != len(variance):
            return variance.mean()  # an output of another shape than those that were looked at
        return variance.view(-1, *[1] * (answer.ndim - axis - 1))


def scores_divergence(ours: Tensor, theirs: Tensor) -> Tensor:
    """KL divergence of the softmax over the classes, the mean over all rows."""
    axis = class_axis(theirs)
    classes = theirs.shape[axis]
    rows, goal = (t.movedim(axis, -1).reshape(-1, classes) for t in (ours, theirs))
    return F.kl_div(
        rows.log_softmax(-1), goal.log_softmax(-1), log_target=True, reduction="batchmean"
    )


def class_axis(scores: Tensor) -> int:
    """The axis of classes: the last one, and behind the examples where there are places in 2-D."""
    return 1 if scores.ndim >= 4 else scores.ndim - 1


def _are_scores(column: Sequence[Tensor]) -> bool:
    """Whether the classes of a row exclude each other, as only scores do."""
    first = column[0]
    classes = first.shape[class_axis(first)] if first.ndim > 1 else 1
    if classes < 2 or any(t.ndim != first.ndim for t in column):
        return False
    if any(t.shape[class_axis(t)] != classes for t in column):
        return False
    rows = torch.cat([t.detach().movedim(class_axis(t), -1).flatten(0, -2) for t in column])
    rows = rows[torch.linspace(0, len(rows) - 1, min(ROWS, len(rows))).long()].double().cpu()
    # Saturated, the entropy would hang on a few rows.
    rows = SHARPNESS * rows / (rows - rows.mean(1, keepdim=True)).std().clamp_min(1e-30)
    if len(rows) < FEWEST or not rows.isfinite().all() or len(rows.argmax(1).unique()) < 2:
        return False
    generator = torch.Generator().manual_seed(0)
    shuffled = [
        _entropy(rows.gather(0, torch.rand(rows.shape, generator=generator).argsort(0)))
        for _ in range(SHUFFLES)
    ]
    share = CERTAIN - DOUBT / math.sqrt(len(rows))
    return _entropy(rows) < share * sum(shuffled) / SHUFFLES


def _entropy(rows: Tensor) -> float:
    logs = rows.log_softmax(-1)
    return float(-(logs.exp() * logs).sum(-1).mean())


def _channel_axis(column: Sequence[Tensor], examples: int | None) -> int | None:
    """The axis, of those whose length never changes, along which sizes differ most.

    examples: the axis of examples, which is none of these, as the first is none.
    """
    first = column[0]
    if any(t.ndim != first.ndim for t in column):
        return None
    inner = [a for a in range(1, first.ndim) if a != examples]
    fixed = [a for a in inner if len({t.shape[a] for t in column}) == 1]
    return max(fixed, key=lambda a: _contrast(first, a), default=None)


def _contrast(answer: Tensor, axis: int) -> float:
    """How much the logarithms of the sizes differ along an axis."""
    rows = answer.detach().movedim(axis, 0).flatten(1).double()
    if len(rows) < 2:
        return 0.0
    return float((rows.square().mean(1) + 1e-30).log().std())


def _variances(column: Sequence[Tensor], axis: int | None) -> Tensor:
    """The variance of each channel over all examples and places, [channels]; never zero."""
    rows = [
        (t.detach().reshape(1, -1) if axis is None else t.detach().movedim(axis, 0).flatten(1))
        for t in column
    ]
    joined = torch.cat([r.double().cpu() for r in rows], 1)
    if not joined.numel():
        return torch.ones(len(joined))
    variance = joined.var(1, correction=0)
    energy = joined.square().mean()
    # A single answer, or a constant one, varies not at all: then its size is all there is.
    constant = float(variance.max()) <= 1e-12 * float(energy)
    variance = torch.full_like(variance, float(energy)) if constant else variance
    # What varies less than floats can tell is constant, and has no size to err by.
    least = (NOISE * joined.square().mean(1)).clamp_min(NOISE**2 * float(variance.max()))
    return variance.clamp_min(1e-30).maximum(least).float()
