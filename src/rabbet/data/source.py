"""The user's batches, read once however often they are asked for, and checked as they come."""

import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from rabbet.data.batches import Batch, describe, replaced, tensors
from rabbet.data.state import seed_of
from rabbet.errors import DataError, theirs
from rabbet.files import scratch

MEMORY = 2**30  # bytes of batches that are kept in memory


class Source:
    """Batches of an iterable, which may be one-shot. No more is read than somebody asks for.

    ready: what is done to a batch as it comes. memory: bytes of batches that are kept there; those
    of a longer iterable lie in a temporary folder, mapped, so that the system reads them when they
    are used and lets go of them as it likes. A list of batches lies in memory anyway.

    What the iterable raises is passed on, with a note; it is then read anew from its start.
    """

    def __init__(
        self, batches: Iterable[Batch], ready: Callable[[Batch], Batch], memory: int = MEMORY
    ) -> None:
        self.batches, self.ready, self.memory = batches, ready, memory
        self._size = 0  # bytes of the batches read so far
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._read: list[Batch] = []
        self._rest: Iterator[Batch] | None = None
        self._held: list[Tensor] = []
        """The tensors of the last batch, to see whether the next one is written over it."""
        self._last: list[int] = []

    def __iter__(self) -> Iterator[Batch]:
        """Raises DataError if there is no batch, or for one that cannot be computed with."""
        place = 0
        while place < len(self._read) or self._found():
            yield self._read[place]
            place += 1
        if not place:
            raise DataError(
                "data holds no batch; give at least one (a generator can be read only once)"
            )

    def _found(self) -> bool:
        """Read one more batch, if there is one."""
        count = len(self._read)
        try:
            if self._rest is None:
                with theirs("the data, before its first batch"):
                    self._rest = iter(self.batches)
            with theirs(f"the data, at batch {count}, counted from 0"):
                try:
                    batch = self.ready(next(self._rest))
                except StopIteration:
                    return False
            _check(batch, count)
            self._require_own(batch, count)
        except BaseException:  # batches read before an error do not count
            self._read, self._rest, self._held, self._last = [], None, [], []
            self._size, self._folder = 0, None
            raise
        self._size += sum(t.nbytes for t in tensors(batch))
        in_memory = self._size <= self.memory or isinstance(self.batches, Sequence)
        self._read.append(batch if in_memory else replaced(batch, self._mapped))
        return True

    def _mapped(self, tensor: Tensor) -> Tensor:
        """The same numbers in a file of their own; what is written to them stays in memory."""
        if tensor.device.type != "cpu" or not tensor.numel():
            return tensor
        self._folder = self._folder or tempfile.TemporaryDirectory(prefix="rabbet-")
        flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        path = scratch(Path(self._folder.name), flat.numpy().data)
        mapped = torch.from_file(str(path), shared=False, size=tensor.numel(), dtype=tensor.dtype)
        return mapped.view(tensor.shape)

    def _require_own(self, batch: Batch, count: int) -> None:
        """Raise DataError where the iterable fills the tensors of the last batch anew."""
        now = [*tensors(batch)]
        if self._held and self._last != _signs(self._held):
            raise DataError(
                f"while batch {count} of the data was read, that before it changed: the iterable "
                "writes into the same tensors again; yield copies (tensor.clone())"
            )
        self._held, self._last = now, _signs(now)


def _signs(held: Sequence[Tensor]) -> list[int]:
    """What tells that tensors were written to, by torch or by whatever shares their memory."""
    versions = [0 if t.is_inference() else t._version for t in held]  # noqa: SLF001
    return [*versions, seed_of(held)]


def _check(batch: Batch, number: int) -> None:
    """Raise DataError for a batch without numbers that can be computed with."""
    parts = tensors(batch)
    if not parts or not parts[0].numel():
        raise DataError(
            f"a batch must hold a tensor with at least one example, found {describe(batch)}"
        )
    where = f"batch {number} of the data, counted from 0, holds"
    for tensor in parts:
        strange = "lies on the meta device and holds no numbers" if tensor.is_meta else ""
        if tensor.layout != torch.strided or tensor.is_nested:
            strange = "is sparse or nested; make it dense with .to_dense(), or pad it"
        if strange:
            raise DataError(f"{where} a tensor that {strange}")
        if tensor.is_floating_point() and bool(tensor.isnan().any()):
            raise DataError(f"{where} NaN; clean the data")
