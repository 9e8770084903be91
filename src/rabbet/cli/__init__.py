"""The command line of rabbet: each command is a function of this package.

What was asked for goes to stdout, everything else to stderr. Exit codes: 0 done, 1 a budget that is
broken or cannot be met, 2 any other mistake, 130 stopped by hand, 143 by SIGTERM. A mistake is one
line that starts with `error:`.
"""

import contextlib
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor
from importlib.metadata import version
from typing import Annotated, Any

import typer

from rabbet.cli import compressing, reading, reporting, running, starting, sweeping
from rabbet.cli.ending import (
    CLOSED,
    INTERRUPTED,
    TERMINATED,
    Stopped,
    leave,
    own_output,
    terminable,
)
from rabbet.errors import BudgetError, RabbetError, note_of

# Newer versions of typer carry a click of their own: the root of its usage errors is found through
# what is public.
_Usage: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")

# Commands that load torch.
HEAVY = {
    "doctor", "init", "survey", "plan", "compress", "frontier", "sweep", "compare", "export",
    "eval", "bench", "report",
}  # fmt: skip

app = typer.Typer(
    name="rabbet",
    help="Fits a trained PyTorch network to a hard budget: "
    "bit-width and rank of every layer, chosen together.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (
    starting.doctor,
    starting.init,
    compressing.survey,
    compressing.plan,
    compressing.compress,
    sweeping.frontier,
    sweeping.sweep,
    reading.show,
    reading.check,
    reading.compare,
    reporting.report,
):
    app.command()(command)
app.command("export")(running.export)
app.command("eval")(running.evaluate)
app.command("bench")(running.bench)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"rabbet {version('rabbet')}")
        raise typer.Exit


@app.callback()
def _options(
    _: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """What every command takes."""


def program() -> int:
    """The command line as a process of its own; returns the exit code."""
    own_output()
    # torch says this whenever it copies a program that it exported itself.
    warnings.filterwarnings("ignore", ".*LeafSpec.* is deprecated", FutureWarning)
    code = main()
    if code in (INTERRUPTED, TERMINATED):
        leave(code)
    return code


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line (default: the arguments of the process); returns the exit code."""
    with terminable() as stopped, _loading(sys.argv[1:] if arguments is None else arguments):
        return _answered(arguments, stopped)


@contextlib.contextmanager
def _loading(arguments: Sequence[str]) -> Iterator[None]:
    """Say on a terminal that a command is loading; what it prints first is written over that."""
    shown = bool(arguments) and arguments[0] in HEAVY and sys.stderr.isatty()
    shown = shown and "--json" not in arguments  # what is printed first has to be longer
    if shown and "--help" not in arguments and "-h" not in arguments:
        print("loading ...", end="\r", file=sys.stderr, flush=True)
    yield
    if shown:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def _answered(arguments: Sequence[str] | None, stopped: Callable[[], int]) -> int:
    try:
        code = app(arguments, standalone_mode=False)
        sys.stdout.flush()
    except (BrokenPipeError, SystemExit) as e:  # the latter with a 1 is typer's word for the former
        if isinstance(e, SystemExit) and e.code in (0, None):  # what completes a line has answered
            return 0
        # Whoever read our output has had enough, as `head` has; what is left in the buffer must not
        # complain later.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CLOSED
    except Stopped as e:
        return _told(str(e), stopped())
    except (KeyboardInterrupt, typer.Abort):
        return _told("stopped", stopped())
    except BudgetError as e:
        return _told(f"error: {e}", 1)
    except _Usage as e:
        message = e.format_message()  # empty where no command was given and the help was shown
        return _told(f"error: {message}", 2) if message else 2
    except BrokenExecutor:
        return _told(
            "error: a worker process died, perhaps for want of memory; try fewer --jobs", 2
        )
    except Exception as e:
        return _failed(e)
    if code == INTERRUPTED:  # typer's own word for a KeyboardInterrupt
        return _told("stopped", stopped())
    return code if isinstance(code, int) else 0


def _failed(error: Exception) -> int:
    """A mistake of the user's is a line; one of ours is shown whole, and is no broken budget."""
    place = note_of(error)  # in the user's own code
    if place is not None:
        return _told(f"error: {type(error).__name__}: {error}: {place}", 2)
    if isinstance(error, RabbetError | OSError):
        return _told(f"error: {error}", 2)
    traceback.print_exception(error)
    return 2


def _told(line: str, code: int) -> int:
    print(" ".join(line.split()), file=sys.stderr)
    return code
