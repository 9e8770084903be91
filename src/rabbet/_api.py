"""The front door: a float network and a budget in, a network that keeps it out."""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ParamSpec, TypeVar

import torch
from torch import nn

from rabbet.choose.filesize import FileGauge
from rabbet.choose.latency import Stopwatch
from rabbet.core.budget import FILES, METRICS, Budget
from rabbet.core.cost import Cost, float_cost, plan_cost
from rabbet.core.plan import Plan, quoted
from rabbet.core.survey import Survey
from rabbet.data.batches import Batch
from rabbet.data.task import Task
from rabbet.errors import BudgetError, FileError, PlanError
from rabbet.export import ENDINGS, EXPORTS, Written, target_of
from rabbet.export.base import Parcel
from rabbet.export.native import read_native
from rabbet.jobs import TURN, Jobs
from rabbet.methods import Method, method_of
from rabbet.model.build import plan_of, validate
from rabbet.reconstruct.outcome import LayerOutcome, layer_errors
from rabbet.report.text import plain, report_parts
from rabbet.workpiece import Workpiece

Data = Task | Iterable[Batch]
ROUNDS = 4  # that a plan is chosen again if its file, once written, is too large
P = ParamSpec("P")
T = TypeVar("T")


def in_turn(call: Callable[P, T]) -> Callable[P, T]:
    """A call that threads run one after the other, in the middle of `torch.inference_mode`, too.

    A new thread takes over torch's number of threads from whichever set it last, and jobs set it to
    one: runs side by side would sum in other orders, and write other bytes, each time.
    """

    @functools.wraps(call)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        with TURN, torch.inference_mode(False):
            return call(*args, **kwargs)

    return run


@dataclass(frozen=True)
class Result:
    """A compressed network and everything that can be said of it.

    `print(result)` shows it a line a layer. cost and float_cost: of the written file and of the
    float32 network. notes: what the method did, in words. errors: of the layers by name, see
    `layers`; empty for a result that was read from a file.
    """

    model: nn.Module
    plan: Plan
    cost: Cost
    float_cost: Cost
    survey: Survey
    budget: Budget | None
    notes: tuple[str, ...]
    parcel: Parcel
    errors: Mapping[str, float] = field(default_factory=dict)

    @property
    def layers(self) -> dict[str, LayerOutcome]:
        """What became of each layer, by its name: `result.layers["conv1"].error`."""
        return {
            site.name: LayerOutcome(site, self.plan.get(site.name), self.errors.get(site.name))
            for site in self.survey
        }

    @classmethod
    @in_turn
    def load(cls, path: str | Path, model: nn.Module, data: Data) -> "Result":
        """The result of an earlier run, from its native file: to be shown, or to be exported.

        model gives the code, as for `rabbet.load`; data is what an export measures and compares on.
        Raises as `rabbet.load` does, and DataError for what is not data.
        """
        network, survey, plan, rest = read_native(Path(path), model)
        parcel = Parcel(network, plan, survey, rest, Task.of(data))
        cost, whole = plan_cost(survey, plan, rest), float_cost(survey)
        return cls(network, plan, cost, whole, survey, None, (), parcel)

    def save(self, path: str | Path) -> int:
        """Write the native file, whole or not at all; returns its bytes, which are `cost.bytes`.

        Raises FileError for the ending of another kind of file, and as `export` does.
        """
        if ENDINGS.get(Path(path).suffix, "safetensors") != "safetensors":
            raise FileError(
                f"save writes the native file, which ends in .safetensors; found {path}: for a "
                "runtime use result.export"
            )
        return self.export(path, "safetensors").bytes

    @in_turn
    def export(self, path: str | Path, target: str | None = None) -> Written:
        """Write a file of the given target; returns its bytes and what to know of it.

        target: for which runtime; the default goes by the path's ending. Folders that are not there
        are made. Raises FileError for an unknown target or a place that cannot be written;
        PlanError or BudgetError, and writes nothing, if the network was changed since and is no
        longer what the plan says or what the budget allows.
        """
        path = Path(path)
        target = target_of(path, target)
        if plan_of(self.model, self.survey) != self.plan:
            raise PlanError(
                "the network was changed and is not what its plan says; compress it again"
            )
        if self.budget is not None:
            self.budget.check(self.cost, self.float_cost)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with torch.inference_mode(False):
                return EXPORTS[target](replace(self.parcel, most=self._most()), path)
        except OSError as e:
            raise FileError(f"cannot write {path}: {e}") from e

    def _most(self) -> dict[str, int]:
        """The bytes that a file for each target may have."""
        limits = self.budget.limits if self.budget is not None else ()
        return {x.metric: x.amount(self.float_cost) for x in limits if x.metric in FILES}

    def __str__(self) -> str:
        costs = self.cost, self.float_cost
        parts = report_parts(self.survey, self.plan, *costs, self.budget, self.errors)
        return plain([*parts, *self.notes])


