"""Along which axis the examples of a batch lie, told by running the network on some of them.

Examples are what a network answers one by one: without the first half of them, or behind as many
others, it answers as before. That holds for no other axis of a batch, such as time, nodes of a
graph or channels, unless the network treats its entries one by one as well.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from rabbet.data.batches import Batch, floating, relative_error, replaced
from rabbet.data.examples import Axes
from rabbet.data.task import Task, evaluating
from rabbet.errors import DataError

SAME = 0.01  # relative error of kernels for another batch size, and of codes that they tip
LEAST = 1e-3  # of the size of an answer, below which its spread is the noise of floats
UNCONFIRMED = (
    "examples are taken to lie along the axes that were declared, though the network does not "
    "answer half of a batch as it answers the whole"
)
AXES = (0, 1)  # torch's layers have their batches on one of these


def with_axes(model: nn.Module, task: Task) -> Task:
    """The task, with the axes of its examples declared, by the user or by this proof.

    Passes on what the forward raises on the first batch as it is.
    """
    if task.axes is not None:
        return task
    batch = task.first()
    with evaluating(model), torch.no_grad():
        whole = floating(task.run(model, batch))
        for axis in AXES:
            axes = Axes.along(batch, axis)
            if axes.known and _independent(model, task, batch, axes, whole):
                return replace(task, batches=task.source, axes=axes.each)
    return replace(task, batches=task.source, axes=())


def doubts(model: nn.Module, task: Task) -> tuple[str, ...]:
    """A note where a run does not confirm that examples lie along the axes that were declared.

    Raises DataError where it confirms another axis instead.
    """
    axes = task.examples
    if not axes.known:
        return ()
    batch = task.first()
    with evaluating(model), torch.no_grad():
        whole = floating(task.run(model, batch))
        if _independent(model, task, batch, axes, whole):
            return ()
        for axis in AXES:
            other = Axes.along(batch, axis)
            if other.known and _independent(model, task, batch, other, whole):
                raise DataError(
                    f"axes={task.axes!r} was declared, but the network answers otherwise when it "
                    f"is given half of a batch along them; along axis {axis} it answers as before: "
                    f"pass axes={axis}, or none"
                )
    return (UNCONFIRMED,)


def _independent(
    model: nn.Module, task: Task, batch: Batch, axes: Axes, whole: Sequence[Tensor]
) -> bool:
    """Whether a network answers a batch behind others, and its last half alone, as before."""
    size = axes.count(batch)
    try:
        behind = floating(task.run(model, axes.join([_others(batch, axes), batch])))
        if not _end_alike(behind, whole, (2, 1)):
            return False
        if size == 1:
            return True
        half = floating(task.run(model, axes.cut(batch, slice(size // 2, None))))
        return _end_alike(whole, half, (size, size - size // 2))
    except Exception:  # the forward is the user's, and may raise anything for such batches
        return False


def _others(batch: Batch, axes: Axes) -> Batch:
    """As many other examples: the same in another order, or a single one changed."""
    size = axes.count(batch)
    if size > 1:
        return axes.take(batch, torch.arange(size).roll(1))
    owned = iter(axes.each)

    def changed(t: Tensor) -> Tensor:
        if next(owned) is None or not t.ndim:
            return t
        return t.flip(-1) * 0.5 if t.is_floating_point() else t.flip(-1)

    return replaced(batch, changed)


def _end_alike(long: Sequence[Tensor], short: Sequence[Tensor], sizes: tuple[int, int]) -> bool:
    if len(long) != len(short):
        return False
    told = [_ends_with(a, b, sizes) for a, b in zip(long, short, strict=True)]
    return True in told and False not in told


def _ends_with(long: Tensor, short: Tensor, sizes: tuple[int, int]) -> bool | None:
    """Whether one answer is the end of another; None for one that holds no examples, like a loss.

    sizes: how many examples each is of.
    """
    if long.shape == short.shape:
        return None
    differing = [d for d in range(long.ndim) if long.shape[d : d + 1] != short.shape[d : d + 1]]
    if long.ndim != short.ndim or len(differing) != 1:
        return False
    axis = differing[0]
    if long.shape[axis] * sizes[1] != short.shape[axis] * sizes[0]:
        return False
    end = long.narrow(axis, long.shape[axis] - short.shape[axis], short.shape[axis])
    if relative_error(short, end) > SAME:
        return False
    # An offset that all answers share says nothing of any of them.
    mean = long.double().mean(axis, keepdim=True)
    spread = float((end.double() - mean).nan_to_num().norm())
    least = LEAST * float(end.double().nan_to_num().norm())
    return float((short.double() - end).nan_to_num().norm()) <= SAME * max(spread, least)
