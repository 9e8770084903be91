"""How a command ends early: by hand, or because nobody reads its output any more."""

INTERRUPTED, CLOSED = 130, 141  # exit codes, as shells count SIGINT and SIGPIPE


class Stopped(Exception):  # noqa: N818 (no error: the user wanted it)
    """The user pressed Ctrl-C; the message says how to go on."""
