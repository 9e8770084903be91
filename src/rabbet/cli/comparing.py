"""Native files side by side: their cost, their scores, and where their plans differ."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from rabbet._api import load
from rabbet.cli.inputs import DEMO_MODEL, DEMO_TEST
from rabbet.cli.judge import Judge, error_of, open_judge
from rabbet.cli.networks import open_network
from rabbet.cli.stored import Stored
from rabbet.core.plan import quoted
from rabbet.report.facts import cost_facts
from rabbet.report.text import KEPT, Part, Table


@dataclass(frozen=True)
class Scores:
    """What judges, and its number for every file."""

    judge: Judge
    values: list[float]


def scores_of(files: list[Path], model: str | None, test: str | None) -> Scores | None:
    """The scores of files, or None where no network is given."""
    if model == DEMO_MODEL:
        test = DEMO_TEST if test is None else test
    if (model is None) != (test is None):
        missing, given = ("--model", "--test") if model is None else ("--test", "--model")
        raise typer.BadParameter(
            f"{given} needs {missing}: accuracy is measured with both", param_hint=missing
        )
    if model is None:
        return None
    network = open_network(model)
    judge = open_judge(test, network=network)
    assert judge is not None
    return Scores(judge, [judge(load(file, network)) for file in files])


def facts(stored: list[Stored], scores: Scores | None) -> dict[str, Any]:
    """The comparison for JSON."""
    files: list[dict[str, Any]] = [
        {
            "file": str(s.path),
            "share": s.cost.bytes / s.float_cost.bytes,
            "cost": cost_facts(s.cost),
        }
        for s in stored
    ]
    if scores is not None:
        for entry, value in zip(files, scores.values, strict=True):
            entry[scores.judge.quantity] = value
            entry[f"{scores.judge.quantity}_error"] = error_of(value)
    differing = [{"layer": name, "plans": bodies} for name, *bodies in differences(stored)]
    return {"files": files, "differences": differing}


def parts(stored: list[Stored], scores: Scores | None) -> list[Part]:
    """The comparison for people."""
    heads = ["file", "bytes", "of float32", "MACs", "BOPs", "bits"]
    rows = [_row(s) for s in stored]
    if scores is not None:
        heads.append(scores.judge.quantity)
        for row, value in zip(rows, scores.values, strict=True):
            row.append(scores.judge.show(value))
    differing = differences(stored)
    costs: list[Part] = [Table(heads, rows), stored[0].survey.counted("MACs and BOPs"), ""]
    if not differing:
        return [*costs, "the plans are the same"]
    columns = ["layer", *(str(s.path) for s in stored)]
    layers = [[quoted(name), *bodies] for name, *bodies in differing]
    return [*costs, Table(columns, layers, len(columns))]


def _row(stored: Stored) -> list[str]:
    cost, share = stored.cost, 100 * stored.cost.bytes / stored.float_cost.bytes
    return [
        str(stored.path),
        f"{cost.bytes:,}",
        f"{share:.3g}%",
        f"{cost.macs:,}",
        f"{cost.bops:,}",
        f"{cost.bits:.3f}",
    ]


def differences(stored: list[Stored]) -> list[tuple[str, ...]]:
    """The layers whose line differs: the name, then in words what each file makes of it."""
    names = dict.fromkeys(site.name for s in stored for site in s.survey)
    lines = [(name, *(_becomes(s, name) for s in stored)) for name in names]
    return [line for line in lines if len(set(line[1:])) > 1]


def _becomes(stored: Stored, name: str) -> str:
    line = stored.plan.get(name)
    if line is not None:
        return line.body
    return KEPT if any(site.name == name for site in stored.survey) else "not in this file"
