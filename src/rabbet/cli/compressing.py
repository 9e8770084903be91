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
    outputs: options.Outputs = None,
    budget: options.BudgetText = options.DEFAULT_BUDGET,
    out: Annotated[
        Path | None, typer.Option(dir_okay=False, help="Write the plan into this file, too.")
    ] = None,
    method: options.MethodText = None,
    target: options.Target = None,
    seed: options.Seed = 0,
    resume: options.Resume = None,
    processes: options.Processes = 1,
    html: options.Html = None,
    as_json: options.Json = False,
) -> None:
    """Choose only: print the plan that compress would fit, to be edited and given to its --plan."""
    from rabbet.cli import outcomes, pages, tables, texts
    from rabbet.cli.inputs import open_inputs
    from rabbet.cli.stored import writable
    from rabbet.cli.terminal import working
    from rabbet.report.facts import plan_facts
    from rabbet.report.text import total_parts

    limits, worker = texts.budget_of(budget, target), texts.worker_of(method)
    if out is not None:
        writable(out)
    pages.ready(html, "--html", out, model, data)
    inputs = open_inputs(model, data, outputs=outputs)
    with working(resume, processes, as_json) as jobs:
        chosen = outcomes.plan_for(inputs, limits, worker, seed, jobs)
    if out is not None:
        texts.write_plan(out, chosen.plan)
    costs = chosen.cost, chosen.float_cost
    if as_json:
        facts = plan_facts(chosen.survey, chosen.plan, *costs, limits, chosen.findings)
        tables.print_json(facts | {"seed": seed})
    else:
        tables.show(total_parts(chosen.survey, *costs, limits), stderr=True)
        print(chosen.plan)
    if html is not None:  # at the end: what was found is not lost if it fails
        pages.write_plan(chosen, limits, html)


def compress(
    output: options.Place,
    model: options.Model = None,
    data: options.Data = None,
    test: options.Test = None,
    outputs: options.Outputs = None,
    budget: options.OptionalBudget = None,
    plan: options.PlanFile = None,
    drop: options.Drop = None,
    axis: options.DropAxis = None,
    held: options.Held = None,
    quality: options.Quality = "default",
    method: options.MethodText = None,
    target: options.Target = None,
    seed: options.Seed = 0,
    resume: options.Resume = None,
    processes: options.Processes = 1,
    html: options.Html = None,
    as_json: options.Json = False,
) -> None:
    """Make a network fit a budget, or fit a given plan, and write the file.

    Accuracy is that of the file. If the output is a folder, a network is read block by block.
    """
    from rabbet.cli import folders, outcomes, pages, tables, texts
    from rabbet.cli.inputs import open_inputs
    from rabbet.cli.stored import agreed, opened, ready, require_other
    from rabbet.cli.terminal import told, working
    from rabbet.cli.wishes import Wish

    if folders.is_folder(output) and model is not None:
        plain = {"--plan": plan, "--drop": drop, "--axis": axis, "--held": held, "--html": html}
        plain |= {"--target": target, "--outputs": outputs}
        asked = folders.Asked(model, data, test, budget, output, plain)
        folders.run(asked, folders.How(method, quality, seed, resume, processes, as_json))
        return
    wish = Wish.read(budget, plan, drop, axis, target)
    wish.require_held(held, test)
    worker = texts.worker_of(method, quality)
    chosen = agreed(ready(output), output, target)
    require_other(output, model, data, test)
    pages.ready(html, "--html", output, model, data, test)
    inputs = open_inputs(model, data, test, outputs)
    outcomes.require_exportable(inputs, chosen)
    judge, wish = inputs.judge, wish.judged(model, held, inputs)
    with working(resume, processes, as_json) as jobs:
        with told(jobs, "judging the network"):
            before = None if judge is None else judge(inputs.network)
        result, frontier = wish.granted(inputs, worker, seed, jobs)
        replaced = output.exists()
        with told(jobs, "writing the file"):
            written = outcomes.export_safely(result, output, chosen)
        with told(jobs, "judging the file"):
            after = None if judge is None else judge(opened(output, inputs.network))
        outcome = outcomes.Outcome(output, result, written, judge, before, after, replaced)
        if html is not None:
            with told(jobs, "making the page"):
                pages.write_outcome(outcome, inputs.network, html, frontier)
    settings = {"seed": seed, "quality": quality, "method": method}
    tables.tell(as_json, lambda: outcome.facts(settings), lambda: outcome.parts(target=chosen))
