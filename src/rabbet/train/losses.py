"""How far one network's answers are from another's."""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rabbet.core.survey import Survey
from rabbet.data.batches import Batch, floating, outputs
from rabbet.data.task import Task
from rabbet.model.hooks import hooked

LEAST = 1e-12  # what a mean square that others are relative to counts for at least


def relative_error(
    ours: Tensor, theirs: Tensor, reduce: Callable[[Tensor], Tensor] = torch.mean
) -> Tensor:
    """`|ours - theirs|^2 / |theirs|^2`, of means, or of sums (`reduce`)."""
    return reduce((ours - theirs).square()) / reduce(theirs.square()).clamp_min(LEAST)


def divergence_of_scores(ours: Tensor, theirs: Tensor) -> Tensor:
    """KL of the softmax of scores [n, classes], mean over the rows."""
    return F.kl_div(
        ours.log_softmax(-1), theirs.log_softmax(-1), log_target=True, reduction="batchmean"
    )


def divergence(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """How far outputs are from the float network's: KL for scores [n, classes], else relative squared error."""
    total = teacher[0].new_zeros(())
    for ours, theirs in zip(student, teacher, strict=True):
        if theirs.ndim == 2 and theirs.shape[1] > 1:
            total = total + divergence_of_scores(ours, theirs)
        else:
            total = total + relative_error(ours, theirs, torch.sum)
    return total


def feature_error(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> Tensor:
    """Mean over features of their relative errors; zero without features.

    Features of other shapes do not count, nor any if there are more of them on one side: an expert
    is shown other places, or none, where a compressed router decides otherwise.
    """
    pairs = list(zip(ours, theirs, strict=True)) if len(ours) == len(theirs) else []
    parts = [relative_error(a, b) for a, b in pairs if a.shape == b.shape and len(a)]
    return torch.stack(parts).mean() if parts else torch.zeros(())


def answer_error(ours: Tensor, theirs: Tensor, mask: Tensor | None, scores: bool) -> Tensor:
    """How far the answers at the places that count are apart: KL where they are scores of classes, else as numbers."""
    classes = scores and ours.ndim > 1 and ours.shape[-1] > 1
    rows, goal = real_places(ours, mask), real_places(theirs, mask)
    return divergence_of_scores(rows, goal) if classes else relative_error(rows, goal)


def hidden_error(ours: Tensor, theirs: Tensor, mask: Tensor | None) -> Tensor:
    """Of hidden states [batch, places, width]: mean squared error plus 1 - cosine, over the places that count."""
    rows, goal = real_places(ours, mask), real_places(theirs, mask)
    return F.mse_loss(rows, goal) + (1 - F.cosine_similarity(rows, goal, -1)).mean()


def attention_divergence(ours: Tensor, theirs: Tensor, mask: Tensor | None) -> Tensor:
    """Mean KL of attention [batch, heads, query, key] over the queries that count."""
    logs = (theirs + 1e-8).log() - (ours + 1e-8).log()
    each = (theirs * logs).sum(-1).mean(1)  # [batch, query]
    return each.mean() if mask is None or each.shape != mask.shape else each[mask.bool()].mean()


def real_places(x: Tensor, mask: Tensor | None) -> Tensor:
    """Rows [n, width] of the places that count; a tensor without places has only its batch.

    Of two axes the second is the width, even where there happen to be as many classes as places.
    """
    if x.ndim < 2:
        return x.reshape(-1, 1)
    if mask is None or x.ndim < 3 or x.shape[:2] != mask.shape:
        return x.flatten(0, -2)
    return x[mask.bool()]


@contextlib.contextmanager
def _tapped(model: nn.Module, names: Sequence[str]) -> Iterator[list[Tensor]]:
    """Collects the outputs of named modules during a forward pass."""
    seen: list[Tensor] = []

    def keep(_: nn.Module, __: object, out: object) -> None:
        seen.extend(floating(out)[:1])

    with hooked((model.get_submodule(name), keep) for name in names):
        yield seen


def taught(
    student: nn.Module,
    teacher: nn.Module,
    task: Task,
    batch: Batch,
    blocks: Sequence[str],
    features: float,
) -> Tensor:
    """How far the student's answers to a batch are from the teacher's, with a gradient for the student.

    The divergence of the outputs plus `features` times the mean relative error of what the named
    blocks give.
    """
    with torch.no_grad(), _tapped(teacher, blocks) as theirs:
        goal = outputs(task.run(teacher, batch))
    with _tapped(student, blocks) as ours:
        answers = outputs(task.run(student, batch))
    return divergence(answers, goal) + features * feature_error(ours, theirs)


def block_names(survey: Survey) -> list[str]:
    """The modules that directly hold a compressed layer, the network itself apart: its blocks, in order."""
    return list(dict.fromkeys(parent for s in survey if (parent := s.name.rpartition(".")[0])))