@in_turn
def compress(  # noqa: PLR0913 (those behind the star are options, given by name)
    model: nn.Module,
    budget: str | Budget,
    data: Data,
    method: Method | None = None,
    *,
    quality: str = "default",
    seed: int = 0,
    jobs: Jobs | None = None,
    target: str | None = None,
) -> Result:
    """Make a copy of a trained network fit a budget; the network itself is not touched.

    budget: such as "bytes <= 10%, bops <= 0.5%" (see `Budget.parse`). target: whose file bytes in
    the budget are about, "onnx" or "openvino": "bytes <= 10%" is then "onnx <= 10%". data: an
    iterable of unlabelled batches (tensor, tuple or mapping: passed as the model's arguments) or a
    `Task`.
    method: default `Joint()`. quality: how long that tunes after the choice, "fast" (not at all),
    "default" or "best"; other methods have settings of their own. jobs: where work runs and what is
    kept; with one jobs several budgets share the solved candidates, and a jobs with a folder makes
    a killed run resume. The same seed gives the same bytes.

    Raises BudgetError at once for a budget that cannot be met, ModelError or DataError, by name of
    the layer, for a network or batches that cannot be used, PlanError for a quality beside a method
    that does not have it. What your own code raises (a loader, the forward, a loss) is passed on,
    with a note of where it arose.
    """
    limits, worker = Budget.parse(budget).shipped(target), method_of(method, quality)
    piece = on_bench(model, limits, data, seed, jobs)
    return _finish(piece, worker, landed(piece, worker, limits), limits)


@in_turn
def plan(  # noqa: PLR0913 (as above)
    model: nn.Module,
    budget: str | Budget,
    data: Data,
    method: Method | None = None,
    *,
    quality: str = "default",
    seed: int = 0,
    jobs: Jobs | None = None,
    target: str | None = None,
) -> Plan:
    """Only choose: the plan that `compress` would fit. Print it, edit it, then `fit` it.

    Raises as `compress` does. The plan is the same for every quality.
    """
    limits, worker = Budget.parse(budget).shipped(target), method_of(method, quality)
    return landed(on_bench(model, limits, data, seed, jobs), worker, limits)


@in_turn
def fit(  # noqa: PLR0913 (as above)
    model: nn.Module,
    plan: Plan | str,
    data: Data,
    method: Method | None = None,
    *,
    quality: str = "default",
    seed: int = 0,
    jobs: Jobs | None = None,
) -> Result:
    """Find the numbers of a given plan (or its text); the rest is as for `compress`.

    Raises PlanError if the plan does not fit the network.
    """
    chosen, worker = _planned(plan), method_of(method, quality)
    piece = Workpiece.of(model, Task.of(data), jobs or Jobs(), seed)
    return _finish(piece, worker, chosen, None)


@in_turn
def survey(model: nn.Module, data: Data) -> Survey:
    """Every layer of a network that can be compressed, and what is left alone and why.

    data: as for `compress`; copies of the network run on the first batch. Raises ModelError for a
    network that cannot be used or holds nothing to compress; what its forward raises is passed on.
    """
    return Workpiece.of(model, Task.of(data), Jobs()).survey


