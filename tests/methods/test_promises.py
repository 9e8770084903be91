"""What methods promise, on random networks under random budgets that can be met."""

import concurrent.futures
import copy
import dataclasses
import itertools
import math
import multiprocessing

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import NETWORKS, flat_networks, image_networks, network, thinned, token_networks

from rabbet import Budget, Jobs, Joint, Plan, Task, compress, load
from rabbet.choose.program import smallest
from rabbet.choose.scoring import scored
from rabbet.core.budget import METRICS
from rabbet.core.cost import plan_cost
from rabbet.data.batches import outputs, tensors
from rabbet.errors import BudgetError
from rabbet.grids.grid import Grid
from rabbet.model.build import build, plan_of
from rabbet.model.compressed import all_layers, compressed_layers
from rabbet.model.prepare import prepared
from rabbet.train.tuning import Tuning
from rabbet.workpiece import Workpiece

FAST = Joint(
    grids=("1c", "tc", "3c", "8c"),
    adapters=(("2hc", 0.3),),
    forms=("cp", "lowrank"),
    shares=(0.5,),
    factor_grids=("4c",),
    tuning=Tuning(steps=0),
)
TUNED = Joint(
    grids=("2hc", "4c", "8c"),
    adapters=(("2hc", 0.3),),
    forms=("cp",),
    shares=(0.5,),
    factor_grids=("4c",),
    act=6,
    tuning=Tuning(steps=3, batch=4),
)
FLOAT = Joint(
    grids=("tc", "3c", "5", "8c"), adapters=(), forms=(), act=None, tuning=Tuning(steps=0)
)


def _table(piece, method):
    return method.chooser(piece).allocator.table


def _exact(piece, table, choice):
    plan = Plan(tuple(row[k].plan for row, k in zip(table, choice, strict=True)))
    return plan_cost(piece.survey, plan, piece.rest(plan))


def _text(metric, cost):
    """A limit that this cost just keeps."""
    if metric == "bits":
        return f"bits <= {math.ceil(cost.bits * 10**6) / 10**6:.6f}"
    return f"{metric} <= {METRICS[metric].amount(cost)}"


def _budget(draw, case, method):
    """The least reachable value of one quantity, or limits that a random choice keeps."""
    piece = Workpiece.of(case.model, Task(case.batches), Jobs())
    table = _table(piece, method)
    metrics = draw(
        st.lists(
            st.sampled_from(["bytes", "bops", "bits", "macs"]), min_size=1, max_size=4, unique=True
        )
    )
    if len(metrics) == 1 and draw(st.booleans()):
        return _text(metrics[0], _exact(piece, table, smallest(table, metrics[0])))
    choice = [draw(st.integers(0, len(row) - 1)) for row in table]
    return ", ".join(_text(m, _exact(piece, table, choice)) for m in metrics)


def _snapshot(model):
    state = {name: t.clone() for name, t in model.state_dict().items()}
    facts = [
        (name, type(m), m.training, len(m._forward_hooks), len(m._forward_pre_hooks))
        for name, m in model.named_modules()
    ]
    return (
        state,
        facts,
        [(p.requires_grad, p.grad) for p in model.parameters()],
        torch.get_rng_state(),
    )


def _unchanged(model, before):
    state, facts, gradients, rng = _snapshot(model)
    return (
        state.keys() == before[0].keys()
        and all(torch.equal(state[k], before[0][k]) for k in state)
        and (facts, gradients) == before[1:3]
        and torch.equal(rng, before[3])
    )


def _outputs(model, batch):
    with torch.no_grad():
        return outputs(Task(()).run(model, batch))


def _keeps_the_promises(case, budget, method, path):
    before = _snapshot(case.model)
    given = copy.deepcopy(case.batches)
    result = compress(case.model, budget, case.batches, method)
    assert _unchanged(case.model, before)
    for old, new in zip(given, case.batches, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(tensors(old), tensors(new), strict=True))
    # the budget is kept, and the cost is that of the file
    Budget.parse(budget).check(result.cost, result.float_cost)
    written = result.save(path)
    assert result.cost.bytes == written == path.stat().st_size
    # what runs is the plan
    assert plan_of(result.model, result.survey) == result.plan
    plain, _ = prepared(case.model, Task(case.batches))
    assert plan_of(build(plain, result.plan, result.survey), result.survey) == result.plan
    assert Plan.parse(str(result.plan)) == result.plan
    for layer in all_layers(result.model).values():
        for factor in (f for factors in layer.factors for f in factors):
            assert torch.equal(
                factor.codes, factor.codes.round().clamp(factor.grid.low, factor.grid.high)
            )
            assert torch.equal(factor.scale, factor.scale.to(torch.bfloat16).float())
    # what is read back is what was written, to the last bit
    again = load(path, case.model)
    ours, theirs = result.model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    for batch in case.batches:
        assert all(
            torch.equal(a, b)
            for a, b in zip(_outputs(result.model, batch), _outputs(again, batch), strict=True)
        )
    assert _unchanged(case.model, before)
    return path.read_bytes()


every_kind = pytest.mark.parametrize(
    "networks",
    [
        pytest.param(image_networks(), id="images"),
        pytest.param(token_networks(), id="tokens"),
        pytest.param(flat_networks(), id="vectors"),
    ],
)


