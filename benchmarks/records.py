"""Rows of benchmarks: printed and stored as soon as they are there.

Rows go into results/NAME.json, which is written whole after each of them, so that a stopped run
keeps what it has; `figures.py` makes docs/figures.md of these files. A file holds `machines` (with
versions of what ran there) and `rows`; each row names its machine by the place in that list. What
is not known is null.
"""

import argparse
import fcntl
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from rabbet.files import write_whole

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MADE = ("benchmarks/results", "docs/figures.md", "docs/pictures")  # changes here are no other code
INSTRUCTIONS = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16",
                "asimd", "asimddp", "i8mm", "sve")  # fmt: skip


def processor() -> dict[str, Any]:
    """The processor's name, its cores, and those of its instruction sets that speed depends on."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    pairs = (line.partition(":") for line in reversed(lines))
    facts = {key.strip(): value.strip() for key, _, value in pairs}
    flags = facts.get("flags", facts.get("Features", "")).split()
    return {
        "processor": facts.get("model name", platform.processor() or platform.machine()),
        "cores": os.cpu_count(),
        "instructions": [s for s in INSTRUCTIONS if s in flags],
    }


def code() -> tuple[str | None, bool]:
    """The commit that runs, and whether something was changed since; None outside of git."""
    try:
        commit = _git("rev-parse", "--short=8", "HEAD").strip()
        changed = _git(
            "status", "--porcelain", "--", ".", *(f":(exclude){place}" for place in MADE)
        )
    except (OSError, subprocess.CalledProcessError):
        return None, True
    return commit, bool(changed.strip())


def _git(*words: str) -> str:
    return subprocess.run(
        ["git", "-C", str(ROOT), *words], check=True, capture_output=True, text=True
    ).stdout


def add_options(parser: argparse.ArgumentParser, jobs: bool = False, folder: bool = False) -> None:
    """The options that all scripts have.

    jobs: rows may run side by side. folder: `--resume` may name a folder that keeps solved layers.
    """
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="NAME", help="rows whose label holds one of these"
    )
    text = "skip rows that are stored for the same settings, seed and commit, without changes to it"
    if folder:
        parser.add_argument(
            "--resume", nargs="?", const=True, metavar="FOLDER",
            help=f"{text}; the folder keeps finished work between runs",
        )  # fmt: skip
    else:
        parser.add_argument("--resume", action="store_true", help=text)
    if jobs:
        parser.add_argument("--jobs", type=int, default=1, help="processes that share the rows")
        parser.add_argument("--share", type=int, nargs=2, help=argparse.SUPPRESS)


def spread(args: argparse.Namespace) -> None:
    """With `--jobs N`, start this script N times, each for its share of the rows, and end.

    Each process prints the rows that it measures, under a head of its own.
    """
    if args.jobs <= 1 or args.share:
        return
    threads = str(max(1, (os.cpu_count() or 1) // args.jobs))
    settings = {"OMP_NUM_THREADS": threads} | os.environ
    command = [sys.executable, *sys.argv]
    started = [
        subprocess.Popen([*command, "--share", str(k), str(args.jobs)], env=settings)
        for k in range(args.jobs)
    ]
    sys.exit(max(abs(process.wait()) for process in started))


Values = dict[str, Any]
Group = list[tuple[Values, Values]]
"""Settings and values of rows that are measured together."""


class Records:
    """The rows of one script in results/NAME.json."""

    def __init__(
        self,
        name: str,
        args: argparse.Namespace,
        packages: Sequence[str] = (),
        folder: Path = RESULTS,
    ) -> None:
        self.path = folder / f"{name}.json"
        self.script = f"benchmarks/{name}.py"
        self.only, self.resume = args.only, bool(args.resume)
        self.place, self.places = getattr(args, "share", None) or (0, 1)
        self.met = 0
        self.commit, self.changed = code()
        if self.resume and self.changed:
            print("--resume skips nothing: the code is not as it was committed", file=sys.stderr)
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        versions |= {p: version for p in packages if (version := _version(p))}
        self.machine = processor() | {"threads": torch.get_num_threads(), "versions": versions}

    def read(self) -> dict[str, Any]:
        """What is stored."""
        if not self.path.exists():
            return {"script": self.script, "machines": [], "rows": []}
        found: dict[str, Any] = json.loads(self.path.read_text())
        return found

    def mine(self) -> bool:
        """Whether the next row is this process's, of those that share the rows."""
        self.met += 1
        return (self.met - 1) % self.places == self.place

    def store(self, rows: list[dict[str, Any]]) -> None:
        """Put rows in the place of older ones of the same settings and seed, or at the end."""
        with _alone(self.path.parent):
            stored = self.read()
            machines, kept = [*stored["machines"], self.machine], stored["rows"]
            for new in rows:
                new["machine"] = len(machines) - 1
                same = [k for k, old in enumerate(kept) if _key(old) == _key(new)]
                if same:
                    kept[same[0]] = new
                else:
                    kept.append(new)
            write(self.path, self.script, machines, kept)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _key(stored: dict[str, Any]) -> tuple[Any, ...]:
    return stored["table"], stored["settings"], stored["seed"]


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Nobody else who asks changes the folder meanwhile."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def write(
    path: Path, script: str, machines: list[dict[str, Any]], rows: list[dict[str, Any]]
) -> None:
    """Write a file of results, a line a row; equal machines become one, those without rows none."""
    used: list[dict[str, Any]] = []
    for each in rows:
        if machines[each["machine"]] not in used:
            used.append(machines[each["machine"]])
    placed = [each | {"machine": used.index(machines[each["machine"]])} for each in rows]
    lists = {
        name: ",\n".join(f"  {json.dumps(x, ensure_ascii=False)}" for x in items)
        for name, items in (("machines", used), ("rows", placed))
    }
    body = ",\n".join(f' "{name}": [\n{lines}\n ]' for name, lines in lists.items())
    write_whole(path, [f'{{\n "script": "{script}",\n{body}\n}}\n'.encode()])


