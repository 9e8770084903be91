"""The commands about many budgets at once, and compress until too much is lost."""

import json

import pytest
from commands import QUICK

from rabbet import demo, load
from rabbet.data.accuracy import accuracy


def test_a_frontier_is_a_table_or_json(run, mine):
    given = (f"{mine}:net", "--data", f"{mine}:batches", "--points", "8", *QUICK)
    code, out, _ = run("frontier", *given)
    assert code == 0
    assert "expected error" in out
    assert "points along bytes" in out
    facts = json.loads(run("frontier", *given, "--json")[1])
    amounts = [point["cost"]["bytes"] for point in facts["points"]]
    assert amounts == sorted(amounts, reverse=True)
    # a point's limit is a budget that compress takes
    budget = ("--budget", facts["points"][2]["limit"])
    names = (f"{mine}:net", "--data", f"{mine}:batches")
    plan = json.loads(run("plan", *names, *budget, "--json", *QUICK)[1])
    assert plan["plan"] == facts["points"][2]["plan"]


@pytest.mark.slow
def test_points_are_measured_on_what_is_held_back(run):
    given = ("--points", "5", "--measure", "2", "--json", *QUICK)
    points = json.loads(run("frontier", *given)[1])["points"]
    assert [point["measured"] for point in points] == [True, *[False] * (len(points) - 2), True]
    assert points[0]["accuracy"][0] >= points[-1]["accuracy"][0] > 50


def test_a_frontier_is_a_page_too(run, tmp_path):
    page = tmp_path / "page.html"
    assert run("frontier", "--points", "4", "--html", str(page), *QUICK)[0] == 0
    assert 'type="range"' in page.read_text()


@pytest.mark.slow
def test_the_least_that_loses_little_is_found(run, tmp_path):
    output, page = tmp_path / "least.safetensors", tmp_path / "least.html"
    asked = ("--drop", "<= 1", "-o", str(output), "--html", str(page))
    code, out, _ = run("compress", *asked, *QUICK)
    assert code == 0
    assert 'type="range"' in page.read_text()  # the frontier that was searched
    assert "a drop of" in out
    lost = accuracy(demo.model(), demo.labelled()) - accuracy(
        load(output, demo.model()), demo.labelled()
    )
    assert lost <= 1


@pytest.mark.slow
def test_a_sweep_prints_a_row_for_each_and_draws_them(run, mine, tmp_path):
    picture, page = tmp_path / "sweep.svg", tmp_path / "sweep.html"
    given = ("--method", "admm sweeps=2 inner=2", "--budget", "bytes <= 95%", "--held",
             "rabbet.demo:labelled")  # fmt: skip
    code, out, _ = run("sweep", *given, "--set", "bits=4;8", "--plot", str(picture),
                       "--html", str(page))  # fmt: skip
    assert code == 0
    text = page.read_text()
    assert 'data-chart="sweep"' in text
    assert out.splitlines()[2].split()[-1] in text  # the first measure
    assert [line.split()[3] for line in out.splitlines()[2:4]] == ["4", "8"]
    assert picture.stat().st_size > 1000
    assert "measure: accuracy, on rabbet.demo:labelled" in out
    names = (f"{mine}:net", "--data", f"{mine}:batches", "--json", *QUICK)
    rows = json.loads(run("sweep", *names, "--budget", "bytes <= 1%", "--budget", "bits <= 4")[1])
    assert [row["measure"] for row in rows["rows"]] == [None, None]
    assert "cannot be met" in rows["rows"][0]["error"]
    assert rows["rows"][1]["cost"]["bits"] <= 4


def test_a_picture_that_cannot_be_drawn_loses_no_row(run, mine):
    names = (f"{mine}:net", "--data", f"{mine}:batches", "--held", f"{mine}:labelled", *QUICK)
    code, out, err = run("sweep", *names, "--budget", "bytes <= 1%", "--plot", "a.svg")
    assert code == 2
    assert "nothing to draw" in err
    assert "cannot be met" in out


def test_mistakes_are_a_line(run, mine, tmp_path):
    names = (f"{mine}:net", "--data", f"{mine}:batches")
    output = ("-o", str(tmp_path / "a.safetensors"))
    for words, said in (
        (("frontier", *names, "--axis", "size"), "'size' is not one of bytes"),
        (("frontier", *names, "--budget", "bytes <= 9%"), "is the axis"),
        (("frontier", *names, "--measure", "3"), "say what networks are measured on"),
        (("frontier", *names, "--method", "admm"), "rabbet.sweep"),
        (("sweep", *names, "--set", "bits"), "is no setting with its values"),
        (("sweep", *names, "--set", "bit=2"), "is no setting; there are"),
        (("sweep", *names, "--html", "x.txt"), "must end in .html"),
        (("sweep", *names, "--plot", "x.svg"), "say what networks are measured on"),
        (("compress", *names, *output, "--drop", "much"), "is not the most that may be lost"),
        (("compress", *names, *output, "--drop", "1"), "say what networks are measured on"),
        (("compress", *names, *output, "--held", "x"), "only a --drop is measured on it"),
        (("compress", *names, *output, "--drop", "1", "--budget", "bytes <= 9%"), "is the axis"),
    ):
        code, out, err = run(*words)
        assert (code, out) == (2, ""), words
        assert said in err, words
        assert err.count("\n") == 1, words


@pytest.mark.slow
def test_a_drop_by_a_function_of_the_user_has_no_deviation(run, mine):
    given = (f"{mine}:net", "--data", f"{mine}:task", "--drop", 9, *QUICK)
    code, out, _ = run("compress", *given, "--output", "a.safetensors")
    assert code == 0
    assert "of how many examples is not known; fitted: bytes <= " in out
