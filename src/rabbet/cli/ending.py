"""How a command ends early: by hand, by a signal, or because nobody reads its output any more."""

import atexit
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

# Exit codes, as shells count SIGINT, SIGPIPE and SIGTERM.
INTERRUPTED, CLOSED, TERMINATED = 130, 141, 143
GRACE = 0.5  # seconds in which the main thread is to answer a signal


class Stopped(Exception):  # noqa: N818 (no error: the user wanted it)
    """The user pressed Ctrl-C, or something sent SIGTERM; the message says how to go on."""


_words = ["stopped"]


@contextlib.contextmanager
def last_word(text: str) -> Iterator[None]:
    """While this lasts, a command that is stopped hard says this."""
    _words.append(text)
    try:
        yield
    finally:
        _words.remove(text)


@contextlib.contextmanager
def terminable() -> Iterator[Callable[[], int]]:
    """While this lasts, SIGTERM is answered as Ctrl-C is; gives the exit code of a stopped command.

    Both raise KeyboardInterrupt in the main thread, and end the process if that stays for `GRACE`
    in a call that does not come back to Python: one decomposition of a large layer takes minutes.
    A handler of somebody else's stays, and so does a signal that is ignored.
    """
    came: list[int] = []
    answered = threading.Event()

    def stop(number: int, _: object) -> None:
        answered.set()
        came.append(number)
        raise KeyboardInterrupt

    usual: dict[signal.Signals, Any] = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGTERM: signal.SIG_DFL,
    }
    here = threading.current_thread() is threading.main_thread()
    ours = [number for number, own in usual.items() if here and signal.getsignal(number) is own]
    for number in ours:
        signal.signal(number, stop)
    try:
        with _watched(ours, answered):
            yield lambda: TERMINATED if signal.SIGTERM in came else INTERRUPTED
    finally:
        for number in ours:
            signal.signal(number, usual[number])


@contextlib.contextmanager
def _watched(numbers: Sequence[int], answered: threading.Event) -> Iterator[None]:
    """End the process if one of these signals comes and is not answered.

    Python runs handlers between two of its own steps, but tells of a signal at once what is set by
    `signal.set_wakeup_fd`.
    """
    if not numbers:
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def watch() -> None:
        while came := os.read(reader, 1):  # nothing once the other end is closed
            if came[0] in numbers and not answered.wait(GRACE):
                with contextlib.suppress(OSError):  # closed
                    os.write(2, f"{_words[-1]}\n".encode())
                os._exit(TERMINATED if came[0] == signal.SIGTERM else INTERRUPTED)

    thread = threading.Thread(target=watch, name="rabbet-signals", daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(writer)
        thread.join()
        os.close(reader)


def leave(code: int) -> None:
    """End a process that is the command line at once: torch alone takes half a second to go."""
    atexit._run_exitfuncs()  # noqa: SLF001 (else semaphores of worker processes are left behind)
    sys.stdout.flush()
    os._exit(code)


def own_output() -> None:
    """Keep the standard output of this process for what Python prints.

    A library that writes to the descriptor itself, as HiGHS rarely does, would spoil the JSON; its
    lines go to stderr instead. Once and for good, and only in a process that is the command line.
    """
    try:
        sys.stdout.flush()
        real = os.dup(1)
        os.dup2(2, 1)
    except OSError:  # started without one of the two
        return
    sys.stdout = os.fdopen(real, "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors)
