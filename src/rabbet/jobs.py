"""Independent jobs on any executor; finished ones are remembered by the content of their input.

A job is a top-level function from tensors and plain settings to a dict of tensors. Its key is a
hash of the function's name and of every byte of its input, so a killed run that is started again
finds its finished results, and a second budget finds the candidates of the first. Results on disk
are safetensors: nothing is ever unpickled from a folder.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, as_completed
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save, save_file
from torch import Tensor

from rabbet.errors import FileError

Tensors = dict[str, Tensor]
Job = tuple[Callable[..., Tensors], Mapping[str, Tensor], Mapping[str, Any]]
Progress = Callable[[str, int, int], None]


def silent(stage: str, done: int, total: int) -> None:
    """Show no progress. A stage may be followed by `: ` and details; done and total are steps."""


@dataclass
class Jobs:
    """Where jobs run and where their results are kept.

    executor: any `concurrent.futures.Executor`; None runs them here, one after the other. folder:
    where results are kept between runs; None keeps them in memory, for the life of this object.
    Functions of a task (`forward`, `loss`) count by their names only: after changing one, use
    another folder.
    """

    executor: Executor | None = None
    folder: Path | None = None
    progress: Progress = silent
    _memory: dict[str, Tensors] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.folder is None:
            return
        self.folder = Path(self.folder)  # a text will do
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            writable = os.access(self.folder, os.W_OK)
        except OSError:
            writable = False
        if not writable:  # better now than after an hour of work
            raise FileError(
                f"finished work cannot be kept in {self.folder}: "
                "it is no folder that can be written to"
            )

    def run(self, stage: str, jobs: Sequence[Job]) -> list[Tensors]:
        """Results in the order of the jobs, whatever the order in which they end."""
        keys = [_key(job) for job in jobs]
        results: dict[str, Tensors] = {k: kept for k in keys if (kept := self.kept(k)) is not None}
        missing = {k: job for k, job in zip(keys, jobs, strict=True) if k not in results}
        for key, result in self._finished(missing):
            self.keep(key, result)
            results[key] = result
            self.progress(stage, len(results), len(set(keys)))
        if not missing:
            self.progress(stage, len(results), len(results))
        return [results[k] for k in keys]

    def _finished(self, jobs: dict[str, Job]) -> Iterator[tuple[str, Tensors]]:
        if self.executor is None:
            yield from ((key, _call(job)) for key, job in jobs.items())
            return
        futures = {
            self.executor.submit(_call_packed, job[0], _packed(job[1]), job[2]): k
            for k, job in jobs.items()
        }
        for future in as_completed(futures):
            yield futures[future], load(future.result())

    def kept(self, key: str) -> Tensors | None:
        """The result that was kept under this key, if any; a damaged file counts as none."""
        if self.folder is None:
            return self._memory.get(key)
        with contextlib.suppress(OSError, SafetensorError):
            return load_file(self.folder / f"{key}.safetensors")
        return None

    def keep(self, key: str, result: Tensors) -> None:
        """Remember a result, in memory or in the folder (written beside, then renamed)."""
        if self.folder is None:
            self._memory[key] = result
            return
        beside = self.folder / f"{key}.{os.getpid()}.part"
        try:
            save_file({k: v.contiguous() for k, v in result.items()}, beside)
            beside.replace(self.folder / f"{key}.safetensors")
        except (OSError, SafetensorError) as e:  # the folder has gone, or the disk is full
            beside.unlink(missing_ok=True)
            raise FileError(f"finished work cannot be kept in {self.folder}: {e}") from e


def content_key(name: str, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> str:
    """A hash of a name, the bytes of tensors, settings (by their `repr`) and rabbet's version."""
    facts = [name, version("rabbet"), {k: repr(v) for k, v in sorted(settings.items())}]
    digest = hashlib.sha256(json.dumps(facts).encode())
    for label, tensor in sorted(tensors.items()):
        digest.update(f"{label} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(
            tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        )
    return digest.hexdigest()[:40]


def _key(job: Job) -> str:
    function, tensors, settings = job
    return content_key(f"{function.__module__}.{function.__qualname__}", tensors, settings)


def _call(job: Job) -> Tensors:
    # One thread per job, wherever it runs: another order of summation would give other bytes.
    function, tensors, settings = job
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            return function(**tensors, **settings)
    finally:
        torch.set_num_threads(threads)


def _packed(tensors: Mapping[str, Tensor]) -> bytes:
    # Processes exchange bytes: torch would share each tensor through a file descriptor, until none
    # is left.
    return save({k: v.detach().cpu().contiguous() for k, v in tensors.items()})


def _call_packed(
    function: Callable[..., Tensors], tensors: bytes, settings: Mapping[str, Any]
) -> bytes:
    return _packed(_call((function, load(tensors), settings)))