@in_turn
def price(model: nn.Module, plan: Plan | str, data: Data) -> Cost:
    """What the network would cost under a plan (or its text), before anything is solved.

    Raises PlanError if the plan does not fit the network.
    """
    chosen, piece = _planned(plan), Workpiece.of(model, Task.of(data), Jobs())
    validate(chosen, piece.survey)
    return piece.cost(chosen)


def _planned(plan: Plan | str) -> Plan:
    if not isinstance(plan, Plan | str):
        raise PlanError(
            f"a plan is a rabbet.Plan or its text, such as result.plan; found {type(plan).__name__}"
        )
    return Plan.parse(plan) if isinstance(plan, str) else plan


def on_bench(
    model: nn.Module, budget: Budget, data: Data, seed: int = 0, jobs: Jobs | None = None
) -> Workpiece:
    """The network on the bench, and beside it what a budget about time or exported files needs."""
    piece = Workpiece.of(model, Task.of(data), jobs or Jobs(), seed)
    if any(limit.metric == "latency" for limit in budget.limits):
        piece.clock = Stopwatch(piece)
    for target in budget.files:
        piece.gauges[target] = FileGauge(piece, functions=target == "onnx")
    return piece


def landed(piece: Workpiece, method: Method, budget: Budget) -> Plan:
    """A plan of the method whose exported files keep the budget, as they are written.

    Each is written once, with any numbers. If one is over its limit, what was predicted is
    corrected by that, and the method chooses again. Raises BudgetError with the smallest file that
    was reached.
    """
    sizes = dict[str, list[int]]((target, []) for target in piece.gauges)
    for _ in range(ROUNDS):
        plan = method.plan(piece, budget)
        for target, gauge in piece.gauges.items():
            piece.jobs.progress(f"writing the {target} file", 0, 1)
            sizes[target].append(gauge.written(plan))
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


def _finish(piece: Workpiece, method: Method, chosen: Plan, budget: Budget | None) -> Result:
    fitted = method.fit(piece, chosen)
    result = _result(fitted.model, piece, budget, fitted.notes)
    return (
        result
        if piece.clock is None
        else replace(result, notes=(*result.notes, _timed(piece, result)))
    )


def _timed(piece: Workpiece, result: Result) -> str:
    """Predicted against measured, in words."""
    assert piece.clock is not None
    measured = piece.clock.network(result.model)
    times = (result.cost.time, measured, result.float_cost.time)
    shown = [METRICS["latency"].show(time, 1) for time in times]
    return f"latency in onnxruntime: {shown[0]} predicted, {shown[1]} measured; float {shown[2]}"


def _result(
    model: nn.Module, piece: Workpiece, budget: Budget | None, notes: tuple[str, ...]
) -> Result:
    """Read the plan back from the network to be handed out, and hold that against the budget."""
    plan = plan_of(model, piece.survey)
    cost = piece.cost(plan)
    if budget is not None:
        budget.check(cost, piece.float_cost)
    parcel = Parcel(model, plan, piece.survey, piece.rest(plan), piece.task)
    missing = [s.name for s in piece.survey if plan.get(s.name) is None]
    if missing:
        notes = (f"no line in the plan, so kept in float: {len(missing)} ({_few(missing)})", *notes)
    dead = piece.dead
    if dead:
        notes = (f"inputs that are zero in all batches: those of {_few(dead)}", *notes)
    said, errors = (*piece.survey.notes, *notes), layer_errors(model, piece)
    return Result(model, plan, cost, piece.float_cost, piece.survey, budget, said, parcel, errors)


def _few(names: Sequence[str]) -> str:
    return ", ".join(map(quoted, names[:3])) + (", ..." if len(names) > 3 else "")


@in_turn
def load(path: str | Path, model: nn.Module) -> nn.Module:
    """The network of a native file, bit-exact, in a copy of `model`, which only gives the code.

    Raises FileError for a file that is missing, damaged, of another format, or of another network.
    """
    return read_native(Path(path), model)[0]


__all__ = ["Result", "compress", "fit", "load", "plan", "price", "survey"]
