"""Weights that are no layer's of a known kind: stored small, float when they are used."""

import pytest
import torch
import torch.nn.functional as F
from networks import rand, settled
from torch import nn

import rabbet
from rabbet import CGMQ, Jobs, Task
from rabbet.calibrate import moments
from rabbet.choose.sensitivity import output_errors
from rabbet.layers.stored import rows_of
from rabbet.methods import QUALITY
from rabbet.model.bags import bags_opened
from rabbet.model.compressed import stored_weights
from rabbet.workpiece import Workpiece


class Mixed(nn.Module):
    """A bag of embeddings, a recurrent layer, a bare table, and a linear that is only read."""

    def __init__(self, recurrent=nn.LSTM, **kwargs):
        super().__init__()
        ways = 2 if kwargs.get("bidirectional") else 1
        out = ways * (kwargs.get("proj_size") or 24)
        self.bag = nn.EmbeddingBag(40, 16)
        self.table = nn.Parameter(0.1 * torch.randn(1, 6, 16))
        self.recurrent = recurrent(16, 24, batch_first=True, **kwargs)
        self.read = nn.Linear(out, 20)
        self.last = nn.Linear(20, 5)

    def forward(self, places):
        x = self.bag(places.reshape(-1, 1)).view(*places.shape, 16) + self.table
        x = F.linear(self.recurrent(x)[0], self.read.weight, self.read.bias)
        return self.last(x.relu().mean(1))


def _data():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(40, (16, 6), generator=generator) for _ in range(2)]


def _mixed(*args, **kwargs):
    torch.manual_seed(0)
    return settled(Mixed(*args, **kwargs))


@pytest.mark.parametrize(
    ("shape", "rows"),
    [
        ((96, 32), (96, 32)),
        ((1, 197, 192), (197, 192)),  # a table of places
        ((64, 16, 3, 3), (64, 144)),  # a conv
        ((96, 1, 3, 3), (96, 9)),  # a depthwise one
        ((169, 3), (1, 507)),  # a table of so few columns that they share a scale
        ((8, 64, 32), (512, 32)),  # experts
        ((20000,), (5, 4000)),
        ((1, 1, 300), (1, 300)),
        ((8209,), (1, 8209)),  # a prime number
    ],
)
def test_rows_are_what_belongs_together(shape, rows):
    assert rows_of(shape) == rows


@pytest.mark.parametrize(
    ("recurrent", "settings"),
    [
        (nn.LSTM, {"num_layers": 2, "bidirectional": True}),
        (nn.LSTM, {"proj_size": 12}),
        (nn.GRU, {"bidirectional": True}),
        (nn.RNN, {"nonlinearity": "relu"}),
    ],
)
def test_a_budget_reaches_every_weight_and_the_file_brings_it_back(recurrent, settings, tmp_path):
    model, data = _mixed(recurrent, **settings), _data()
    surveyed = rabbet.survey(model, data)
    assert sum(x.bytes for x in surveyed.left) < 0.15 * surveyed.float_bytes  # biases
    result = rabbet.compress(model, "bytes <= 30%", data, quality="fast")
    assert result.save(tmp_path / "a.safetensors") == result.cost.bytes
    again = rabbet.load(tmp_path / "a.safetensors", model)
    with torch.no_grad():
        for batch in data:
            assert torch.equal(again(batch), result.model(batch))
            wanted = model(batch)
            assert (again(batch) - wanted).norm() < 0.2 * wanted.norm()
    assert stored_weights(again).keys() == stored_weights(result.model).keys()


def test_the_network_computes_with_the_values_of_the_codes():
    model = _mixed()
    result = rabbet.fit(model, "recurrent.weight_hh_l0 dense@2c\nlast dense@8c", _data())
    values = result.model.recurrent.weight_hh_l0
    assert len(values[0].unique()) <= 4
    assert torch.equal(values, stored_weights(result.model)["recurrent.weight_hh_l0"].canonical)
    assert not torch.equal(values, model.recurrent.weight_hh_l0)


@pytest.mark.parametrize("recurrent", [nn.LSTM, nn.GRU])
def test_recurrent_weights_know_what_they_multiply(recurrent):
    """Second moments of the inputs, and of the states as the outputs of all steps tell them."""
    model, data = _mixed(recurrent, num_layers=2, bidirectional=True), _data()
    piece = Workpiece.of(model, Task(data), Jobs())
    found, x = piece.moments(), torch.cat(data)
    with torch.no_grad():
        x = model.bag(x.reshape(-1, 1)).view(*x.shape, 16) + model.table
        out = model.recurrent(x)[0]
    for name, rows in (
        ("recurrent.weight_ih_l0_reverse", x),
        ("recurrent.weight_hh_l1", out[..., :24]),
        ("recurrent.weight_hh_l1_reverse", out[..., 24:]),
        ("read.weight", out),
    ):
        flat = rows.reshape(-1, rows.shape[-1])
        assert torch.allclose(found[name][0], flat.T @ flat / len(flat), atol=1e-5), name
    assert "table" not in found
    assert "bag.words" not in found


