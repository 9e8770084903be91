"""docs/figures.md and its pictures, made of the stored rows of all benchmarks.

    python benchmarks/figures.py        # or: make figures

The page is benchmarks/figures.md.in with its tables filled in. A table there is a block of lines:

    @table SCRIPT TABLE                 which rows: results/SCRIPT.json, and the table in it
    @where key=value; key=one|other     only rows of these settings; `-` is null; a second such
                                        line adds rows
    @pivot key by one/other             rows that agree in `one` and `other` become a single one;
                                        its values are named {value of key/name}
    @group key                          rows of equal `key` stand together, and it is shown once
    @command ...                        what prints the table
    | title | ...                       the head
    | {name:format} | ...               a row; text in [brackets] is left out with its values, and
                                        a cell without any is empty
"""

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from peerpicture import TOOLS
from peerpicture import drawn as peers
from picture import frontier
from records import RESULTS, ROOT, shown

from rabbet.files import write_whole

PAGE = ROOT / "docs" / "figures.md"
PICTURE = ROOT / "docs" / "pictures" / "frontier.svg"
PEERS = ROOT / "docs" / "pictures" / "peers.svg"
TEMPLATE = ROOT / "benchmarks" / "figures.md.in"
NAMES = {
    "resnet20": "ResNet-20",
    "resnet56": "ResNet-56",
    "resnet18": "ResNet-18",
    "resnet50": "ResNet-50",
    "vit_b16": "ViT-B/16",
    "bert_base": "BERT-base",
    "mobilenet": "MobileNet v1",
    "mobilenet_v2": "MobileNetV2",
    "efficientnet_lite0": "EfficientNet-Lite0",
    "minilm": "MiniLM",
    "digits": "digits of the demo",
    "bert": "BERT, 2 layers of width 64",
    "heads": "ConvNet of two outputs",
    "8c": "dense int8",
    "tucker@45": "Tucker-2",
    "lowrank@45": "low rank",
    "cp@45": "CP",
    "joint": "`Joint`",
    "Joint": "`Joint`",
    "Joint, same bytes": "`Joint`, same bytes",
    "ttqat": "`TTQAT`",
    **TOOLS,
}
UNKNOWN = "not recorded"
Row = dict[str, Any]


def read(script: str, table: str = "") -> list[Row]:
    """The stored rows of a table, or of all, each with its machine."""
    found = json.loads((RESULTS / f"{script}.json").read_text())
    machines = found["machines"]
    rows = (row | {"machine": machines[row["machine"]]} for row in found["rows"])
    return [row for row in rows if table in ("", row["table"])]


def page(template: str) -> str:
    """The text of docs/figures.md."""
    parts = re.split(r"^(@table .*(?:\n.+)*)", template, flags=re.MULTILINE)
    return "".join(table(part) if part.startswith("@table ") else part for part in parts)


def table(block: str) -> str:
    """A table and a line on its age."""
    lines = block.splitlines()
    orders = [line[1:].partition(" ")[::2] for line in lines if line.startswith("@")]
    title, pattern = (line for line in lines if line.startswith("|"))
    given = dict(orders)
    wheres = [text for order, text in orders if order == "where"] or [""]
    rows = [r for r in read(*given["table"].split()) if any(fits(r["settings"], w) for w in wheres)]
    if not rows:
        sys.exit(f"no stored row for: {block}")
    values = [row["settings"] | row["values"] for row in rows]
    if "pivot" in given:
        values = pivoted(values, given["pivot"])
    group = given.get("group")
    if group:
        order = list(dict.fromkeys(v[group] for v in values))
        values = sorted(values, key=lambda v: order.index(v[group]))
        firsts = {id(next(v for v in values if v[group] == name)) for name in order}
        values = [v if id(v) in firsts else v | {group: None} for v in values]
    columns = title.count("|") - 1
    body = [title, "|" + "---|" * columns, *(filled(pattern, v) for v in values)]
    return "\n".join([*body, "", about(rows, given["command"])])


