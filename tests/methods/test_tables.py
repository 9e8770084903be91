"""An embedding table that is also the weight of a classifier: one site, two uses."""

import pytest
import torch
import torch.nn.functional as F
from networks import OneTable, lasting, network, rand, settled, thinned, tokens
from torch import nn

import rabbet
from rabbet import CGMQ, TTQAT, CoRa, Joint, Task, survey
from rabbet.errors import FileError, PlanError
from rabbet.grids.grid import Grid
from rabbet.methods.ttqat import Choices, Distillation
from rabbet.model.compressed import Factor
from rabbet.runtime.session import Session
from rabbet.train.qat import Latent
from rabbet.train.tuning import Tuning
from rabbet.workpiece import Workpiece

EXACT = Joint(grids=("8c",), adapters=(), forms=(), act=None, tuning=Tuning(steps=0))


def error(answer, wanted):
    return ((answer - wanted).norm() / wanted.norm()).item()


class Tied(nn.Module):
    """A language model that scores the last token: its head is the table, with its own bias."""

    def __init__(self, heads=1, first=False):
        super().__init__()
        if first:  # a network may name the head before the table
            self.heads = nn.ModuleList(nn.Linear(12, 30) for _ in range(heads))
        self.table = nn.Embedding(30, 12)
        self.body = nn.Linear(12, 12)
        if not first:
            self.heads = nn.ModuleList(nn.Linear(12, 30) for _ in range(heads))
        for head in self.heads:
            head.weight = self.table.weight

    def forward(self, x):
        y = F.relu(self.body(self.table(x)))[:, -1]
        return sum(head(y) for head in self.heads)


TABLES = ("dense@8c | act@8", "dense@4 | act@6", "dense@8", "ttm[9]@8c", "ttm[9]@8 | act@8",
          "dense@4c + dense@4 | act@8", "dense[0-9]@4c + dense[10-29]@8c | act@8")  # fmt: skip


@pytest.mark.parametrize("line", thinned(TABLES, 2))
@pytest.mark.parametrize(("heads", "first"), [(1, False), (1, True), (2, False)])
def test_heads_that_share_a_table_run_with_it_and_it_is_stored_once(
    line, heads, first, tmp_path, kernels_are_exact
):
    model = settled(Tied(heads, first))
    batches = tokens(30)
    site = survey(model, batches)["table"]
    names = tuple(f"heads.{k}" for k in range(heads))
    assert (site.heads, site.head_positions, site.macs) == (names, heads, heads * 30 * 12)
    plan = rabbet.Plan.parse(f"table {line}\nbody dense@8c | act@8")
    result = rabbet.fit(model, plan, batches, EXACT)
    times = 2 if "+ dense@4 " in line else 1  # two terms over all rows are two products
    assert result.cost.macs == (7 * 12 + times * heads * 30) * 12
    assert error(result.model(batches[0]), model(batches[0])) < 0.2
    weight = result.model.table.weight
    assert all(torch.equal(head.weight, weight) for head in result.model.heads)
    with torch.no_grad():
        hidden = F.relu(result.model.body(F.embedding(batches[0], weight)))[:, -1]
        act = result.model.table.quantisers
        hidden = act[0](hidden) if act else hidden
        wanted = sum(F.linear(hidden, weight, head.bias) for head in model.heads)
    assert torch.allclose(result.model(batches[0]), wanted, atol=1e-5)
    assert result.save(tmp_path / "a") == result.cost.bytes
    again = rabbet.load(tmp_path / "a", model)
    assert torch.equal(again(batches[0]), result.model(batches[0]))
    assert again.state_dict().keys() == result.model.state_dict().keys()
    written = result.export(tmp_path / "a.onnx")
    answer = Session(tmp_path / "a.onnx")(batches[1])
    assert error(answer, result.model(batches[1])) < (0.02 if kernels_are_exact else 0.2)
    assert len(lasting(written.notes)) == (0 if "act" in line else 1)
    assert not any("unknown" in note for note in written.notes)


