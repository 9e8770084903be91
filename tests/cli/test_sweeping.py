"""The command line: what budgets buy, the least that keeps a measure, sweeps."""

import json

from commands import QUICK


def test_a_frontier_is_a_line_for_each_budget(run, kept):
    given = ("--limits", "12%", "20%", "--points", 5, "--resume", kept, *QUICK)
    code, out, _ = run("frontier", *given)
    assert code == 0
    rows = [line for line in out.splitlines() if line.startswith("bytes <= ")]
    assert len(rows) == 5
    assert "measure" not in out
    points = json.loads(run("frontier", *given, "--json")[1])["points"]
    assert [point["limit"] for point in points] == [row.rpartition("%")[0] + "%" for row in rows]
    assert all(point["accuracy"] is None for point in points)


def test_points_are_measured_and_what_lies_between_is_marked(run, kept):
    given = ("--limits", "12%", "20%", "--points", 4, "--measure", 2, "--resume", kept, *QUICK)
    code, out, _ = run("frontier", *given)
    assert code == 0
    assert out.count(" ? ") == 2
    assert "?: not measured, but told by the measured points on both sides" in out
    for point in json.loads(run("frontier", *given, "--json")[1])["points"]:
        value, low, high = point["accuracy"]
        assert 0 <= low <= value <= high <= 100


def test_compress_finds_the_least_within_a_drop(run, kept, tmp_path):
    path = tmp_path / "small.safetensors"
    given = ("--drop", "<= 1", "--budget", "macs <= 100%", "--resume", kept, *QUICK)
    code, out, _ = run("compress", *given, "--output", path)
    assert code == 0
    assert ": a drop of " in out
    assert "(one standard deviation); fitted: bytes <= " in out
    assert path.stat().st_size < 15_000


def test_a_drop_by_a_function_of_the_user_has_no_deviation(run, mine):
    given = (f"{mine}:net", "--data", f"{mine}:task", "--drop", 9, *QUICK)
    code, out, _ = run("compress", *given, "--output", "a.safetensors")
    assert code == 0
    assert "of how many examples is not known; fitted: bytes <= " in out


def test_a_sweep_is_a_row_for_each_combination(run, mine, tmp_path):
    given = (f"{mine}:net", "--data", f"{mine}:batches", "--set", "act=8;None", *QUICK)
    code, out, _ = run("sweep", *given, "--budget", "bits <= 4", "--budget", "bits <= 0.1")
    assert code == 0
    rows = [line.split() for line in out.splitlines()[:6]]
    assert rows[0] == ["budget", "act", "bytes", "macs", "bops", "bits", "bpw"]
    assert [row[3] for row in rows[2:]] == ["8", "None", "8", "None"]
    assert "'bits <= 0.1' cannot be met" in out
    path = tmp_path / "sweep.svg"
    given = (*given, "--held", f"{mine}:labelled", "--plot", path)
    code, out, _ = run("sweep", *given, "--budget", "bits <= 4")
    assert code == 0
    assert "measure" in out
    assert "<svg" in path.read_text()
