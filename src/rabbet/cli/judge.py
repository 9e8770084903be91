"""What says how good a network is: labelled batches, or the user's own function."""

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

import typer
from torch import nn

from rabbet.cli.corpora import is_corpus, open_held_corpus
from rabbet.cli.datasets import Labelled, is_data, open_data
from rabbet.cli.references import attribute, reporting, resolve_value
from rabbet.data.accuracy import Accuracy, accuracy, examples_of
from rabbet.data.decoder import Estimate
from rabbet.data.measure import quantity_of, smaller_is_better
from rabbet.data.task import Task


@dataclass(frozen=True)
class Judge:
    """One number for a network.

    quantity: what the number is; unit: what follows it. run: gives it. option: where it was asked
    for. sample: what a network makes of prompts of the same data, if they have some.
    """

    quantity: str
    unit: str
    run: Callable[[nn.Module], float]
    reference: str
    option: str = "--test"
    smaller_is_better: bool = False
    sample: Callable[[nn.Module], Mapping[str, str]] | None = None

    @classmethod
    def by(
        cls,
        measure: Callable[[nn.Module], float],
        reference: str,
        option: str,
        sample: Callable[[nn.Module], Mapping[str, str]] | None = None,
    ) -> Self:
        """By a measure, which may say what it is called and which way is better."""
        quantity, smaller = quantity_of(measure, "evaluation"), smaller_is_better(measure)
        return cls(quantity, "", measure, reference, option, smaller, sample)

    def __call__(self, network: nn.Module) -> float:
        """Judge a network; a usage error if the user's batches or function fail."""
        with reporting(self.reference, self.option):
            value = self.run(network)
            return value if isinstance(value, Accuracy | Estimate) else float(value)

    def examples(self, network: nn.Module) -> int | None:
        """Of how many examples the number is a share, where that is known."""
        return examples_of(self(network))

    def show(self, value: float) -> str:
        """A number of this judge in words, with its standard error if it is known."""
        if isinstance(value, Accuracy):
            return f"{value:.2f}{self.unit} ± {value.error:.2f}"
        error = error_of(value)
        if error is not None:
            return f"{value:.4g} ± {error:.2g}"
        return f"{value:.2f}{self.unit}" if self.unit else f"{value:.6g}"


def error_of(value: float) -> float | None:
    """The standard error of a number, where it knows that."""
    return value.error if isinstance(value, Accuracy | Estimate) else None


def open_judge(
    reference: str | None,
    task: Task | None = None,
    network: nn.Module | None = None,
    classes: tuple[str, ...] = (),
    option: str = "--test",
) -> Judge | None:
    """What judges a network, if anything does.

    It is the test that a reference names, else the task's own evaluation. network: what files are
    prepared for. classes: how the folders of classes are numbered, where the data say so. option:
    what the reference was given to.
    """
    if reference is None:
        own = None if task is None else task.evaluate
        if own is None:
            return None
        return Judge.by(own, "the task's evaluate", option)
    if network is not None and is_corpus(reference, network):
        measure, sample = open_held_corpus(reference, network, option)
        return Judge.by(measure, reference, option, sample)
    if is_data(reference):
        pairs = open_data(reference, network, option).labelled(classes)
        return Judge("accuracy", "%", _accuracy(pairs), reference, option)
    named = attribute(reference, option)
    value = named if _takes_one(named) else resolve_value(named, reference, option)
    if callable(value) and not isinstance(value, Iterable):
        return Judge.by(value, reference, option)
    if not isinstance(value, Iterable):
        raise typer.BadParameter(
            f"{reference} gives {type(value).__name__}, not batches of (inputs, labels) or a "
            "function of a model",
            param_hint=option,
        )
    # read twice, before and after: what can be read only once is kept
    batches = list(value) if isinstance(value, Iterator) else value
    return Judge("accuracy", "%", _accuracy(batches), reference, option)


def _accuracy(pairs: Iterable[Any]) -> Callable[[nn.Module], float]:
    classes = pairs.classes if isinstance(pairs, Labelled) else None
    return lambda network: accuracy(network, pairs, classes)


def _takes_one(named: Any) -> bool:
    """Whether something is a function of one argument: it wants the model."""
    if not callable(named):
        return False
    with contextlib.suppress(TypeError, ValueError):
        inspect.signature(named).bind(None)
        with contextlib.suppress(TypeError):
            inspect.signature(named).bind()
            return False
        return True
    return False
