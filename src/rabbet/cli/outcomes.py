"""The work of plan and compress, and what is said of it."""

import contextlib
import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rabbet._api import Result
from rabbet._bench import in_turn, landed, opened
from rabbet.cli.inputs import Inputs
from rabbet.cli.judge import Judge
from rabbet.core.budget import Budget
from rabbet.core.cost import Cost
from rabbet.core.plan import Plan
from rabbet.core.survey import Survey
from rabbet.data.accuracy import Accuracy
from rabbet.data.decoder import Estimate
from rabbet.errors import FileError
from rabbet.export import TRIALS, Written
from rabbet.jobs import Jobs
from rabbet.methods import Method
from rabbet.report.facts import plan_facts
from rabbet.report.text import NOTHING, Findings, Part, report_parts, times_smaller
from rabbet.workpiece import Workpiece


@dataclass(frozen=True)
class Chosen:
    """A plan before it is fitted, and what it will cost."""

    plan: Plan
    survey: Survey
    cost: Cost
    float_cost: Cost
    findings: Findings = NOTHING


@dataclass(frozen=True)
class Outcome:
    """A compressed network, its file, and how good the network was and the file is."""

    output: Path
    result: Result
    written: Written
    judge: Judge | None
    before: float | None
    after: float | None
    replaced: bool = False

    @property
    def notes(self) -> tuple[str, ...]:
        """What the method and the export say."""
        return (*self.result.notes, *self.written.notes)

    def facts(self, settings: dict[str, Any]) -> dict[str, Any]:
        """All of it for JSON; settings: what was asked for."""
        result, judge = self.result, self.judge
        file = {"output": str(self.output), "bytes": self.written.bytes}
        costs = result.cost, result.float_cost
        scores = {"before": self.before, "after": self.after} | self._sureness()
        evaluation = None if judge is None else {"quantity": judge.quantity} | scores
        said = {"evaluation": evaluation, "notes": list(self.notes)}
        found = plan_facts(result.survey, result.plan, *costs, result.budget, result.findings)
        return file | settings | found | said

    def parts(self, target: str) -> list[Part]:
        """All of it for people; target: whose file was written."""
        result, judge = self.result, self.judge
        costs = result.cost, result.float_cost
        parts = report_parts(result.survey, result.plan, *costs, result.budget, result.findings)
        parts += self.notes
        if judge is not None and self.before is not None and self.after is not None:
            scores = f"{judge.show(self.before)} -> {judge.show(self.after)}"
            parts.append(f"{judge.quantity}: {scores}")
        older = ", in place of an older file" if self.replaced else ""
        parts.append(f"{self.output}: {self.written.bytes:,} bytes{older}")
        limits = result.budget.limits if result.budget is not None else ()
        native = not any(limit.metric == target for limit in limits)
        if target != "safetensors" and native:
            size = f"{result.cost.bytes:,} bytes"
            parts.append(f"the native file, which a budget of bytes is about: {size}")
        return [*parts, self.sentence]

    def _sureness(self) -> dict[str, Any]:
        """How sure estimates are, for JSON."""
        before, after = self.before, self.after
        if isinstance(before, Accuracy) and isinstance(after, Accuracy):
            lost, apart = _lost(before, after)
            sure = {"before_error": before.error, "after_error": after.error}
            return sure | {"drop": lost, "drop_error": apart, "examples": before.examples}
        if not (isinstance(before, Estimate) and isinstance(after, Estimate)):
            return {}
        ratio, error = after.ratio(before)
        errors = {"before_error": before.error, "after_error": after.error}
        return errors | {"ratio": ratio, "ratio_error": error, "windows": len(before.sums)}

    @property
    def sentence(self) -> str:
        """All of it in one sentence."""
        smaller = times_smaller(self.result.float_cost.bytes, self.written.bytes)
        if self.judge and isinstance(self.before, Estimate) and isinstance(self.after, Estimate):
            ratio, error = self.after.ratio(self.before)
            give = "" if error is None else f" ± {error:.2g}"
            of = f"the float network's {self.judge.quantity} over {len(self.before.sums):,} windows"
            return f"{smaller}; {ratio:.4g}{give} times {of}"
        if not (isinstance(self.before, Accuracy) and isinstance(self.after, Accuracy)):
            return smaller
        lost, error = _lost(self.before, self.after)
        change = "as accurate" if not lost else f"{abs(lost):.2f} points {_side(lost)}"
        told = "within" if abs(lost) <= 2 * error else "beyond"
        sure = f"{told} what so many can tell (two standard errors are {2 * error:.2f})"
        return f"{smaller}; {change} on {self.before.examples:,} examples, {sure}"


def _lost(before: Accuracy, after: Accuracy) -> tuple[float, float]:
    """The drop and its standard error; as if each had examples of its own, if they have others.

    Such as those of a loader that shuffles.
    """
    if after.is_of_the_same(before):
        return after.drop(before)
    return before - after, math.hypot(before.error, after.error)


def _side(lost: float) -> str:
    return "less accurate" if lost > 0 else "more accurate"


def require_exportable(inputs: Inputs, target: str) -> None:
    """Refuse a network that torch cannot export before any work: the float one is tried."""
    if target in TRIALS:
        piece = Workpiece.of(inputs.network, inputs.task, Jobs())
        with unheard():
            TRIALS[target](piece.model, inputs.task)


@contextlib.contextmanager
def unheard() -> Iterator[None]:
    """Keep standard error free of what exporters and quantisers of others say on their way.

    torch prints the whole graph where it cannot go on, onnxruntime warns of axes and shapes of its
    own. What matters to the user is raised, or is a note of the result.

    Only here: a library's standard error is shared by all threads of its process.
    """
    with contextlib.redirect_stderr(io.StringIO()):
        yield


def export_safely(result: Result, output: Path, target: str) -> Written:
    """Write a file for a runtime, the native one before it: if the export fails, nothing is lost.

    The native file is taken away again once the other is there.
    """
    spare = output.with_name(f"{output.name}.safetensors")
    if target == "safetensors" or spare.exists():
        with unheard():
            return result.export(output, target)
    result.save(spare)
    try:
        with unheard():
            written = result.export(output, target)
    except Exception as e:
        wish = f"rabbet export {spare} --output {output}"
        raise FileError(
            f"{e}; the compressed network is kept in {spare}, from which {wish} goes on"
        ) from e
    spare.unlink()
    return written


@in_turn
def plan_for(inputs: Inputs, limits: Budget, worker: Method, seed: int, jobs: Jobs) -> Chosen:
    """Choose a plan, and count what it costs."""
    piece = opened(inputs.network, limits.metrics, inputs.task, seed, jobs)
    plan = landed(piece, lambda: worker.plan(piece, limits), limits)
    times = {}
    if piece.clock is not None:
        times = {s.name: piece.clock.layer(s, plan.get(s.name)) for s in piece.survey}
    costs = piece.cost(plan), piece.float_cost
    return Chosen(plan, piece.survey, *costs, Findings(times=times))
