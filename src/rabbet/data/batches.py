"""Batches as users bring them, nested tuples, lists and mappings of tensors, and their handling."""

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
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


def with_tensors(batch: Batch) -> Batch:
    """A batch with numpy's arrays as tensors; one that holds none is returned as it is.

    Raises DataError for an array that is not of numbers.
    """
    if isinstance(batch, np.ndarray):
        return tensor_of(batch)
    if isinstance(batch, Mapping) and _holds_array(batch):
        return {k: with_tensors(v) for k, v in batch.items()}
    if type(batch) in (tuple, list) and _holds_array(batch):
        return type(batch)(map(with_tensors, batch))
    return batch


def _holds_array(value: Any) -> bool:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, tuple | list):
        return any(map(_holds_array, value))
    return isinstance(value, np.ndarray)


def tensor_of(array: NDArray[Any]) -> Tensor:
    """A copy of an array, of any byte order and layout; DataError if it is not of numbers."""
    try:
        native = array.astype(array.dtype.newbyteorder("="))
        return torch.from_numpy(np.ascontiguousarray(native))
    except TypeError as e:
        raise DataError(f"an array of {array.dtype} holds no numbers: {e}") from None


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


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """The norm of a difference over that of what is compared with, where both are finite.

    Infinite where shapes differ, or where values that are not finite are not the same.
    """
    if ours.shape != theirs.shape:
        return math.inf
    a, b = ours.detach().double().cpu(), theirs.detach().double().cpu()
    known = b.isfinite()
    if not torch.equal(a[~known].nan_to_num(), b[~known].nan_to_num()):
        return math.inf
    if not a[known].isfinite().all():
        return math.inf
    distance, size = float((a - b)[known].norm()), float(b[known].norm())
    return distance / max(size, 1e-30) if distance else 0.0
