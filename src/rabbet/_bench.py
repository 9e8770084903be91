"""The network on the bench: opened for what a budget is about, planned until its files keep it."""

import functools
from collections.abc import Callable, Collection, Iterable
from typing import ParamSpec, TypeVar

import torch
from torch import nn

from rabbet.choose.filesize import FileGauge
from rabbet.choose.latency import Stopwatch
from rabbet.core.budget import FILES, Budget
from rabbet.core.plan import Plan
from rabbet.data.batches import Batch
from rabbet.data.task import Task
from rabbet.errors import BudgetError, PlanError
from rabbet.jobs import TURN, Jobs
from rabbet.reconstruct.candidates import forget_metrics
from rabbet.workpiece import Workpiece

Data = Task | Iterable[Batch]
P = ParamSpec("P")
T = TypeVar("T")
ROUNDS = 4  # that a plan is chosen again if its file, once written, is too large


def in_turn(call: Callable[P, T]) -> Callable[P, T]:
    """A call that threads run one after the other, in the middle of `torch.inference_mode`, too.

    A new thread takes over torch's number of threads from whichever set it last, and jobs set it to
    one: runs side by side would sum in other orders, and write other bytes, each time.
    """

    @functools.wraps(call)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        with TURN, torch.inference_mode(False):
            try:
                return call(*args, **kwargs)
            finally:
                forget_metrics()

    return run


def jobs_of(jobs: Jobs | None) -> Jobs:
    """The jobs of a call; new ones for None. Raises PlanError for what is none."""
    if jobs is not None and not isinstance(jobs, Jobs):
        raise PlanError(f"jobs is an object rabbet.Jobs(), or is left out; found {jobs!r}")
    return jobs or Jobs()


def opened(
    model: nn.Module,
    metrics: Collection[str],
    data: Data,
    seed: int = 0,
    jobs: Jobs | None = None,
) -> Workpiece:
    """The network on the bench, and beside it what metrics of time or exported files need."""
    piece = Workpiece.of(model, Task.of(data), jobs_of(jobs), seed)
    if "latency" in metrics:
        piece.clock = Stopwatch(piece)
    for target in (metric for metric in metrics if metric in FILES):
        piece.gauges[target] = FileGauge(piece, functions=target == "onnx")
    return piece


def landed(piece: Workpiece, choose: Callable[[], Plan], budget: Budget) -> Plan:
    """A plan whose exported files keep the budget, as they are written.

    Each is written once, with any numbers. If one is over its limit, what was predicted is
    corrected by that, and another is chosen. Raises BudgetError with the smallest file that
    was reached.
    """
    sizes = dict[str, list[int]]((target, []) for target in budget.files)
    for _ in range(ROUNDS):
        plan = choose()
        for target, found in sizes.items():
            piece.jobs.progress(f"writing the {target} file", 0, 1)
            found.append(piece.gauges[target].written(plan))
            piece.jobs.progress(f"writing the {target} file", 1, 1)
        cost, whole = piece.cost(plan), piece.float_cost
        over = [x for x in budget.limits if x.metric in sizes and x.broken_by(cost, whole)]
        if not over:
            return plan
    least, allowed = min(sizes[over[0].metric]), over[0].amount(whole)
    raise BudgetError(
        f"{over[0].text!r} was not met: {ROUNDS} plans were chosen, and the smallest of their "
        f"files takes {least:,} bytes, {allowed:,} were allowed; loosen it to that"
    )
