"""Weights that are no layer's of a known kind: stored small, float when they are used."""

import pytest
import torch
import torch.nn.functional as F
from networks import rand, settled
from torch import nn
from torch.nn.utils import parametrize

import rabbet
from rabbet import CGMQ, TTQAT, Jobs, Joint, Task, workpiece
from rabbet.calibrate import moments
from rabbet.choose.sensitivity import output_errors
from rabbet.errors import ModelError
from rabbet.layers.stored import rows_of
from rabbet.methods import QUALITY
from rabbet.model.bags import bags_opened
from rabbet.model.compressed import stored_weights
from rabbet.train.distil import Distillation
from rabbet.train.tuning import Tuning
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


def _quick(model, data, plan="", **settings):
    method = Joint(rank=False, tuning=Tuning(steps=settings.get("steps", 0), batch=8))
    if plan:
        return rabbet.fit(model, plan, data, method, jobs=settings.get("jobs"))
    return rabbet.compress(model, settings.get("budget", "bits <= 5"), data, method)


class Sum(nn.Module):
    """A linear beside a bare matrix, which may be a buffer."""

    def __init__(self, buffer):
        super().__init__()
        self.l = nn.Linear(64, 64)
        value = torch.randn(64, 64)
        self.register_buffer("w", value) if buffer else setattr(self, "w", nn.Parameter(value))

    def forward(self, x):
        return self.l(x) + F.linear(0.01 * x, self.w)


def test_a_narrow_recurrent_layer_whose_rows_are_folded_is_rounded_for_itself():
    model = settled(nn.LSTM(3, 200, batch_first=True))
    task = Task([rand(4, 5, 3)], lambda m, x: m(x)[0])
    assert _quick(model, task).plan["weight_ih_l0"].terms
    assert set(Workpiece.of(model, task, Jobs()).moments()) == {"weight_hh_l0"}


class OwnLSTM(nn.LSTM):
    def __init__(self, n):
        super().__init__(n, n, batch_first=True)


def test_a_subclass_of_a_recurrent_layer_is_run_as_torchs():
    model = settled(nn.Sequential(OwnLSTM(20)))
    task = Task([rand(4, 5, 20)], lambda m, x: m(x)[0])
    assert set(Workpiece.of(model, task, Jobs()).moments()) == {"0.weight_ih_l0", "0.weight_hh_l0"}
    _quick(model, task)


def test_a_buffer_counts_as_the_parameter_that_it_might_be():
    harms, moments = [], []
    for buffer in (False, True):
        torch.manual_seed(0)
        model = Sum(buffer).eval()
        piece = Workpiece.of(model, Task([rand(16, 64)]), Jobs())
        moments.append(piece.moments()["w"])
        change = torch.full((1, 64, 64), 0.01)
        harms.append(output_errors(piece, {"w": change})["w"])
    assert torch.equal(*moments)
    assert torch.allclose(*harms)


def test_another_plan_of_stored_weights_is_other_work(tmp_path):
    torch.manual_seed(0)
    model, data = settled(Sum(False)), [rand(16, 64, seed=k) for k in range(3)]
    plans = [f"l dense@3c | act@8\nw dense@{bits}c" for bits in (2, 8)]
    kept = [
        _quick(model, data, plan, steps=4, jobs=Jobs(folder=tmp_path)).model.state_dict()
        for plan in plans
    ]
    fresh = _quick(model, data, plans[1], steps=4).model.state_dict()
    assert all(torch.equal(fresh[name], value) for name, value in kept[1].items())


def test_a_stored_weight_of_a_half_network_keeps_its_codes_while_others_are_taught(tmp_path):
    torch.manual_seed(0)
    model, data = settled(Sum(False)).bfloat16(), [rand(16, 64, seed=k) for k in range(3)]
    method = TTQAT(epochs=0, finish=1, distil=Distillation(blocks=("l",)))
    result = rabbet.fit(model, "l dense@4c | act@8\nw dense@4c", data, method)
    result.save(tmp_path / "a.safetensors")
    again = rabbet.load(tmp_path / "a.safetensors", model)
    with torch.no_grad():
        assert torch.equal(again(data[0]), result.model(data[0]))


def test_moments_that_no_layer_has_are_not_measured_again(monkeypatch):
    model = settled(nn.Sequential(nn.Embedding(40, 16), nn.Flatten()))
    piece = Workpiece.of(model, Task([torch.randint(40, (4, 3))]), Jobs())
    assert not piece.moments()
    monkeypatch.setattr(workpiece, "second_moments", None)
    assert not piece.moments()