@every_kind
@settings(max_examples=6)
@given(data=st.data())
@pytest.mark.slow
def test_a_network_keeps_every_promise(networks, data, tmp_path_factory):
    case = data.draw(networks)
    budget = _budget(data.draw, case, FAST)
    folder = tmp_path_factory.mktemp("promise")
    first = _keeps_the_promises(case, budget, FAST, folder / "a.safetensors")
    # the same seed, other threads: the same bytes
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        result = compress(case.model, budget, case.batches, FAST, jobs=Jobs(pool, folder / "kept"))
        result.save(folder / "b.safetensors")
    assert (folder / "b.safetensors").read_bytes() == first


@every_kind
@settings(max_examples=2)
@given(data=st.data())
@pytest.mark.slow
def test_a_tuned_network_keeps_every_promise(networks, data, tmp_path_factory):
    case = data.draw(networks)
    budget = _budget(data.draw, case, TUNED)
    folder = tmp_path_factory.mktemp("promise")
    first = _keeps_the_promises(case, budget, TUNED, folder / "a.safetensors")
    compress(case.model, budget, case.batches, TUNED).save(folder / "b.safetensors")
    assert (folder / "b.safetensors").read_bytes() == first


# Every network with the fast method, and with one of the others in turn.
PAIRS = [
    (name, method) for k, name in enumerate(NETWORKS) for method in (FAST, (FLOAT, TUNED)[k % 2])
]


@pytest.mark.parametrize(("name", "method"), thinned(PAIRS))
@settings(max_examples=1)
@given(data=st.data())
def test_every_known_network_keeps_every_promise(name, method, data, tmp_path_factory):
    case = network(name)
    budget = _budget(data.draw, case, method)
    _keeps_the_promises(case, budget, method, tmp_path_factory.mktemp("promise") / "a.safetensors")


@pytest.mark.parametrize("name", ["residual", "tokens"])
@pytest.mark.slow
def test_other_processes_write_the_same_bytes(name, tmp_path):
    case = network(name)
    method = dataclasses.replace(FAST, tuning=Tuning(steps=2, batch=4))
    compress(case.model, "bits <= 4", case.batches, method).save(tmp_path / "a")
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=spawn) as pool:
        compress(case.model, "bits <= 4", case.batches, method, jobs=Jobs(pool)).save(
            tmp_path / "b"
        )
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.slow
def test_the_seed_is_all_that_chance_depends_on(tmp_path):
    case = network("residual")
    for k, (seed, noise) in enumerate([(0, 1), (0, 2), (1, 1)]):
        torch.manual_seed(noise)
        compress(case.model, "bits <= 3", case.batches, TUNED, seed=seed).save(tmp_path / str(k))
    a, b, c = ((tmp_path / str(k)).read_bytes() for k in range(3))
    assert a == b
    assert a != c


def _harm(piece, method, budget):
    """The harm that the method expects of the plan it chooses: the objective of its program."""
    scores = scored(piece, {s.name: method.menu(s) for s in piece.survey})
    table = _table(piece, method)
    plan = method.plan(piece, Budget.parse(budget))
    names = [[option.plan for option in row] for row in table]
    return sum(row[n.index(line)] for row, n, line in zip(scores, names, plan, strict=True))


@pytest.mark.slow
def test_more_budget_never_scores_worse():
    case = network("residual")
    piece = Workpiece.of(case.model, Task(case.batches), Jobs())
    harm = [_harm(piece, FAST, f"bits <= {bits}") for bits in (1.5, 2, 3, 4, 6, 8)]
    assert all(b <= a * 1.001 for a, b in itertools.pairwise(harm))
    assert harm[-1] < 0.01 * harm[0]


@pytest.mark.slow
def test_rank_in_the_menu_is_never_worse_and_reaches_what_bits_alone_do_not():
    case = network("residual")
    piece = Workpiece.of(case.model, Task(case.batches), Jobs())
    alone = dataclasses.replace(FAST, forms=(), adapters=())
    for budget in ("bits <= 2", "bits <= 4", "bytes <= 20%", "bops <= 2%"):
        assert _harm(piece, FAST, budget) <= _harm(piece, alone, budget) * 1.001
    FAST.plan(piece, Budget.parse("macs <= 80%"))
    with pytest.raises(BudgetError):
        alone.plan(piece, Budget.parse("macs <= 80%"))


def test_a_network_in_training_mode_comes_back_in_training_mode_and_its_copy_in_eval_mode():
    case = network("stack")
    case.model.train()
    case.model[2].eval()
    case.model[0].weight.requires_grad_(False)
    before = _snapshot(case.model)
    result = compress(case.model, "bits <= 4", case.batches, FAST)
    assert _unchanged(case.model, before)
    assert not any(m.training for m in result.model.modules())


def test_the_hooks_of_the_user_stay_and_see_nothing_afterwards():
    case = network("stack")
    seen = []
    case.model[7].register_forward_hook(lambda *_: seen.append(1))
    result = compress(case.model, "bits <= 4", case.batches, FAST)
    count = len(seen)
    case.model(case.batches[0])
    assert len(seen) == count + 1
    assert result.model is not case.model


@pytest.mark.slow
def test_input_ranges_of_every_width_are_set():
    case = network("residual")
    for act in (2, 4, 8):
        method = Joint(
            grids=("4c",), adapters=(("4c", 0.3),), forms=(), act=act, tuning=Tuning(steps=0)
        )
        result = compress(case.model, "bits <= 32", case.batches, method)
        for layer in compressed_layers(result.model).values():
            first, *between = layer.quantisers
            assert first.grid == Grid.of(act, "unsigned")
            assert all(a.grid == Grid.of(8, "unsigned") for a in between)  # whatever the input has
            assert all(a.ready and 0 <= a.zero <= a.grid.high for a in layer.quantisers)
