"""The folded copy held against the network that it was made of, on the user's batch.

Which BatchNorms may be folded is read from one watched pass, and code that torch compiles or maps
can read the output of a layer unseen. So no rewrite is believed: a fold that changes what the
network answers is taken back, before any work.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from rabbet.core.survey import Survey
from rabbet.data.batches import floating, relative_error
from rabbet.data.task import Task, evaluating
from rabbet.errors import ModelError
from rabbet.model.bn_fold import fold
from rabbet.model.inspect import unfolded
from rabbet.model.surgery import copied, leave_fast_path

PADDING = (
    "torch's fused encoder, which writes zeros where a mask has padding, is not used in the "
    "compressed network, so these places differ"
)
SAME = 1e-3  # relative error that float arithmetic in another order may cause


def proven(model: nn.Module, survey: Survey, task: Task) -> tuple[nn.Module, Survey]:
    """The folded float32 copy of a network, and the survey of the folds that it bears.

    Raises ModelError if the copy answers otherwise than the network, whatever is folded.
    """
    folded = fold(model, survey)
    plain = model if _is_float32(model) else copied(model).float()
    wanted = answers(plain, task)
    if same(answers(folded, task), wanted):
        return folded, survey
    if not same(answers(plain, task), wanted):
        return folded, _noted(
            survey,
            "the network answers otherwise each time that it is given the "
            "same batch: its copies cannot be compared with it",
        )
    eager = copied(plain)
    leave_fast_path(eager)
    usual = answers(eager, task)
    if not same(usual, wanted):
        survey = _noted(survey, PADDING)
    names = [site.name for site in survey if site.norm is not None]
    survey = unfolded(model, survey, _faulty(model, survey, task, usual, names))
    folded = fold(model, survey)
    error = _error(answers(folded, task), usual)
    if not error <= SAME:
        raise ModelError(
            f"a copy of the network answers otherwise than the network itself, by "
            f"{100 * error:.3g} %, so nothing can be compressed in it; look for functions that it "
            "keeps and that hold layers of their own"
        )
    return folded, survey


def _faulty(
    model: nn.Module, survey: Survey, task: Task, wanted: Sequence[Tensor], names: list[str]
) -> list[str]:
    """Those of the named sites whose folds change the answer: halves are tried, down to one."""
    others = {site.name for site in survey} - set(names)
    if not names or same(answers(fold(model, unfolded(model, survey, others)), task), wanted):
        return []
    if len(names) == 1:
        return names
    middle = len(names) // 2
    halves = (names[:middle], names[middle:])
    return [name for half in halves for name in _faulty(model, survey, task, wanted, half)]


def _is_float32(model: nn.Module) -> bool:
    held = [*model.parameters(), *model.buffers()]
    return all(t.dtype == torch.float32 for t in held if t.is_floating_point())


def answers(model: nn.Module, task: Task) -> list[Tensor]:
    """What a network answers to the first batch."""
    with evaluating(model), torch.no_grad():
        return floating(task.run(model, task.read()[0]))


def same(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> bool:
    """Whether answers agree but for what float arithmetic in another order may cause."""
    return _error(ours, theirs) <= SAME


def _error(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """The largest relative error among the outputs, where both are finite."""
    if [t.shape for t in ours] != [t.shape for t in theirs]:
        return float("inf")
    return max((relative_error(a, b) for a, b in zip(ours, theirs, strict=True)), default=0.0)


def _noted(survey: Survey, note: str) -> Survey:
    return replace(survey, notes=(*survey.notes, note))