def shown(value: Any, form: str = "") -> str:
    """A value in a cell: nothing for None, text as it is, a number in this format."""
    if value is None:
        return ""
    return str(value) if isinstance(value, str | bool) or not form else format(value, form)


def _as_shown(value: Any, form: str) -> Any:
    """A number with the digits that are printed, so that the file says what the table says."""
    if isinstance(value, str | bool) or value is None or not form:
        return value
    text = format(value, form).replace(",", "")
    return int(text) if text.lstrip("-").isdigit() else float(text)


@dataclass
class Table:
    """A kind of rows: its columns with their formats, the data, and how rows are measured.

    Columns are settings and values; what has no column is only stored.
    """

    records: Records
    name: str
    columns: Mapping[str, str]
    data: str
    seed: int | list[int] | None = 0
    begun: bool = field(default=False, init=False)

    def row(
        self, settings: Values, measure: Callable[[], Values], label: str = ""
    ) -> Values | None:
        """The values of one row, measured, printed and stored, unless `--only` leaves it out.

        With `--resume` a stored row is printed as it is.
        """
        found = self._rows(settings, lambda: [(settings, measure())], label, True)
        return found[0]["values"] if found else None

    def rows(self, shared: Values, measure: Callable[[], Group]) -> Group:
        """The same for rows that are measured together; `shared` are settings that all have."""
        found = self._rows(shared, measure, "", False)
        return [(each["settings"], each["values"]) for each in found]

    def _rows(
        self, settings: Values, measure: Callable[[], Group], label: str, one: bool
    ) -> list[dict[str, Any]]:
        records, label = self.records, label or labelled(settings)
        mine = records.mine()
        if not mine or (records.only and not any(name in label for name in records.only)):
            return []
        settings, stored = _plain(settings), records.read()
        if records.resume and (known := self._known(stored, settings, one)):
            self._print(known)
            return known
        if expected := self._expected(stored, settings):
            print(f"{label}: {expected}", file=sys.stderr, flush=True)
        start = time.perf_counter()
        group = measure()
        seconds = round(time.perf_counter() - start, 1)
        new = [
            {
                "table": self.name,
                "label": label if one else labelled(own),
                "settings": _plain(own),
                "values": {k: _as_shown(v, self.columns.get(k, "")) for k, v in values.items()},
                "seed": _plain(self.seed),
                "data": self.data,
                "seconds": seconds,
                "commit": records.commit,
                "changed": records.changed,
                "date": f"{datetime.now(UTC):%Y-%m-%d}",
            }
            for own, values in group
        ]
        self._print(new)
        records.store(new)
        return new

    def _known(self, stored: dict[str, Any], settings: Values, one: bool) -> list[dict[str, Any]]:
        """Rows that this commit has measured for these settings."""
        records = self.records
        if records.changed or records.commit is None:
            return []
        return [
            each
            for each in stored["rows"]
            if (each["table"], each["seed"]) == (self.name, _plain(self.seed))
            and settings.items() <= each["settings"].items()
            and (each["settings"] == settings or not one)
            and (each["commit"], each.get("changed")) == (records.commit, False)
        ]

    def _expected(self, stored: dict[str, Any], settings: Values) -> str:
        """How long those rows took that agree with half of these settings or more, and best."""
        rows = [r for r in stored["rows"] if r["table"] == self.name and r.get("seconds")]
        agree = [sum(settings.get(k) == v for k, v in r["settings"].items()) for r in rows]
        most = max([len(settings) / 2, *agree])
        like = [r["seconds"] for r, n in zip(rows, agree, strict=True) if n == most]
        return f"such rows took about {duration(statistics.median(like))}" if like else ""

    def _print(self, rows: list[dict[str, Any]]) -> None:
        if not self.begun:
            print()
            _line(*self.columns)
            _line(*("---" for _ in self.columns))
            self.begun = True
        for each in rows:
            cells = each["settings"] | each["values"]
            _line(*(shown(cells.get(name), form) or "-" for name, form in self.columns.items()))


def _plain(value: Any) -> Any:
    """A value as it is read back from the file: lists for tuples."""
    return json.loads(json.dumps(value))


def _line(*cells: object) -> None:
    print("| " + " | ".join(str(c) for c in cells) + " |", flush=True)


def told(parser: argparse.ArgumentParser, args: argparse.Namespace, *names: str) -> Values:
    """The options of these names that were given another value than their default."""
    given = ((name, getattr(args, name)) for name in names)
    return {name: value for name, value in given if value != parser.get_default(name)}


def labelled(settings: Values) -> str:
    """The settings in words."""
    return ", ".join(str(value) for value in settings.values() if value is not None)


def duration(seconds: float) -> str:
    """Seconds in a unit that is easily read."""
    for size, unit in ((3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} seconds" if seconds >= 2 else "a second"
