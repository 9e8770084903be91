"""The examples of a batch: along which axis of each tensor they lie, and how batches are cut.

Nothing is cut or joined along an axis that the user did not declare (`Task(axes=...)`) and that was
not proven by running the network (`rabbet.model.independence`). Where axes are not known, a batch
is one example, and is taken as it is.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rabbet.data.batches import Batch, describe, replaced, tensors
from rabbet.errors import DataError

LEAVES = (bool, int, float, complex, str, bytes)  # that can be compared


@dataclass(frozen=True)
class Axes:
    """The axis of each tensor of a batch, in order, along which its examples lie.

    None: all examples share the tensor. Without any axis, a batch is one example.
    """

    each: tuple[int | None, ...] = ()

    @classmethod
    def along(cls, batch: Batch, axis: int) -> "Axes":
        """One axis of the first tensor, and of those that are as long there.

        A tensor that is as long on its first axis, such as labels beside sequences that lie along
        the second, has its examples there; others are shared.
        """
        parts = tensors(batch)
        size = parts[0].shape[axis] if parts[0].ndim > axis else None

        def place(t: Tensor) -> int | None:
            return next((a for a in (axis, 0) if t.shape[a : a + 1] == (size,)), None)

        return cls(tuple(map(place, parts)))

    @property
    def known(self) -> bool:
        """Whether a batch can be cut and joined."""
        return any(axis is not None for axis in self.each)

    def count(self, batch: Batch) -> int:
        """Examples in a batch. Raises DataError if tensors hold different numbers of them, or 0."""
        axes = self._of(batch)
        sizes = {t.shape[a] for t, a in zip(tensors(batch), axes, strict=True) if a is not None}
        if len(sizes) > 1 or 0 in sizes:
            raise DataError(
                f"the examples of a batch lie along axes {axes} of its tensors, as declared or as "
                f"in the first batch, and in this one they are not one number of them: "
                f"{describe(batch)}; say where they lie with Task(batches, axes=...)"
            )
        return sizes.pop() if sizes else 1

    def cut(self, batch: Batch, part: slice) -> Batch:
        """Some of the examples of a batch, in a slice of them."""
        return self._changed(batch, lambda t, axis: t[(slice(None),) * axis + (part,)])

    def first(self, batch: Batch, count: int = 1) -> Batch:
        """The first examples of a batch."""
        return self.cut(batch, slice(count))

    def take(self, batch: Batch, index: Tensor) -> Batch:
        """Examples of a batch by their numbers."""
        return self._changed(batch, lambda t, axis: t.index_select(axis, index.to(t.device)))

    def shapes(self, batch: Batch) -> list[tuple[int | None, tuple[int, ...]]]:
        """For each tensor its axis, and its shape without that."""
        return [
            (a, tuple(size for d, size in enumerate(t.shape) if d != a))
            for t, a in zip(tensors(batch), self._of(batch), strict=True)
        ]

    def joinable(self, one: Batch, other: Batch) -> bool:
        """Whether two batches can be one: alike in structure and shapes, and in what is shared."""
        if not self.known or not _alike(one, other) or self.shapes(one) != self.shapes(other):
            return False
        pairs = zip(tensors(one), tensors(other), self.each, strict=True)
        return all(axis is not None or torch.equal(a, b) for a, b, axis in pairs)

    def join(self, batches: Sequence[Batch]) -> Batch:
        """Several batches that are `joinable` as one."""
        if len(batches) == 1:
            return batches[0]
        columns = iter([*zip(*map(tensors, batches), strict=True)])
        return self._changed(
            batches[0],
            lambda _, axis: torch.cat(next(columns), axis),
            lambda t: next(columns)[0],
        )

    def gathered(self, batches: Sequence[Batch], limit: int) -> tuple[Batch, list[Batch]]:
        """At most `limit` examples as one batch, and the batches of which none was taken.

        The first batches are joined while they are `joinable`.
        """
        parts, count = [batches[0]], self.count(batches[0])
        for batch in batches[1:]:
            if count >= limit or not self.joinable(parts[0], batch):
                break
            parts.append(batch)
            count += self.count(batch)
        return self.first(self.join(parts), limit), list(batches[len(parts) :])

    def portions(self, batches: Sequence[Batch], size: int) -> Iterator[Batch]:
        """All examples in batches of `size`; fewer at the end, and where batches do not join."""
        parts: list[Batch] = []
        for batch in batches:
            start, count = 0, self.count(batch)
            while start < count:
                room = size - sum(map(self.count, parts))
                if parts and not (room and self.joinable(parts[0], batch)):
                    yield self.join(parts)
                    parts, room = [], size
                parts.append(self.cut(batch, slice(start, start + room)))
                start += room
        if parts:
            yield self.join(parts)

    def hold_back(self, batches: Sequence[Batch], share: float) -> tuple[list[Batch], list[Batch]]:
        """All examples split into the first ones and those held back from the end.

        About `share` of them is held back, at least one example.
        """
        total = sum(map(self.count, batches))
        keep, kept, held, seen = total - max(1, round(total * share)), [], [], 0
        for batch in batches:
            size = self.count(batch)
            if seen + size <= keep:
                kept.append(batch)
            elif seen >= keep:
                held.append(batch)
            else:
                kept.append(self.cut(batch, slice(keep - seen)))
                held.append(self.cut(batch, slice(keep - seen, None)))
            seen += size
        return kept, held

    def of_layer(self, x: Tensor, count: int) -> int | None:
        """The axis of a layer's input or output along which a batch's examples lie.

        On the first axis each may have several rows (windows, frames, tokens). None if the tensor
        does not tell.
        """
        axis = next((a for a in self.each if a is not None), None)
        if axis is None or not x.ndim:
            return None
        if axis == 0:
            return 0 if len(x) % count == 0 else None
        # the last axis is that of features, whose number may be the same
        return next((a for a in (axis, 0) if a < x.ndim - 1 and x.shape[a] == count), None)

    def halves(self, x: Tensor, count: int) -> list[Tensor]:
        """A layer's input or output by every second example of a batch of so many.

        Nothing if there are no two, or if they cannot be told apart.
        """
        axis = self.of_layer(x, count)
        if axis is None or count < 2 or not x.numel():
            return []
        rows = torch.arange(x.shape[axis], device=x.device).view(count, -1)
        return [x.index_select(axis, rows[k::2].flatten()) for k in (0, 1)]

    def fit(self, batch: Batch) -> bool:
        """Whether a batch has as many tensors, and they these axes."""
        parts = tensors(batch)
        return len(parts) == len(self.each) and all(
            a is None or t.ndim > a for t, a in zip(parts, self.each, strict=True)
        )

    def _of(self, batch: Batch) -> tuple[int | None, ...]:
        """The axes of a batch's tensors. Raises DataError for one that is not like the first."""
        if not self.known:
            return (None,) * len(tensors(batch))
        if not self.fit(batch):
            raise DataError(
                f"the examples of a batch lie along axes {self.each} of its tensors, as declared "
                f"or as in the first batch; this one is {describe(batch)}: make batches alike, or "
                "say Task(batches, axes=())"
            )
        return self.each

    def _changed(
        self,
        batch: Batch,
        change: Callable[[Tensor, int], Any],
        shared: Callable[[Tensor], Any] = lambda t: t,
    ) -> Batch:
        axes = iter(self._of(batch))

        def changed(t: Tensor) -> Any:
            axis = next(axes)
            return shared(t) if axis is None else change(t, axis)

        return replaced(batch, changed)


def _alike(one: Any, other: Any) -> bool:
    """Whether two nested values have the same structure, types of tensors, and all else equal."""
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        return bool(one.dtype == other.dtype)
    if isinstance(one, Mapping):  # in this order: tensors are told by their places
        pairs = zip(one.values(), other.values(), strict=False)
        return list(one) == list(other) and all(_alike(a, b) for a, b in pairs)
    if isinstance(one, tuple | list):
        pairs = zip(one, other, strict=False)
        return len(one) == len(other) and all(_alike(a, b) for a, b in pairs)
    return one is other or (isinstance(one, LEAVES) and bool(one == other))
