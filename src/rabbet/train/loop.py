"""The training loop: it resumes from the last checkpoint, and runs on one process or several.

A `Course` says what is trained, on which batches and by which loss; the loop knows neither bits nor
ranks. With `torch.distributed` initialised (`torchrun`), every process takes its shard of each
batch and gradients are averaged, so that all processes hold the same parameters after every step.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rabbet.core.history import History
from rabbet.data.batches import Batch
from rabbet.data.examples import Axes
from rabbet.errors import DataError
from rabbet.jobs import Jobs

BETAS = (0.9, 0.99)
ADAM = ("step", "exp_avg", "exp_avg_sq")
FUSED = ("cpu", "cuda")  # devices that have Adam as one kernel
Group = dict[str, Any]
"""Parameters that share a learning rate: `params`, and `base`, the rate before the schedule."""


class Course(ABC):
    """What the loop runs: parameters, a loss, and what is done between steps.

    steps: of the whole run. groups: the parameters that are trained. fused: use Adam's fused kernel
    on devices that have it; it is several times faster, but rounds differently. learned: whether
    any parameter got a gradient; there is none if the forward runs under `torch.no_grad`. losses:
    of the steps so far, this process's.
    """

    steps: int
    groups: Sequence[Group]
    fused = False
    learned = True
    losses: Sequence[float] = ()

    @property
    def summary(self) -> str:
        """The number of steps in words, for a note; it says so if no gradient came through."""
        if self.learned:
            return f"{self.steps} steps"
        return f"{self.steps} steps, and no gradient came through the network in any"

    def loss_history(self, stage: str) -> History:
        """The loss of each step's batch."""
        return History(stage, "step", "loss of the step's batch", {"": tuple(self.losses)})

    def rate(self, step: int) -> float:
        """The factor on the base rates: a cosine down to a fiftieth, with ten warm-up steps."""
        cosine = max(0.5 * (1 + math.cos(math.pi * step / self.steps)), 0.02)
        return cosine * min(1.0, (step + 1) / 10)

    @abstractmethod
    def losses_of(self, step: int) -> Iterator[Tensor]:
        """The loss of a step's batch in parts, scalars that add up to it.

        On several processes, of this one's `shard`. The gradient of each part is taken before the
        next is asked for, so memory holds that of one.
        """

    def update(self, adam: torch.optim.Optimizer) -> None:
        """Update the parameters by their gradients: with Adam, unless a course overrides this."""
        adam.step()

    def after_step(self, step: int) -> None:  # noqa: B027 (not every course has to)
        """Called after the parameters were updated, while their gradients still exist."""

    @property
    def detail(self) -> str:
        """The current state in words, for the progress display; empty if there is none."""
        return ""

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint holds besides the parameters and Adam's state."""
        return {}

    def restore(self, state: dict[str, Tensor]) -> None:  # noqa: B027 (not every course has to)
        """The inverse of `state`."""


def run(course: Course, jobs: Jobs, key: str, stage: str, every: int = 100) -> None:
    """Train to the end, in place.

    If the jobs have a folder, a checkpoint is kept there every `every` steps, and a run that was
    stopped resumes from the last. Raises DataError if the loss is not finite.
    """
    groups = [dict(group, lr=group["base"]) for group in course.groups]
    parameters = [p for group in groups for p in group["params"]]
    # The fused kernel goes through memory in storage order: a parameter and a gradient of different
    # strides would be paired wrongly.
    fused = course.fused and all(p.device.type in FUSED and p.is_contiguous() for p in parameters)
    # None leaves it to torch, which takes many small parameters together where that is faster.
    optimiser = torch.optim.Adam(groups, betas=BETAS, fused=fused or None)
    for p in parameters:
        p.requires_grad_()
    first = _resume(course, jobs, key, optimiser, parameters)
    losses = course.losses = list(course.losses[:first])
    try:
        for step in range(first, course.steps):
            rate = course.rate(step)
            for group in optimiser.param_groups:
                group["lr"] = group["base"] * rate
            optimiser.zero_grad(set_to_none=True)
            losses.append(_backward(course, step, stage))
            _fill_missing_gradients(parameters)
            average([p.grad for p in parameters if p.grad is not None])
            course.update(optimiser)
            course.after_step(step)
            detail = course.detail
            jobs.progress(f"{stage}: {detail}" if detail else stage, step + 1, course.steps)
            due = (step + 1) % every == 0 or step + 1 == course.steps
            if due and jobs.lasts(key) and first_process():
                jobs.keep(key, _checkpoint(course, optimiser, parameters, step + 1))
        course.learned = any(optimiser.state[p] for p in parameters)
    finally:
        for p in parameters:
            p.requires_grad_(False)


