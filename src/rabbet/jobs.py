"""Independent jobs on any executor; finished ones are remembered by the content of their input.

A job is a top-level function from tensors and plain settings to a dict of tensors. Its key is a
hash of the function's name, of every byte of its input and of what its settings are and compute, so
a killed run that is started again finds its finished results, and a second budget finds the
candidates of the first. Results on disk are safetensors, each with the key of its job and a
checksum: nothing is ever unpickled from a folder, and nothing is taken from it that was damaged or
belongs to another job.
"""

import contextlib
import functools
import hashlib
import json
import logging
import multiprocessing
import os
import secrets
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, wait
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from rabbet.cluster import Placed, worker_died
from rabbet.errors import FileError, PlanError, RabbetError
from rabbet.files import write_whole
from rabbet.fingerprint import Untold, fingerprint
from rabbet.progress import duration, worded

Tensors = dict[str, Tensor]
Job = tuple[Callable[..., Tensors], Mapping[str, Tensor], Mapping[str, Any]]
Progress = Callable[[str, int, int], None]
Finished = Generator[tuple[str, Tensors], None, None]

AHEAD = 2**30  # bytes of inputs that wait in an executor, beside those of a job for each core
ONCE = "once-"  # how the key of work begins that no other run can find again
LOG = logging.getLogger("rabbet")
TURN = threading.RLock()
"""Held by the one thread that works: one that is new takes over torch's number of threads from
whichever thread set it last, so beside a job it would start with one."""


def silent(stage: str, done: int, total: int) -> None:
    """Show no progress. A stage may be followed by `: ` and details; done and total are steps.

    Steps are of equal work, about: jobs that differ are counted in milliseconds that they may take.
    """


def logged(stage: str, done: int, total: int) -> None:
    """Report progress to the logger `rabbet`, at level INFO."""
    LOG.info("%s", worded(stage, done, total))


