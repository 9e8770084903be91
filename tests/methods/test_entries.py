"""CGMQ with a gate for each entry of a weight: what it counts, what is stored, what decides."""

from dataclasses import replace

import pytest
import torch
from networks import network
from torch import nn

from rabbet import CGMQ, Budget, Jobs, Plan, Task, compress, fit, load
from rabbet.core.plan import LayerPlan, Term
from rabbet.errors import BudgetError, PlanError
from rabbet.forms import Dense
from rabbet.methods.cgmq.entries import Entries, counted
from rabbet.methods.cgmq.moving import MovingGates
from rabbet.model.compressed import compressed_layers
from rabbet.train.nested import NestedWeight, nest
from rabbet.workpiece import Workpiece

METHOD = CGMQ.paper(
    granularity="weight", counts="gates", epochs=4, finish=2, steps=4, batch=6, gates=3.0
)


def _piece(name="residual", **jobs):
    case = network(name)
    return Workpiece.of(case.model, Task.of(case.batches), Jobs(**jobs))


def _course(budget, **changed):
    piece, method = _piece(), replace(METHOD, **changed)
    lines = [method._line(k, s) for k, s in enumerate(piece.survey)]
    return MovingGates(method, piece, lines, Budget.parse(budget))


# Grids within grids


def test_grids_nest_where_a_step_is_a_whole_number_of_the_next():
    assert all(map(nest, [(2, 4, 8), (2, 4, 8, 16, 32), (3, 6), (2, 6), (2, 8, 32), (5,)]))
    assert not any(map(nest, [(2, 3), (3, 4), (2, 4, 6), (4, 6, 8), (2, 5, 8)]))


@pytest.mark.parametrize("axis", [None, 0])
@pytest.mark.parametrize("widths", [(2,), (2, 4), (2, 4, 8), (3, 6), (2, 4, 8, 16, 32)])
def test_what_is_stored_is_each_entry_on_the_grid_of_its_own_width(axis, widths):
    torch.manual_seed(0)
    weight = NestedWeight(torch.randn(6, 5, 3), axis, widths)
    weight.each.copy_(torch.tensor(widths)[torch.randint(len(widths), (6, 5, 3))])
    top = min(max(widths), 8)
    # A file rounds scales to bfloat16; of reaches for which that changes nothing it holds it all.
    scale = weight.scale_of(top).detach().bfloat16().float()
    weight.reach.copy_(scale * (2**top - 1) / 2)
    with torch.no_grad():
        shown = weight()
    numbers = weight.numbers_of(Term(Dense(), weight.grid_of(top)))
    grid, codes = numbers.grid, numbers.codes
    assert torch.equal(codes, codes.round())
    assert codes.min() >= grid.low
    assert codes.max() <= grid.high
    on_grid = weight.each <= 8
    assert torch.allclose(numbers.values[on_grid], shown[on_grid], rtol=1e-5, atol=1e-6)
    for bits in (b for b in widths if b <= 8):
        own = codes[weight.each == bits] * (2**bits - 1) / (2**top - 1)
        assert torch.equal(own, own.round())
        assert own.abs().max() <= 2 ** (bits - 1) - 1
    assert torch.equal(shown[~on_grid], weight.latent[~on_grid])


# What is counted


def test_entries_are_counted_each_at_its_own_width():
    course = _course("bops <= 2%")
    gates, piece = course.gates, course.piece
    assert isinstance(gates, Entries)
    generator = torch.Generator().manual_seed(0)
    gates.set_levels(torch.randint(3, (len(gates),), generator=generator))
    wanted = 0
    for name, layer in course.layers.items():
        site = piece.survey[name]
        wanted += site.macs // site.numel * int(layer.weight.each.sum()) * layer.act
    each = {name: layer.weight.each for name, layer in course.layers.items()}
    assert counted(piece, course.plan, each).bops == wanted
    assert gates._cost(gates._counts(gates.levels)).bops == wanted
    gates.stored = True
    assert gates._cost(gates._counts(gates.levels)).bops == piece.cost(course.plan).bops > wanted


def test_of_one_width_both_counts_are_the_same():
    course = _course("bops <= 2%")
    for level in range(3):
        course.gates.set_levels([level] * len(course.gates))
        each = {name: layer.weight.each for name, layer in course.layers.items()}
        assert counted(course.piece, course.plan, each) == course.piece.cost(course.plan)


@pytest.mark.parametrize("counts", ["gates", "stored"])
@pytest.mark.parametrize("budget", ["bops <= 0.4%", "bops <= 0.7%", "bops <= 1.4%"])
def test_landing_keeps_the_budget_by_lowering_what_harms_least(counts, budget):
    course = _course(budget, counts=counts)
    gates = course.gates
    generator = torch.Generator().manual_seed(0)
    gates.slopes = torch.rand(len(gates), generator=generator).double() + 0.1
    gates.land(1)
    assert gates.excess() <= 0
    if counts == "stored":
        assert course.piece.cost(course.plan).bops <= course.budget.limits[0].amount(
            course.piece.float_cost
        )
        return
    one = gates.spans[0].index
    order = gates.slopes[one].argsort()
    assert (gates.levels[one][order].diff() >= 0).all()  # who matters more has no fewer bits
    free = next((k for k, x in enumerate(gates.levels.tolist()) if x < 2), None)
    assert budget == "bops <= 0.4%" or free is not None


