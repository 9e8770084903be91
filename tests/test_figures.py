"""docs/figures.md and its picture say what benchmarks/results says."""

import json
import re
from xml.etree import ElementTree as ET

import figures
import peerpicture
import pytest
from picture import DROPS, series

RESULTS = sorted(figures.RESULTS.glob("*.json"))


def _tables():
    """Every table of the page with what stands around it, a block each."""
    return re.split(r"\n\n", figures.PAGE.read_text())


MADE = [figures.PAGE, figures.PICTURE, figures.PEERS]


@pytest.mark.parametrize("path", MADE, ids=lambda path: path.name)
def test_what_make_figures_writes_is_what_lies_in_docs(path):
    assert dict(figures.made())[path] == path.read_text(), "run make figures"


def test_each_table_is_followed_by_its_age_and_the_command_that_prints_it():
    blocks = _tables()
    tables = [k for k, block in enumerate(blocks) if block.startswith("|")]
    assert len(tables) == figures.TEMPLATE.read_text().count("@table ")
    for k in tables:
        about = blocks[k + 1]
        assert re.search(r"\b\d{4}-\d\d-\d\d, commit [0-9a-f]{8}\b", about), blocks[k]
        command = re.search(r"Printed by `python (benchmarks/\w+\.py)[^`]*`\.$", about)
        assert command, blocks[k]
        assert (figures.ROOT / command[1]).exists()


def test_every_table_has_as_many_cells_in_each_row_as_in_its_head():
    for block in _tables():
        if block.startswith("|"):
            assert len({line.count("|") for line in block.splitlines()}) == 1, block


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_a_stored_row_says_what_was_measured_with_what_and_when(path):
    stored = json.loads(path.read_text())
    assert (figures.ROOT / stored["script"]).stem == path.stem
    for row in stored["rows"]:
        assert row.keys() >= {"table", "label", "settings", "values", "seed", "data", "seconds"}
        assert re.fullmatch(r"[0-9a-f]{8}", row["commit"]), row["label"]
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", row["date"]), row["label"]
        machine = stored["machines"][row["machine"]]
        assert machine.keys() >= {"processor", "cores", "instructions", "threads", "versions"}
    keys = [(r["table"], str(r["settings"]), str(r["seed"])) for r in stored["rows"]]
    assert len(set(keys)) == len(keys)


def test_the_picture_has_a_mark_for_each_of_its_points():
    root = ET.fromstring(figures.PICTURE.read_text())
    drawn = [mark.text for mark in root.iter("{http://www.w3.org/2000/svg}title")][1:]
    wanted = [
        f"{each.name}: {size:,} bytes, {drop:.2f}"
        for each in series(figures.read)
        for size, drop in each.points
    ]
    assert drawn == wanted
    assert len(figures.PICTURE.read_bytes()) < 10_000
    assert all(drop < DROPS[1] for each in series(figures.read) for _, drop in each.points)


def test_the_picture_of_tools_has_a_mark_for_each_of_its_points():
    root = ET.fromstring(figures.PEERS.read_text())
    drawn = [mark.text for mark in root.iter("{http://www.w3.org/2000/svg}title")][1:]
    assert sorted(drawn) == sorted(title for _, title, *_ in peerpicture.points(figures.read))
    assert len(figures.PEERS.read_bytes()) < 20_000


def test_text_in_brackets_goes_with_its_values_and_other_text_stays():
    pattern = "| {network} | {a:.2f}[ ({b:.1f}x)] | {c/d:,} bytes |"
    values = {"network": "resnet20", "a": 1, "c/d": 1234}
    assert figures.filled(pattern, values) == "| ResNet-20 | 1.00 | 1,234 bytes |"
    assert figures.filled(pattern, values | {"b": 2}) == "| ResNet-20 | 1.00 (2.0x) | 1,234 bytes |"
    assert figures.filled(pattern, {"network": "x"}) == "| x | | |"


def test_rows_that_agree_become_one_with_values_by_what_differs():
    values = [{"net": n, "case": c, "drop": k} for k, (n, c) in enumerate(["a1", "b1", "a2"])]
    first, second = figures.pivoted(values, "net by case")
    assert (first["case"], first["a/drop"], first["b/drop"]) == ("1", 0, 1)
    assert (second["case"], second["a/drop"], second.get("b/drop")) == ("2", 2, None)


def test_a_row_that_nobody_dated_is_said_to_be_so():
    row = {"commit": None, "date": None, "seed": None, "changed": True}
    nothing = {"processor": None, "cores": None, "instructions": None, "threads": None}
    about = figures.about([row | {"machine": nothing | {"versions": {}}}], "python x.py")
    assert about.count("not recorded") == 5
