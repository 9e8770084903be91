"""A folder compressed into a folder; never more than a block of the network is in memory."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor, nn

from rabbet.core.budget import Budget
from rabbet.core.cost import Cost
from rabbet.core.plan import Plan
from rabbet.core.survey import Left, Survey
from rabbet.data.task import Task
from rabbet.errors import FileError, PlanError
from rabbet.export.folders import earlier_files, native_names
from rabbet.export.writing import write_layers
from rabbet.fingerprint import Untold, fingerprint
from rabbet.jobs import Jobs, Tensors
from rabbet.methods.blockwise.bench import Bench
from rabbet.methods.blockwise.draft import rest_among
from rabbet.methods.blockwise.fitting import compressed
from rabbet.methods.blockwise.folder import (
    Part,
    Prefixed,
    Shards,
    Streamed,
    fill_buffers,
    parts_of,
    rest_of,
    survey_stack,
    types_of,
)
from rabbet.methods.blockwise.method import Blockwise
from rabbet.methods.blockwise.rotate import turned
from rabbet.methods.blockwise.stack import Stack
from rabbet.model.compressed import Compressed
from rabbet.report.text import Findings, plain, report_parts
from rabbet.report.text import Part as Told

UNKNOWN = "no layer that is known here holds it"
CONFIG = "config.json"
WORK = ".rabbet-work"  # in the output, until it is whole: what a stopped run goes on from


@dataclass(frozen=True)
class Saved:
    """A network that was compressed from a folder into another; `cost.bytes` is of its files."""

    folder: Path
    plan: Plan
    cost: Cost
    float_cost: Cost
    survey: Survey
    budget: Budget
    files: tuple[Path, ...]
    expected: float
    """The divergence from the float network, in nats a word, that choosing foretold."""
    notes: tuple[str, ...] = ()

    def parts(self) -> list[Told]:
        """What is to be told of it."""
        costs = self.cost, self.float_cost
        parts = report_parts(self.survey, self.plan, *costs, self.budget, Findings())
        named = ", ".join(path.name for path in self.files)
        said = f"expected divergence: {self.expected:.3g} nats a word"
        return [*parts, *self.notes, said, f"written into {self.folder}: {named}"]

    def __str__(self) -> str:
        return plain(self.parts())


def stream(  # noqa: PLR0913 (those behind the star are options, given by name)
    folder: Path,
    network: nn.Module,
    budget: Budget,
    task: Task,
    output: Path,
    *,
    method: Blockwise,
    seed: int,
    jobs: Jobs | None,
) -> Saved:
    """Compress the network of a folder of safetensors; `network` is its skeleton on `meta`.

    Finished blocks are kept in the output, or where `jobs` keeps them, so that the same call goes
    on where it was stopped. Raises BudgetError before anything is measured for a budget that cannot
    be met, FileError for weights that are missing or of other shapes.
    """
    _require_readable(folder, network, task, method)
    stack, priced = _opened(folder, network, task)
    survey = priced.survey
    method.require_feasible(survey, priced, budget)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise FileError(f"cannot write into {output}: {e}") from e
    work = output / WORK
    own = jobs is None
    jobs = jobs or Jobs(folder=work)
    told = _told(folder, network, task, jobs)
    bench = Bench(stack, survey, task, jobs, seed, told)
    bench = turned(bench) if method.rotate else bench
    plan = method.chosen(bench, priced, budget)
    cost = priced.cost(plan)
    budget.check(cost, priced.float_cost)
    files = _write(bench, plan, priced.parts, method, output, bench.stack)
    harms = bench.known(method.menus(survey), method.scored).harms
    expected = sum(
        harms[line.name][method.menu(survey[line.name]).index(line.terms)] for line in plan
    )
    if own:
        shutil.rmtree(work, ignore_errors=True)
    paths, notes = tuple(files), bench.notes
    return Saved(output, plan, cost, priced.float_cost, survey, budget, paths, expected, notes)


def _require_readable(folder: Path, network: nn.Module, task: Task, method: Blockwise) -> None:
    """Refuse what cannot be compressed block by block."""
    if method.act is not None:
        raise PlanError(
            "a network that is read block by block keeps its inputs in float: leave out act"
        )
    if task.outputs not in (None, "scores"):
        raise PlanError("from a folder, networks are compressed whose outputs are scores of words")
    if getattr(getattr(network, "config", None), "quantization_config", None) is not None:
        raise FileError(
            f"{folder} holds weights that are quantised already (quantization_config): start from "
            "those in floats"
        )


def _opened(folder: Path, network: nn.Module, task: Task) -> tuple[Stack, Streamed]:
    """The network block by block, and what knows its cost."""
    shards = Shards(folder)
    tensors = Prefixed(shards, network)
    stack = Stack(network.eval(), tensors)
    types = types_of(network, shards, stack)
    fill_buffers(network, tensors)
    batch = task.read()[0]
    with stack.ends():
        hidden, _ = stack.enter(task, batch)
    places = max(1, hidden[..., 0].numel() // task.examples.count(batch))
    survey = survey_stack(stack, places)
    rest = rest_of(stack, survey, types)
    whole = (Left(r.name, UNKNOWN, r.bytes) for r in rest if len(r.shape) > 1)
    survey = replace(survey, left=tuple(whole))
    return stack, Streamed(survey, parts_of(survey, rest, len(shards.paths)), survey.left)


def _told(folder: Path, network: nn.Module, task: Task, jobs: Jobs) -> str:
    """The fingerprint of all that results depend on: weights, config, batches, functions."""
    config = getattr(network, "config", None)
    said = config.to_json_string() if config is not None else type(network).__name__
    try:
        return fingerprint(
            {
                "weights": Shards(folder).digest(),
                "network": said,
                "forward": task.forward,
                "batches": task.read(),
            }
        )
    except Untold as e:
        jobs.say_untold("the task", e)
        return jobs.key("", {}, {"never again": e})


def _write(
    bench: Bench,
    plan: Plan,
    parts: Sequence[Part],
    method: Blockwise,
    output: Path,
    stack: Stack,
) -> list[Path]:
    """Fit the blocks, then write the files; a block that is finished is read from where it lies."""
    keys: dict[str, str] = {}
    rest: Tensors = {}  # what was changed of the tensors of no site: norms, which are small
    for finished in method.fitted(bench, plan):
        rest |= rest_among(finished.numbers)
        keys |= dict.fromkeys(finished.names, finished.key)
    last: list[tuple[str, Tensors]] = []

    def layer(name: str) -> Compressed:
        if not last or last[0][0] != keys[name]:
            found = bench.jobs.kept(keys[name])
            if found is None:
                raise FileError("finished work has gone while files were written; run it again")
            last[:] = [(keys[name], found)]
        site = bench.survey[name]
        bias = stack.read(f"{name}.bias") if site.bias else None
        return compressed(site, plan, last[0][1], bias)

    buffers = dict(stack.model.named_buffers())

    def tensor(name: str) -> Tensor:
        if name in buffers:
            return buffers[name]
        return rest[name] if name in rest else stack.read(name)

    names = native_names(len(parts))
    for path in (*earlier_files(output), output / CONFIG):
        path.unlink(missing_ok=True)  # a half of one network beside one of another would be read
    for name, part in zip(names, parts, strict=True):
        bench.jobs.progress("writing files", names.index(name), len(names))
        write_layers(output / name, part.survey, part.of(plan), part.rest, layer, tensor)
    bench.jobs.progress("writing files", len(names), len(names))
    return [output / name for name in names]
