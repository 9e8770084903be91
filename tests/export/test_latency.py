"""Time as a budget: with a fake clock, and once with the real one."""

import json
import re

import pytest
import torch
from exporting import CASES
from networks import network
from torch import nn

import rabbet
from rabbet import Joint
from rabbet.choose.latency import Stopwatch
from rabbet.cli import main
from rabbet.core.plan import LayerPlan, Term
from rabbet.errors import BudgetError
from rabbet.train.tuning import Tuning
from rabbet.workpiece import Workpiece

JOINT = Joint(
    grids=("2hc", "8c"),
    adapters=(("2hc", 0.4),),
    forms=("cp",),
    shares=(0.5,),
    tuning=Tuning(steps=0),
)
METHOD = "joint grids=('2hc','8c') forms=() adapters=() tuning.steps=0"


class Clock:
    """A layer takes a microsecond per term, the rest ten, the float network a hundred."""

    whole, rest = 100_000, 10_000

    def __init__(self, piece):
        self.piece = piece

    def layer(self, site, layer):
        return 0 if layer is None else 1000 * len(layer.terms)

    def expect(self, lines):
        self.expected = list(lines)

    def network(self, model):
        return 12_345


@pytest.fixture
def clocked(monkeypatch):
    monkeypatch.setattr("rabbet._bench.Stopwatch", Clock)
    return CASES["cifar resnet"]()


def test_a_latency_is_a_budget_like_any_other(clocked):
    layers = len(rabbet.survey(clocked.model, clocked.batches).sites)
    for spare in range(3):
        most = 10 + layers + spare
        result = rabbet.compress(
            clocked.model, f"latency <= {most} us, bits <= 6", clocked.batches, JOINT
        )
        assert sum(len(line.terms) - 1 for line in result.plan) <= spare
        assert (
            result.cost.time
            == 10_000 + 1000 * sum(len(line.terms) for line in result.plan)
            <= 1000 * most
        )
        assert result.float_cost.time == 100_000
        assert "0.012 ms measured; float 0.100 ms" in result.notes[-1]
        assert f"{result.cost.time / 1e6:.3f} ms predicted" in result.notes[-1]
        took, allowed = f"{result.cost.time / 1e6:.3f} ms", f"0.0{most} ms"
        row = rf"latency, predicted +{took} +{result.cost.time / 1000:.3g}% +{allowed}"
        assert re.search(row, str(result))
        assert str(result).splitlines()[0].endswith("  ms")  # of each layer
        latencies = result.latencies
        assert sum(latencies.layers.values()) + latencies.rest == result.cost.time
        assert latencies.measured == 12_345