# What a user gets


class Halves(nn.Module):
    """One layer, of whose inputs the second half is fifty times smaller than the first."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(16, 8)

    def forward(self, x):
        return self.layer(x * torch.cat([torch.ones(8), torch.full((8,), 0.02)]))


def test_entries_that_matter_get_more_bits_than_those_that_do_not():
    torch.manual_seed(0)
    net, batches = Halves().eval(), [torch.randn(32, 16) for _ in range(3)]
    piece = Workpiece.of(net, Task.of(batches), Jobs())
    method = replace(METHOD, image=8, epochs=6, steps=10, batch=32, gates=1.0)
    plan = method.plan(piece, Budget.parse("bops <= 3%"))
    kept = method.fit(piece, plan)
    values = compressed_layers(kept.model)["layer"].factors[0][0]
    codes = values.codes
    # A code of 2 bits is a multiple of 85 on the grid of 8.
    narrow = codes.remainder(85) == 0
    assert plan["layer"].terms[0].grid.bits == 8
    assert narrow[:, 8:].float().mean() > 0.9
    assert narrow[:, :8].float().mean() < 0.5
    assert kept.counted.bops <= 0.03 * piece.float_cost.bops < piece.cost(plan).bops


def test_a_budget_that_only_gates_keep_is_not_promised(tmp_path):
    case = network("residual")
    result = compress(case.model, "bops <= 0.6%", case.batches, METHOD)
    assert result.budget is None
    assert result.counted.bops <= 0.006 * result.float_cost.bops < result.cost.bops
    assert any(f"{result.counted.bops:,} bops" in x for x in result.notes)
    assert any("NOT for what is stored" in x for x in result.notes)
    assert result.save(tmp_path / "a.safetensors") == result.cost.bytes
    again = load(tmp_path / "a.safetensors", case.model)
    assert torch.equal(again(case.batches[0]), result.model(case.batches[0]))


def test_by_default_the_budget_is_that_of_the_file():
    case = network("residual")
    result = compress(case.model, "bops <= 0.6%", case.batches, replace(METHOD, counts="stored"))
    assert result.budget is not None
    assert result.cost.bops <= 0.006 * result.float_cost.bops
    assert result.counted is None
    assert any("gates of entries count" in x for x in result.notes)


def test_a_plan_that_no_search_found_has_one_width_a_layer():
    case = network("residual")
    lines = "\n".join(f"{s.name} dense@4 | act@8" for s in _piece().survey)
    result = fit(case.model, lines, case.batches, METHOD)
    assert result.plan == Plan.parse(lines)
    assert result.counted is None
    assert not any("gates of entries" in x for x in result.notes)


@pytest.mark.slow
def test_a_search_that_was_killed_ends_like_one_that_was_not(tmp_path):
    case = network("residual")

    def stop(stage, done, _):
        if stage.startswith("training with gates") and done == 14:
            raise KeyboardInterrupt

    whole = compress(case.model, "bops <= 0.6%", case.batches, METHOD)
    with pytest.raises(KeyboardInterrupt):
        compress(case.model, "bops <= 0.6%", case.batches, METHOD,
                 jobs=Jobs(folder=tmp_path, progress=stop))  # fmt: skip
    again = compress(case.model, "bops <= 0.6%", case.batches, METHOD, jobs=Jobs(folder=tmp_path))
    assert again.counted == whole.counted
    state = again.model.state_dict()
    assert all(torch.equal(state[n], t) for n, t in whole.model.state_dict().items())


def test_mistakes_are_named():
    for fields, word in (
        ({"epochs": 0}, "granularity='weight' needs epochs"),
        ({"direction": 3}, "needs start='widest' and direction=1 or 2"),
        ({"start": "program"}, "needs start='widest'"),
        ({"widths": (2, 3, 4)}, "lie within one another"),
        ({"two": "half"}, "two='ternary'"),
        ({"granularity": "layer"}, "counts='gates' needs granularity='weight'"),
    ):
        with pytest.raises(PlanError, match=word):
            replace(METHOD, **fields)
    case = network("residual")
    for budget in ("bytes <= 40%", "bops <= 2%, bits <= 3"):
        with pytest.raises(BudgetError, match="count bit operations alone"):
            compress(case.model, budget, case.batches, METHOD)
    with pytest.raises(BudgetError, match=r"smallest reachable value .* \(0\.3906% of float32\)"):
        compress(case.model, "bops <= 0.39%", case.batches, METHOD)


def test_a_layer_is_stored_at_the_widest_of_its_entries():
    course = _course("bops <= 2%")
    gates = course.gates
    levels = torch.zeros(len(gates), dtype=torch.long)
    levels[gates.spans[0].first] = 1  # one entry of the first layer alone
    gates.set_levels(levels)
    lines = list(course.plan)
    assert [x.terms[0].grid.bits for x in lines] == [4] + [2] * (len(lines) - 1)
    assert isinstance(lines[0], LayerPlan)
