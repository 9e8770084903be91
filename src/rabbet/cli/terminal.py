"""The jobs that a command works with: progress bars, worker processes, a folder to go on from."""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
)
from rich.text import Text

from rabbet.cli.ending import Stopped, last_word
from rabbet.jobs import Jobs, end_with_parent, silent
from rabbet.jobs import Progress as Report
from rabbet.progress import Pace, worded

EVERY, TICK = 4.5, 0.5  # seconds between two lines of progress; how often it is asked
DEAF = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def working(folder: Path | None, processes: int, quiet: bool) -> Iterator[Jobs]:
    """Jobs for one command; Ctrl-C or SIGTERM raises Stopped and ends the worker processes."""
    how = (
        "stopped; with --resume DIR a run keeps what it has finished and can go on from there"
        if folder is None
        else f"stopped; finished work is kept in {folder}: run the same command again to go on"
    )
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(last_word(how))
            progress = silent if quiet else stack.enter_context(bars())
            executor = stack.enter_context(workers(processes)) if processes > 1 else None
            yield Jobs(executor, folder, progress)
    except KeyboardInterrupt:
        raise Stopped(how) from None


@contextlib.contextmanager
def told(jobs: Jobs, stage: str) -> Iterator[None]:
    """Work in one step, as a stage of its own."""
    jobs.progress(stage, 0, 1)
    yield
    jobs.progress(stage, 1, 1)


@contextlib.contextmanager
def bars() -> Iterator[Report]:
    """A progress bar a stage on stderr, gone at the end; a line now and then where it is a file."""
    console = Console(stderr=True)
    if not console.is_terminal:
        with lines() as said:
            yield said
        return
    columns = (TextColumn("{task.description}"), BarColumn(), Left())
    with Progress(*columns, console=console, transient=True) as shown:
        stages: dict[str, TaskID] = {}

        def report(stage: str, done: int, total: int) -> None:
            name, now = stage.partition(": ")[0], time.monotonic()
            if name not in stages:
                stages[name] = shown.add_task(stage, total=total, pace=Pace(done, total, now))
            shown.tasks[stages[name]].fields["pace"].hear(done, total, now)
            text = worded(stage, done, total)
            shown.update(stages[name], completed=done, total=total, description=text)

        yield report


class Left(ProgressColumn):
    """How much longer a stage takes."""

    def render(self, task: Task) -> Text:
        """In words, as of now; nothing once it has ended."""
        return Text("" if task.finished else task.fields["pace"].words(time.monotonic()))


class Lines:
    """A line on stderr every few seconds, whoever works meanwhile: what takes less says nothing."""

    def __init__(self) -> None:
        self.last = time.monotonic()
        self.lock = threading.Lock()
        self.stream = sys.stderr  # which an export takes away for a time
        self.stage: tuple[str, int, int] | None = None
        self.pace = Pace(0, 1, self.last)

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Report that so many steps of a stage are done."""
        now = time.monotonic()
        with self.lock:
            before = self.stage
            self.stage = stage, done, total
            if before is None or before[0].partition(": ")[0] != stage.partition(": ")[0]:
                self.pace = Pace(done, total, now)
            self.pace.hear(done, total, now)
        self.say()

    def say(self) -> None:
        """Say how far the stage is, unless something was said a moment ago."""
        now = time.monotonic()
        with self.lock:
            if self.stage is not None and now - self.last >= EVERY:
                self.last = now
                text = f"{worded(*self.stage)}, {self.pace.words(now)}"
                print(text, file=self.stream, flush=True)


@contextlib.contextmanager
def lines() -> Iterator[Lines]:
    """`Lines`, and a thread that says how far a stage is while one step of it takes long."""
    said, ended = Lines(), threading.Event()

    def watch() -> None:
        while not ended.wait(TICK):
            said.say()

    thread = threading.Thread(target=watch, name="rabbet-progress", daemon=True)
    thread.start()
    try:
        yield said
    finally:
        ended.set()
        thread.join()


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
