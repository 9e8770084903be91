"""Rows of benchmarks: printed and stored at once, skipped, picked, shared out, expected."""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import records
from records import Records, Table

FOLDER = Path(records.__file__).parent
COLUMNS = {"net": "", "bits": "", "bytes": ",", "drop": ".2f"}


def _args(*words):
    parser = argparse.ArgumentParser()
    records.add_options(parser, jobs=True)
    return parser.parse_args(words)


@pytest.fixture
def table(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "code", lambda: ("0123abcd", False))

    def make(*words, seed=0, name="sizes"):
        return Table(Records("some", _args(*words), folder=tmp_path), name, COLUMNS, "data", seed)

    return make


def _stored(tmp_path):
    return json.loads((tmp_path / "some.json").read_text())


def _measured(**values):
    return lambda: {"bytes": 1234, "drop": 0.123456} | values


def _never():
    raise AssertionError("measured again")


def test_a_row_is_printed_and_stored_before_the_next_one_begins(table, tmp_path, capsys):
    rows = table()
    rows.row({"net": "a", "bits": 2}, _measured(more="x"))

    def second():
        assert [r["label"] for r in _stored(tmp_path)["rows"]] == ["a, 2"]
        printed = capsys.readouterr().out.splitlines()
        assert printed[-3:] == [
            "| net | bits | bytes | drop |",
            "| --- | --- | --- | --- |",
            "| a | 2 | 1,234 | 0.12 |",
        ]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rows.row({"net": "a", "bits": 3}, second)
    (row,) = _stored(tmp_path)["rows"]
    assert row["values"] == {"bytes": 1234, "drop": 0.12, "more": "x"}
    assert (row["settings"], row["seed"], row["data"]) == ({"net": "a", "bits": 2}, 0, "data")
    assert (row["commit"], row["changed"], row["table"]) == ("0123abcd", False, "sizes")
    machine = _stored(tmp_path)["machines"][row["machine"]]
    assert machine["cores"] > 0
    assert machine["versions"].keys() >= {"python", "torch"}


def test_a_row_takes_the_place_of_an_older_one_of_its_settings(table, tmp_path):
    for drop in (1, 2):
        table().row({"net": "a", "bits": (2, 3)}, _measured(drop=drop))
        table().row({"net": "b", "bits": None}, _measured())
    table(seed=[0, 1]).row({"net": "a", "bits": (2, 3)}, _measured(drop=3))
    assert [r["values"]["drop"] for r in _stored(tmp_path)["rows"]] == [2, 0.12, 3]
    assert len(_stored(tmp_path)["machines"]) == 1


def test_resume_takes_rows_of_this_commit_and_seed_as_they_are(table, monkeypatch, capsys):
    settings = {"net": "a", "bits": (2, 3)}
    table().row(settings, _measured())
    first = capsys.readouterr().out
    assert table("--resume").row(settings, _never) == {"bytes": 1234, "drop": 0.12}
    assert capsys.readouterr().out == first
    for other in (
        lambda: table().row(settings, _never),
        lambda: table("--resume", seed=1).row(settings, _never),
        lambda: table("--resume", name="others").row(settings, _never),
        lambda: table("--resume").row(settings | {"bits": 4}, _never),
        lambda: table("--resume").row({"net": "a"}, _never),
    ):
        with pytest.raises(AssertionError, match="again"):
            other()
    for code in (("89abcdef", False), ("0123abcd", True), (None, True)):
        monkeypatch.setattr(records, "code", lambda code=code: code)
        with pytest.raises(AssertionError, match="again"):
            table("--resume").row(settings, _never)


def test_resume_does_not_take_rows_of_a_changed_tree(table, monkeypatch):
    monkeypatch.setattr(records, "code", lambda: ("0123abcd", True))
    table().row({"net": "a"}, _measured())
    monkeypatch.setattr(records, "code", lambda: ("0123abcd", False))
    with pytest.raises(AssertionError, match="again"):
        table("--resume").row({"net": "a"}, _never)


def test_rows_that_are_measured_together_are_stored_and_resumed_together(table, tmp_path):
    group = [({"net": "a", "bits": b}, {"bytes": b}) for b in (2, 3)]
    table().rows({"net": "a"}, lambda: group)
    table("--resume").rows({"net": "a"}, _never)
    assert [r["label"] for r in _stored(tmp_path)["rows"]] == ["a, 2", "a, 3"]


def test_only_picks_rows_by_their_label(table, tmp_path):
    rows = table("--only", "b, 2", "c")
    for net in "abc":
        for bits in (2, 3):
            rows.row({"net": net, "bits": bits}, _measured())
    rows.row({"net": "d", "bits": 2}, _measured(), "called c")
    assert [r["label"] for r in _stored(tmp_path)["rows"]] == ["b, 2", "c, 2", "c, 3", "called c"]


def test_what_rows_of_a_kind_took_is_said_before_the_next(table, tmp_path, capsys):
    rows = table()
    rows.row({"net": "a", "bits": 2}, _measured())
    assert capsys.readouterr().err == ""
    path = tmp_path / "some.json"
    path.write_text(path.read_text().replace('"seconds": 0.0', '"seconds": 600.0'))
    rows.row({"net": "a", "bits": 3}, _measured())
    assert capsys.readouterr().err == "a, 3: such rows took about 10 minutes\n"
    assert [records.duration(s) for s in (0.4, 7.6, 119, 120, 7200)] == [
        "a second", "8 seconds", "119 seconds", "2 minutes", "2 hours"
    ]  # fmt: skip


def test_every_row_is_one_process_s(table, tmp_path):
    for k in range(3):
        rows = table("--share", str(k), "3")
        for bits in range(7):
            rows.row({"net": "a", "bits": bits}, _measured(place=k))
    found = {r["settings"]["bits"]: r["values"]["place"] for r in _stored(tmp_path)["rows"]}
    assert found == {bits: bits % 3 for bits in range(7)}


SCRIPT = """
import argparse, sys, types
from pathlib import Path
# the true one takes seconds to import
sys.modules["torch"] = types.SimpleNamespace(__version__="0", get_num_threads=lambda: 1)
sys.path.insert(0, {folder!r})
import records
parser = argparse.ArgumentParser()
records.add_options(parser, jobs=True)
args = parser.parse_args()
records.spread(args)
table = records.Table(records.Records("some", args, folder=Path({out!r})), "t", {{"k": ""}}, "d")
for k in range(8):
    table.row({{"k": k}}, lambda: {{}})
"""


def test_processes_that_share_the_rows_lose_none(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(folder=str(FOLDER), out=str(tmp_path)))
    subprocess.run([sys.executable, script, "--jobs", "2"], check=True, capture_output=True)
    assert sorted(r["settings"]["k"] for r in _stored(tmp_path)["rows"]) == list(range(8))


def test_code_that_is_no_checkout_has_no_commit(monkeypatch, tmp_path):
    monkeypatch.setattr(records, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert records.code() == (None, True)


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_stored_rows_and_the_page_are_no_change_of_the_code(monkeypatch, tmp_path):
    def git(*words):
        name = ("-c", "user.name=a", "-c", "user.email=a@b.example")
        subprocess.run(["git", *name, *words], cwd=tmp_path, check=True, capture_output=True)

    git("init")
    git("commit", "--allow-empty", "-m", "first")
    monkeypatch.setattr(records, "ROOT", tmp_path)
    for place in ("benchmarks/results/some.json", "docs/figures.md", "docs/pictures/a.svg"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_text("")
    assert records.code()[1] is False
    (tmp_path / "docs" / "other.md").write_text("")
    assert records.code()[1] is True
