"""Layers solved again in order: kept where held-back examples agree, undone where they do not."""

import functools

import pytest
import torch
from networks import rand, settled
from torch import nn

import rabbet
from rabbet import Joint, Task
from rabbet.core.plan import LayerPlan, Plan
from rabbet.data.distance import Distance
from rabbet.data.examples import Axes
from rabbet.jobs import Jobs
from rabbet.methods import QUALITY
from rabbet.model.compressed import compressed_layers
from rabbet.reconstruct import matching, sequential
from rabbet.reconstruct.network import solved
from rabbet.train.tuning import Tuning
from rabbet.workpiece import Workpiece


def _network():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3)]
    return settled(nn.Sequential(*layers))


def _piece(model, batches):
    return Workpiece.of(model, Task(batches), Jobs())


def _plan(piece, text):
    return Plan(tuple(LayerPlan.parse(f"{s.name} {text}") for s in piece.survey))


def test_corrections_that_help_are_kept(monkeypatch):
    piece = _piece(_network(), [rand(64, 3, 10, 10, seed=k) for k in range(4)])
    plan, unseen = _plan(piece, "dense@2hc"), [[rand(64, 3, 10, 10, seed=9)]]
    student, note = solved(piece, plan)
    assert not note
    monkeypatch.setattr(sequential, "solve_in_order", lambda *_: None)
    plain, _ = solved(piece, plan)
    ours, others = (piece.distance(net, unseen).divergence for net in (student, plain))
    assert ours < 0.9 * others


def test_corrections_that_harm_are_undone_and_that_is_said(monkeypatch):
    piece = _piece(_network(), [rand(8, 3, 10, 10, seed=k) for k in range(4)])
    plan = _plan(piece, "dense@8c | act@8")

    def harm(student, *_):
        for layer in compressed_layers(student).values():
            layer.factors[0][0].scale.mul_(1.5)
            layer.bias.data = layer.bias.data + 1

    with monkeypatch.context() as patch:
        patch.setattr(sequential, "solve_in_order", lambda *_: None)
        plain, _ = solved(piece, plan)
    monkeypatch.setattr(sequential, "solve_in_order", harm)
    student, note = solved(piece, plan)
    assert note.startswith(
        "solving layers again in order undone: no sure gain on held-back examples"
    )
    state = plain.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in student.state_dict().items())
    result = rabbet.fit(_network(), plan, piece.task, QUALITY["fast"])
    assert note in result.notes


def test_a_quarter_of_the_judges_is_enough_where_it_leaves_no_doubt(monkeypatch):
    piece = _piece(_network(), [rand(64, 3, 10, 10, seed=k) for k in range(4)])
    asked, distance = [], Workpiece.distance

    def counted(self, student, parts):
        asked.append(len(parts))
        return distance(self, student, parts)

    monkeypatch.setattr(Workpiece, "distance", counted)
    assert not solved(piece, _plan(piece, "dense@2hc"))[1]
    assert asked == [4, 4]
    asked.clear()
    monkeypatch.setattr(sequential, "CLEAR", float("inf"))  # all are asked, and agree
    student, _ = solved(piece, _plan(piece, "dense@2hc"))
    assert asked == [4, 4, 12, 12]
    every = [[rand(64, 3, 10, 10, seed=9)]]
    ours = distance(piece, student, every).divergence
    asked.clear()
    monkeypatch.setattr(sequential, "solve_in_order", lambda *_: None)
    plain, note = solved(piece, _plan(piece, "dense@2hc"))
    assert not note  # nothing was changed, which no judge can tell from no gain
    assert asked == [4, 4, 12, 12]
    assert ours < 0.9 * distance(piece, plain, every).divergence  # the corrections were kept


def test_a_forward_that_does_not_take_the_parts_of_the_other_judges_is_no_error(monkeypatch):
    monkeypatch.setattr(sequential, "CLEAR", float("inf"))

    def forward(model, x):
        if len(x) == 3:
            raise ValueError("no 3")
        return model(x)

    batches = [rand(40, 3, 10, 10, seed=k) for k in range(8)]
    piece = Workpiece.of(_network(), Task(batches, forward=forward), Jobs())
    assert "ValueError" in solved(piece, _plan(piece, "dense@2hc"))[1]


def test_few_examples_of_wide_layers_do_not_make_the_network_worse(monkeypatch):
    # 8 examples for 256 inputs: the step that fits them says nothing of any other.
    torch.manual_seed(0)
    layers = [nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)]
    piece = _piece(settled(nn.Sequential(*layers)), [rand(8, 256), rand(8, 256, seed=1)])
    plan, unseen = _plan(piece, "dense@8c | act@8"), [[rand(256, 256, seed=9)]]
    ours = piece.distance(solved(piece, plan)[0], unseen).divergence
    monkeypatch.setattr(sequential, "solve_in_order", lambda *_: None)
    assert ours <= 1.05 * piece.distance(solved(piece, plan)[0], unseen).divergence


