"""The commands that need a network: survey, plan, compress."""

from pathlib import Path
from typing import Annotated

import typer

from rabbet.cli import options


def survey(
    model: options.Model = None, data: options.Data = None, as_json: options.Json = False
) -> None:
    """Show every layer that can be compressed, and what is left alone and why."""
    from rabbet._api import survey as look
    from rabbet.cli import tables
    from rabbet.cli.inputs import open_inputs
    from rabbet.report.facts import survey_facts
    from rabbet.report.text import survey_parts

    inputs = open_inputs(model, data)
    layers = look(inputs.network, inputs.task)
    if as_json:
        tables.print_json(survey_facts(layers))
    else:
        tables.show(survey_parts(layers))


def plan(
    model: options.Model = None,
    data: options.Data = None,
    budget: options.BudgetText = options.DEFAULT_BUDGET,
    out: Annotated[
        Path | None, typer.Option(dir_okay=False, help="Write the plan into this file, too.")
    ] = None,
    method: options.MethodText = None,
    target: options.Target = None,
    seed: options.Seed = 0,
    resume: options.Resume = None,
    processes: options.Processes = 1,
    as_json: options.Json = False,
) -> None:
    """Choose only: print the plan that compress would fit, to be edited and given to its --plan."""
    from rabbet.cli import outcomes, tables, texts
    from rabbet.cli.inputs import open_inputs
    from rabbet.cli.stored import writable
    from rabbet.cli.terminal import working
    from rabbet.report.facts import plan_facts
    from rabbet.report.text import total_parts

    limits, worker = texts.budget_of(budget, target), texts.worker_of(method)
    if out is not None:
        writable(out)
    inputs = open_inputs(model, data)
    with working(resume, processes, as_json) as jobs:
        chosen = outcomes.plan_for(inputs, limits, worker, seed, jobs)
    if out is not None:
        texts.write_plan(out, chosen.plan)
    costs = chosen.cost, chosen.float_cost
    if as_json:
        tables.print_json(plan_facts(chosen.survey, chosen.plan, *costs, limits) | {"seed": seed})
        return
    tables.show(total_parts(chosen.survey, *costs, limits), stderr=True)
    print(chosen.plan)


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
    target: options.Target = None,
    seed: options.Seed = 0,
    resume: options.Resume = None,
    processes: options.Processes = 1,
    as_json: options.Json = False,
) -> None:
    """Make a network fit a budget, or fit a given plan, and write the file.

    Accuracy is that of the file.
    """
    from rabbet.cli import outcomes, tables, texts
    from rabbet.cli.inputs import open_inputs
    from rabbet.cli.stored import agreed, opened, ready, require_other
    from rabbet.cli.terminal import told, working

    asked = options.DEFAULT_BUDGET if budget is None and plan is None else budget
    limits = None if asked is None else texts.budget_of(asked, target)
    worker = texts.worker_of(method, quality)
    wanted = None if plan is None else texts.plan_of_file(plan)
    if wanted is not None and limits is not None:
        outcomes.require_countable(limits)
    chosen = agreed(ready(output), output, target)
    require_other(output, model, data, test)
    inputs = open_inputs(model, data, test)
    outcomes.require_exportable(inputs, chosen)
    judge = inputs.judge
    with working(resume, processes, as_json) as jobs:
        with told(jobs, "judging the network"):
            before, examples = (None, 0) if judge is None else judge.measured(inputs.network)
        result = outcomes.compress_or_fit(inputs, limits, wanted, worker, seed, jobs)
        replaced = output.exists()
        with told(jobs, "writing the file"):
            written = outcomes.export_safely(result, output, chosen)
        with told(jobs, "judging the file"):
            after = None if judge is None else judge(opened(output, inputs.network))
    outcome = outcomes.Outcome(output, result, written, judge, before, after, examples, replaced)
    if as_json:
        settings = {"seed": seed, "quality": quality, "method": method}
        tables.print_json(outcome.facts(settings))
    else:
        tables.show(outcome.parts(target=chosen))
