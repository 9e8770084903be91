"""Pages and notebooks without a browser: what is in them, and what is refused."""

import importlib.util
import json
import math
from base64 import b64decode
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from networks import rand
from pages import HOSTILE, METHOD, Frontier, Point, Two, case, frontier_of, uniform
from PIL import Image
from torch import nn

import rabbet
from rabbet.cli import main
from rabbet.core.budget import METRICS
from rabbet.core.cost import float_cost, plan_cost
from rabbet.core.history import History
from rabbet.core.plan import LayerPlan, Plan, Term, quoted
from rabbet.core.survey import Survey
from rabbet.data.answers import Answers
from rabbet.errors import FileError, ModelError, PlanError
from rabbet.report.content import Report
from rabbet.report.examples import answered, examples_of, seen
from rabbet.report.looking import look
from rabbet.report.notebook import ROWS, frontier_summary, summary
from rabbet.report.page import page
from rabbet.report.points import frontier_facts
from rabbet.workpiece import Workpiece

drawn = pytest.mark.skipif(
    importlib.util.find_spec("vl_convert") is None, reason="pages need rabbet[report]"
)


class Reader(HTMLParser):
    """The texts of a page by section, its tags, and the JSON in it."""

    def __init__(self, text):
        super().__init__()
        self.sections, self.tags, self.facts, self.open = {"": ""}, [], "", []
        self.place = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.tags.append(tag)
        self.inert = given.get("type") == "application/json"
        self.open.append(tag)
        if tag == "section":
            self.place = given["id"]
            self.sections[self.place] = ""

    def handle_endtag(self, tag):
        self.open.append(f"/{tag}")

    def handle_data(self, data):
        if self.open[-1:] == ["script"]:
            self.facts += data if self.inert else ""
        elif self.open[-1:] != ["style"]:
            self.sections[self.place] += data


def sections(path):
    """The texts of a page that was written."""
    return Reader(Path(path).read_text(encoding="utf-8")).sections


@pytest.fixture(scope="module")
def fitted():
    """A network with two outputs, fitted at 4 bits, and its task."""
    model, task = case("two outputs")
    survey = rabbet.survey(model, task)
    return model, rabbet.fit(model, uniform(survey, 4), task, METHOD)


@drawn
def test_a_page_says_what_was_asked_and_found_in_this_order(fitted, tmp_path):
    model, result = fitted
    result = replace(result, budget=rabbet.Budget.parse("bits <= 5, bytes <= 1%"))
    size = result.report(tmp_path / "new" / "a.html", model, files={"a.onnx": 4321})
    path = tmp_path / "new" / "a.html"
    assert path.stat().st_size == size
    read = Reader(path.read_text(encoding="utf-8"))
    order = ["", "asked", "layers", "bytes", "notes", "convergence", "examples"]
    assert [*read.sections] == order  # nothing of this network is left alone
    asked = read.sections["asked"]
    assert "bits <= 5, bytes <= 1%" in asked
    assert f"{result.cost.bytes:,}" in asked
    assert "kept, 1.000 to spare" in asked
    over = result.cost.bytes - result.float_cost.bytes // 100
    assert f"over by {over:,}" in asked
    assert "counted, of one example, [20]" in asked
    for name, error in result.errors.items():
        assert name in read.sections["layers"]
        assert f"{100 * error:.2g}%" in read.sections["layers"]
    assert "4,321" in read.sections["bytes"]
    assert all(note in read.sections["notes"] for note in result.notes)
    facts = json.loads(read.facts)
    assert [row["part"] for row in facts["bytes"]][-1] == "file, whole"
    totals = {row["version"]: 0 for row in facts["bytes"]}
    for row in facts["bytes"]:
        totals[row["version"]] += row["bytes"]
    assert totals["planned"] == result.cost.bytes
    assert totals["float32"] == result.float_cost.bytes
    (history,) = facts["histories"]
    assert len(history["values"]) == METHOD.tuning.steps


@drawn
def test_a_page_without_the_network_leaves_out_what_needs_it(fitted, tmp_path):
    _, result = fitted
    result.report(tmp_path / "a.html")
    read = Reader((tmp_path / "a.html").read_text(encoding="utf-8"))
    assert "examples" not in read.sections
    assert "Harm" not in read.sections["layers"]


