"""The jobs that a command works with: progress bars, worker processes, a folder to go on from."""

import contextlib
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

from rabbet.cli.ending import Stopped
from rabbet.jobs import Jobs, end_with_parent, silent
from rabbet.jobs import Progress as Report

EVERY = 10.0  # seconds between two lines of progress
DEAF = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def working(folder: Path | None, processes: int, quiet: bool) -> Iterator[Jobs]:
    """Jobs for one command; Ctrl-C or SIGTERM raises Stopped and ends the worker processes."""
    try:
        with contextlib.ExitStack() as stack:
            progress = silent if quiet else stack.enter_context(bars())
            executor = stack.enter_context(workers(processes)) if processes > 1 else None
            yield Jobs(executor, folder, progress)
    except KeyboardInterrupt:
        raise Stopped(
            "stopped; with --resume DIR a run keeps what it has finished and can go on from there"
            if folder is None
            else f"stopped; finished work is kept in {folder}: run the same command again to go on"
        ) from None


@contextlib.contextmanager
def bars() -> Iterator[Report]:
    """A progress bar a stage on stderr, gone at the end; a line now and then where it is a file."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield Lines()
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as shown:
        stages: dict[str, TaskID] = {}

        def report(stage: str, done: int, total: int) -> None:
            name = stage.partition(": ")[0]
            if name not in stages:
                stages[name] = shown.add_task(stage, total=total)
            shown.update(stages[name], completed=done, total=total, description=stage)

        yield report


class Lines:
    """A line on stderr every ten seconds: what takes less says nothing."""

    def __init__(self) -> None:
        self.last = time.monotonic()

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Report that so many steps of a stage are done."""
        now = time.monotonic()
        if now - self.last >= EVERY:
            self.last = now
            print(f"{stage}: {done:,} of {total:,}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def workers(processes: int) -> Iterator[Executor]:
    """Processes that start afresh.

    A fork of a process in which torch has started threads may hang.
    """
    others = set(multiprocessing.active_children())
    executor = ProcessPoolExecutor(
        processes, mp_context=multiprocessing.get_context("spawn"), initializer=end_with_parent
    )
    # Ctrl-C reaches the whole process group, a service manager's SIGTERM too. The parent ends the
    # workers, which would only print tracebacks or look as if they had crashed: they are born deaf,
    # since a signal may come while they are still importing. A submission each starts them all.
    before = {number: signal.signal(number, signal.SIG_IGN) for number in DEAF}
    try:
        for _ in range(processes):
            executor.submit(os.getpid)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    try:
        yield executor
    except BaseException:
        executor.shutdown(wait=False, cancel_futures=True)
        for process in set(multiprocessing.active_children()) - others:
            process.kill()
        raise
    executor.shutdown()
