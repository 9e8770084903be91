"""The commands that need a file and no network: show, check, compare."""

from pathlib import Path
from typing import Annotated, Any

import typer

from rabbet._api import load
from rabbet.cli import options, tables
from rabbet.cli.inputs import DEMO_MODEL, DEMO_TEST, open_network
from rabbet.cli.judge import Judge, open_judge
from rabbet.cli.stored import Stored
from rabbet.core.budget import METRICS, Limit
from rabbet.core.cost import Cost
from rabbet.core.plan import quoted

File = Annotated[Path, typer.Argument(metavar="FILE", help="A native file, as compress writes it.")]


def show(file: File, as_json: options.Json = False) -> None:
    """Show the plan of a file, what it costs, and what is left alone."""
    stored = Stored.read(file)
    if as_json:
        facts = tables.plan_facts(stored.survey, stored.plan, stored.cost, stored.float_cost)
        tables.print_json({"file": str(file)} | facts)
        return
    tables.print_report(
        tables.console(), stored.survey, stored.plan, (stored.cost, stored.float_cost)
    )


def check(
    file: File,
    budget: Annotated[str, typer.Option(help="Such as 'bytes <= 10%, bops <= 0.5%'.")],
    as_json: options.Json = False,
) -> None:
    """Hold a file against a budget: exit code 0 if it is within, 1 if it is over."""
    limits = options.budget_of(budget)
    if any(limit.metric == "latency" for limit in limits.limits):
        raise typer.BadParameter(
            "a file does not say its latency; measure it with rabbet bench", param_hint="--budget"
        )
    stored = Stored.read(file)
    over = any(limit.broken_by(stored.cost, stored.float_cost) for limit in limits.limits)
    if as_json:
        held = [_held(limit, stored.cost, stored.float_cost) for limit in limits.limits]
        tables.print_json({"file": str(file), "within": not over, "limits": held})
    else:
        for limit in limits.limits:
            print(_verdict(limit, stored.cost, stored.float_cost))
    if over:
        raise typer.Exit(1)


def _verdict(limit: Limit, cost: Cost, whole: Cost) -> str:
    metric, allowed = METRICS[limit.metric], limit.amount(whole)
    found = metric.amount(cost)
    shown, most, apart = (
        metric.show(n, whole.weights) for n in (found, allowed, abs(found - allowed))
    )
    verdict = f"OVER by {apart}" if found > allowed else f"within, {apart} to spare"
    return f"{limit.text}: {shown} of {most} {limit.metric}, {verdict}"


def _held(limit: Limit, cost: Cost, whole: Cost) -> dict[str, Any]:
    """One limit for JSON, in whole numbers; those of `bits` are the bits of all weights together."""
    found, allowed = METRICS[limit.metric].amount(cost), limit.amount(whole)
    over = max(found - allowed, 0)
    return {
        "limit": limit.text,
        "metric": limit.metric,
        "found": found,
        "allowed": allowed,
        "over": over,
    }


def compare(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE...", help="Native files, two or more.")
    ],
    model: Annotated[
        str | None, typer.Option(help=f"The network that they hold: {options.NETWORK}.")
    ] = None,
    test: options.Test = None,
    as_json: options.Json = False,
) -> None:
    """Show files side by side: their cost, their accuracy where a network is given, and where their plans differ."""
    if len(files) < 2:
        raise typer.BadParameter("give at least two files", param_hint="FILE...")
    stored = [Stored.read(file) for file in files]
    judge, scores = _scores(files, model, test)
    differing = differences(stored)
    if as_json:
        listed = [
            {
                "file": str(s.path),
                "share": s.cost.bytes / s.float_cost.bytes,
                "cost": tables.cost_facts(s.cost),
            }
            | ({judge.quantity: score} if judge else {})
            for s, score in zip(stored, scores, strict=True)
        ]
        tables.print_json(
            {
                "files": listed,
                "differences": [{"layer": name, "plans": bodies} for name, *bodies in differing],
            }
        )
        return
    out = tables.console()
    heads = [
        "file",
        "bytes",
        "of float32",
        "MACs",
        "BOPs",
        "bits",
        *([judge.quantity] if judge else []),
    ]
    lines = [
        _line(s) + ([judge.show(score)] if judge else [])
        for s, score in zip(stored, scores, strict=True)
    ]
    out.print(tables.table(heads, lines))
    out.print()
    if not differing:
        out.print("the plans are the same")
        return
    columns = ["layer", *(str(file) for file in files)]
    rows = [[quoted(name), *bodies] for name, *bodies in differing]
    out.print(tables.table(columns, rows, len(columns)))


def _scores(
    files: list[Path], model: str | None, test: str | None
) -> tuple[Judge | None, list[float]]:
    """What judges, and its number for every file (zeros where nothing judges)."""
    if model == DEMO_MODEL:
        test = DEMO_TEST if test is None else test
    if (model is None) != (test is None):
        missing, given = ("--model", "--test") if model is None else ("--test", "--model")
        raise typer.BadParameter(
            f"{given} needs {missing}: accuracy is measured with both", param_hint=missing
        )
    judge = None if model is None else open_judge(test)
    if model is None or judge is None:
        return None, [0.0] * len(files)
    network = open_network(model)
    return judge, [judge(load(file, network)) for file in files]


def _line(stored: Stored) -> list[str]:
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
    """The layers whose line is not the same in all files: the name, then in words what each file makes of it."""
    names = dict.fromkeys(site.name for s in stored for site in s.survey)
    lines = [(name, *(_becomes(s, name) for s in stored)) for name in names]
    return [line for line in lines if len(set(line[1:])) > 1]


def _becomes(stored: Stored, name: str) -> str:
    line = stored.plan.get(name)
    if line is not None:
        return line.body
    return (
        "kept as it is" if any(site.name == name for site in stored.survey) else "not in this file"
    )