@pytest.mark.slow
@drawn
def test_a_long_frontier_of_many_layers_stays_small():
    model, task = case("two outputs")
    site = rabbet.survey(model, task)["body"]
    sites = tuple(replace(site, name=f"block{k // 6}.layer{k % 6}.weight") for k in range(300))
    survey = Survey(sites, (), 4 * sum(s.numel for s in sites))
    whole, points = float_cost(survey), []
    for k in range(200):
        terms = [(Term.parse(f"dense@{2 + (k * i) % 7}c"),) for i in range(300)]
        plan = Plan(tuple(LayerPlan(s.name, t, 8) for s, t in zip(sites, terms, strict=True)))
        points.append(
            Point(plan, plan_cost(survey, plan, ()), 1.0 / (k + 1), (9.0, 8.0, 9.5), True)
        )
    frontier = Frontier("bits", tuple(points), survey, whole)
    text = page(Report.of_frontier(frontier))
    assert len(text.encode()) < 3_000_000
    facts = json.loads(Reader(text).facts)["frontier"]
    last = facts["points"][-1]
    shown = [facts["options"][k][choice]["plan"] for k, choice in enumerate(last["choice"])]
    assert shown == [line.body for line in points[-1].plan]


@drawn
def test_numbers_that_are_not_finite_are_not_drawn(fitted):
    model, task = case("two outputs")
    known = frontier_of(model, task)
    points = (replace(known.points[0], harm=math.inf), *known.points[1:])
    history = History("search", "step", "loss", {"": (math.nan, 2.0, math.inf, 1.0)})
    report = replace(Report.of_frontier(replace(known, points=points)), histories=(history,))
    facts = json.loads(Reader(page(report)).facts)
    assert facts["frontier"]["points"][0]["harm"] is None
    assert [v["value"] for v in facts["histories"][0]["values"]] == [2.0, 1.0]


@drawn
def test_a_frontier_of_another_network_or_without_plans_is_refused(fitted, tmp_path):
    model, result = fitted
    other = frontier_of(*case("hostile names"))
    with pytest.raises(PlanError, match="is of another network"):
        result.report(tmp_path / "a.html", frontier=other)
    with pytest.raises(PlanError, match="has no plan"):
        result.report(
            tmp_path / "a.html", frontier=replace(frontier_of(model, result.parcel.task), points=())
        )
    with pytest.raises(PlanError, match="without a plan"):
        Report.of_frontier(replace(other, points=()))
    assert list(tmp_path.iterdir()) == []


