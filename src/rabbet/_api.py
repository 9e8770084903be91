"""The front door: a float network and a budget in, a network that keeps it out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import nn

from rabbet._bench import Data, in_turn, jobs_of, landed, opened
from rabbet.core.budget import FILES, METRICS, Budget
from rabbet.core.cost import Cost, Latencies, float_cost, plan_cost
from rabbet.core.history import History
from rabbet.core.plan import Plan, quoted
from rabbet.core.survey import Survey
from rabbet.data.task import Task
from rabbet.errors import FileError, ModelError, PlanError
from rabbet.export import ENDINGS, EXPORTS, Written, target_of
from rabbet.export.base import Parcel
from rabbet.export.native import read_native
from rabbet.files import path_of
from rabbet.jobs import Jobs
from rabbet.methods import Method, method_of
from rabbet.methods.base import Fitted
from rabbet.model.build import plan_of, validate
from rabbet.reconstruct.outcome import LayerOutcome, layer_errors
from rabbet.report.content import Frontier, Report, Score
from rabbet.report.looking import look, require_together
from rabbet.report.notebook import summary
from rabbet.report.page import page_path, require_drawing, write_page
from rabbet.report.text import Findings, plain, report_parts
from rabbet.workpiece import Workpiece


@dataclass(frozen=True)
class Result:
    """A compressed network and everything that can be said of it.

    `print(result)` shows it a line a layer. cost and float_cost: of the written file and of the
    float32 network. notes: what the method did, in words. errors: of the layers by name, see
    `layers`. histories: of what was searched and trained. latencies: of the layers, if the budget
    is about latency. counted: the cost that the method held against the budget where that is not
    `cost` (`CGMQ(counts="gates")`); `budget` is then None unless `cost` keeps it, too. Of the last
    four a result that was read from a file has none.
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
    histories: tuple[History, ...] = ()
    latencies: Latencies | None = None
    counted: Cost | None = None

    @property
    def layers(self) -> dict[str, LayerOutcome]:
        """What became of each layer, by its name: `result.layers["conv1"].error`."""
        return {
            site.name: LayerOutcome(site, self.plan.get(site.name), self.errors.get(site.name))
            for site in self.survey
        }

    @property
    def findings(self) -> Findings:
        """What was measured of the layers."""
        return Findings(self.errors, times={} if self.latencies is None else self.latencies.layers)

    @classmethod
    @in_turn
    def load(cls, path: str | Path, model: nn.Module, data: Data) -> "Result":
        """The result of an earlier run, from its native file: to be shown, or to be exported.

        model gives the code, as for `rabbet.load`; data is what an export measures and compares on.
        Raises as `rabbet.load` does, and DataError for what is not data.
        """
        network, survey, plan, rest = read_native(path_of(path), model)
        parcel = Parcel(network, plan, survey, rest, Task.of(data))
        cost, whole = plan_cost(survey, plan, rest), float_cost(survey)
        return cls(network, plan, cost, whole, survey, None, (), parcel)

    def save(self, path: str | Path) -> int:
        """Write the native file, whole or not at all; returns its bytes, which are `cost.bytes`.

        Raises FileError for the ending of another kind of file, and as `export` does.
        """
        if ENDINGS.get(path_of(path).suffix, "safetensors") != "safetensors":
            raise FileError(
                f"save writes the native file, which ends in .safetensors; found {path}: for a "
                "runtime use result.export"
            )
        return self.export(path, "safetensors").bytes

    @in_turn
    def export(self, path: str | Path, target: str | None = None) -> Written:
        """Write a file of the given target; returns its bytes and what to know of it.

        target: for which runtime; the default goes by the path's ending. Targets for decoders alone
        (`rabbet.export.DECODERS`) make the path a folder. Folders that are not there
        are made. Raises FileError for an unknown target or a place that cannot be written;
        PlanError or BudgetError, and writes nothing, if the network was changed since and is no
        longer what the plan says or what the budget allows.
        """
        path = path_of(path)
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

    @in_turn
    def report(
        self,
        path: str | Path,
        network: nn.Module | None = None,
        *,
        title: str = "",
        frontier: Frontier | None = None,
        files: Mapping[str, int] | None = None,
        score: Score | None = None,
    ) -> int:
        """Write all that is known of this result as one HTML file for a browser; returns its bytes.

        network: the float network, as it was compressed; with it the page shows some examples with
        the answers of both, and what each layer alone does to the outputs, which takes a backward
        pass over up to 256 examples. title: default the class of the network. frontier: is shown
        under a slider. files: the bytes of exported files by name. score: how good both are.

        Raises FileError without `rabbet[report]`, for an ending that is no page's or for a place
        that cannot be written, ModelError if the network is another one, PlanError if the frontier
        is another network's or has no plans, or for arguments of other kinds, and as the network's
        forward does.
        """
        require_drawing()
        page_path(path)
        shown = replace(self._page, title=title or type(self.model).__name__)
        shown = replace(shown, frontier=frontier, files=files or {}, score=score)
        if network is not None:
            piece = Workpiece.of(network, self.parcel.task, Jobs())
            if piece.survey != self.survey:
                raise ModelError(
                    "the network beside the report has other layers than the one that was "
                    "compressed; give that one, as it was"
                )
            require_together(piece.model, self.model)
            seen = look(piece, self.model)
            found = replace(self.findings, errors=seen.errors, harms=seen.harms)
            shown = replace(shown, survey=piece.survey, found=found, examples=seen.examples)
            shown = replace(shown, unknown=seen.unknown)
        return write_page(shown, path)

    @property
    def _page(self) -> Report:
        """What a page can show of this without the float network."""
        return Report(
            title=type(self.model).__name__,
            survey=self.survey,
            plan=self.plan,
            cost=self.cost,
            whole=self.float_cost,
            budget=self.budget,
            found=self.findings,
            notes=self.notes,
            histories=self.histories,
            latencies=self.latencies,
        )

    def _repr_html_(self) -> str:
        return summary(self._page)

    def _most(self) -> dict[str, int]:
        """The bytes that a file for each target may have."""
        limits = self.budget.limits if self.budget is not None else ()
        return {x.metric: x.amount(self.float_cost) for x in limits if x.metric in FILES}

    def __str__(self) -> str:
        costs = self.cost, self.float_cost
        parts = report_parts(self.survey, self.plan, *costs, self.budget, self.findings)
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
    limits, worker = _shipped(budget, target), method_of(method, quality)
    piece = opened(model, limits.metrics, data, seed, jobs)
    return finished(
        piece, worker, landed(piece, lambda: worker.plan(piece, limits), limits), limits
    )


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
    limits, worker = _shipped(budget, target), method_of(method, quality)
    piece = opened(model, limits.metrics, data, seed, jobs)
    return landed(piece, lambda: worker.plan(piece, limits), limits)


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
    piece = Workpiece.of(model, Task.of(data), jobs_of(jobs), seed)
    return finished(piece, worker, chosen, None)


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


