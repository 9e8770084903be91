"""How many answers are right: top-1 accuracy, and how sure so many examples make it."""

import hashlib
import math
from collections.abc import Iterable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from rabbet.data.batches import describe, outputs, suited
from rabbet.data.measure import standard_error
from rabbet.data.state import clean_pass
from rabbet.data.task import call, evaluating
from rabbet.errors import DataError


class Accuracy(float):
    """A share of right answers in per cent, which knows how sure it is.

    rights: how many labels of each example are answered right; labels: how many each has. told: a
    hash of what the labels are, in their order.
    """

    rights: tuple[int, ...]
    labels: tuple[int, ...]
    told: str

    def __new__(cls, rights: Sequence[int], labels: Sequence[int], told: str = "") -> Self:
        """From the right answers and the labels of each example.

        Raises DataError if there is no label, or not as many numbers of the one as of the other.
        """
        if len(rights) != len(labels) or not sum(labels):
            raise DataError(
                f"an accuracy is of examples with labels; found {len(rights):,} numbers of right "
                f"answers, and {len(labels):,} of labels, {sum(labels):,} in all"
            )
        found = super().__new__(cls, 100 * sum(rights) / sum(labels))
        found.rights, found.labels, found.told = tuple(rights), tuple(labels), told
        return found

    def __getnewargs__(self) -> tuple[Any, ...]:
        return self.rights, self.labels, self.told

    @property
    def examples(self) -> int:
        """How many stand behind it."""
        return len(self.rights)

    @property
    def error(self) -> float:
        """The standard error in points, examples drawn anew.

        Labels of one example, its words or pixels, count together. All right, or none, is not
        certain either: two more examples are taken to be right and two wrong, as Agresti and Coull
        add them (The American Statistician 52, 1998).
        """
        mean = sum(self.labels) / self.examples
        return 100 * standard_error([*self.rights, mean, mean, 0, 0], [*self.labels, *[mean] * 4])

    def is_of_the_same(self, other: "Accuracy") -> bool:
        """Whether another accuracy has the same labels in the same order."""
        return (self.labels, self.told) == (other.labels, other.told)

    def drop(self, before: "Accuracy") -> tuple[float, float]:
        """By how many points this is below another accuracy on the same examples, and how surely.

        The second number is the standard error of the difference, example by example. It is usually
        smaller than those of the two: what is hard is so for both. Half an example more is taken
        to be right in one alone, half in the other, one in both alike, as Agresti and Min add them
        (Statistics in Medicine 24, 2005). Examples must come in the same order. Raises DataError
        where labels differ, which tells most of what is in another order.
        """
        if not isinstance(before, Accuracy):
            raise DataError(
                f"a drop is from another accuracy, as rabbet.accuracy gives it; found {before!r}"
            )
        if not self.is_of_the_same(before):
            raise DataError(
                f"accuracies are of other examples ({before.examples:,} and {self.examples:,}), or "
                "of the same in another order, and cannot be compared one by one: read them in one "
                "order, without shuffling"
            )
        mean = sum(self.labels) / self.examples
        apart = [a - b for a, b in zip(before.rights, self.rights, strict=True)]
        half = mean * math.sqrt(0.5)  # two of these have the square of half an example each way
        error = standard_error([*apart, half, -half], [*self.labels, mean, mean])
        return 100 * sum(apart) / sum(self.labels), 100 * error


def examples_of(value: float) -> int | None:
    """Of how many examples a measure is a share; None if it is none, or they have more labels."""
    if not isinstance(value, Accuracy) or set(value.labels) != {1}:
        return None
    return value.examples


def accuracy(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], classes: int | None = None
) -> Accuracy:
    """Top-1 accuracy in per cent over (inputs, labels), in eval mode; it knows its standard error.

    Axis 1 of the scores is that of the classes; labels have the other axes, such as [batch, words]
    for scores [batch, classes, words], as torch's cross-entropy takes them. The model is left in
    the mode that it was in. Of two networks on the same batches, `after.drop(before)` is what was
    lost, with the standard error of that.

    classes: how many there are, where the labels' source says so; the scores must be of as many.
    Raises DataError for batches that are not such pairs.
    """
    rights: list[int] = []
    labels: list[int] = []
    told = hashlib.sha256()
    with evaluating(model), torch.no_grad():
        for batch in batches:
            pair = isinstance(batch, tuple | list) and len(batch) == 2
            if not pair or not isinstance(batch[1], Tensor):
                raise DataError(
                    f"accuracy needs batches of (inputs, labels), found {describe(batch)}"
                )
            x, y = batch
            with clean_pass(model, x):
                scores = outputs(call(model, suited(x, model)))[0]
            whole = _checked(scores, y, classes).cpu()
            named = scores.argmax(1).cpu() == whole
            named &= ~scores.isnan().any(1).cpu()  # no answer is no right one
            each = math.prod(whole.shape[1:])
            rights += named.reshape(len(whole), each).sum(1).tolist()
            labels += [each] * len(whole)
            told.update(whole.long().contiguous().numpy().tobytes())
    if not sum(labels):
        raise DataError("no labelled batch to measure accuracy on")
    return Accuracy(rights, labels, told.hexdigest())


def _checked(scores: Tensor, y: Tensor, classes: int | None) -> Tensor:
    """Labels as whole numbers; raises DataError unless they are classes of the scores."""
    if scores.shape[:1] + scores.shape[2:] != y.shape or scores.ndim < 2:
        raise DataError(
            f"scores {list(scores.shape)} are of classes on axis 1 and need labels "
            f"{list(scores.shape[:1] + scores.shape[2:])}, whole numbers; "
            f"found {describe(y)}{_classes_last(scores, y)}"
        )
    if classes not in (None, scores.shape[1]):
        raise DataError(
            f"the network gives scores of {scores.shape[1]} classes, and the labels are "
            f"numbers of {classes}: there is a folder for each, numbered in the order of "
            "their names; give folders of all classes, or labels that are the network's "
            "own numbers in an .npz or by a module:callable"
        )
    whole = not y.is_floating_point() or bool((y == y.round()).all())
    y = y.long() if whole else y
    if y.numel() and not (whole and 0 <= y.min() <= y.max() < scores.shape[1]):
        raise DataError(
            f"labels are whole numbers from 0 below {scores.shape[1]}, the number of "
            f"classes in the scores; found {describe(y)} from {y.min():g} to {y.max():g}"
        )
    return y


def _classes_last(scores: Tensor, labels: Tensor) -> str:
    """What to do if the last axis is that of the classes, in words; else nothing."""
    if scores.ndim < 3 or scores.shape[:-1] != labels.shape:
        return ""
    return ": the classes seem to be on the last axis; hand scores on as scores.movedim(-1, 1)"


def deviation(count: int, *shares: float) -> float:
    """The standard deviation of the difference of shares in per cent of so many examples.

    They are taken as independent; of the same examples they are usually nearer to each other. All
    right, or none, is not certain either: at least two are taken to be right and two wrong, as many
    as Agresti and Coull add (The American Statistician 52, 1998). So where none of n is wrong,
    1.645 deviations are 2.3 / n and two are 2.8 / n, as far as errors of 10 % and 6 % reach there.
    """
    least = min(2 / count, 0.5)
    parts = (min(max(share / 100, least), 1 - least) for share in shares)
    return 100 * math.sqrt(sum(part * (1 - part) for part in parts) / count)
