"""How a command ends early: by hand, by a signal, or because nobody reads its output any more."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator

# Exit codes, as shells count SIGINT, SIGPIPE and SIGTERM.
INTERRUPTED, CLOSED, TERMINATED = 130, 141, 143


class Stopped(Exception):  # noqa: N818 (no error: the user wanted it)
    """The user pressed Ctrl-C, or something sent SIGTERM; the message says how to go on."""


@contextlib.contextmanager
def terminable() -> Iterator[Callable[[], int]]:
    """While this lasts, SIGTERM is answered as Ctrl-C is; gives the exit code of a stopped command.

    A handler of somebody else's stays, and so does a signal that is ignored.
    """
    came: list[int] = []

    def stop(number: int, _: object) -> None:
        came.append(number)
        raise KeyboardInterrupt

    ours = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    )
    if ours:
        signal.signal(signal.SIGTERM, stop)
    try:
        yield lambda: TERMINATED if came else INTERRUPTED
    finally:
        if ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


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
