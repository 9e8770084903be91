"""The commands that need a network: survey, plan, compress."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from rabbet._api import Result, fit
from rabbet._api import compress as choose_and_fit
from rabbet._api import plan as choose
from rabbet.cli import options, tables
from rabbet.cli.inputs import Inputs, open_inputs
from rabbet.cli.stored import opened, ready, writable
from rabbet.cli.terminal import working
from rabbet.core.budget import Budget
from rabbet.core.plan import Plan, quoted
from rabbet.core.survey import Survey
from rabbet.export.base import write_beside
from rabbet.jobs import Jobs
from rabbet.methods import Method
from rabbet.model.build import validate
from rabbet.model.inspect import survey as look
from rabbet.workpiece import Workpiece


def survey(
    model: options.Model = None, data: options.Data = None, as_json: options.Json = False
) -> None:
    """Show every layer that can be compressed, and what is left alone and why."""
    inputs = open_inputs(model, data)
    found = look(inputs.network, inputs.task.read()[0], inputs.task)
    if as_json:
        tables.print_json(_survey_facts(found))
        return
    out = tables.console()
    heads = ("layer", "kind", "shape", "MACs", "positions", "float bytes")
    kinds = [", ".join((s.kind.name, *s.heads)) for s in found]
    lines = [
        (
            quoted(s.name),
            kind,
            "x".join(map(str, s.shape)),
            f"{s.macs:,}",
            f"{s.positions:,}",
            f"{4 * s.numel:,}",
        )
        for s, kind in zip(found, kinds, strict=True)
    ]
    out.print(tables.table(heads, lines, 3))
    out.print()
    out.print(
        f"{len(found.sites)} layers hold {4 * found.weights:,} of {found.float_bytes:,} bytes in float32"
    )
    tables.print_left(out, found.left)


def plan(
    model: options.Model = None,
    data: options.Data = None,
    budget: options.BudgetText = options.DEFAULT_BUDGET,
    out: Annotated[
        Path | None, typer.Option(dir_okay=False, help="Write the plan into this file, too.")
    ] = None,
    method: options.MethodText = None,
    seed: options.Seed = 0,
    resume: options.Resume = None,
    processes: options.Processes = 1,
    as_json: options.Json = False,
) -> None:
    """Choose only: print the plan that compress would fit, to be read, edited and given to compress --plan."""
    limits, chooser = options.budget_of(budget), options.method_of(method)
    if out is not None:
        writable(out)
    inputs = open_inputs(model, data)
    with working(resume, processes, as_json) as jobs:
        found = choose(inputs.network, limits, inputs.task, chooser, seed, jobs)
        piece = Workpiece.of(inputs.network, inputs.task, jobs, seed)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_beside(out, [f"{found}\n".encode()])
    costs = piece.cost(found), piece.float_cost
    if as_json:
        tables.print_json(tables.plan_facts(piece.survey, found, *costs, limits) | {"seed": seed})
        return
    tables.print_totals(tables.console(stderr=True), piece.survey, costs, limits)
    print(found)


def compress(
    output: options.Output,
    model: options.Model = None,
    data: options.Data = None,
    test: options.Test = None,
    budget: options.OptionalBudget = None,
    plan: Annotated[
        Path | None, typer.Option(dir_okay=False, help="Fit the plan in this file.")
    ] = None,
    quality: options.Quality = "default",
    method: options.MethodText = None,
    seed: options.Seed = 0,
    resume: options.Resume = None,
    processes: options.Processes = 1,
    as_json: options.Json = False,
) -> None:
    """Make a network fit a budget, or fit a given plan, and write the file; accuracy is that of the file."""
    given = options.DEFAULT_BUDGET if budget is None and plan is None else budget
    limits = None if given is None else options.budget_of(given)
    worker = options.method_of(method, quality)
    wanted = None if plan is None else options.plan_of_file(plan)
    if (
        wanted is not None
        and limits is not None
        and any(x.metric == "latency" for x in limits.limits)
    ):
        raise typer.BadParameter(
            "a plan is not timed before it is fitted; leave the latency out, and measure with rabbet bench",
            param_hint="--budget",
        )
    target = ready(output)
    inputs = open_inputs(model, data, test)
    before = None if inputs.judge is None else inputs.judge(inputs.network)
    with working(resume, processes, as_json) as jobs:
        result = _made(inputs, limits, wanted, worker, seed, jobs)
    output.parent.mkdir(parents=True, exist_ok=True)
    written = result.export(output, target)
    after = None if inputs.judge is None else inputs.judge(opened(output, inputs.network))
    if as_json:
        facts = tables.plan_facts(
            result.survey, result.plan, result.cost, result.float_cost, limits
        )
        made = {
            "output": str(output),
            "bytes": written.bytes,
            "seed": seed,
            "quality": quality,
            "method": method,
        }
        notes = [*result.notes, *written.notes]
        tables.print_json(
            made | facts | {"evaluation": _judged(inputs, before, after), "notes": notes}
        )
        return
    out = tables.console()
    costs = result.cost, result.float_cost
    tables.print_report(
        out, result.survey, result.plan, costs, limits, (*result.notes, *written.notes)
    )
    if inputs.judge is not None and before is not None:
        end = "" if after is None else f" -> {inputs.judge.show(after)}"
        out.print(f"{inputs.judge.quantity}: {inputs.judge.show(before)}{end}", soft_wrap=True)
    out.print(f"{output}: {written.bytes:,} bytes", soft_wrap=True)
    if target != "safetensors":
        out.print(
            f"the native file, which a budget of bytes is about: {result.cost.bytes:,} bytes",
            soft_wrap=True,
        )


def _made(
    inputs: Inputs,
    limits: Budget | None,
    wanted: Plan | None,
    method: Method,
    seed: int,
    jobs: Jobs,
) -> Result:
    """Choose and fit; or fit a given plan, held against the budget before anything is solved."""
    if wanted is None:
        assert limits is not None
        return choose_and_fit(inputs.network, limits, inputs.task, method, seed, jobs)
    if limits is not None:
        piece = Workpiece.of(inputs.network, inputs.task, jobs, seed)
        validate(wanted, piece.survey)
        limits.check(piece.cost(wanted), piece.float_cost)
    result = fit(inputs.network, wanted, inputs.task, method, seed, jobs)
    return replace(result, budget=limits)


def _judged(inputs: Inputs, before: float | None, after: float | None) -> dict[str, Any] | None:
    if inputs.judge is None:
        return None
    return {"quantity": inputs.judge.quantity, "before": before, "after": after}


def _survey_facts(found: Survey) -> dict[str, Any]:
    """A survey for JSON."""
    sites = [
        {
            "name": s.name,
            "kind": s.kind.name,
            "shape": list(s.shape),
            "macs": s.macs,
            "positions": s.positions,
            "float_bytes": 4 * s.numel,
            "norm": s.norm,
            "tied": list(s.tied),
            "heads": list(s.heads),
        }
        for s in found
    ]
    return {"sites": sites, "left": tables.left_facts(found), "float_bytes": found.float_bytes}