def test_a_table_is_stored_once_in_a_file_for_a_runtime(tmp_path):
    model = settled(Tied())
    model.table = nn.Embedding(3000, 12)
    model.heads[0] = nn.Linear(12, 3000, bias=False)
    model.heads[0].weight = model.table.weight
    model = settled(model)
    for grid, least in (("8", 36_000), ("4", 18_000), ("3", 13_500), ("t", 7_200)):
        plan = rabbet.Plan.parse(f"table dense@{grid} | act@8")
        result = rabbet.fit(model, plan, tokens(3000), EXACT)
        written = result.export(tmp_path / "a.onnx")
        assert least < written.bytes < least + 6_000


def test_a_table_is_solved_for_both_of_its_uses():
    model = settled(Tied())
    data = tokens(30, count=64)
    second = Workpiece.of(model, Task(data), rabbet.Jobs()).moments()["table"][0]
    table = model.table.weight
    with torch.no_grad():
        x = torch.cat([F.relu(model.body(model.table(b)))[:, -1] for b in data])
        change = 0.1 * rand(30, 12)
        apart = [
            (x @ w.T).square().sum() / (x @ table.T).square().sum() for w in (change, 2 * change)
        ]
        rows = [w.square().sum() / table.square().sum() for w in (change, 2 * change)]
        energies = [((w @ second) * w).sum() for w in (change, 2 * change)]
        unit = ((table @ second) * table).sum() / 2
    for k in range(2):
        assert float(energies[k] / unit) == pytest.approx(float(apart[k] + rows[k]), rel=1e-4)


@pytest.mark.parametrize(
    "why", ["a head that never runs", "a hook on another look-up", "a head of two names", "a hook"]
)
def test_a_table_whose_head_cannot_be_replaced_is_only_stored(why):
    model = settled(Tied())
    if why == "a head that never runs":
        model.spare = nn.Linear(12, 30)
        model.spare.weight = model.table.weight
    elif why == "a hook on another look-up":
        model.body = nn.Sequential(model.body, Second(model.table.weight))
        model.body[1].table.register_forward_hook(lambda *_: None)
    elif why == "a head of two names":
        model.again = model.heads[0]
    else:
        model.heads[0].register_forward_hook(lambda *_: None)
    surveyed = survey(model, tokens(30))
    assert [s.name for s in surveyed] == ["body.0" if "another" in why else "body", "table.weight"]
    result = rabbet.fit(model, "table.weight dense@8c", tokens(30), EXACT)
    assert result.model.table.weight is result.model.heads[0].weight
    assert error(result.model(tokens(30)[0]), model(tokens(30)[0])) < 0.05


def test_look_ups_that_share_a_table_are_one_layer_with_its_head(tmp_path):
    case = network("tables")
    surveyed = survey(case.model, case.batches)
    assert not surveyed.left  # nor is a second table kept
    table = surveyed["shared"]
    assert (table.tied, table.heads, table.calls) == (("encode", "decode"), ("head",), 2)
    result = rabbet.fit(case.model, "shared dense@4c | act@8", case.batches, EXACT)
    assert result.model.encode is result.model.decode is result.model.shared
    result.save(tmp_path / "a.safetensors")
    apart = settled(OneTable())
    apart.decode.weight = nn.Parameter(apart.decode.weight.detach().clone())
    with pytest.raises(FileError, match="'shared' is not the same layer as 'encode', 'decode'"):
        rabbet.load(tmp_path / "a.safetensors", apart)


class Offset(nn.Embedding):
    """A table with a forward of its own."""

    def forward(self, x):
        return super().forward((x + 1) % 20)


def _other(padding=None, kind=nn.Embedding):
    model = settled(OneTable())
    weight = model.shared.weight
    model.decode = kind(20, 12, padding_idx=padding)
    model.decode.weight = weight
    return model


@pytest.mark.parametrize(
    "model", [_other(padding=1), _other(kind=Offset)], ids=["padding", "forward"]
)
def test_look_ups_that_differ_are_left_alone_and_the_file_is_read_again(model, tmp_path):
    surveyed = survey(model, tokens())
    assert [s.name for s in surveyed] == ["body"]
    assert "shared with" in {x.name: x.reason for x in surveyed.left}["shared"]
    result = rabbet.fit(model, "body dense@8c | act@8", tokens(), EXACT)
    assert type(result.model.decode) is type(model.decode)
    assert result.model.decode.padding_idx == model.decode.padding_idx
    result.save(tmp_path / "a.safetensors")
    again, x = rabbet.load(tmp_path / "a.safetensors", model), tokens()[0]
    assert torch.equal(again(x), result.model(x))