@pytest.mark.slow
@pytest.mark.parametrize("command", ["plan", "compress"])
def test_the_command_line_says_what_a_latency_is_and_may_be(command, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("rabbet._bench.Stopwatch", Clock)
    given = ["--budget", "latency <= 0.02 ms, bits <= 4", "--method", METHOD]
    out = ["--output", str(tmp_path / "a.safetensors")] if command == "compress" else []
    assert main([command, *given, *out]) == 0
    row = r"latency, predicted +0\.01\d ms +1\d(\.\d)?% +0\.020 ms"
    assert re.search(row, "".join(capsys.readouterr()))
    assert main([command, *given, *out, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["float"]["latency"] == 100_000
    (limit,) = [x for x in facts["limits"] if x["metric"] == "latency"]
    assert limit["found"] == facts["cost"]["latency"] <= limit["allowed"] == 20_000
    assert limit["over"] == 0
    assert sum(layer["latency"] for layer in facts["layers"]) == limit["found"] - Clock.rest


def test_how_many_layers_are_to_be_timed_is_said_before_any_is(tmp_path, monkeypatch):
    monkeypatch.setenv("RABBET_CACHE", str(tmp_path))
    said, timed = [], []
    jobs = rabbet.Jobs(progress=lambda *report: said.append(report))
    model = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 3, 3, padding=1))
    piece = Workpiece.of(model.eval(), rabbet.Task([torch.rand(4, 3, 8, 8)]), jobs)
    monkeypatch.setattr("rabbet.choose.latency._time", lambda *_: timed.append(1) or 1000)
    watch = Stopwatch(piece)
    texts = ("dense@4c", "dense@8c", "dense@4c + lowrank[2]@8c")
    lines = [LayerPlan(n, tuple(map(Term.parse, t.split(" + "))), 8) for n in "02" for t in texts]
    said.clear()
    watch.expect(lines)
    # both layers are alike, and so are their bits
    assert (said, timed) == ([("timing layers: distinct ones", 0, 2)], [])
    for line in lines:
        assert watch.layer(piece.survey[line.name], line) == 1000
    assert [report[1:] for report in said] == [(0, 2), (1, 2), (2, 2)]
    assert len(timed) == 2
    said.clear()
    Stopwatch(piece).expect(lines)
    assert said == []  # nothing is left to be timed


def test_an_impossible_latency_is_refused_with_the_smallest_reachable_one(clocked):
    with pytest.raises(BudgetError, match=r"smallest reachable value is 0\.01\d ms latency"):
        rabbet.plan(clocked.model, "latency <= 5%", clocked.batches, JOINT)


def test_without_such_a_budget_nobody_measures_and_nothing_is_shown(clocked):
    result = rabbet.compress(clocked.model, "bits <= 4", clocked.batches, JOINT)
    assert result.cost.time == result.float_cost.time == 0
    assert "latency" not in str(result)


def test_a_table_takes_the_time_of_its_head_and_none_for_a_look_up(tmp_path, monkeypatch):
    monkeypatch.setenv("RABBET_CACHE", str(tmp_path))
    for name, heads in (("tied", 1), ("tokens", 0)):
        piece = _piece(network(name))
        watch, site = Stopwatch(piece), piece.survey["table"]
        lines = [
            LayerPlan("table", (Term.parse(t),), 8 if heads else None)
            for t in ("dense@4c", "ttm[4]@8")
        ]
        assert [watch.layer(site, line) > 0 for line in (*lines, None)] == [heads > 0] * 3


def test_a_layer_deep_inside_is_timed_with_its_adapter(tmp_path, monkeypatch):
    monkeypatch.setenv("RABBET_CACHE", str(tmp_path))
    piece = _piece(network("residual"))
    for text in ("dense@4c + lowrank[2]@8c", "dense[0-3]@4c + dense[4-7]@2hc", "tt[3]@4"):
        line = rabbet.Plan.parse(f"3.conv1 {text} | act@8")["3.conv1"]
        assert Stopwatch(piece).layer(piece.survey["3.conv1"], line) > 0


def _piece(case):
    return Workpiece.of(case.model, rabbet.Task(case.batches), rabbet.Jobs())


def test_layers_are_timed_once_per_machine_and_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("RABBET_CACHE", str(tmp_path))
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))
    piece = Workpiece.of(model.eval(), rabbet.Task([torch.rand(4, 3, 8, 8)]), rabbet.Jobs())
    plan = rabbet.Plan.parse("0 dense@3c + lowrank[2]@8c | act@8\n2 lowrank[4]@4c | act@8")

    def times():
        watch = Stopwatch(piece)
        return [
            watch.whole,
            watch.rest,
            *(watch.layer(s, plan[s.name]) for s in piece.survey),
            watch.layer(piece.survey["2"], None),
        ]

    first = times()
    assert first[0] > 0
    assert min(first[2:]) > 0
    kept = len(list(tmp_path.iterdir()))
    monkeypatch.setattr("rabbet.choose.latency.time_files", None)  # measuring again would fail
    assert times() == first
    assert len(list(tmp_path.iterdir())) == kept
    four = rabbet.Plan.parse("2 lowrank[4]@8c | act@8")["2"]
    assert Stopwatch(piece).layer(piece.survey["2"], four) == first[3]  # bits take no time
