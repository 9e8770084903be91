"""A plan costs what its file and its arithmetic cost; budgets are exact to the last digit."""

import json
from collections import Counter
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import NETWORKS, network
from torch.utils.flop_counter import FlopCounterMode

from rabbet.core.budget import METRICS, Budget
from rabbet.core.cost import Cost, float_cost, layer_cost, plan_cost
from rabbet.core.layout import line_bytes
from rabbet.core.plan import LayerPlan, Plan, Term
from rabbet.data.task import Task
from rabbet.errors import BudgetError
from rabbet.export.base import Parcel
from rabbet.export.writing import write_native
from rabbet.forms import FORMS, RANKED, Dense
from rabbet.grids.grid import Grid
from rabbet.grids.pack import packed_bytes
from rabbet.jobs import Jobs
from rabbet.layers import Site
from rabbet.layers.conv import Conv
from rabbet.layers.linear import Linear
from rabbet.model.build import build, plan_of
from rabbet.model.compressed import ActQuant, compressed_layers
from rabbet.model.hooks import hooked
from rabbet.model.inspect import inspect_network
from rabbet.model.prepare import prepared
from rabbet.workpiece import Workpiece

PIECES = {
    name: Workpiece.of(network(name).model, Task(network(name).batches), Jobs())
    for name in NETWORKS
}


def _terms(draw, site):
    full = {n: f(*[1] * (n in RANKED)).full_rank(site) for n, f in FORMS.items()}
    fitting = [name for name in FORMS if full[name]]
    bodies, layouts = ["1", "t", "2h", "3", "4", "5", "8"], ["", "c", "c1", "g4", "g7z"]
    integers = st.builds("{}{}".format, st.sampled_from(bodies), st.sampled_from(layouts))
    terms = []
    for _ in range(draw(st.integers(1, 3))):
        form = draw(st.sampled_from(fitting))
        grid = Grid.parse(draw(integers | st.sampled_from(["f32", "f16", "bf16"])))
        rank = [draw(st.integers(1, full[form]))] if form in RANKED else []
        terms.append(Term(FORMS[form](*rank), grid))
    return tuple(terms)


@st.composite
def _plans(draw, sites):
    chosen = [s for s in sites if draw(st.booleans())] or [sites[0]]
    acts = st.none() | st.integers(2, 8)
    return Plan(
        tuple(
            LayerPlan(s.name, _terms(draw, s), draw(acts) if s.multiplies else None) for s in chosen
        )
    )


@pytest.mark.parametrize("name", NETWORKS)
@settings(max_examples=6)
@given(data=st.data())
def test_predicted_bytes_are_those_of_the_file(name, data, tmp_path_factory):
    piece = PIECES[name]
    plan = data.draw(_plans(piece.survey.sites))
    student = build(piece.model, plan, piece.survey)
    for act in (m for m in student.modules() if isinstance(m, ActQuant)):
        act.set_range(torch.tensor(0.5), torch.tensor(1.0))
    path = tmp_path_factory.mktemp("bytes") / "file"
    written = write_native(
        Parcel(student, plan, piece.survey, piece.rest(plan), piece.task), path
    ).bytes
    assert piece.cost(plan).bytes == written == path.stat().st_size
    assert plan_of(student, piece.survey) == plan


@pytest.mark.parametrize("name", NETWORKS)
def test_entries_are_the_numbers_that_layers_take_and_give(name):
    piece = PIECES[name]
    batch = piece.task.read()[0]
    met = Counter()

    def counts(name):
        return lambda _, given, out: met.update({name: given[0].numel() + out.numel()})

    sites = {module: s for s in piece.survey if s.runs for module in (s.name, *s.heads)}
    with torch.no_grad(), hooked((piece.model.get_submodule(m), counts(m)) for m in sites):
        piece.task.run(piece.model, batch)
    found = Counter()
    for module, site in sites.items():
        found[site.name] += met[module]
    size = piece.task.examples.count(batch)
    assert found == {s.name: size * s.entries for s in piece.survey if s.runs}


@pytest.mark.parametrize("name", NETWORKS)
@settings(max_examples=5)
@given(data=st.data())
def test_predicted_macs_are_those_that_a_counter_sees(name, data):
    piece = PIECES[name]
    batch = piece.task.read()[0]
    plan = data.draw(_plans(piece.survey.sites))
    plan = Plan(tuple(LayerPlan(line.name, line.terms) for line in plan))
    count = len(next(iter(batch.values()))) if isinstance(batch, dict) else len(batch)
    built = build(piece.model, plan, piece.survey)
    before, after = (
        _counted(piece, piece.model, batch),
        _counted(piece, built, batch) - _putting_together(built),
    )
    # products outside of sites (attention's own) are counted by torch and not by rabbet: they are
    # the same on both sides
    assert after - before == 2 * count * (piece.cost(plan).macs - piece.float_cost.macs)