def _backward(course: Course, step: int, stage: str) -> float:
    """Add the gradients of a step's loss to those of the parameters; returns the loss."""
    total = 0.0
    with torch.enable_grad():
        for loss in course.losses_of(step):
            if not torch.isfinite(loss):
                raise DataError(
                    f"the loss of step {step + 1} of {stage} is not finite: check the batches, the "
                    "loss and that gradients through the network are finite; a lower rate may help"
                )
            total += float(loss.detach())
            if loss.requires_grad:
                loss.backward()
    return total


def first_process() -> bool:
    """Whether this is the process that writes files: the only one, or the first of several."""
    return not _several() or dist.get_rank() == 0


def shard(batch: Batch, axes: Axes) -> Batch:
    """This process's part of a batch: every n-th example, n the number of processes.

    Every process gets equally many, so examples that are left over are dropped. Raises DataError
    for a batch of fewer examples than processes.
    """
    if not _several():
        return batch
    size, count = axes.count(batch), dist.get_world_size()
    if size < count:
        raise DataError(
            f"a batch of {size} cannot be shared by {count} processes; make batches larger"
        )
    used = size - size % count  # equal parts, so that the mean of means is the mean
    return axes.cut(batch, slice(dist.get_rank(), used, count))


def _fill_missing_gradients(parameters: Sequence[Tensor]) -> None:
    """Set a missing gradient to zero if the parameter has one on another process.

    A parameter may be reached by the examples of one process and not by those of another.
    """
    if not _several():
        return
    reached = torch.tensor(
        [float(p.grad is not None) for p in parameters], device=parameters[0].device
    )
    dist.all_reduce(reached)
    for p, count in zip(parameters, reached.tolist(), strict=True):
        if count and p.grad is None:
            p.grad = torch.zeros_like(p)


def average(tensors: Sequence[Tensor]) -> None:
    """Replace tensors by their mean over all processes, in place."""
    if not _several():
        return
    for tensor in tensors:
        dist.all_reduce(tensor)
        tensor.div_(dist.get_world_size())


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _checkpoint(
    course: Course, optimiser: torch.optim.Optimizer, parameters: Sequence[Tensor], step: int
) -> dict[str, Tensor]:
    losses = torch.tensor(course.losses, dtype=torch.float64)
    kept = {"step": torch.tensor([step]), "losses": losses}
    for k, p in enumerate(parameters):
        state = optimiser.state[p]
        kept |= {f"{k}.value": p.detach().clone()}
        # Each parameter has its own step count: it may have got its first gradient late.
        kept |= {f"{k}.{name}": state[name].clone() for name in ADAM if name in state}
    return kept | {f"course.{name}": tensor.clone() for name, tensor in course.state().items()}


def _resume(
    course: Course,
    jobs: Jobs,
    key: str,
    optimiser: torch.optim.Optimizer,
    parameters: Sequence[Tensor],
) -> int:
    kept = jobs.kept(key) if jobs.lasts(key) else None
    if kept is None or "losses" not in kept:  # none, or one of before losses were kept
        return 0
    step, course.losses = kept["step"], kept["losses"].tolist()
    with torch.no_grad():
        for k, p in enumerate(parameters):
            p.copy_(kept[f"{k}.value"])
            if f"{k}.exp_avg" in kept:
                # Adam keeps its step count on the CPU, but the fused kernel keeps it on the
                # parameter's device.
                step_device = p.device if optimiser.defaults["fused"] else torch.device("cpu")
                optimiser.state[p] = {
                    n: kept[f"{k}.{n}"].to(step_device if n == "step" else p.device) for n in ADAM
                }
    course.restore(
        {k.removeprefix("course."): v for k, v in kept.items() if k.startswith("course.")}
    )
    return int(step)