def _shipped(budget: str | Budget, target: str | None) -> Budget:
    """The budget of the file for a target; FileError for one that there is not."""
    limits = Budget.parse(budget).shipped(target)
    if target is not None:
        target_of(Path(), target)
    return limits


def _planned(plan: Plan | str) -> Plan:
    if not isinstance(plan, Plan | str):
        raise PlanError(
            f"a plan is a rabbet.Plan or its text, such as result.plan; found {type(plan).__name__}"
        )
    return Plan.parse(plan) if isinstance(plan, str) else plan


def finished(piece: Workpiece, method: Method, chosen: Plan, budget: Budget | None) -> Result:
    """A plan fitted, read back from the network, and held against the budget."""
    fitted = method.fit(piece, chosen)
    result = _result(fitted, piece, budget)
    if piece.clock is None:
        return result
    clock = piece.clock
    layers = {s.name: clock.layer(s, result.plan.get(s.name)) for s in piece.survey}
    latencies = Latencies(layers, clock.rest, clock.network(result.model))
    return replace(
        result, latencies=latencies, notes=(*result.notes, _timed(result, latencies.measured))
    )


def _timed(result: Result, measured: int) -> str:
    """Predicted against measured, in words."""
    times = (result.cost.time, measured, result.float_cost.time)
    shown = [METRICS["latency"].show(time, 1) for time in times]
    return f"latency in onnxruntime: {shown[0]} predicted, {shown[1]} measured; float {shown[2]}"


def _result(fitted: Fitted, piece: Workpiece, budget: Budget | None) -> Result:
    """Read the plan back from the network to be handed out, and hold that against the budget.

    A budget that a method held against another cost is checked by that, and promised only if what
    is stored keeps it, too.
    """
    model, notes, counted = fitted.model, fitted.notes, fitted.counted
    plan = plan_of(model, piece.survey)
    cost = piece.cost(plan)
    if budget is not None:
        budget.check(counted or cost, piece.float_cost)
        if any(limit.broken_by(cost, piece.float_cost) for limit in budget.limits):
            over = f"'{budget}' holds as the method counts, NOT for what is stored"
            budget, notes = None, (*notes, f"{over}, which is over it: no budget is promised")
    parcel = Parcel(model, plan, piece.survey, piece.rest(plan), piece.task)
    missing = [s.name for s in piece.survey if plan.get(s.name) is None]
    if missing:
        notes = (f"no line in the plan, so kept in float: {len(missing)} ({_few(missing)})", *notes)
    dead = piece.dead
    if dead:
        notes = (f"inputs that are zero in all batches: those of {_few(dead)}", *notes)
    said = (*piece.survey.notes, *notes)
    errors = layer_errors(model, piece) if fitted.errors is None else dict(fitted.errors)
    costs, histories = (cost, piece.float_cost), tuple(piece.histories)
    piece.histories.clear()  # of this result alone, if more is made of the piece
    return Result(
        model, plan, *costs, piece.survey, budget, said, parcel, errors, histories, counted=counted
    )


def _few(names: Sequence[str]) -> str:
    return ", ".join(map(quoted, names[:3])) + (", ..." if len(names) > 3 else "")


@in_turn
def load(path: str | Path, model: nn.Module) -> nn.Module:
    """The network of a native file, bit-exact, in a copy of `model`, which only gives the code.

    Raises FileError for a file that is missing, damaged, of another format, or of another network.
    """
    return read_native(path_of(path), model)[0]


__all__ = [
    "Result",
    "compress",
    "finished",
    "fit",
    "load",
    "plan",
    "price",
    "survey",
]