def fits(settings: Row, where: str) -> bool:
    """Whether settings are among those asked for."""
    for clause in where.split("; ") if where else ():
        key, _, wanted = clause.partition("=")
        value = settings.get(key)
        if ("-" if value is None else str(value)) not in wanted.split("|"):
            return False
    return True


def pivoted(values: list[Row], text: str) -> list[Row]:
    """Rows that agree in some settings as one, with the values of each under another name."""
    key, _, by = text.partition(" by ")
    merged: dict[tuple[Any, ...], Row] = {}
    for each in values:
        own = {name: each[name] for name in by.split("/")}
        row = merged.setdefault(tuple(own.values()), own)
        row |= {f"{each[key]}/{name}": value for name, value in each.items()}
    return list(merged.values())


FIELD = re.compile(r"\{([^{}]+?)(?::([^{}\s]*))?\}")  # a name may hold a colon and a space


def filled(pattern: str, values: Row) -> str:
    """A row of a table."""
    cells = pattern.strip("| ").split(" | ")
    return (
        "|"
        + "|".join(f" {text} " if (text := _cell(cell, values)) else " " for cell in cells)
        + "|"
    )


def _cell(text: str, values: Row) -> str:
    def part(inner: str) -> str:
        names = [name for name, _ in FIELD.findall(inner)]
        if names and all(values.get(name) is None for name in names):
            return ""
        return FIELD.sub(lambda m: _named(values.get(m[1]), m[2] or ""), inner)

    pieces = re.split(r"\[([^][]*)\]", text)
    return "".join(part(piece) for piece in pieces if piece)


def _named(value: Any, form: str) -> str:
    return NAMES.get(str(value), shown(value, form))


def about(rows: list[Row], command: str) -> str:
    """How old a table is, what it was measured on, and what prints it."""
    ages = Counter(age(row) for row in rows)
    machines = dict.fromkeys(machine(row["machine"]) for row in rows)
    seeds = dict.fromkeys(_seeds(row["seed"]) for row in rows)
    if len(ages) == 1:
        when = f"{next(iter(ages))}."
    else:
        when = f"Rows: {'; '.join(f'{n} {text}' for text, n in sorted(ages.items()))}."
    notes = dict.fromkeys(row["note"] for row in rows if row.get("note"))
    sentences = (when, *(f"{text}." for text in (*machines, " / ".join(seeds), *notes)))
    text = " ".join(sentence[0].upper() + sentence[1:] for sentence in sentences)
    return f"*{text}* Printed by `{command}`."


def age(row: Row) -> str:
    """When a row was measured, or written down, and with which code."""
    commit, date = (row[key] or UNKNOWN for key in ("commit", "date"))
    changed = " and changes to it" if row.get("changed") else ""
    verb = "from the README as of" if row.get("from") else "measured"
    return f"{verb} {date}, commit {commit}{changed}"


def machine(facts: Row) -> str:
    """A machine and what ran on it, in words."""
    cores, threads = facts["cores"], facts["threads"]
    parts = [
        facts["processor"] or f"machine {UNKNOWN}",
        f"{cores} cores" if cores else None,
        " ".join(facts["instructions"]) if facts["instructions"] else None,
        f"{threads} thread{'s' * (threads > 1)}" if threads else None,
        *(f"{name} {version}" for name, version in facts["versions"].items()),
        None if facts["versions"] else f"versions {UNKNOWN}",
    ]
    return ", ".join(part for part in parts if part)


def _seeds(seed: int | list[int] | None) -> str:
    if seed is None:
        return f"seed {UNKNOWN}"
    return f"seed {seed}" if isinstance(seed, int) else f"seeds {', '.join(map(str, seed))}"


def made() -> Iterable[tuple[Path, str]]:
    """The files that this script writes, with their text."""
    yield PAGE, page(TEMPLATE.read_text())
    yield PICTURE, frontier(read)
    yield PEERS, peers(read)


def main() -> None:
    """Write the page and the picture."""
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    for path, text in made():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, [text.encode()])
        print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
