"""The one training loop: steps, usually of Adam, that go on from the last checkpoint, on one process or several.

What is trained, on which batches and by which loss is a `Course`; the loop knows neither bits nor
ranks. With `torch.distributed` initialised (`torchrun`), every process takes its share of each
batch and gradients are averaged: all hold the same numbers after every step.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rabbet.data.batches import Batch, examples, replaced
from rabbet.errors import DataError
from rabbet.jobs import Jobs

BETAS = (0.9, 0.99)
ADAM = ("step", "exp_avg", "exp_avg_sq")
FUSED = ("cpu", "cuda")  # devices that have Adam as one kernel
Group = dict[str, Any]
"""Parameters of Adam that share a rate: `params`, and `base`, the rate before the schedule."""


class Course(ABC):
    """What a loop runs: its numbers, its loss, and what is done between steps.

    steps: in all. groups: what Adam moves. fused: by the kernel that passes over a parameter once,
    where there is one: several times faster, and rounded otherwise. learned: whether a gradient has
    come; a forward under `torch.no_grad` has none.
    """

    steps: int
    groups: Sequence[Group]
    fused = False
    learned = True

    @property
    def walked(self) -> str:
        """Its steps in words, for who reads what came of them."""
        return f"{self.steps} steps{'' if self.learned else ', and no gradient came through the network in any'}"

    def rate(self, step: int) -> float:
        """What the base rates are multiplied with: a cosine down to a fiftieth, after ten steps of warming up."""
        return max(0.5 * (1 + math.cos(math.pi * step / self.steps)), 0.02) * min(
            1.0, (step + 1) / 10
        )

    @abstractmethod
    def loss(self, step: int) -> Tensor:
        """The loss of a step's batch, a scalar; on several processes that of this one's share (`shared`)."""

    def move(self, adam: torch.optim.Optimizer) -> None:
        """Move the numbers by their gradients: with Adam, unless a course has a way of its own."""
        adam.step()

    def stepped(self, step: int) -> None:  # noqa: B027 (not every course has to)
        """After the numbers have moved; gradients are still there."""

    @property
    def detail(self) -> str:
        """How things stand, in words, for whoever watches; empty for nothing to tell."""
        return ""

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint holds besides the parameters and Adam's own state."""
        return {}

    def restore(self, state: dict[str, Tensor]) -> None:  # noqa: B027 (not every course has to)
        """The inverse of `state`."""


def run(course: Course, jobs: Jobs, key: str, stage: str, every: int = 100) -> None:
    """Train to the end, in place; jobs with a folder keep a checkpoint every so many steps and go on from it.

    Raises DataError if the loss is not finite.
    """
    groups = [dict(group, lr=group["base"]) for group in course.groups]
    parameters = [p for group in groups for p in group["params"]]
    # the one kernel goes through memory as it lies: numbers and gradients of other strides would be
    # paired wrongly
    fused = course.fused and all(p.device.type in FUSED and p.is_contiguous() for p in parameters)
    optimiser = torch.optim.Adam(groups, betas=BETAS, fused=fused)
    for p in parameters:
        p.requires_grad_()
    first = _resume(course, jobs, key, optimiser, parameters)
    try:
        for step in range(first, course.steps):
            rate = course.rate(step)
            for group in optimiser.param_groups:
                group["lr"] = group["base"] * rate
            with torch.enable_grad():
                loss = course.loss(step)
                if not torch.isfinite(loss):
                    raise DataError(
                        f"the loss of step {step + 1} of {stage} is not finite; check the batches and the loss"
                    )
                optimiser.zero_grad(set_to_none=True)
                if loss.requires_grad:
                    loss.backward()
            _complete(parameters)
            average([p.grad for p in parameters if p.grad is not None])
            course.move(optimiser)
            course.stepped(step)
            jobs.progress(
                f"{stage}: {course.detail}" if course.detail else stage, step + 1, course.steps
            )
            if (
                jobs.lasts(key)
                and first_process()
                and ((step + 1) % every == 0 or step + 1 == course.steps)
            ):
                jobs.keep(key, _checkpoint(course, optimiser, parameters, step + 1))
        course.learned = any(optimiser.state[p] for p in parameters)
    finally:
        for p in parameters:
            p.requires_grad_(False)


def first_process() -> bool:
    """Whether this process writes: the only one, or the first of several."""
    return not _several() or dist.get_rank() == 0


def shared(batch: Batch) -> Batch:
    """This process's part of a batch: every so-manieth example."""
    if not _several():
        return batch
    size, count = examples(batch), dist.get_world_size()
    if size < count:
        raise DataError(
            f"a batch of {size} cannot be shared by {count} processes; make batches larger"
        )
    whole = size - size % count  # equal parts, so that the mean of means is the mean
    return replaced(
        batch, lambda t: t[dist.get_rank() : whole : count] if t.ndim and len(t) == size else t
    )


def _complete(parameters: Sequence[Tensor]) -> None:
    """Where another process's examples reached a parameter and this one's did not, its gradient here is zero."""
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
    """Make tensors the mean over all processes, in place."""
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
    kept = {"step": torch.tensor([step])}
    for k, p in enumerate(parameters):
        state = optimiser.state[p]
        kept |= {f"{k}.value": p.detach().clone()}
        # a parameter that got no gradient at first counts its own steps
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
    if kept is None:
        return 0
    step = kept["step"]
    with torch.no_grad():
        for k, p in enumerate(parameters):
            p.copy_(kept[f"{k}.value"])
            if f"{k}.exp_avg" in kept:
                # Adam counts steps on the CPU, wherever the parameter lies; the one kernel beside
                # the parameter
                place = p.device if optimiser.defaults["fused"] else torch.device("cpu")
                optimiser.state[p] = {
                    n: kept[f"{k}.{n}"].to(place if n == "step" else p.device) for n in ADAM
                }
    course.restore(
        {k.removeprefix("course."): v for k, v in kept.items() if k.startswith("course.")}
    )
    return int(step)
