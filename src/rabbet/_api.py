"""The front door: a float network and a budget in, a network that keeps it out."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from rabbet.calibrate.ranges import calibrate_ranges as _calibrate_ranges
from rabbet.choose.latency import Stopwatch
from rabbet.core.budget import METRICS, Budget
from rabbet.core.cost import Cost, float_cost, plan_cost
from rabbet.core.plan import Plan
from rabbet.core.survey import Survey
from rabbet.data.batches import Batch
from rabbet.data.task import Task
from rabbet.errors import FileError, PlanError
from rabbet.export import EXPORTS, Written, target_of
from rabbet.export.base import Parcel
from rabbet.export.native import read_native
from rabbet.jobs import Jobs
from rabbet.methods import Joint, Method
from rabbet.model.build import plan_of, validate
from rabbet.report.text import render
from rabbet.workpiece import Workpiece

Data = Task | Iterable[Batch]


@dataclass(frozen=True)
class Result:
    """A compressed network and everything that can be said of it; `print(result)` shows it a line a layer.

    cost and float_cost: of the written file and of the float32 network. notes: what the method did,
    in words.
    """

    model: nn.Module
    plan: Plan
    cost: Cost
    float_cost: Cost
    survey: Survey
    budget: Budget | None
    notes: tuple[str, ...]
    parcel: Parcel

    def save(self, path: str | Path) -> int:
        """Write the native file, whole or not at all; returns its bytes, which are `cost.bytes`.

        Raises as `export` does.
        """
        return self.export(path, "safetensors").bytes

    def export(self, path: str | Path, target: str | None = None) -> Written:
        """Write a file of the given target (default: by the path's ending); returns its bytes and what to know of it.

        Raises FileError for an unknown target or a folder that cannot be written; PlanError or
        BudgetError, and writes nothing, if the network was changed since and is no longer what the
        plan says or what the budget allows.
        """
        path = Path(path)
        target = target_of(path, target)
        if not path.parent.is_dir():
            raise FileError(f"cannot write {path}: there is no folder {path.parent}")
        if plan_of(self.model, self.survey) != self.plan:
            raise PlanError(
                "the network was changed and is not what its plan says; compress it again"
            )
        if self.budget is not None:
            self.budget.check(self.cost, self.float_cost)
        try:
            return EXPORTS[target](self.parcel, path)
        except OSError as e:
            raise FileError(f"cannot write {path}: {e}") from e

    def __str__(self) -> str:
        return render(self.survey, self.plan, self.cost, self.float_cost, self.budget, self.notes)


def compress(
    model: nn.Module,
    budget: str | Budget,
    data: Data,
    method: Method | None = None,
    seed: int = 0,
    jobs: Jobs | None = None,
) -> Result:
    """Make a copy of a trained network fit a budget; the network itself is not touched.

    budget: such as "bytes <= 10%, bops <= 0.5%" (see `Budget.parse`). data: an iterable of
    unlabelled batches (tensor, tuple or mapping: passed as the model's arguments) or a `Task`.
    method: default `Joint()`. jobs: where work runs and what is kept; with one jobs several budgets
    share the solved candidates, and an jobs with a folder makes a killed run resume. The same seed
    gives the same bytes.

    Raises BudgetError at once for a budget that cannot be met, ModelError or DataError, by name of
    the layer, for a network or batches that cannot be used.
    """
    limits, method = Budget.parse(budget), _checked(method)
    piece = _piece(model, limits, data, seed, jobs)
    return _finish(piece, method, method.plan(piece, limits), limits)


def plan(
    model: nn.Module,
    budget: str | Budget,
    data: Data,
    method: Method | None = None,
    seed: int = 0,
    jobs: Jobs | None = None,
) -> Plan:
    """Only choose: the plan that `compress` would fit. Print it, edit it, then `fit` it. Raises as `compress` does."""
    limits = Budget.parse(budget)
    return _checked(method).plan(_piece(model, limits, data, seed, jobs), limits)


def fit(
    model: nn.Module,
    plan: Plan | str,
    data: Data,
    method: Method | None = None,
    seed: int = 0,
    jobs: Jobs | None = None,
) -> Result:
    """Find the numbers of a given plan (or its text).

    Raises PlanError if it does not fit the network.
    """
    chosen, worker = _planned(plan), _checked(method)
    return _finish(Workpiece.of(model, Task.of(data), jobs or Jobs(), seed), worker, chosen, None)


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


def _checked(method: Method | None) -> Method:
    if method is not None and (isinstance(method, type) or not hasattr(method, "fit")):
        raise PlanError(
            f"method is an object such as rabbet.Joint() or rabbet.QUALITY['fast']; found {method!r}"
        )
    return method or Joint()


def _piece(model: nn.Module, budget: Budget, data: Data, seed: int, jobs: Jobs | None) -> Workpiece:
    """The network on the bench, with a stopwatch beside it if the budget is about time."""
    piece = Workpiece.of(model, Task.of(data), jobs or Jobs(), seed)
    if any(limit.metric == "latency" for limit in budget.limits):
        piece.clock = Stopwatch(piece)
    return piece


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
    found = piece.clock.network(result.model)
    shown = [
        METRICS["latency"].show(t, 1) for t in (result.cost.time, found, result.float_cost.time)
    ]
    return f"latency in onnxruntime: {shown[0]} predicted, {shown[1]} measured; float {shown[2]}"


def _result(
    model: nn.Module, piece: Workpiece, budget: Budget | None, notes: tuple[str, ...]
) -> Result:
    """Read the plan back from the network that will be handed out, and hold that against the budget."""
    found = plan_of(model, piece.survey)
    cost = piece.cost(found)
    if budget is not None:
        budget.check(cost, piece.float_cost)
    parcel = Parcel(model, found, piece.survey, piece.rest(found), piece.task)
    return Result(model, found, cost, piece.float_cost, piece.survey, budget, notes, parcel)


def load(path: str | Path, model: nn.Module) -> nn.Module:
    """The network of a native file, bit-exact, seated in a copy of `model` (which only gives the code).

    Raises FileError for a file that is missing, damaged, of another format, or of another network.
    """
    return read_native(Path(path), model)[0]


def reopen(path: str | Path, model: nn.Module, data: Data) -> Result:
    """The result of an earlier run, read from its native file: to be shown again, or exported for a runtime.

    model gives the code, as for `load`; data what an export measures and compares on. Raises as
    `load` does.
    """
    network, survey, plan, rest = read_native(Path(path), model)
    parcel = Parcel(network, plan, survey, rest, Task.of(data))
    return Result(
        network, plan, plan_cost(survey, plan, rest), float_cost(survey), survey, None, (), parcel
    )


def calibrate_ranges(model: nn.Module, data: Data, seed: int = 0) -> None:
    """Choose the input ranges of a network from `build`, in place, from about 512 examples."""
    _calibrate_ranges(model, Task.of(data), seed)


__all__ = ["Result", "calibrate_ranges", "compress", "fit", "load", "plan", "price", "reopen"]
