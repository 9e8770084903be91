"""How parts of a report are printed: tables for people, plain values for JSON."""

import json
from collections.abc import Callable, Iterable
from typing import Any

from rich.console import Console
from rich.table import Table as Columns

from rabbet.report.facts import known
from rabbet.report.text import Part, Table, cut, shortened

BAR, LONGEST = "\u2587", 9  # a bit of a bar, and how many are drawn: more is a float
SHORTEST = 12  # signs of a name that stay, however narrow the terminal
WIDE = 100_000  # columns of a file or a pipe: nothing is folded or cut


def show(parts: Iterable[Part], stderr: bool = False) -> None:
    """Print tables and lines."""
    console = _console(stderr)
    for part in parts:
        if isinstance(part, Table):
            console.print(_grid(part, console))
        else:
            console.print(part, soft_wrap=True)


def _console(stderr: bool) -> Console:
    """Where parts go. Names of layers and terms hold brackets, which are not markup here."""
    plain: dict[str, Any] = {"markup": False, "emoji": False, "highlight": False}
    console = Console(stderr=stderr, **plain)
    return console if console.is_terminal else Console(stderr=stderr, width=WIDE, **plain)


def _grid(table: Table, console: Console) -> Columns:
    """Columns under bold heads; on a terminal names fit its width, and bits are drawn."""
    heads, rows = list(table.heads), [list(map(cut, row)) for row in table.rows]
    if console.is_terminal and rows:
        if table.bits and _room(heads, rows, console) >= SHORTEST + LONGEST:
            heads, bars = [*heads, "bits"], [BAR * round(bits) for bits in table.bits]
            rows = [[*row, bar[:LONGEST]] for row, bar in zip(rows, bars, strict=True)]
        room = _room(heads, rows, console)
        rows = [[shortened(row[0], max(SHORTEST, room)), *row[1:]] for row in rows]
    grid = Columns(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for k, head in enumerate(heads):
        left = k < table.left or k >= len(table.heads)
        # Names and plans may go on in a second line, numbers not.
        folds = 0 < k < table.left
        grid.add_column(
            head, justify="left" if left else "right", overflow="fold", no_wrap=not folds
        )
    for row in rows:
        grid.add_row(*row)
    return grid


def _room(heads: list[str], rows: list[list[str]], console: Console) -> int:
    """The columns of a terminal that are left for names."""
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    return widths[0] - (sum(widths) + 2 * len(widths) - console.width)


def print_json(facts: dict[str, Any]) -> None:
    """One JSON object; numbers that are not finite are null."""
    print(json.dumps(known(facts), indent=2, allow_nan=False))


def tell(
    as_json: bool, facts: Callable[[], dict[str, Any]], parts: Callable[[], list[Part]]
) -> None:
    """What came of a command: for programs, or for people."""
    if as_json:
        print_json(facts())
    else:
        show(parts())
