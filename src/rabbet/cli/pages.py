"""What commands write as pages of HTML."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import typer
from torch import nn

from rabbet._api import Result
from rabbet.cli.inputs import Inputs
from rabbet.cli.outcomes import Chosen, Outcome
from rabbet.cli.stored import Stored, opened, require_other, size_of, writable
from rabbet.core.budget import Budget
from rabbet.data.accuracy import Accuracy
from rabbet.errors import FileError
from rabbet.report.content import Frontier, Report, Score
from rabbet.report.page import require_drawing, write_page


def ready(html: Path | None, option: str, *references: str | Path | None) -> None:
    """Refuse, before any work, a page that could not be written, or over what a command uses."""
    if html is None:
        return
    if html.suffix not in (".html", ".htm"):
        raise typer.BadParameter(f"{html} must end in .html", param_hint=option)
    require_drawing()
    writable(html)
    written = [path.absolute() for path in references if isinstance(path, Path)]
    if html.absolute() in written:
        raise FileError(f"{html} is another file of this command: name another {option}")
    require_other(html, *references, option=option)


def write_plan(chosen: Chosen, limits: Budget, html: Path) -> None:
    """The page of a plan that is not fitted."""
    page = Report(
        title=html.stem,
        survey=chosen.survey,
        plan=chosen.plan,
        cost=chosen.cost,
        whole=chosen.float_cost,
        budget=limits,
        fitted=False,
        found=chosen.findings,
        notes=chosen.survey.notes,
    )
    write_page(page, html)


def write_outcome(
    outcome: Outcome, network: nn.Module, html: Path, frontier: Frontier | None
) -> None:
    """The page of a compressed network and its file, and of the frontier that it was found on."""
    judge, before, after = outcome.judge, outcome.before, outcome.after
    score = None
    if judge is not None and before is not None and after is not None:
        shown = judge.show(before), judge.show(after)
        score = Score(judge.quantity, *shown, _examples(before))
    files = {outcome.output.name: outcome.written.bytes}
    outcome.result.report(
        html, network, title=outcome.output.name, frontier=frontier, files=files, score=score
    )


def write_stored(
    file: Path, html: Path, limits: Budget | None, inputs: Inputs | None, exported: list[Path]
) -> dict[str, Any]:
    """The page of a file, with its network beside it if there is one; returns facts for JSON."""
    files = {file.name: size_of(file)} | {str(p): p.stat().st_size for p in exported}
    if inputs is None:
        stored = Stored.read(file)
        page = Report(
            title=file.name,
            survey=stored.survey,
            plan=stored.plan,
            cost=stored.cost,
            whole=stored.float_cost,
            budget=limits,
            notes=("the network was not given: errors and examples are not known",),
            files=files,
        )
        size = write_page(page, html)
    else:
        size = _with_network(file, html, limits, inputs, files)
    return {"file": str(file), "output": os.fspath(html), "bytes": size}


def _with_network(
    file: Path, html: Path, limits: Budget | None, inputs: Inputs, files: dict[str, int]
) -> int:
    result = replace(Result.load(file, inputs.network, inputs.task), budget=limits)
    judge, score = inputs.judge, None
    if judge is not None:
        before = judge(inputs.network)
        after = judge(opened(file, inputs.network))
        score = Score(judge.quantity, judge.show(before), judge.show(after), _examples(before))
    return result.report(html, inputs.network, title=file.name, files=files, score=score)


def _examples(score: float) -> int:
    return score.examples if isinstance(score, Accuracy) else 0