def test_layers_that_share_a_stored_weight_read_one_in_the_file_of_a_runtime(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(96, 96), nn.Linear(96, 96)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(self.a(x).relu())

    torch.manual_seed(0)
    result = _quick(settled(Tied()), [rand(8, 96)])
    assert result.export(tmp_path / "a.onnx").bytes < 2 * result.cost.bytes + 2000


def test_a_parametrisation_that_draws_leaves_the_random_numbers_alone():
    class Noisy(nn.Module):
        def forward(self, w):
            return w + 0.1 * torch.rand_like(w)

    layer = nn.Linear(20, 20)
    parametrize.register_parametrization(layer, "weight", Noisy())
    model = nn.Sequential(layer, nn.Linear(20, 4)).eval()
    before = torch.random.get_rng_state()
    rabbet.survey(model, [rand(4, 20)])
    assert torch.equal(before, torch.random.get_rng_state())


def test_padding_of_a_bag_counts_for_nothing_whatever_it_holds():
    bag = nn.EmbeddingBag(20, 6, mode="sum", padding_idx=0)
    with torch.no_grad():
        bag.weight[0] = torch.inf
    items, starts = torch.tensor([3, 0, 5, 7, 0, 9, 2, 4, 1, 6]), torch.tensor([0, 4])
    with torch.no_grad():
        assert torch.allclose(bags_opened(bag)(items, starts), bag(items, starts))


class Kept(nn.Module):
    """A layer and a matrix, read from where `way` says."""

    def __init__(self, way):
        super().__init__()
        self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 4)
        self.p = nn.Parameter(torch.randn(32, 32) / 6)
        self.way, self.held = way, {"layer": [self.a], "weight": (self.a.weight, 1)}.get(way)
        if way == "matrix":
            self.held = {"p": self.p}
        if way == "buffer":
            self.register_buffer("w", self.a.weight, persistent=False)

    def forward(self, x):
        x = x @ self.p
        match self.way:
            case "layer":
                x = self.held[0](x)
            case "weight":
                x = F.linear(self.a(x), self.held[0])
            case "matrix":
                x = self.a(x) @ self.held["p"]
            case "buffer":
                x = F.linear(self.a(x), self.w)
            case _:
                x = self.a(x)
        return self.b(x.relu())


@pytest.mark.parametrize(
    ("way", "name"), [("layer", "a"), ("weight", "a"), ("buffer", "a"), ("matrix", ""), ("", None)]
)
def test_what_is_read_from_elsewhere_is_left_alone_and_said(way, name, tmp_path):
    torch.manual_seed(0)
    model, x = Kept(way).eval(), rand(8, 32)
    survey = rabbet.survey(model, [x])
    assert {s.name for s in survey} == {"a", "b", "p"} - {"p" if name == "" else name}
    assert name is None or "from a list" in {z.name: z.reason for z in survey.left}[name]
    _quick(model, [x]).save(tmp_path / "a.safetensors")


def test_a_closure_over_the_network_itself_is_refused():
    model = nn.LSTM(32, 16)
    model.forward = lambda x: nn.LSTM.forward(model, x)[0]
    with pytest.raises(ModelError, match="a copy of the network computes with bias_hh_l0"):
        _quick(model.eval(), [rand(3, 5, 32)])


def test_a_forward_that_writes_to_a_parameter_is_refused():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(8, 8)
            self.n = nn.Parameter(torch.zeros(()), requires_grad=False)

        def forward(self, x):
            self.n += 1
            return self.a(x) + self.n

    model = Counting().eval()
    with pytest.raises(ModelError, match="writes to the parameter 'n'"):
        _quick(model, [rand(4, 8)])
    assert float(model.n) == 0


def test_layers_that_are_opened_do_not_make_the_float_network_larger():
    a, b = nn.MultiheadAttention(32, 4), nn.MultiheadAttention(32, 4)
    b.in_proj_weight, b.out_proj.weight = a.in_proj_weight, a.out_proj.weight
    task = Task([rand(5, 2, 32)], lambda m, x: m[1](*[m[0](x, x, x)[0]] * 3)[0])
    model = nn.ModuleList([a, b]).eval()
    whole = 4 * sum(p.numel() for p in model.parameters())
    assert rabbet.survey(model, task).float_bytes == whole


def test_a_parametrised_buffer_stays_a_buffer():
    class Flipped(nn.Module):
        def forward(self, w):
            return w.flip(0)

    model = nn.Sequential(nn.Linear(8, 20), nn.Linear(20, 4))
    model[0].register_buffer("order", torch.arange(20))
    parametrize.register_parametrization(model[0], "order", Flipped())
    task = Task([rand(4, 8)], lambda m, x: m[1](m[0](x)[:, m[0].order]))
    assert {s.name for s in rabbet.survey(model.eval(), task)} == {"0", "1"}