@drawn
def test_a_page_is_written_over_no_other_kind_of_file(fitted, tmp_path):
    result = fitted[1]
    result.save(tmp_path / "a.safetensors")
    before = (tmp_path / "a.safetensors").read_bytes()
    with pytest.raises(FileError, match=r"a page ends in \.html; found .*a\.safetensors"):
        result.report(tmp_path / "a.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == before
    for path in ("x\0.html", None, 3):
        with pytest.raises(FileError, match="a path is a text"):
            result.report(path)
    for given in ({"files": ["x"]}, {"title": 3}, {"frontier": 3}, {"score": "x"}):
        with pytest.raises(PlanError, match="; found "):
            result.report(tmp_path / "a.html", **given)


@drawn
def test_what_each_layer_does_alone_is_of_the_network_that_was_fitted(fitted, tmp_path):
    model, result = fitted
    result.report(tmp_path / "a.html", model)
    text = Reader((tmp_path / "a.html").read_text(encoding="utf-8")).sections["layers"]
    assert "Harm: measured by gradients" in text
    finer = rabbet.fit(model, uniform(result.survey, 8), result.parcel.task, METHOD)
    piece = Workpiece.of(model, result.parcel.task, rabbet.Jobs())
    coarse, fine = (look(piece, x.model).harms for x in (result, finer))
    assert all(0 < fine[name] < coarse[name] / 4 for name in coarse)


@drawn
def test_another_network_beside_a_report_is_refused_and_nothing_is_written(fitted, tmp_path):
    _, result = fitted
    with pytest.raises(ModelError, match="other layers than the one that was compressed"):
        result.report(tmp_path / "a.html", nn.Linear(20, 4).eval())
    assert list(tmp_path.iterdir()) == []


@drawn
def test_a_place_that_cannot_be_written_is_an_error(fitted, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="cannot write"):
        fitted[1].report(tmp_path / "file" / "a.html")


def test_without_the_extra_the_error_says_what_to_install(fitted, tmp_path, monkeypatch):
    monkeypatch.setattr("rabbet.report.page.find_spec", lambda _: None)
    with pytest.raises(FileError, match=r"need vl-convert-python; install rabbet\[report\]"):
        fitted[1].report(tmp_path / "a.html")
    out = str(tmp_path / "a.html")
    assert main(["plan", "--html", out]) == 2  # before any work


@drawn
def test_a_network_without_gradients_has_a_page_that_says_so(tmp_path):
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(12, 12), nn.Linear(12, 3)

        def forward(self, x):
            return self.head(torch.sigmoid(self.body(x)).mul_(2))  # which sigmoid's gradient needs

    task = rabbet.Task([rand(8, 12)])
    model = InPlace().eval()
    plan = "body dense@4c | act@8\nhead dense@4c | act@8"
    result = rabbet.fit(model, plan, task, quality="fast")
    result.report(tmp_path / "a.html", model)
    read = Reader((tmp_path / "a.html").read_text(encoding="utf-8"))
    assert "what each layer alone does is not known" in read.sections["notes"]
    assert "Harm" not in read.sections["layers"]
    assert "examples" in read.sections


@drawn
def test_names_do_not_leave_their_place_in_the_page_or_in_its_json():
    model, task = case("hostile names")
    frontier = frontier_of(model, task)
    text = page(Report.of_frontier(frontier, "</title><script>hacked=1</script>"))
    read = Reader(text)
    assert read.tags.count("script") == text.lower().count("</script") == 3
    assert "img" not in read.tags
    assert "<!--" not in text.partition("</main>")[2].partition("<script>")[0]
    facts = json.loads(read.facts)
    assert [row["name"] for row in facts["layers"]] == list(map(quoted, HOSTILE))
    for name in HOSTILE:
        assert quoted(name) in read.sections["layers"]


def test_a_point_of_a_frontier_says_which_options_it_takes():
    model, task = case("two outputs")
    frontier = frontier_of(model, task)
    report = Report.of_frontier(frontier)
    facts = frontier_facts(frontier, report)
    assert (facts["fitted"], facts["start"]) == (0, 0)
    for point, told in zip(frontier.points, facts["points"], strict=True):
        lines = [facts["options"][k][choice]["plan"] for k, choice in enumerate(told["choice"])]
        assert lines == [line.body for line in point.plan]
        assert told["costs"]["bytes"]["found"] == f"{point.cost.bytes:,}"
        assert told["accuracy"] == list(point.accuracy)
        assert ("measured" in told["accurate"]) == point.measured
    assert len(facts["options"][1]) == 6  # each option once, however many points take it


def test_a_notebook_shows_a_result_without_any_script(fitted):
    _, result = fitted
    text = result._repr_html_()
    read = Reader(text)
    assert len(text) < 20_000
    assert not {"script", "style", "img", "link"} & set(read.tags)
    assert f"{result.cost.bytes:,} bytes" in read.sections[""]
    assert all(line.body in read.sections[""] for line in result.plan)
    assert read.tags.count("rect") == len(result.plan)


def test_a_notebook_shows_only_the_heaviest_of_many_layers_and_escapes_them():
    layers = {f"layer{k}": nn.Linear(6, 6 if k else 60) for k in range(20)}
    layers["<script>hacked=1</script>"] = nn.Linear(60, 6)

    class Many(nn.Module):
        def __init__(self):
            super().__init__()
            for name, layer in layers.items():
                self.add_module(name, layer)

        def forward(self, x):
            *middle, last = list(self.children())[1:]
            for layer in middle:
                x = layer(x)
            return last(self.layer0(x))

    task = rabbet.Task([rand(8, 6)])
    piece = Workpiece.of(Many().eval(), task, rabbet.Jobs())
    plan = uniform(piece.survey, 4)
    costs = piece.cost(plan), piece.float_cost
    read = Reader(summary(Report("many", piece.survey, plan, *costs)))
    assert f"and {len(piece.survey.sites) - ROWS} lighter layers" in read.sections[""]
    assert "script" not in read.tags
    assert "<script>hacked=1</script>" in read.sections[""]


def test_a_notebook_shows_a_frontier():
    model, task = case("two outputs")
    frontier = frontier_of(model, task)
    text = frontier_summary(frontier)
    read = Reader(text)
    assert f"{len(frontier.points)} plans by bytes" in read.sections[""]
    for point in (frontier.points[0], frontier.points[-1]):
        assert f"{METRICS['bytes'].amount(point.cost):,}" in read.sections[""]
    assert read.tags.count("polyline") == 1
    assert len(text) < 10_000


def test_tensors_are_shown_as_what_they_are():
    assert seen(rand(3, 8, 9)).form == seen(rand(1, 8, 8)).form == seen(rand(30, 20)).form
    assert seen(rand(3, 8, 9)).content.startswith("data:image/png;base64,")
    assert seen(rand(200)).form == "line"
    assert seen(torch.tensor([3, 1, 4])).content == "3, 1, 4"
    assert seen(torch.arange(99)).content.endswith("15, …")
    assert seen(torch.tensor(7.5)).content == "7.5"
    assert seen(rand(5, 2, 2, 2)).form == "text"
    wide = seen(torch.full((1000,), float("nan")))
    assert max(wide.content) == 0.0
    assert len(wide.content) <= 400


def test_a_picture_holds_its_pixels(tmp_path):
    pixels = torch.arange(48.0).view(1, 6, 8)
    path = tmp_path / "a.png"
    path.write_bytes(b64decode(seen(pixels).content.partition(",")[2]))
    with Image.open(path) as image:
        assert image.size == (8, 6)
        read = torch.tensor(list(image.tobytes())).view(6, 8)
    assert torch.equal(read, (pixels[0] * 255 / 47).round().long())


def test_answers_of_scores_are_classes_and_of_values_numbers(fitted):
    model, result = fitted
    piece = Workpiece.of(model, result.parcel.task, rabbet.Jobs())
    examples = examples_of(piece, result.model, 3)
    assert len(examples) == 3
    batch = piece.task.first()
    with torch.no_grad():
        exact = model(batch)
    for k, example in enumerate(examples):
        scores, box = example.answers
        best = int(exact["scores"][k].argmax())
        assert scores.rows[0][1].startswith(f"class {best}: ")
        assert scores.agree in ("same class", "another class")
        assert box.rows[0][1] == f"{float(exact['box'][k, 0]):.4g}"
    alike = examples_of(piece, piece.model, 1)[0].answers
    assert alike[0].agree == "same class"
    assert all(a == b for _, a, b in (*alike[0].rows, *alike[1].rows))


def test_answers_of_many_places_and_of_other_shapes_are_told_in_words():
    answers = Answers(("scores",), True, (1,), (torch.ones(1),), (1.0,))
    theirs = rand(5, 4, 4)
    ours = theirs.clone()
    ours[:, 0, 0] = -ours[:, 0, 0]
    assert answered(answers, 0, theirs, theirs, 1).agree.startswith("16 of 16 places")
    assert answered(answers, 0, theirs, ours, 1).agree.startswith("15 of 16 places")
    other = answered(answers, 0, theirs, ours[:4], 1)
    assert other.rows == (("shape", "[5, 4, 4]", "[4, 4, 4]"),)


def test_a_batch_that_is_one_example_is_shown_whole():
    model = Two().eval()
    task = rabbet.Task([rand(6, 20)], axes=())
    piece = Workpiece.of(model, task, rabbet.Jobs())
    (example,) = examples_of(piece, piece.model)
    assert example.inputs[0].about == "float32 [6, 20]"


@drawn
def test_the_command_line_makes_pages(tmp_path, capsys):
    nets = tmp_path / "nets.py"
    nets.write_text(NETS)
    given = (f"{nets}:network", "--data", f"{nets}:batches")
    names = ("a.safetensors", "a.html", "p.html", "r.html")
    file, made, plan, report = (str(tmp_path / name) for name in names)
    options = ("--budget", "bits <= 4", "--method", QUICK)
    good = ("--test", f"{nets}:good")
    assert main(["plan", *given, *options, "--html", plan]) == 0
    assert main(["compress", *given, *options, *good, "-o", file, "--html", made]) == 0
    chosen, whole = sections(plan), sections(made)
    assert "Plan, not fitted" in chosen[""]
    assert "counted before anything is solved" in chosen["asked"]
    assert "examples" in whole
    assert "measured: the written file" in whole["asked"]
    capsys.readouterr()
    assert main(["report", file, "-o", report, "--budget", "bits <= 2", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    alone = sections(report)
    assert facts["bytes"] > 100_000
    assert "examples" not in alone
    assert "over by 2.000" in alone["asked"]
    model = ("--model", given[0], *given[1:])
    assert main(["report", file, "-o", report, *model, "--exported", file]) == 0
    whole = sections(report)
    assert "examples" in whole
    assert "Error: measured" in whole["layers"]


@drawn
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["-o", "a.png"], "must end in .html"),
        (["-o", "a.html", "--data", "x"], "--data needs the network"),
        (["-o", "a.html", "--budget", "latency <= 1 ms"], "does not say its latency"),
    ],
)
def test_mistakes_of_report_are_told(arguments, said, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.safetensors").write_bytes(b"")
    assert main(["report", "a.safetensors", *arguments]) == 2
    assert said in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


QUICK = "joint grids=('4c','8c') forms=() adapters=() tuning.steps=0"
NETS = """
import torch
from torch import nn


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4)).eval()


def batches():
    torch.manual_seed(1)
    return [torch.randn(16, 12) for _ in range(2)]


def good(model):
    return 3.0
"""