def test_a_look_up_that_did_not_run_at_first_may_be_given_its_input_by_name():
    class Late(OneTable):
        def forward(self, x, more=None):
            scores = self.head(F.relu(self.body(self.encode(x))))
            return scores if more is None else scores + self.decode(input=more).mean()

    model, x = settled(Late()), tokens()[0]
    result = rabbet.fit(model, "shared dense@8c | act@8", [x], EXACT)
    assert error(result.model(x, x), model(x, x)) < 0.05


class Second(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.table = nn.Embedding(*weight.shape, _weight=weight)
        self.table.weight = weight

    def forward(self, x):
        return x + self.table(torch.zeros(1, dtype=torch.long))


METHODS = {
    "joint": (Joint(tuning=Tuning(steps=2)), "bytes <= 60%"),
    "cora": (CoRa(), "bytes <= 62%"),
    "cgmq": (CGMQ(epochs=1, finish=1), "bops <= 2%"),
    "ttqat": (
        TTQAT(
            rank=None,
            table_rank=None,
            choices=Choices(ranks=(2, 4)),
            epochs=1,
            finish=1,
            distil=Distillation(blocks=("body",)),
        ),
        "bytes <= 60%",
    ),
}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_keeps_its_budget_on_a_shared_table(name, tmp_path):
    method, budget = METHODS[name]
    model = settled(Tied())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    result = rabbet.compress(model, budget, tokens(30, batches=3), method)
    assert {line.name for line in result.plan} == {"table", "body"}
    rabbet.Budget.parse(budget).check(result.cost, result.float_cost)
    assert (result.plan["table"].act is None) == (name == "ttqat")
    assert result.save(tmp_path / "a") == result.cost.bytes
    assert torch.equal(
        rabbet.load(tmp_path / "a", model)(tokens(30)[0]), result.model(tokens(30)[0])
    )
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_file_of_a_shared_table_is_refused_by_a_network_that_does_not_share_it(tmp_path):
    model = settled(Tied())
    rabbet.compress(model, "bits <= 8.5", tokens(30), EXACT).save(tmp_path / "a")
    apart = settled(Tied())
    apart.heads[0].weight = nn.Parameter(apart.table.weight.detach().clone())
    with pytest.raises(FileError, match=r"'heads.0' does not share the table of 'table'"):
        rabbet.load(tmp_path / "a", apart)


def test_rows_of_a_shared_table_are_paid_for_where_they_multiply():
    model = settled(Tied())
    data = tokens(30)
    plan = rabbet.Plan.parse("table dense@4c | act@8\nbody dense@8c | act@8")
    cost = rabbet.price(model, plan, data)
    assert cost.bops == 30 * 12 * 4 * 8 + 7 * 12 * 12 * 8 * 8
    apart = settled(Tied())
    apart.heads[0].weight = nn.Parameter(apart.table.weight.detach().clone())
    with pytest.raises(PlanError, match="an index and cannot be quantised"):
        rabbet.price(apart, plan, data)


@pytest.mark.parametrize("grid", ["8c", "2hc", "1c", "tc"])
@pytest.mark.parametrize("trains", [False, True])
def test_rows_that_are_looked_up_are_those_of_the_whole_table_and_learn_alike(grid, trains):
    latent = Latent(rand(20, 6), Grid.parse(grid))
    latent.move_to_grid()
    factor = latent if trains else Factor(latent.numbers)
    learnt = [latent.value, latent.scale] if trains else []
    places, weights = torch.randint(0, 9, (4, 5)), rand(4, 5, 6)
    results, grads = [], []
    for look_up in (factor.lookup, lambda x: F.embedding(x, factor())):
        for p in learnt:
            p.requires_grad_()
            p.grad = None
        with torch.enable_grad():
            rows = look_up(places)
            if trains:
                (rows * weights).sum().backward()
        results.append(rows.detach())
        grads.append([p.grad.clone() for p in learnt])
    assert torch.equal(*results)
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("place", [-1, 30])
def test_a_word_that_is_not_in_the_table_is_an_error(place):
    model = settled(Tied())
    result = rabbet.fit(
        model, rabbet.Plan.parse("table dense@8c\nbody dense@8c"), tokens(30), EXACT
    )
    with pytest.raises(IndexError, match="out of range"):
        result.model(torch.full((2, 7), place))