def test_without_a_second_example_nothing_is_corrected():
    method = Joint(grids=("4c",), adapters=(), forms=(), act=None, tuning=Tuning(steps=0))
    result = rabbet.compress(settled(nn.Linear(6, 4)), "bits <= 32", [rand(1, 6)], method)
    assert "layers not solved again in order: too few examples to hold one back" in result.notes


def _distance(*divergences, errors=None, declared=True, kinds=("scores",)):
    values = torch.tensor(divergences)
    return Distance(values, values if errors is None else torch.tensor(errors), kinds, declared)


def test_nearer_is_what_is_nearer_by_more_than_chance():
    start = _distance(1.0, 2.0, 3.0, 4.0)
    assert _distance(0.9, 1.9, 2.9, 3.9).is_below(start)
    assert not start.is_below(start)
    assert not _distance(0.0, 3.0, 2.0, 4.9).is_below(start)
    assert not _distance(0.95).is_below(_distance(1.0))  # one part cannot say how much parts differ
    assert _distance(0.8).is_below(_distance(1.0))


def test_outputs_only_told_to_be_scores_may_not_err_more_as_values_for_certain():
    def told(*errors, declared=False):
        return _distance(0.5, 0.5, 0.5, 0.5, errors=errors, declared=declared)

    before = _distance(1.0, 1.0, 1.0, 1.0, errors=[0.1, 0.2, 0.3, 0.4], declared=False)
    assert told(0.11, 0.19, 0.31, 0.4).is_below(before)  # no more than chance
    worse = told(0.2, 0.3, 0.4, 0.5)
    assert not worse.is_below(before)
    assert told(0.2, 0.3, 0.4, 0.5, declared=True).is_below(before)
    assert 'outputs="scores"' in worse.refused(before)
    assert "--outputs scores" in worse.refused(before)
    assert "1 -> 0.5" in worse.refused(before)
    assert "0.25 -> 0.35" in worse.refused(before)
    assert "no sure gain" in before.refused(before)


@pytest.mark.parametrize(
    "errors",
    [[torch.nan] * 4, [torch.inf] * 4, [1e38] * 4, [0, 0, torch.nan, 0], [0, 0, torch.inf, 0]],
)
def test_outputs_that_err_by_no_number_are_not_nearer(errors):
    before = _distance(1.0, 1.0, 1.0, 1.0, declared=False)
    assert not _distance(0.5, 0.5, 0.5, 0.5, errors=errors, declared=False).is_below(before)


def test_a_network_of_several_outputs_is_told_to_name_each():
    several = {"declared": False, "kinds": ("scores", "values")}
    before = _distance(1.0, 1.0, errors=[0.1, 0.1], **several)
    said = _distance(0.5, 0.5, errors=[0.2, 0.2], **several).refused(before)
    assert 'Task(batches, outputs=["scores", "values"])' in said
    assert "--outputs" not in said


class _Fixed(nn.Module):
    """Takes 32 examples at most."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 4)
        self.register_buffer("places", torch.zeros(32, 16))

    def forward(self, x):
        return self.b(torch.relu(self.a(x + self.places[: len(x)])))


@pytest.mark.parametrize("axes", [None, 0])
@pytest.mark.parametrize("steps", [0, 3])
def test_a_network_that_takes_no_more_than_its_batches_is_compressed(axes, steps):
    method = Joint(grids=("4c",), adapters=(), forms=(), act=None, tuning=Tuning(steps, batch=64))
    data = Task([rand(32, 16, seed=k) for k in range(8)], axes=axes)
    result = rabbet.compress(settled(_Fixed()), "bits <= 32", data, method)
    assert any("on many at once" in n or "one example" in n for n in result.notes)


def test_an_expert_that_is_shown_other_places_is_not_matched():
    torch.manual_seed(0)
    layer = settled(nn.Sequential(nn.Linear(6, 4)))
    piece = _piece(layer, [rand(64, 6) + 2])
    student = solved(piece, _plan(piece, "dense@8c"))[0]
    met, halves = rand(64, 6) + 2, functools.partial(Axes((0,)).halves, count=64)
    seen = matching.in_halves(layer(met), piece.survey["0"], halves)
    hook = matching.matcher(seen, sequential.GAIN, met.shape, halves)
    compressed, others = student[0], rand(5, 6) - 2
    before = compressed.bias.clone()
    out = compressed(others)
    assert torch.equal(hook(compressed, (others,), out), out)
    assert torch.equal(compressed.bias, before)
