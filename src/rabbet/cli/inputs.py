"""What a command works on: a network, batches, and what judges a network."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import cast

import typer
from torch import nn

from rabbet.cli.corpora import is_corpus, open_corpus
from rabbet.cli.datasets import Batches, is_data, open_data
from rabbet.cli.judge import Judge, open_judge
from rabbet.cli.networks import open_network
from rabbet.cli.references import reporting, resolve
from rabbet.core.plan import quoted
from rabbet.data.answers import Kind
from rabbet.data.task import Task
from rabbet.errors import DataError, RabbetError

DEMO_MODEL, DEMO_DATA, DEMO_TEST, DEMO_HELD = (
    "rabbet.demo:model",
    "rabbet.demo:calibration",
    "rabbet.demo:test",
    "rabbet.demo:labelled",
)


@dataclass(frozen=True)
class Inputs:
    """The network in eval mode, the task, and what judges a network, if anything does."""

    network: nn.Module
    task: Task
    judge: Judge | None


@contextlib.contextmanager
def demo(given: str | None, option: str) -> Iterator[None]:
    """Say in an error that the demo stood in for an option that was not given."""
    try:
        yield
    except RabbetError as e:
        if given is not None:
            raise
        raise type(e)(f"without {option} it is the demo's that is taken: {e}") from None
    except typer.BadParameter as e:
        if given is not None:
            raise
        raise typer.BadParameter(
            f"none is given, so it is the demo's that is taken, and {e.message}", param_hint=option
        ) from None


def open_inputs(
    model: str | None, data: str | None, test: str | None = None, outputs: str | None = None
) -> Inputs:
    """Load what three references name; without any they are the demo's.

    outputs: "scores" or "values", where the user says so. A usage error for what cannot be used.
    """
    model = DEMO_MODEL if model is None else model
    if model == DEMO_MODEL:
        data, test = DEMO_DATA if data is None else data, DEMO_TEST if test is None else test
    if data is None:
        raise typer.BadParameter(
            f"{quoted(model)} needs batches: a folder of images, a .npy or .npz file, a .txt for "
            "a network that reads text, or a module:callable that gives them",
            param_hint="--data",
        )
    network = open_network(model)
    task = open_task(data, network, outputs)
    judge = open_judge(test, task, network, _classes(task))
    if judge is not None and judge.sample is not None:
        task = replace(task, sample=judge.sample)
    return Inputs(network, task, judge)


def open_held(
    model: str | None, held: str | None, inputs: Inputs, required: bool = True
) -> Judge | None:
    """What measures networks while one is chosen, on data that no test holds.

    A usage error if nothing does, and it is required.
    """
    if held is None and model in (None, DEMO_MODEL):
        held = DEMO_HELD
    judge = open_judge(held, inputs.task, inputs.network, _classes(inputs.task), "--held")
    if judge is None and required:
        raise typer.BadParameter(
            "say what networks are measured on: labelled batches that --test does not hold, or a "
            "function of a network; or give a Task(evaluate=...)",
            param_hint="--held",
        )
    return judge


def _told(task: Task, outputs: str | None) -> Task:
    """A task with what the user says that outputs are; a usage error if it says otherwise."""
    if outputs is None or task.outputs == outputs:
        return task
    if task.outputs is not None:
        raise typer.BadParameter(
            f"{outputs!r} was asked for, and the Task of --data says outputs={task.outputs!r}; "
            "leave one of them out",
            param_hint="--outputs",
        )
    return replace(task, outputs=cast(Kind, outputs))


def _classes(task: Task) -> tuple[str, ...]:
    """How the folders of classes are numbered, where the data say so."""
    return task.batches.table.classes if isinstance(task.batches, Batches) else ()


def open_task(reference: str, network: nn.Module | None = None, outputs: str | None = None) -> Task:
    """The batches or the task that a reference names; network: what files are prepared for.

    outputs: as for `open_inputs`.
    """
    if network is not None and is_corpus(reference, network):
        return _told(open_corpus(reference, network, "--data"), outputs)
    if is_data(reference):
        batches = open_data(reference, network, "--data").spread()
        return _told(Task(batches, limit=batches.table.count), outputs)
    try:
        task = Task.of(resolve(reference, "--data"))
    except DataError as e:
        raise typer.BadParameter(f"{reference}: {e}", param_hint="--data") from None
    task = _told(task, outputs)
    with reporting(reference, "--data"):  # a generator runs the user's code only now
        task.read()
    return task