def test_rounding_in_the_metric_of_the_states_is_better(monkeypatch):
    model, data = _mixed(nn.GRU, bidirectional=True), _data()
    plan = "\n".join(
        f"recurrent.weight_{part}_l0{way} dense@3c"
        for part in ("ih", "hh")
        for way in ("", "_reverse")
    )
    errors = []
    for known in (True, False):
        if not known:
            monkeypatch.setattr(moments, "recurrent", lambda *_: ())
        network = rabbet.fit(model, plan, data, quality="fast").model
        with torch.no_grad():
            errors.append(sum((network(b) - model(b)).square().sum() for b in data))
    assert errors[0] < 0.9 * errors[1]


def test_scores_of_stored_weights_are_about_what_a_change_does():
    model, data = _mixed(nn.GRU), [*_data(), *_data()]
    piece = Workpiece.of(model, Task(data), Jobs())
    site = piece.survey["recurrent.weight_hh_l0"]
    weight = piece.weight(site)
    changes = torch.stack([1e-3 * rand(*weight.shape, seed=k) for k in range(8)])
    scores = output_errors(piece, {site.name: changes})[site.name]
    true = []
    with torch.no_grad():
        before = [piece.model(b) for b in data]
        spread = torch.cat(before).var(0, correction=0)
        for change in changes:
            piece.model.recurrent.weight_hh_l0.add_(change)
            after = [piece.model(b) for b in data]
            piece.model.recurrent.weight_hh_l0.sub_(change)
            moved = torch.cat(after) - torch.cat(before)
            true.append((moved.square() / spread).mean())
    assert 0.4 < float(scores.sum() / torch.stack(true).sum()) < 2.5
    assert not piece.model.recurrent.weight_hh_l0.requires_grad


def test_what_is_small_or_not_finite_or_only_a_mask_stays():
    class Holds(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mask", torch.ones(80, 80).tril())
            self.register_buffer("far", torch.full((80, 80), float("-inf")).triu(1))
            self.register_buffer("waves", torch.randn(80, 80).sin())
            self.register_buffer("unused", torch.randn(80, 80))
            self.gain = nn.Parameter(torch.ones(80))
            self.last = nn.Linear(80, 80)

        def forward(self, x):
            return self.last(x @ (self.mask * self.waves) + (x @ self.mask).softmax(1)) * self.gain

    surveyed = rabbet.survey(settled(Holds()), [rand(4, 80)])
    assert [site.name for site in surveyed] == ["last", "waves"]
    assert "few different values" in surveyed.left[0].reason


def test_gates_leave_stored_weights_at_8_bits_within_the_budget(tmp_path):
    model, data = _mixed(nn.GRU), _data()
    method = CGMQ(epochs=1, finish=1, steps=2)
    result = rabbet.compress(model, "bops <= 5%, bytes <= 40%", data, method)
    stored = [line for line in result.plan if not result.survey[line.name].runs]
    assert {line.terms[0].grid.bits for line in stored} == {8}
    result.save(tmp_path / "a.safetensors")
    again = rabbet.load(tmp_path / "a.safetensors", model)
    assert torch.equal(again(data[0]), result.model(data[0]))


def test_an_act_for_a_stored_weight_is_refused():
    with pytest.raises(rabbet.RabbetError, match="its input cannot be quantised"):
        rabbet.fit(_mixed(), "recurrent.weight_hh_l0 dense@4c | act@8", _data())


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("padding", [None, 0])
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_a_bag_of_embeddings_is_a_table_that_answers_the_same(mode, padding, last):
    bag = nn.EmbeddingBag(20, 6, mode=mode, padding_idx=padding, include_last_offset=last)
    table = bags_opened(nn.ModuleList([bag, bag]))[1]
    assert isinstance(table.words, nn.Embedding)
    assert table.words.weight is bag.weight
    items, starts = torch.randint(20, (5, 7)), torch.tensor([0, 3, 3, 9, *([13] if last else [])])
    items[3] = 0  # an empty bag, if this is the padding
    flat = torch.randint(20, (13,))
    for given in ((items,), (flat, starts)):
        weights = [None, torch.rand(given[0].shape)] if mode == "sum" else [None]
        for w in weights:
            assert torch.allclose(
                table(*given, per_sample_weights=w), bag(*given, per_sample_weights=w)
            )


def test_a_bag_is_compressed_as_a_table_and_read_again(tmp_path):
    torch.manual_seed(0)
    model = settled(nn.Sequential(nn.EmbeddingBag(60, 16), nn.Linear(16, 4)))
    data = [torch.randint(60, (8, 5)) for _ in range(2)]
    survey = rabbet.survey(model, data)
    assert survey["0.words"].kind.name == "embedding"
    result = rabbet.fit(model, "0.words dense@4c\n1 dense@8c | act@8", data, QUALITY["fast"])
    result.save(tmp_path / "a.safetensors")
    again = rabbet.load(tmp_path / "a.safetensors", model)
    assert torch.equal(again(data[0]), result.model(data[0]))


def test_a_bag_that_rewrites_its_table_stays_as_it_is():
    bag = nn.EmbeddingBag(20, 6, max_norm=1.0)
    assert bags_opened(bag) is bag
