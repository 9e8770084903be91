"""How far one network's answers are from another's."""

import contextlib
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rabbet.core.survey import Survey
from rabbet.data.batches import Batch, floating, outputs
from rabbet.data.task import Task
from rabbet.model.hooks import hooked


def divergence(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """How far outputs are from the float network's: KL for scores [n, classes], else relative squared error."""
    total = teacher[0].new_zeros(())
    for s, t in zip(student, teacher, strict=True):
        if t.ndim == 2 and t.shape[1] > 1:
            total = total + F.kl_div(
                s.log_softmax(1), t.log_softmax(1), log_target=True, reduction="batchmean"
            )
        else:
            total = total + (s - t).square().sum() / t.square().sum().clamp_min(1e-12)
    return total


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
        found = outputs(task.run(student, batch))
    return divergence(found, goal) + features * relative_error(ours, theirs)


def block_names(survey: Survey) -> list[str]:
    """The modules that directly hold a compressed layer, the network itself apart: its blocks, in order."""
    return list(dict.fromkeys(parent for s in survey if (parent := s.name.rpartition(".")[0])))


def relative_error(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> Tensor:
    """Mean over features of `|ours - theirs|^2 / |theirs|^2`; zero without features.

    Features of other shapes do not count, nor any if there are more of them on one side: an expert
    is shown other places, or none, where a compressed router decides otherwise.
    """
    pairs = list(zip(ours, theirs, strict=True)) if len(ours) == len(theirs) else []
    parts = [
        (a - b).square().mean() / b.square().mean().clamp_min(1e-12)
        for a, b in pairs
        if a.shape == b.shape and len(a)
    ]
    return torch.stack(parts).mean() if parts else torch.zeros(())
