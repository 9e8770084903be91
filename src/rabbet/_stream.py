"""A folder compressed into a folder; never more than a block of the network is in memory."""

import contextlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor, nn

from rabbet._bench import in_turn, jobs_of
from rabbet.core.budget import MEASURED, Budget
from rabbet.core.cost import Cost
from rabbet.core.plan import Plan
from rabbet.core.survey import Left, Survey
from rabbet.data.task import Task
from rabbet.errors import BudgetError, FileError, PlanError
from rabbet.export.folders import earlier_files, native_names
from rabbet.export.writing import write_layers
from rabbet.files import require_regular
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
NEW = ".rabbet-new"  # in the output, too: where files are written until all of them are there


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


def _require_countable(budget: Budget) -> None:
    strange = next((limit for limit in budget.limits if limit.metric in MEASURED), None)
    if strange is not None:
        raise BudgetError(
            f"{strange.text!r} is not known of a network that is compressed block by block: take a "
            "budget of bytes, which is that of the native files; rabbet.hf.predict_bytes says "
            "beforehand how long an exported file of a plan will be"
        )


@in_turn
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
    beside: Callable[[Path], None],
) -> Saved:
    """Compress the network of a folder of safetensors; `network` is its skeleton on `meta`.

    Finished blocks are kept in the output, or where `jobs` keeps them, so that the same call goes
    on where it was stopped. An output that lies there stays until all of the new one is written.
    beside: writes the config, and whatever else belongs there, into a folder. Raises BudgetError
    before anything is measured for a budget that cannot be met, FileError for weights that are
    missing or of other shapes.
    """
    jobs = None if jobs is None else jobs_of(jobs)
    _require_countable(budget)
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
    files = _write(bench, plan, priced.parts, method, output, beside)
    harms = bench.known(method.menus(survey), method.scored).harms
    expected = sum(
        harms[line.name][method.menu(survey[line.name]).index(line.terms)] for line in plan
    )
    if own:
        shutil.rmtree(work, ignore_errors=True)
    return Saved(
        output, plan, cost, priced.float_cost, survey, budget, files, expected, bench.notes
    )


@contextlib.contextmanager
def _new(output: Path) -> Iterator[Path]:
    """An empty folder in the output, gone afterwards; FileError where that cannot be written."""
    new = output / NEW
    shutil.rmtree(new, ignore_errors=True)  # of a run that was killed while it wrote
    try:
        new.mkdir()
        yield new
    except OSError as e:
        raise FileError(f"cannot write into {output}: {e}") from e
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _replace(output: Path, new: Path) -> None:
    """Put the files of a folder in the place of an earlier network's.

    The config goes first and comes last: a folder without one is not read, so that whoever looks
    in between is not given half of one network beside half of another.
    """
    files = sorted(new.iterdir(), key=lambda path: path.name == CONFIG)
    for path in files:  # before anything is taken away
        require_regular(output / path.name)
    for path in (output / CONFIG, *earlier_files(output)):
        path.unlink(missing_ok=True)
    for path in files:
        path.replace(output / path.name)


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
    beside: Callable[[Path], None],
) -> tuple[Path, ...]:
    """Fit the blocks, then write the files; a block that is finished is read from where it lies."""
    keys: dict[str, tuple[str, ...]] = {}
    rest: Tensors = {}  # what was changed of the tensors of no site: norms, which are small
    for finished in method.fitted(bench, plan):
        rest |= rest_among(finished.numbers)
        keys |= dict.fromkeys(finished.names, finished.keys)
        del finished  # or its numbers would be held while the next are found
    last: list[tuple[tuple[str, ...], Tensors]] = []
    stack = bench.stack

    def layer(name: str) -> Compressed:
        if not last or last[0][0] != keys[name]:
            last[:] = [(keys[name], bench.numbers(keys[name]))]
        site = bench.survey[name]
        bias = stack.read(f"{name}.bias") if site.bias else None
        return compressed(site, plan, last[0][1], bias)

    buffers = dict(stack.model.named_buffers())

    def tensor(name: str) -> Tensor:
        if name in buffers:
            return buffers[name]
        return rest[name] if name in rest else stack.read(name)

    names = native_names(len(parts))
    with _new(output) as new:
        for name, part in zip(names, parts, strict=True):
            bench.jobs.progress("writing files", names.index(name), len(names))
            write_layers(new / name, part.survey, part.of(plan), part.rest, layer, tensor)
        beside(new)
        _replace(output, new)
    bench.jobs.progress("writing files", len(names), len(names))
    return tuple(output / name for name in names)