@dataclass
class Jobs:
    """Where jobs run and where their results are kept.

    executor: any `concurrent.futures.Executor`; None runs them here, one after the other. folder:
    where results are kept between runs; None keeps them in memory, for the life of this object.
    progress: is told the stage, the steps done and their number; the default reports to the logger
    `rabbet`, which `logging.basicConfig(level="INFO")` shows.

    Functions of a task (`forward`, `loss`) and the network's own code count by what they compute:
    code, constants, defaults, closures, the globals that they read, what they import, the state of
    objects. What is installed, such as torch, counts by its version; what code reads from files
    does not count. Work that depends on something that cannot be told from another (a lock, a
    generator, an open file, a module that is not loaded yet, `eval`, the environment) is not kept.
    That, and an entry of the folder that was damaged or is another job's, is said once, through the
    logger `rabbet`. The checksums are against accidents, not against somebody who may write into
    the folder.
    """

    executor: Executor | None = None
    folder: Path | None = None
    progress: Progress = logged
    _memory: dict[str, Tensors] = field(default_factory=dict, repr=False)
    _said: set[str] = field(default_factory=set, repr=False)
    _inputs: Placed = field(default_factory=Placed, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.executor is not None and not isinstance(self.executor, Executor):
            raise PlanError(
                "executor is one of concurrent.futures, such as ProcessPoolExecutor(4) or a Dask "
                f"client's get_executor(), or is left out; found {self.executor!r}"
            )
        if self.folder is None:
            return
        if not isinstance(self.folder, str | os.PathLike):
            raise PlanError(f"folder is a path, or is left out; found {self.folder!r}")
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

    def run(self, stage: str, jobs: Sequence[Job], seconds: Sequence[float] = ()) -> list[Tensors]:
        """Results in the order of the jobs, whatever the order in which they end.

        Each lies on the device of its job's tensors, wherever it was worked out or found. seconds:
        what each may take, about; then the longest begin, and progress goes by that. Raises
        RabbetError if a worker process dies; what the others have finished is kept.
        """
        keys = [self.key(_name(function), given, rest) for function, given, rest in jobs]
        results: dict[str, Tensors] = {k: kept for k in keys if (kept := self.kept(k)) is not None}
        missing = {k: job for k, job in zip(keys, jobs, strict=True) if k not in results}
        expected = dict(zip(keys, seconds, strict=True)) if seconds else {}
        missing = dict(sorted(missing.items(), key=lambda item: -expected.get(item[0], 0.0)))
        self._tell(stage, keys, results, expected)
        # closed here, so that an error leaves no job waiting and the threads as they were
        with TURN, one_thread(), contextlib.closing(self._finished(stage, missing)) as finished:
            for key, result in finished:
                self.keep(key, result)
                results[key] = result
                self._tell(stage, keys, results, expected)
        return [_beside(given, results[k]) for k, (_, given, _) in zip(keys, jobs, strict=True)]

    def _tell(
        self,
        stage: str,
        keys: Sequence[str],
        results: Mapping[str, Tensors],
        expected: Mapping[str, float],
    ) -> None:
        """Report progress: jobs, or milliseconds where it is expected how long each takes."""
        done, total = len(results), len(set(keys))
        if not expected:
            self.progress(stage, done, total)
            return
        spent, whole = (round(1000 * sum(expected[k] for k in ks)) for ks in (results, expected))
        detail = f"{done} of {total}"
        if not done:
            detail = f"{detail}, perhaps {duration(whole / 1000)} on one core"
        self.progress(f"{stage}: {detail}", spent, whole)

    def _finished(self, stage: str, jobs: dict[str, Job]) -> Finished:
        if self.executor is None:
            for key, job in jobs.items():
                yield key, _call(job)
            return
        try:
            yield from _spread(self.executor, jobs, self._inputs)
        except Exception as e:
            if not worker_died(e):
                raise
            kept = (
                "run it again: with Jobs(folder=...) it goes on from what is finished"
                if self.folder is None
                else f"what was finished is kept in {self.folder}: run it again to go on"
            )
            raise RabbetError(
                f"a worker process died ({stage}), perhaps for want of memory: use fewer processes "
                f"at once; a script must start them under `if __name__ == '__main__':`; {kept}"
            ) from e

    def placed(self, content: bytes) -> Any:
        """What the executor's jobs are to be given in the place of these bytes."""
        assert self.executor is not None
        return self._inputs.given(self.executor, content)

    def key(self, name: str, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> str:
        """The `content_key` of work; if its settings cannot be told from others, one used once."""
        try:
            return content_key(name, tensors, settings)
        except Untold as e:
            self.say_untold(name, e)
            return f"{ONCE}{secrets.token_hex(20)}"

    def lasts(self, key: str) -> bool:
        """Whether what is kept under a key is there for the next run."""
        return self.folder is not None and not key.startswith(ONCE)

    def kept(self, key: str) -> Tensors | None:
        """The result that was kept under this key, if any.

        A file that is damaged or holds another job's result counts as none, and that is said.
        """
        if self.folder is None or not self.lasts(key):
            return self._memory.get(key)
        path = self.folder / f"{key}.safetensors"
        if not path.is_file():
            return None
        try:
            return _unsealed(path.read_bytes(), key)
        except Exception:  # the bytes may be anybody's, and readers of them raise anything
            self._say(
                "damage",
                f"{path} is damaged or holds another job's result: this work is done again, and so "
                "is any other that is found like this",
            )
            return None

    def keep(self, key: str, result: Tensors) -> None:
        """Remember a result, in the folder or in the CPU's memory."""
        if self.folder is None or not self.lasts(key):
            self._memory[key] = {name: tensor.cpu() for name, tensor in result.items()}
            return
        try:
            write_whole(self.folder / f"{key}.safetensors", [_sealed(result, key)])
        except FileError as e:  # the folder has gone, or the disk is full
            raise FileError(f"finished work cannot be kept in {self.folder}: {e}") from e

    def say_untold(self, what: str, cause: Untold) -> None:
        """Say that work is not kept because it depends on what cannot be told from another."""
        if self.folder is not None:
            self._say(
                what,
                f"{what} depends on {cause}, which cannot be told from another: work that needs it "
                f"is not kept in {self.folder}",
            )

    def _say(self, topic: str, text: str) -> None:
        if topic not in self._said:
            self._said.add(topic)
            LOG.warning("%s", text)


def _beside(given: Mapping[str, Tensor], result: Tensors) -> Tensors:
    """A result on the device of what it was worked out from."""
    home = next((tensor.device for tensor in given.values()), None)
    return {name: tensor.to(home) for name, tensor in result.items()}


def content_key(name: str, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> str:
    """A hash of a name, tensors, settings, and the versions of rabbet and torch.

    Tensors count by their bytes, settings by their `fingerprint`. Raises Untold for a setting that
    cannot be told from another.
    """
    told = {k: fingerprint(v) for k, v in sorted(settings.items())}
    facts = [name, version("rabbet"), torch.__version__, told]
    digest = hashlib.sha256(json.dumps(facts).encode())
    for part in _content(tensors):
        digest.update(part)
    return digest.hexdigest()[:40]


def _content(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """All that makes tensors what they are."""
    for label, tensor in sorted(tensors.items()):
        yield json.dumps([label, str(tensor.dtype), list(tensor.shape)]).encode()
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        yield flat.view(torch.uint8).numpy().data


def _seal(result: Mapping[str, Tensor], key: str) -> dict[str, str]:
    # one entry: safetensors writes several in any order, and the same work is to be the same bytes
    digest = hashlib.blake2b(key=key.encode()[: hashlib.blake2b.MAX_KEY_SIZE], digest_size=20)
    for part in _content(result):
        digest.update(part)
    return {"job": f"{key} {digest.hexdigest()}"}


def _sealed(result: Mapping[str, Tensor], key: str) -> bytes:
    """A result as the bytes of a file, with its job's key and a checksum."""
    tensors = {k: v.detach().cpu().contiguous() for k, v in result.items()}
    return save(tensors, _seal(tensors, key))


def _unsealed(content: bytes, key: str) -> Tensors:
    """The inverse; raises ValueError, or whatever a damaged file makes its reader raise."""
    result = load(content)
    length = int.from_bytes(content[:8], "little")
    facts = json.loads(content[8 : 8 + length])["__metadata__"]
    if facts != _seal(result, key):
        raise ValueError("not what was kept under this key")
    return result


def _name(function: Callable[..., Tensors]) -> str:
    return f"{function.__module__}.{function.__qualname__}"


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """One thread for torch: sums in another order would be other bytes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _call(job: Job) -> Tensors:
    function, tensors, settings = job
    with one_thread(), torch.no_grad():
        return function(**tensors, **settings)


def _spread(executor: Executor, jobs: Mapping[str, Job], inputs: Placed) -> Finished:
    """The results of an executor as they come. Few inputs wait in it at a time, see AHEAD.

    After a failure nothing new is started, and what is being worked on is still waited for: it is
    finished work, too. Then the first failure is raised.
    """
    here, least = os.getpid(), 1 + (os.cpu_count() or 1)
    futures: dict[Future[bytes], tuple[str, int]] = {}
    waiting = deque(jobs.items())
    failure: Exception | None = None
    try:
        while futures or waiting:
            while waiting and (
                len(futures) < least or sum(size for _, size in futures.values()) < AHEAD
            ):
                key, (function, tensors, settings) = waiting.popleft()
                contents = [_packed({"": t}) for t in tensors.values()]
                given = [inputs.given(executor, content) for content in contents]
                try:
                    future = executor.submit(
                        _call_packed, function, settings, here, tuple(tensors), *given
                    )
                except RuntimeError as e:
                    if isinstance(e, BrokenExecutor) or "shutdown" not in str(e):
                        raise
                    failure = failure or RabbetError(
                        f"the executor takes no work ({e}); give jobs one that is not shut down"
                    )
                    waiting.clear()
                    break
                futures[future] = key, sum(map(len, contents))
            ended = list(wait(futures, return_when=FIRST_COMPLETED).done)
            while ended:
                # Let go of at once: a cluster does again what is wanted of a worker that died.
                future = ended.pop()
                key, _ = futures.pop(future)
                try:
                    content = future.result()
                except Exception as e:  # the first one counts: those that it stopped are Cancelled
                    failure = failure or e
                    waiting.clear()
                    for other in futures:
                        other.cancel()
                    continue
                del future
                yield key, load(content)
    finally:
        for future in futures:
            future.cancel()
    if failure is not None:
        raise failure


def _packed(tensors: Mapping[str, Tensor]) -> bytes:
    # Processes exchange bytes: torch would share each tensor through a file descriptor, until none
    # is left.
    return save({k: v.detach().cpu().contiguous() for k, v in tensors.items()})


def _call_packed(
    function: Callable[..., Tensors],
    settings: Mapping[str, Any],
    sender: int,
    names: Sequence[str],
    *contents: bytes,
) -> bytes:
    """A job where the executor runs it; sender: the process that gave it out."""
    parent = multiprocessing.parent_process()
    # A process of the user's, with threads that run its jobs, has a parent too: not the sender.
    if parent is not None and parent.pid == sender:
        end_with_parent()
    tensors = {name: load(each)[""] for name, each in zip(names, contents, strict=True)}
    return _packed(_call((function, tensors, settings)))


def end_with_parent() -> None:
    """Let this process, a worker of a pool, end when the one that started it has, however that was.

    Otherwise it would wait for work for ever. For workers alone, as the initializer of their pool:
    any other process that `multiprocessing` started would end with its parent, too.
    """
    _watch_parent_of(os.getpid())


@functools.cache
def _watch_parent_of(_: int) -> None:  # by its number: a fork inherits the cache, not the thread
    parent = multiprocessing.parent_process()
    if parent is None:  # `multiprocessing` did not start it
        return

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, name="rabbet-parent", daemon=True).start()
