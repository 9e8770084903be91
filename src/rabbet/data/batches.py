"""Batches as users bring them, nested tuples, lists and mappings of tensors, and their handling."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rabbet.errors import DataError

Batch = Any


def tensors(value: Any) -> list[Tensor]:
    """Every tensor of a nested value, such as a batch or an output, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, tuple | list):
        return list(itertools.chain.from_iterable(map(tensors, value)))
    return []


def floating(value: Any) -> list[Tensor]:
    """Every tensor of a nested value that holds real numbers: no indices, no masks."""
    return [t for t in tensors(value) if t.is_floating_point()]


def replaced(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """The same nested value with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {k: replaced(v, change) for k, v in value.items()}
    if isinstance(value, tuple | list):
        parts = [replaced(v, change) for v in value]
        if hasattr(value, "_fields"):  # a named tuple
            return type(value)(*parts)
        return tuple(parts) if isinstance(value, tuple) else parts
    return value


def examples(batch: Batch) -> int:
    """Examples in a batch: the length of its first tensor."""
    parts = tensors(batch)
    if not parts or not parts[0].ndim or not len(parts[0]):
        raise DataError(
            f"a batch must hold a tensor with at least one example, found {describe(batch)}"
        )
    return len(parts[0])


def first_examples(batch: Batch, count: int) -> Batch:
    """The first examples of a batch: tensors as long as the first one are cut, others are not."""
    size = examples(batch)
    return replaced(batch, lambda t: t[:count] if t.ndim and len(t) == size else t)


def inner_shapes(batch: Batch) -> list[tuple[bool, tuple[int, ...]]]:
    """For each tensor, whether every example has its own slice, and the shape of that slice.

    For a tensor that all examples share, its whole shape. Batches with equal results can be joined.
    """
    size = examples(batch)
    own = [t.ndim > 0 and len(t) == size for t in tensors(batch)]
    return [(each, tuple(t.shape[each:])) for each, t in zip(own, tensors(batch), strict=True)]


def join(batches: Sequence[Batch]) -> Batch:
    """Several batches of the same `inner_shapes` as one.

    Tensors that all examples share are taken from the first batch.
    """
    if len(batches) == 1:
        return batches[0]
    columns = zip(*map(tensors, batches), strict=True)
    own = [own for own, _ in inner_shapes(batches[0])]
    whole = iter([torch.cat(c) if each else c[0] for c, each in zip(columns, own, strict=True)])
    return replaced(batches[0], lambda _: next(whole))


def gathered(batches: Sequence[Batch], limit: int) -> tuple[Batch, list[Batch]]:
    """At most `limit` examples as one batch, and the batches of which none was taken.

    The first batches are joined while their shapes agree.
    """
    parts, count = [batches[0]], examples(batches[0])
    for batch in batches[1:]:
        if count >= limit or inner_shapes(batch) != inner_shapes(parts[0]):
            break
        parts.append(batch)
        count += examples(batch)
    return first_examples(join(parts), limit), list(batches[len(parts) :])


def suited(batch: Batch, model: nn.Module) -> Batch:
    """A copy of a batch on the model's device and in its floating type.

    It is a copy because a model may work in place; without floating parameters or buffers the batch
    itself is returned.
    """
    numbers = itertools.chain(model.parameters(), model.buffers())
    home = next((p for p in numbers if p.is_floating_point()), None)
    if home is None:
        return batch
    return replaced(
        batch,
        lambda t: t.to(home.device, home.dtype if t.is_floating_point() else t.dtype, copy=True),
    )


def describe(batch: Batch) -> str:
    """A batch in words: the types and shapes of what it holds."""
    if isinstance(batch, Tensor):
        return f"{str(batch.dtype).removeprefix('torch.')}{list(batch.shape)}"
    if isinstance(batch, Mapping):
        return "{" + ", ".join(f"{k}: {describe(v)}" for k, v in batch.items()) + "}"
    if isinstance(batch, tuple | list):
        return "(" + ", ".join(map(describe, batch)) + ")"
    return type(batch).__name__


def outputs(value: Any) -> list[Tensor]:
    """The floating tensors of a model's output.

    Raises DataError if there is none: without one, no output can be compared.
    """
    parts = floating(value)
    if not parts:
        raise DataError(
            f"the model returned {type(value).__name__} without a floating tensor; "
            "nothing to compare"
        )
    return parts
