"""How parts of a report are printed: tables for people, plain values for JSON."""

import json
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.table import Table as Columns

from rabbet.report.text import Part, Table, cut

WIDE = 100_000  # columns of a file or a pipe: nothing is folded or cut


def show(parts: Iterable[Part], stderr: bool = False) -> None:
    """Print tables and lines."""
    console = _console(stderr)
    for part in parts:
        if isinstance(part, Table):
            console.print(_grid(part))
        else:
            console.print(part, soft_wrap=True)


def _console(stderr: bool) -> Console:
    """Where parts go. Names of layers and terms hold brackets, which are not markup here."""
    plain: dict[str, Any] = {"markup": False, "emoji": False, "highlight": False}
    console = Console(stderr=stderr, **plain)
    return console if console.is_terminal else Console(stderr=stderr, width=WIDE, **plain)


def _grid(table: Table) -> Columns:
    """Columns under bold heads."""
    grid = Columns(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for k, head in enumerate(table.heads):
        grid.add_column(head, justify="left" if k < table.left else "right", overflow="fold")
    for row in table.rows:
        grid.add_row(*map(cut, row))
    return grid


def print_json(facts: dict[str, Any]) -> None:
    """One JSON object."""
    print(json.dumps(facts, indent=2))
