"""The user's task: batches, and how a network is run and judged on them."""

import contextlib
import functools
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

import torch
from torch import Tensor, nn

from rabbet.data.answers import Kind
from rabbet.data.batches import (
    Batch,
    describe,
    suited,
    with_tensors,
)
from rabbet.data.examples import Axes
from rabbet.data.measure import smaller_is_better
from rabbet.data.source import MEMORY, Source
from rabbet.data.state import Pass, clean_pass, makeup, state_kept
from rabbet.errors import DataError, ModelError, theirs

Forward = Callable[[nn.Module, Batch], Any]


def call(model: nn.Module, batch: Batch) -> Any:
    """Pass a batch as the model's arguments.

    A tensor is the only argument, a tuple or list is positional, a mapping goes by keyword.
    """
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, tuple | list):
        return model(*batch)
    return model(batch)


@dataclass(frozen=True)
class Task:
    """The user's batches and, where the defaults do not fit, how to use them.

    batches: unlabelled examples as `forward` takes them; a one-shot iterable is read once. forward:
    runs a model on a batch; the default passes the batch as arguments. evaluate: model -> one
    number, larger is better unless it says otherwise (`rabbet.data.measure`); reports use it if it
    is given. loss: (outputs, batch) -> a scalar to
    be minimised, for methods that train on labels; the batch then holds them. vary: (batch,
    generator) -> a batch of the same shapes with the same correct outputs, for example with words
    dropped; methods that train on unchanged batches show it to the student, and the batch itself to
    the teacher. limit: examples used at most (batches, where each counts as one example); the
    rest of a longer iterable is not read. outputs:
    whether outputs are "scores" of classes or "values", one for all or one for each floating output
    in order; None: told from the float network's answers, and "values" where that leaves a doubt.
    weights: what each floating output counts beside the others; None: as much as any other. axes:
    the axis along which a batch's examples lie, one number for the first tensor and those that are
    as long there, or one for each tensor in order, None for one that all examples share; `()`: a
    batch is one example, as it is. None: told by running the network on some of the examples.
    memory: bytes of batches that are kept in memory; further ones that an iterable gives wait in a
    temporary folder. sample: model -> what it makes of some prompts, text by text; reports show it
    in the place of examples.
    """

    batches: Iterable[Batch]
    forward: Forward = call
    evaluate: Callable[[nn.Module], float] | None = None
    limit: int = 2048
    loss: Callable[[Any, Batch], Tensor] | None = None
    vary: Callable[[Batch, torch.Generator], Batch] | None = None
    outputs: Kind | Sequence[Kind] | None = None
    weights: Sequence[float] | None = None
    axes: int | Sequence[int | None] | None = None
    memory: int = MEMORY
    sample: Callable[[nn.Module], Mapping[str, str]] | None = None
    source: Source = field(init=False, repr=False, compare=False)
    """The batches, read once and no further than they are asked for."""

    def __post_init__(self) -> None:
        data = self.batches
        if isinstance(data, Tensor | str | bytes | Mapping) or not isinstance(data, Iterable):
            raise DataError(
                f"data must be an iterable of batches or a Task, found {type(data).__name__}; "
                "for one batch write [batch]"
            )
        kinds = [self.outputs] if isinstance(self.outputs, str) else self.outputs or []
        strange = [kind for kind in kinds if kind not in get_args(Kind)]
        if strange:
            raise DataError(f"outputs are 'scores' or 'values'; found {strange[0]!r}")
        weights = self.weights
        if weights is not None and not (any(weights) and all(w >= 0 for w in weights)):
            raise DataError(
                "weights are what outputs count, at least 0 and one of them more; "
                f"found {tuple(weights)}"
            )
        for name, least, what in (
            ("limit", 1, "the number of examples to use"),
            ("memory", 0, "the bytes of batches that are kept in memory"),
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise DataError(
                    f"{name} is {what}, a whole number, at least {least}; found {value!r}"
                )
        axes = () if self.axes is None else (self.axes,) if _is_axis(self.axes) else self.axes
        if not isinstance(axes, Sequence) or not all(a is None or _is_axis(a) for a in axes):
            raise DataError(
                "axes are numbers from 0, one for all tensors of a batch or one (or None) for each "
                f"in order; found {self.axes!r}"
            )
        # A forward of the user's may want what the iterable gives as it is.
        ready = with_tensors if self.forward is call else lambda batch: batch
        source = data if isinstance(data, Source) else Source(data, ready, self.memory)
        object.__setattr__(self, "source", source)
        if isinstance(data, Iterator):  # so that a copy of this task finds what was read already
            object.__setattr__(self, "batches", source)

    @classmethod
    def of(cls, data: "Task | Iterable[Batch]") -> "Task":
        """A task from bare batches; a task is returned unchanged.

        Raises DataError for what is not an iterable of batches.
        """
        return data if isinstance(data, Task) else cls(data)

    def first(self) -> Batch:
        """The first batch, whole. Raises as `read` does."""
        return next(iter(self.source))

    def read(self) -> list[Batch]:
        """The batches up to the limit, as a list.

        Raises DataError if there is no batch, for one that holds no numbers, is not a tensor,
        tuple, list or mapping with tensors, or holds NaN, and for axes that it does not have.
        """
        batches, count = list[Batch](), 0
        for batch in self.source:
            size = self.examples.count(batch)
            # what is counted along an axis that nobody has said or proven is not cut there
            whole = self.axes is None or count + size <= self.limit
            batches.append(batch if whole else self.examples.first(batch, self.limit - count))
            count += size
            if count >= self.limit:
                break
        return batches

    @functools.cached_property
    def examples(self) -> Axes:
        """Where the examples of a batch lie.

        While that is neither declared nor told, they are counted along the first axis.
        """
        batch = self.first()
        if self.axes is None or isinstance(self.axes, int):
            axes = Axes.along(batch, self.axes or 0)
            fit = axes.known or self.axes is None
        else:
            axes = Axes(tuple(self.axes))
            fit = axes.fit(batch) or not axes.each
        if not fit:
            raise DataError(f"axes={self.axes!r} do not fit a batch of {describe(batch)}")
        return axes

    def gathered(self, limit: int) -> Batch:
        """At most `limit` examples as one batch: the first batches joined while shapes agree."""
        return self.examples.gathered(self.read(), limit)[0]

    def run(self, model: nn.Module, batch: Batch) -> Any:
        """The model's output on a batch, its tensors moved to the model's device and floating type.

        The pass leaves no trace in the model, and draws the same random numbers for the same batch
        (see `rabbet.data.state`). What the forward raises is passed on, with a note.
        """
        return self.watched(model, batch)[0]

    def watched(self, model: nn.Module, batch: Batch) -> tuple[Any, Pass]:
        """The same, and what is known of the pass."""
        place = (
            f"the forward: the model does not run on a batch of {describe(batch)}. A batch is "
            "passed as the model's arguments (tensor, tuple or mapping); use "
            "Task(batches, forward=...) for anything else"
        )
        given = suited(batch, model)
        with clean_pass(model, batch) as seen, theirs(place):
            result = self.forward(model, given)
        if seen.rewrote:
            raise ModelError(
                f"the forward writes to the parameter {seen.rewrote[0]!r}, so the network answers "
                "otherwise after each pass; keep what changes in a buffer (register_buffer)"
            )
        return result, seen

    def judge(self, model: nn.Module, result: Any, batch: Batch) -> Tensor:
        """The task's own loss, a scalar, for a model's result on a batch.

        The loss gets the batch in the model's floating type. Raises DataError unless it returns one
        number.
        """
        assert self.loss is not None
        with theirs("Task(loss=...)"):
            value = self.loss(result, suited(batch, model))
        if not isinstance(value, Tensor) or value.numel() != 1:
            shown = describe(value) if isinstance(value, Tensor) else type(value).__name__
            raise DataError(
                f"Task(loss=...) must return one number for a batch, as a tensor; found {shown}"
            )
        return value.reshape(())

    def score(self, model: nn.Module) -> float:
        """The user's own score of a model in eval mode; larger or smaller is better, as it says.

        The model is left in the mode and the state that it was in, whatever the user's function
        sets. Raises DataError unless the score is a number.
        """
        assert self.evaluate is not None
        return measured(model, self.evaluate, "Task(evaluate=...)")

    def varied(self, batch: Batch, generator: torch.Generator) -> Batch:
        """A batch as the student sees it."""
        if self.vary is None:
            return batch
        with theirs("Task(vary=...)"):
            return self.vary(batch, generator)

    def sampled(self, model: nn.Module) -> dict[str, str]:
        """What a model makes of the user's prompts; raises DataError unless those are texts."""
        assert self.sample is not None
        with theirs("Task(sample=...)"):
            found = self.sample(model)
        if not isinstance(found, Mapping) or not all(isinstance(v, str) for v in found.values()):
            raise DataError(
                f"Task(sample=...) must give a text for each prompt, as a mapping; "
                f"found {describe(found)}"
            )
        return dict(found)


def _is_axis(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


_LOCK = threading.Lock()
_MODES: dict[nn.Module, list[bool]] = {}
"""The mode of each module before it was put into eval mode, and that again if it was once more."""


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode; afterwards every module is back in its own mode.

    Several threads may do so with one model: the last one out puts its modules back.
    """
    modules = list(model.modules())
    with _LOCK:
        for module in modules:
            _MODES.setdefault(module, []).append(module.training)
            module.training = False  # an exported program has no `eval`
    try:
        yield
    finally:
        with _LOCK:
            for module in modules:
                mode = _MODES[module].pop()
                if not _MODES[module]:
                    del _MODES[module]
                module.training = mode


def measured(
    model: nn.Module, measure: Callable[[nn.Module], float], name: str = "the measure"
) -> float:
    """What a user's function of a model in eval mode gives: one number.

    The model is left in the mode and the state that it was in, whatever the function sets. Raises
    DataError, by the name of the function, unless it gives a number and leaves the parameters and
    modules as they are.
    """
    before = makeup(model)
    with state_kept(model), evaluating(model), theirs(name):
        result = measure(model)
        try:
            value = float(result)
        except (TypeError, ValueError, RuntimeError) as e:
            raise DataError(
                f"{name} gave {describe(result)}; it must give a number, {_better(measure)}"
            ) from e
    now = makeup(model)
    changed = next((part for part in {**before, **now} if before.get(part) != now.get(part)), None)
    if changed is not None:
        raise DataError(
            f"{name} changes {changed or 'the network'!r} of the network that it measures; let it "
            "change a copy (copy.deepcopy)"
        )
    if math.isnan(value):
        raise DataError(f"{name} gave NaN; it must give a number, {_better(measure)}")
    return value


def _better(measure: object) -> str:
    return f"{'smaller' if smaller_is_better(measure) else 'larger'} is better"