def _putting_together(model):
    """What it takes to contract cores, once per call, whatever the batch."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        for layer in compressed_layers(model).values():
            for form, factors in zip(layer.forms, layer.factors, strict=True):
                calls = layer.site.calls + len(layer.site.heads)
                for _ in range(calls if form.contracted else 0):
                    form.for_runtime(layer.site, [f() for f in factors])
    return counter.get_total_flops()


def _counted(piece, model, batch):
    fast = torch.backends.mha.get_fastpath_enabled()
    # a fused call hides its products from the counter
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            piece.task.run(model, batch)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return counter.get_total_flops()


SITE = Site("a.b", Conv(2), (8, 6, 3, 3), (1, 1), (1,) * 4, "zeros", (1, 1), 1, True, 49, 49)


def test_scales_and_zero_points_of_groups_are_in_bpw_and_not_in_bits():
    site = Site("a", Linear(), (8, 128))
    for line, bpw in (("dense@4g64", 4.25), ("dense@4g64z", 4.3125), ("dense@4c", 4.125)):
        cost = layer_cost(site, LayerPlan.parse(f"a {line}"))
        assert METRICS["bits"].amount(cost) == 4 * 8 * 128
        assert METRICS["bpw"].amount(cost) == bpw * 8 * 128


def test_bit_operations_are_macs_times_bits_of_weight_and_input():
    macs = 8 * 6 * 9 * 49
    assert layer_cost(SITE, LayerPlan.parse("a.b dense@3c | act@5")).bops == macs * 3 * 5
    assert layer_cost(SITE, LayerPlan.parse("a.b dense@3c")).bops == macs * 3 * 32
    assert layer_cost(SITE, LayerPlan.parse("a.b dense@tc | act@8")).bops == macs * 2 * 8
    assert layer_cost(SITE, LayerPlan.parse("a.b dense@1c | act@8")).bops == macs * 8
    with_adapter = layer_cost(SITE, LayerPlan.parse("a.b dense@2c + lowrank[3]@8c | act@4"))
    inner, outer = 3 * 54 * 49, 3 * 8 * 49
    assert with_adapter.macs == macs + inner + outer
    # there are 8 bits between factors
    assert with_adapter.bops == macs * 2 * 4 + inner * 8 * 4 + outer * 8 * 8


def test_the_bytes_of_a_layer_are_its_numbers_and_its_line():
    layer = LayerPlan.parse("a.b dense@3c + lowrank[3]@tc | act@8")
    codes = packed_bytes(8 * 54, 8) + packed_bytes(3 * 54, 3) + packed_bytes(8 * 3, 3)
    scales, bias, acts = 2 * (8 + 3 + 8), 4 * 8, 2 * 5
    assert layer_cost(SITE, layer).bytes == codes + scales + bias + acts + line_bytes(layer)
    assert layer_cost(SITE, layer).code_bits == 8 * codes


@given(st.text(max_size=8))
def test_a_line_takes_the_bytes_that_it_is_said_to_take(name):
    one = LayerPlan(name, (Term(Dense(), Grid.parse("4c")),), 8)
    other = LayerPlan(name + "x", (Term(Dense(), Grid.parse("4c")),), 8)
    both, alone = Plan((one, other)), Plan((other,))
    assert len(json.dumps(both.compact)) - len(json.dumps(alone.compact)) == line_bytes(one)


def test_the_cost_of_the_float_network_is_four_bytes_an_entry_and_32_bits_a_side():
    piece = PIECES["single"]
    assert float_cost(piece.survey) == Cost(4 * (60 + 6), 60, 60 * 1024, 60 * 32, 60)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_layer_without_a_line_costs_what_it_did(name):
    piece = PIECES[name]
    for site in piece.survey:
        plan = Plan((LayerPlan(site.name, (Term(Dense(), Grid.parse("4c")),)),))
        cost, whole = piece.cost(plan), piece.float_cost
        assert cost.macs == whole.macs
        assert whole.bops - cost.bops == site.macs * 32 * (32 - 4)
        assert whole.code_bits - cost.code_bits == 32 * site.numel - 8 * packed_bytes(
            site.numel, 16
        )
        assert cost.weights == whole.weights


def _has_bias(model, name):
    return getattr(model.get_submodule(name), "bias", None) is not None


@pytest.mark.parametrize("name", NETWORKS)
def test_every_tensor_is_in_the_bytes(name):
    """What is covered, folded and left alone adds up to every stored tensor."""
    model, _ = prepared(network(name).model, Task(network(name).batches))
    surveyed = inspect_network(model, network(name).batches[0])
    state = {id(t): t for t in model.state_dict(keep_vars=True).values()}
    sites = sum(
        4 * (s.numel + (s.runs and _has_bias(model, s.name)) * s.shape[0]) for s in surveyed
    )
    norms = [model.get_submodule(s.norm) for s in surveyed if s.norm]
    folded = sum(t.numel() * t.element_size() for m in norms for t in m.state_dict().values())
    left = sum(x.bytes for x in surveyed.left)
    assert (
        sites + folded + left
        == sum(t.numel() * t.element_size() for t in state.values())
        == surveyed.float_bytes
    )
    assert all(x.reason for x in surveyed.left)


def test_costs_add_up():
    a, b = Cost(1, 2, 3, 4, 5), Cost(10, 20, 30, 40, 50)
    assert a + b == Cost(11, 22, 33, 44, 55)
    assert (a + b).bits == 44 / 55
    assert Cost().bits == 0


WHOLE = Cost(bytes=1000, macs=2000, bops=3_000_000, code_bits=3200, weights=100)


@pytest.mark.parametrize(
    ("text", "metric", "amount"),
    [
        ("bytes <= 120", "bytes", 120),
        ("bytes <= 120 B", "bytes", 120),
        ("bytes <= 1.5 kB", "bytes", 1500),
        ("bytes<=1.5KIB", "bytes", 1536),
        ("bytes <= 2 MB", "bytes", 2_000_000),
        ("bytes ≤ 2 MiB", "bytes", 2 * 2**20),
        ("BYTES <= 3GB", "bytes", 3_000_000_000),
        ("bytes <= 0.5 GiB", "bytes", 2**29),
        ("bytes <= 10%", "bytes", 100),
        ("bytes <= 0.19 %", "bytes", 1),
        ("bytes <= 29%", "bytes", 290),
        ("bytes <= 7%", "bytes", 70),
        ("bytes <= 57%", "bytes", 570),
        ("bytes <= 1_000", "bytes", 1000),
        ("bytes <= .5 kB", "bytes", 500),
        ("macs <= 60%", "macs", 1200),
        ("macs <= 1.5 k", "macs", 1500),
        ("macs <= 2M", "macs", 2_000_000),
        ("bops <= 0.1%", "bops", 3000),
        ("bops <= 1.2G", "bops", 1_200_000_000),
        ("bops <= 1.2T", "bops", 1_200_000_000_000),
        ("bits <= 4", "bits", 400),
        ("bits <= 2.33", "bits", 233),
        ("bits <= 2.339", "bits", 233),
        ("bits <= 10%", "bits", 320),
    ],
)
def test_a_limit_allows_exactly_what_it_says(text, metric, amount):
    (limit,) = Budget.parse(text).limits
    assert limit.metric == metric
    assert limit.text == text
    assert limit.amount(WHOLE) == amount


FIELDS = {"bits": "code_bits", "bpw": "code_bits", "latency": "time"}


@given(st.sampled_from(list(METRICS)), st.integers(1, 10**15))
def test_a_budget_has_no_tolerance(metric, amount):
    whole = Cost(weights=7, time=1, onnx=1, openvino=1)
    unit, step = ("us", 1000) if metric == "latency" else ("", 1)
    budget = Budget.parse(f"{metric} <= {amount} {unit}")
    field = FIELDS.get(metric, metric)
    most = amount * (whole.weights if metric in ("bits", "bpw") else step)
    budget.check(Cost(**{field: most}), whole)
    with pytest.raises(BudgetError):
        budget.check(Cost(**{field: most + 1}), whole)


@pytest.mark.parametrize("text", ["latency <= 5 ms", "onnx <= 5 MB", "openvino <= 5%"])
def test_what_nobody_measured_is_not_zero(text):
    with pytest.raises(BudgetError, match="measured by `compress` and `plan` only"):
        Budget.parse(text).check(Cost(bytes=3), WHOLE)


def test_bytes_of_a_file_for_a_runtime_are_a_limit_of_that_file():
    budget = Budget.parse("bytes <= 10%, macs <= 1k")
    assert str(budget.shipped("onnx")) == "onnx <= 10%, macs <= 1k"
    assert str(Budget.parse("2 MB").shipped("openvino")) == "openvino <= 2 MB"
    assert budget.shipped(None) == budget.shipped("safetensors") == budget
    assert Budget.parse("bits <= 3").shipped("torch") == Budget.parse("bits <= 3")
    with pytest.raises(BudgetError, match="there are safetensors, onnx, openvino"):
        budget.shipped("torch")
    with pytest.raises(BudgetError, match="limits onnx twice"):
        Budget.parse("bytes <= 10%, onnx <= 9%").shipped("onnx")


@given(st.decimals(0, 200, places=3).filter(lambda d: d > 0), st.integers(1, 10**12))
def test_a_share_is_taken_exactly(percent, whole):
    limit = Budget.parse(f"bytes <= {percent}%").limits[0]
    assert limit.amount(Cost(bytes=whole)) == Fraction(percent) / 100 * whole // 1


def test_all_limits_hold_at_once():
    budget = Budget.parse("bytes <= 10%, bits <= 3")
    budget.check(Cost(bytes=100, code_bits=300, weights=100), WHOLE)
    for cost in (Cost(bytes=101, code_bits=300), Cost(bytes=100, code_bits=301)):
        with pytest.raises(BudgetError):
            budget.check(cost, WHOLE)


def test_a_broken_budget_says_what_was_allowed_and_what_was_found():
    with pytest.raises(
        BudgetError, match=r"'bytes <= 10%' allows 100 bytes, the network has 1,234"
    ):
        Budget.parse("bytes <= 10%").check(Cost(bytes=1234), WHOLE)
    with pytest.raises(BudgetError, match=r"allows 3\.000 bits, the network has 3\.200"):
        Budget.parse("bits <= 3").check(Cost(code_bits=320), WHOLE)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "''"),
        ("bytes", "'bytes'"),
        ("bytes > 10", "bytes > 10"),
        ("bytes >= 10", "bytes >= 10"),
        ("bytes <= ", "bytes <="),
        ("bytes <= ten", "ten"),
        ("bytes <= -1", "-1"),
        ("bytes <= 0", "larger than zero"),
        ("bytes <= 0.0%", "larger than zero"),
        ("bytes <= nan", "nan"),
        ("bytes <= 1e6", "e"),
        ("bytes <= 10 kbit", "unknown unit 'kbit'"),
        ("macs <= 10 kB", "unknown unit 'kb'"),
        ("bits <= 4 k", "unknown unit 'k'"),
        ("energy <= 4", "unknown quantity 'energy'"),
        ("bytes <= 10%, ", "''"),
        ("bytes <= 10% macs <= 5%", "bytes <= 10% macs <= 5%"),
        ("10%", "10%"),
        ("bytes <= 10,5 kB", "10,5"),
        ("bytes <= 1000,000", "1000,000"),
    ],
)
def test_what_is_not_a_budget_is_refused_in_its_own_words(text, word):
    with pytest.raises(BudgetError) as caught:
        Budget.parse(text)
    assert word in str(caught.value)


@pytest.mark.parametrize("wrong", [None, 10, 0.1, ["bytes <= 10%"], b"bytes <= 10%"])
def test_a_budget_that_is_not_text_is_refused(wrong):
    with pytest.raises(BudgetError, match=type(wrong).__name__):
        Budget.parse(wrong)


def test_an_unknown_quantity_or_unit_is_answered_with_the_known_ones():
    with pytest.raises(BudgetError) as caught:
        Budget.parse("size <= 10%")
    assert all(metric in str(caught.value) for metric in METRICS)
    with pytest.raises(BudgetError, match="kib"):
        Budget.parse("bytes <= 10 kilobytes")


def test_numbers_may_be_written_as_they_are_shown():
    budget = Budget.parse("bytes <= 10,000,macs <= 1,500 k")
    assert [limit.value for limit in budget.limits] == [10_000, 1_500_000]


def test_a_budget_is_read_once_and_written_as_it_was():
    budget = Budget.parse("bytes <= 10%, macs <= 1.5 M")
    assert Budget.parse(budget) is budget
    assert str(budget) == "bytes <= 10%, macs <= 1.5 M"
    assert Budget.parse(str(budget)) == budget


def test_a_plan_of_every_network_costs_less_than_the_network():
    for piece in PIECES.values():
        plan = Plan(
            tuple(LayerPlan(s.name, (Term(Dense(), Grid.parse("4c")),)) for s in piece.survey)
        )
        cost = plan_cost(piece.survey, plan, piece.rest(plan))
        assert cost.bops < piece.float_cost.bops or not piece.float_cost.macs
        assert cost.bits < 5
