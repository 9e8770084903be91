"""The parts of methods: allocation, calibration, matching, tuning; and what all methods promise."""

import dataclasses
import itertools
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import NETWORKS, Residual, network, rand, settled, tokens
from torch import nn

from rabbet import CGMQ, Budget, CoRa, Jobs, Joint, Plan, Task, compress, fit, plan, price, survey
from rabbet.calibrate.moments import second_moments
from rabbet.calibrate.ranges import calibrate_ranges
from rabbet.choose.program import Option, allocate, picked, require_feasible
from rabbet.core.cost import Cost
from rabbet.core.plan import LayerPlan
from rabbet.core.survey import windows
from rabbet.data.augment import Pool, cropped, mixed
from rabbet.data.batches import outputs, tensors
from rabbet.data.examples import Axes
from rabbet.errors import BudgetError, ModelError, PlanError
from rabbet.methods import METHODS
from rabbet.methods.cora.search import Ranking
from rabbet.model.bn_fold import fold
from rabbet.model.build import build
from rabbet.model.compressed import ActQuant, compressed_layers, stored_weights
from rabbet.model.prepare import prepared
from rabbet.reconstruct import sequential
from rabbet.reconstruct.candidates import read_numbers, solve_site
from rabbet.reconstruct.network import solve_lines
from rabbet.reconstruct.sequential import solve_in_order
from rabbet.train import losses
from rabbet.train.losses import block_names, distillation_loss, distillation_losses
from rabbet.train.qat import GatedRange
from rabbet.train.tuning import Tuning, _Loop, tune
from rabbet.workpiece import Workpiece

QUICK = Joint(
    grids=("3c", "8c"),
    adapters=(("2hc", 0.3),),
    forms=("cp",),
    shares=(0.5,),
    factor_grids=("4c",),
    tuning=Tuning(steps=0),
)


# Every method

# what each can reach on a network without kernels to factorise
WITHIN = {
    "joint": "bits <= 4",
    "admm": "bits <= 8",
    "cora": "bits <= 8",
    "cgmq": "bops <= 3%",
    "ttqat": "bits <= 8",
    "blockwise": "bits <= 4",
}
ON = {"blockwise": "blocks"}


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_a_frozen_dataclass_that_plans_and_fits(name):
    method = METHODS[name]()
    assert dataclasses.is_dataclass(method)
    assert method.__dataclass_params__.frozen
    assert METHODS[name]() == method
    case = network(ON.get(name, "stack"))
    piece = Workpiece.of(case.model, Task(case.batches), Jobs())
    budget = Budget.parse(WITHIN[name])
    chosen = method.plan(piece, budget)
    budget.check(piece.cost(chosen), piece.float_cost)
    fitted = method.fit(piece, chosen)
    assert Plan(tuple(c.plan for c in compressed_layers(fitted.model).values())) == chosen
    assert all(isinstance(note, str) and note for note in fitted.notes)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.slow
def test_a_plan_can_be_chosen_edited_and_fitted(name):
    case, method = network(ON.get(name, "stack")), METHODS[name]()
    chosen = plan(case.model, WITHIN[name], case.batches, method)
    first = next(iter(chosen))
    edited = chosen.with_layer(LayerPlan.parse(f"{first.name} dense@6c | act@7"))
    result = fit(case.model, str(edited), case.batches, method)
    assert result.plan == edited
    assert result.budget is None


@pytest.mark.slow
def test_choosing_and_fitting_are_together_what_compress_does(tmp_path):
    case = network("residual")
    method = Joint(
        grids=("3c", "8c"),
        adapters=(("2hc", 0.3),),
        forms=("cp",),
        shares=(0.5,),
        factor_grids=("4c",),
        tuning=Tuning(steps=2, batch=4),
    )
    compress(case.model, "bits <= 4", case.batches, method).save(tmp_path / "a")
    chosen = plan(case.model, "bits <= 4", case.batches, method)
    fit(case.model, chosen, case.batches, method).save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("name", ["residual", "twice", "tokens", "single"])
def test_the_price_of_a_plan_is_what_it_costs_when_it_is_fitted(name):
    case = network(name)
    chosen = plan(case.model, "bits <= 5", case.batches, QUICK)
    costs = [price(case.model, text, case.batches) for text in (chosen, str(chosen))]
    assert costs == [fit(case.model, chosen, case.batches, QUICK).cost] * 2
    with pytest.raises(PlanError, match="nowhere"):
        price(case.model, "nowhere dense@4c", case.batches)


def test_a_result_prints_every_layer_every_quantity_and_what_was_left():
    case = network("twice")
    result = compress(case.model, "bytes <= 200%, bits <= 4", case.batches, QUICK)
    text = str(result)
    for line in result.plan:
        assert re.search(
            rf"^{re.escape(line.name)} +[\dx]+ +{re.escape(line.body)} ", text, re.MULTILINE
        )
    for left in result.survey.left:
        assert f"left alone: {left.name}" in text
        assert left.reason in text
    for metric in ("bytes", "macs", "bops", "bits"):
        assert re.search(rf"^{metric} ", text, re.MULTILINE)
    assert f"{result.cost.bytes:,}" in text
    assert all(note in text for note in result.notes)


@dataclasses.dataclass(frozen=True)
class Careless:
    """A method that chooses well and then builds something larger."""

    def plan(self, piece, budget):
        return QUICK.plan(piece, budget)

    def fit(self, piece, chosen):
        first = next(iter(chosen))
        return QUICK.fit(
            piece,
            chosen.with_layer(LayerPlan.parse(f"{first.name} dense@8c + lowrank[1]@8c | act@8")),
        )


def test_a_method_that_breaks_the_budget_is_caught():
    case = network("stack")
    with pytest.raises(BudgetError, match="the network has"):
        compress(case.model, "bits <= 3.5", case.batches, Careless())


class Counting(Jobs):
    """Jobs that count, by stage, what is really worked out."""

    def run(self, stage, jobs, *seconds):
        self.stage = stage
        return super().run(stage, jobs, *seconds)

    def _finished(self, stage, jobs):
        self.ran = getattr(self, "ran", Counter()) + Counter({self.stage: len(jobs)})
        return super()._finished(stage, jobs)


@pytest.mark.slow
def test_a_second_budget_finds_the_candidates_of_the_first():
    case = network("residual")
    jobs = Counting()
    compress(case.model, "bits <= 4", case.batches, QUICK, jobs=jobs)
    first = jobs.ran
    assert first["predicting"] == 7
    compress(case.model, "bits <= 3.5, bops <= 5%", case.batches, QUICK, jobs=jobs)
    both = jobs.ran
    assert both["predicting"] == 7
    compress(case.model, "bits <= 4", case.batches, QUICK, jobs=jobs)
    assert jobs.ran == both
    assert "solving the plan" not in jobs.ran  # its lines were solved when they were chosen


@pytest.mark.slow
def test_a_killed_run_that_is_started_again_does_not_do_finished_work_twice(tmp_path):
    case = network("residual")

    def killer(stage, *_):
        if stage.startswith("solving layers: 4 of "):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(
            case.model,
            "bits <= 4",
            case.batches,
            QUICK,
            jobs=Jobs(folder=tmp_path / "k", progress=killer),
        )
    jobs = Counting(folder=tmp_path / "k")
    compress(case.model, "bits <= 4", case.batches, QUICK, jobs=jobs).save(tmp_path / "a")
    whole = Counting()
    compress(case.model, "bits <= 4", case.batches, QUICK, jobs=whole).save(tmp_path / "b")
    assert jobs.ran["predicting"] == 0
    assert jobs.ran["solving layers"] == whole.ran["solving layers"] - 4
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


# Allocation


def _table(draw):
    rows = []
    for layer in range(draw(st.integers(1, 4))):
        count = draw(st.integers(1, 4))
        lines = [LayerPlan.parse(f"layer{layer} lowrank[{k + 1}]@4c") for k in range(count)]
        cost = st.builds(
            lambda b, m: Cost(bytes=b, macs=m, weights=1), st.integers(0, 60), st.integers(0, 60)
        )
        rows.append([Option(line, draw(cost)) for line in lines])
    scores = [[draw(st.integers(0, 1000)) / 8 for _ in row] for row in rows]
    return rows, scores


def _priced(rows, whole, fixed=17, exact=None):
    """What a plan of these options costs: their sum, or what a function says."""
    costs = {option.plan: option.cost for row in rows for option in row}

    def cost(plan):
        total = sum((costs[line] for line in plan), Cost(bytes=fixed))
        return total if exact is None else exact(total)

    return SimpleNamespace(float_cost=whole, left=(), cost=cost, frame=lambda _: None)


@settings(max_examples=60)
@given(data=st.data())
def test_the_choice_is_the_best_of_all_that_keep_the_budget(data):
    rows, scores = _table(data.draw)
    budget = Budget.parse(
        f"bytes <= {data.draw(st.integers(1, 200))}, macs <= {data.draw(st.integers(1, 200))}"
    )
    whole = Cost(bytes=1000, macs=1000)
    piece = _priced(rows, whole)
    choices = itertools.product(*(range(len(row)) for row in rows))
    plans = {picked(rows, choice): choice for choice in choices}
    keeping = [
        p for p in plans if not any(x.broken_by(piece.cost(p), whole) for x in budget.limits)
    ]
    if not keeping:
        with pytest.raises(BudgetError):
            require_feasible(rows, budget, piece)
        with pytest.raises(BudgetError):
            allocate(scores, rows, budget, piece)
        return
    require_feasible(rows, budget, piece)
    chosen = allocate(scores, rows, budget, piece)
    assert chosen in keeping

    def harm(plan):
        return sum(row[k] for row, k in zip(scores, plans[plan], strict=True))

    best = min(map(harm, keeping))
    assert harm(chosen) <= best * (1 + 1e-9)


def test_a_cost_that_is_more_than_the_sum_of_its_layers_still_keeps_the_budget():
    rows = [
        [Option(LayerPlan.parse(f"l{i} lowrank[{b}]@4c"), Cost(bytes=b)) for b in (10, 20, 30)]
        for i in range(3)
    ]
    scores = [[2.0, 1.0, 0.0]] * 3

    # What nobody told the program.
    piece = _priced(
        rows, Cost(bytes=100), 0, lambda cost: Cost(bytes=cost.bytes + 9 * (cost.bytes % 20 == 0))
    )
    for limit in range(39, 95):
        budget = Budget.parse(f"bytes <= {limit}")
        assert piece.cost(allocate(scores, rows, budget, piece)).bytes <= limit


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_score_that_is_not_finite_is_refused_by_the_name_of_its_layer(value):
    rows = [[Option(LayerPlan.parse(f'"the {i}" dense@4c'), Cost(bytes=1))] * 2 for i in range(3)]
    scores = [[1.0, 2.0], [1.0, value], [1.0, 2.0]]
    with pytest.raises(ModelError, match='"the 1"'):
        allocate(scores, rows, Budget.parse("bytes <= 10"), _priced(rows, Cost(bytes=10)))


def test_the_solver_writes_nothing_where_the_user_reads(capfd):
    case = network("residual")
    compress(case.model, "bits <= 4, bops <= 5%", case.batches, QUICK)
    assert capfd.readouterr() == ("", "")


# Calibration


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.Conv2d(4, 6, 3, stride=2, padding=1), rand(3, 4, 7, 6)),
        (nn.Conv2d(4, 6, (3, 2), dilation=(1, 2)), rand(3, 4, 7, 6)),
        (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), rand(3, 4, 7, 6)),
    ],
)
def test_second_moments_are_those_of_unfolded_patches(layer, x, monkeypatch):
    monkeypatch.setattr("rabbet.calibrate.moments.FEW", 0)
    model = nn.Sequential(layer).eval()
    moments = second_moments(model, survey(model, [x]), Task([x, x + 1]))["0"]
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    both = F.pad(torch.cat([x, x + 1]), layer._reversed_padding_repeated_twice, mode=mode)
    rows = F.unfold(both, layer.kernel_size, layer.dilation, 0, layer.stride).mT.reshape(
        -1, moments.shape[1]
    )
    assert torch.allclose(moments[0], rows.T @ rows / len(rows), rtol=1e-4, atol=1e-5)


def test_second_moments_of_very_many_examples_are_those_of_every_nth_batch(monkeypatch):
    monkeypatch.setattr("rabbet.calibrate.moments.EXAMPLES", 12)
    monkeypatch.setattr("rabbet.calibrate.moments.FEW", 0)
    model = nn.Sequential(nn.Linear(6, 3))
    for count, step in ((3, 1), (5, 1), (6, 2), (9, 3)):  # batches of 4 examples
        data = [rand(4, 6, seed=k) for k in range(count)]
        moments = second_moments(model, survey(model, data), Task(data))["0"]
        seen = torch.cat(data[::step])
        assert torch.allclose(moments[0], seen.T @ seen / len(seen), atol=1e-5)


def test_second_moments_of_groups_and_of_features_are_their_own(monkeypatch):
    monkeypatch.setattr("rabbet.calibrate.moments.FEW", 0)
    conv, fc = nn.Conv2d(4, 6, 1, groups=2), nn.Linear(5, 3)
    x, y = rand(3, 4, 2, 2), rand(3, 7, 5)
    model = nn.Sequential(conv).eval()
    moments = second_moments(model, survey(model, [x]), Task([x]))["0"]
    for g in range(2):
        rows = x[:, 2 * g : 2 * g + 2].movedim(1, 3).reshape(-1, 2)
        assert torch.allclose(moments[g], rows.T @ rows / len(rows), atol=1e-5)
    model = nn.Sequential(fc).eval()
    moments = second_moments(model, survey(model, [y]), Task([y]))["0"]
    assert torch.allclose(moments[0], y.reshape(-1, 5).T @ y.reshape(-1, 5) / 21, atol=1e-5)


def test_second_moments_are_the_same_however_little_memory_there_is(monkeypatch):
    """More passes over the batches, and a folder for what memory has no room for."""
    case = network("tokens")
    surveyed = survey(case.model, case.batches)
    task = Task(case.batches)
    folded = fold(prepared(case.model, task)[0], surveyed)
    at_once = second_moments(folded, surveyed, task)
    monkeypatch.setattr("rabbet.calibrate.moments.WINDOW", 1)
    monkeypatch.setattr("rabbet.calibrate.moments.KEPT", at_once["head"].numel())
    steps = []
    little = second_moments(folded, surveyed, task, progress=lambda *step: steps.append(step))
    assert dict(little).keys() == dict(at_once).keys()
    assert all(torch.equal(moment, at_once[name]) for name, moment in little.items())
    passes = sum(site.multiplies for site in surveyed)
    assert [done for _, done, _ in steps][-1] == passes * len(case.batches)
    folder = Path(little._folder.name)
    assert 0 < len(list(folder.iterdir())) < len(little)
    del little
    assert not folder.exists()


def test_a_table_has_no_second_moment():
    case = network("tokens")
    surveyed = survey(case.model, case.batches)
    task = Task(case.batches)
    moments = second_moments(fold(prepared(case.model, task)[0], surveyed), surveyed, task)
    assert set(moments) == {s.name for s in surveyed if s.runs} - {"table"}
    for moment in moments.values():
        assert torch.allclose(moment, moment.mT, atol=1e-5)
        assert (torch.linalg.eigvalsh(moment) > -1e-4).all()


def test_a_few_places_are_drawn_from_each_example_and_all_are_taken_on_request():
    layer = nn.Conv2d(2, 3, 3, padding=1)
    site = survey(layer, [rand(1, 2, 6, 6)]).sites[0]
    x = rand(4, 2, 6, 6)
    every = site.patches(x, 10**6, torch.Generator())
    assert every.shape == (1, 4 * 36, 18)
    few = site.patches(x, 5, torch.Generator().manual_seed(1))
    assert few.shape == (1, 4 * 5, 18)
    known = {tuple(row.tolist()) for row in every[0]}
    assert all(tuple(row.tolist()) in known for row in few[0])
    assert len({tuple(row.tolist()) for row in few[0]}) == 20


def _ranged(model, batches, bits=8):
    surveyed = survey(model, batches)
    student = build(
        model,
        Plan(tuple(LayerPlan.parse(f"{s.name} dense@8c | act@{bits}") for s in surveyed)),
        surveyed,
    )
    calibrate_ranges(student, Task(batches))
    return student, [m for m in student.modules() if isinstance(m, ActQuant)]


@pytest.mark.parametrize("shift", [-9.0, -1.0, 0.0, 1.0, 9.0])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_range_holds_zero_exactly_and_the_inputs_nearly(shift, bits):
    x = rand(400, 6) + shift
    _, (act,) = _ranged(nn.Sequential(nn.Linear(6, 3)), [x], bits)
    assert act.zero == act.zero.round()
    assert 0 <= act.zero <= act.grid.high
    assert act(torch.zeros(1)).item() == 0
    # no worse than the plain range from the smallest to the largest value and zero
    low, high = min(x.min().item(), 0), max(x.max().item(), 0)
    plain = ActQuant(bits)
    scale = (high - low) / act.grid.high
    plain.set_range(torch.tensor(scale), torch.tensor(float(round(-low / scale))))
    assert (act(x) - x).square().mean() <= 1.05 * (plain(x) - x).square().mean()


def test_inputs_that_are_always_zero_have_a_range():
    student, (act,) = _ranged(nn.Sequential(nn.Linear(6, 3)), [torch.zeros(5, 6)])
    assert torch.isfinite(act.scale)
    assert torch.isfinite(student(torch.zeros(5, 6))).all()


# Solving in order


def test_after_solving_in_order_every_channel_has_the_mean_and_deviation_of_the_float_network():
    model = settled(
        nn.Sequential(
            nn.Conv2d(3, 8, 3),
            nn.ReLU(),
            nn.Conv2d(8, 6, 3),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(24, 4),
        )
    )
    batches = [rand(2048, 3, 6, 6)]
    piece = Workpiece.of(model, Task(batches), Jobs())
    lines = [LayerPlan.parse(f"{s.name} dense@3c") for s in piece.survey]
    student = build(piece.model, Plan(tuple(lines)), piece.survey)

    def statistics(net):
        seen = []
        hooks = [
            net.get_submodule(s.name).register_forward_hook(lambda _, __, y: seen.append(y))
            for s in piece.survey
        ]
        with torch.no_grad():
            net(batches[0])
        for hook in hooks:
            hook.remove()
        flat = [y.movedim(1, 0).flatten(1) for y in seen]
        return torch.cat([y.mean(1) for y in flat]), torch.cat([y.std(1) for y in flat])

    mean, spread = statistics(piece.model)
    before = [(a - b).abs().max() for a, b in zip(statistics(student), (mean, spread), strict=True)]
    solve_in_order(student, piece, piece.task.gathered(2048))
    after = [(a - b).abs().max() for a, b in zip(statistics(student), (mean, spread), strict=True)]
    # Corrections go as far as two halves of the examples agree; scales are bfloat16: three digits.
    assert after[0] < 0.2 * before[0]
    assert after[1] < 0.2 * before[1]
    for factor in (
        f for layer in compressed_layers(student).values() for fs in layer.factors for f in fs
    ):
        assert torch.equal(factor.scale, factor.scale.to(torch.bfloat16).float())


def test_solving_in_order_skips_what_runs_twice_and_matches_only_what_has_a_scale_per_output():
    case = network("twice")
    piece = Workpiece.of(case.model, Task(case.batches), Jobs())
    student = build(
        piece.model, Plan.parse("stem dense@3\nbody dense@3c\nhead dense@3c"), piece.survey
    )
    before = {k: v.clone() for k, v in student.state_dict().items()}
    solve_in_order(student, piece, piece.task.gathered(1024))
    changed = {k for k, v in student.state_dict().items() if not torch.equal(v, before[k])}
    assert not any(k.startswith("body") for k in changed)
    assert "head.bias" in changed
    assert "stem.bias" not in changed


def test_layers_solved_in_windows_come_out_as_in_one(monkeypatch):
    """A window holds what the float network's layers are given, and goes on behind the last."""
    answers, starts = [], []
    for window in (2**27, 1):
        monkeypatch.setattr(sequential, "WINDOW", window)
        piece = _piece()
        plan = Plan(tuple(LayerPlan.parse(f"{s.name} dense@3c | act@8") for s in piece.survey))
        student = build(piece.model, plan, piece.survey, solve_lines(piece, "solving", plan))
        calibrate_ranges(student, piece.task, piece.seed)
        starts.append(outputs(piece.task.run(student, piece.task.read()[0]))[0])
        solve_in_order(student, piece, piece.task.gathered(64))
        answers.append(outputs(piece.task.run(student, piece.task.read()[0]))[0])
    each = list(windows(list(piece.survey), sequential._inputs, 1 // 64))
    assert each == [[site] for site in piece.survey]
    assert torch.equal(*starts)
    moved = (answers[0] - starts[0]).norm()
    assert moved > 0
    # a bias that differs in its last place turns codes of the last layer, which few examples hold
    assert (answers[0] - answers[1]).norm() < 0.2 * moved


def test_solving_in_order_brings_the_outputs_nearer_to_the_float_network():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3)]
    model = settled(nn.Sequential(*layers))
    piece = Workpiece.of(model, Task([rand(256, 3, 10, 10)]), Jobs())
    plan = Plan(tuple(LayerPlan.parse(f"{s.name} dense@2hc") for s in piece.survey))
    alone = solve_lines(piece, "solving", plan)
    student = build(piece.model, plan, piece.survey, alone)
    fresh = rand(64, 3, 10, 10)
    with torch.no_grad():
        goal = model(fresh)
        before = (student(fresh) - goal).square().sum()
        solve_in_order(student, piece, piece.task.gathered(1024))
        after = (student(fresh) - goal).square().sum()
    assert after < 0.9 * before


# Tuning


def _piece(tmp_path=None, count=4, **jobs):
    model = settled(
        nn.Sequential(Residual(3, 8), Residual(8, 8), nn.Flatten(), nn.Linear(8 * 64, 5))
    )
    batches = [rand(16, 3, 8, 8, seed=k) for k in range(count)]
    return Workpiece.of(model, Task(batches), Jobs(folder=tmp_path, **jobs))


def _student(piece, line="dense@2hc | act@8"):
    plan = Plan(tuple(LayerPlan.parse(f"{s.name} {line}") for s in piece.survey))
    student = build(piece.model, plan, piece.survey)
    calibrate_ranges(student, piece.task)
    return student


def test_tuning_brings_the_answers_nearer_to_the_float_network():
    piece = _piece(count=24)
    student = _student(piece)
    unseen = [[rand(64, 3, 8, 8, seed=999)]]
    before = piece.distance(student, unseen).divergence
    note = tune(student, piece, Tuning(steps=100, batch=32))
    assert note.startswith("tuned 100 steps")
    assert piece.distance(student, unseen).divergence < 0.9 * before
    assert not any(t.requires_grad for t in (*student.parameters(), *student.buffers()))


@pytest.mark.parametrize("line", ["dense@2hc", "dense@3c", "dense@8", "dense@2hc + lowrank[2]@8c"])
def test_tuning_starts_from_the_codes_that_were_solved(line):
    piece = _piece()
    numbers = {
        s.name: read_numbers(
            solve_site(
                piece.weight(s),
                piece.moments()[s.name],
                site=s,
                menu=(LayerPlan.parse(f"x {line}").terms,),
            ),
            (LayerPlan.parse(f"x {line}").terms,),
            0,
        )
        for s in piece.survey
    }
    plan = Plan(tuple(LayerPlan.parse(f"{s.name} {line}") for s in piece.survey))
    student = build(piece.model, plan, piece.survey, numbers)
    before = {k: v.clone() for k, v in student.state_dict().items() if "codes" in k}
    _Loop(student, piece, Pool.of(piece.task.read(), piece.task.examples), Tuning())
    after = {k: v for k, v in student.state_dict().items() if k in before}
    assert all(torch.equal(after[k].detach().round(), v) for k, v in before.items())
    moved = any(not torch.equal(after[k], v) for k, v in before.items())
    # a code of one term alone starts where the weight lies in its cell
    assert moved == ("lowrank" not in line)


def test_what_is_taught_is_the_answers_and_what_the_blocks_give():
    piece = _piece()
    student, batch = _student(piece), piece.task.read()[0]
    blocks = block_names(piece.survey)
    assert blocks
    told = [float(distillation_loss(student, piece, batch, blocks, share)) for share in (0, 1, 3)]
    assert told[0] == pytest.approx(piece.distance(student, [[batch]]).divergence)
    assert told[2] - told[0] == pytest.approx(3 * (told[1] - told[0]), rel=1e-3)
    assert 0 < told[0] < told[1]
    assert float(distillation_loss(piece.model, piece, batch, blocks, 1.0)) == pytest.approx(
        0, abs=1e-6
    )


@pytest.mark.parametrize("features", [0.0, 2.0])
def test_a_batch_that_memory_has_no_room_for_is_taught_in_parts(features, monkeypatch):
    piece = _piece()
    student, batch = _student(piece), piece.task.read()[0]
    batch = torch.cat([batch, torch.zeros_like(batch[:1])])  # in one part blocks have little to do
    scales = [x.factors[0][0].scale.requires_grad_() for x in compressed_layers(student).values()]
    each = sum(site.entries for site in piece.survey)

    def taught(count):
        monkeypatch.setattr(losses, "ENTRIES", count * each)
        blocks = block_names(piece.survey)
        parts = list(distillation_losses(student, piece, batch, blocks, features))
        return len(parts), float(sum(parts).detach()), torch.autograd.grad(sum(parts), scales)

    whole, some = taught(len(batch)), taught(2)
    assert (whole[0], some[0]) == (1, 9)  # of 17 examples, so one part is smaller and counts less
    assert some[1] == pytest.approx(whole[1])
    for one, other in zip(whole[2], some[2], strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-6 * float(one.abs().max()))


@pytest.mark.parametrize(
    "method", [Joint(tuning=Tuning(3, 8)), CGMQ(steps=3, batch=8), CoRa(ranking=Ranking(3, 8))]
)
def test_every_training_goes_in_parts(method, monkeypatch):
    case = network("residual")
    histories = []
    for count in (2**28, 1):
        monkeypatch.setattr(losses, "ENTRIES", count)
        result = compress(case.model, "bits <= 6, bops <= 10%", case.batches, method)
        histories.append(list(result.histories[0].lines.values())[-1][:3])
    assert histories[0] == pytest.approx(histories[1], rel=0.05)


def test_a_gradient_that_is_nan_behind_finite_outputs_is_named():
    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(8, 8, bias=False), nn.Linear(8, 3)

        def forward(self, x):
            x = self.first(x)
            return self.last(x / (x.square().sum(-1, keepdim=True).sqrt() + 1e-6))

    batch = rand(16, 8)
    batch[::2] = 0  # the square root of nothing has no slope
    assert torch.isfinite(Normed()(batch)).all()
    with pytest.raises(ModelError, match="not finite: look for a gradient"):
        compress(Normed().eval(), "bits <= 4", [batch])


def test_what_a_gate_sees_is_of_all_calls():
    act = GatedRange({8: (-1.0, 1.0)})
    act.records_slope = True
    parts = [rand(3, 4, seed=k).requires_grad_() for k in range(2)]
    for part, size in zip(parts, (1.0, -5.0), strict=True):
        act(part).sum().mul(size).backward()
    assert float(act.slope) == pytest.approx(3)
    act.forget()
    assert act.slope is None


class Routed(nn.Module):
    """Experts that are called only if a token goes there."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(4, 4)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(4, 5), nn.ReLU()) for _ in range(4))
        self.last = nn.Linear(5, 3)

    def forward(self, x):
        place = self.gate(x).argmax(1)
        out = x.new_zeros(len(x), 5)
        for k, expert in enumerate(self.experts):
            mine = (place == k).nonzero()[:, 0]
            if len(mine):
                out = out.index_copy(0, mine, 10**k * expert(x[mine]))
        return self.last(out)


def test_experts_that_some_parts_do_not_call_count_as_in_the_whole_batch(monkeypatch):
    torch.manual_seed(0)
    piece = Workpiece.of(Routed().eval(), Task([rand(16, 4, seed=3)]), Jobs())
    student, batch = _student(piece, "dense@8c | act@8"), piece.task.read()[0]
    blocks = [f"experts.{k}" for k in range(4)]
    told = []
    for count in (16, 3, 1):
        monkeypatch.setattr(losses, "ENTRIES", count * sum(s.entries for s in piece.survey))
        told.append(float(sum(distillation_losses(student, piece, batch, blocks, 2.0)).detach()))
    assert told[1:] == pytest.approx(told[:1] * 2, rel=1e-4)


def test_a_forward_that_takes_no_part_of_a_batch_is_not_tuned(monkeypatch):
    class Pairs(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(8, 8), nn.Linear(16, 3)

        def forward(self, x):
            joined = self.first(x).relu().view(len(x) // 2, 16)
            return self.last(joined).repeat_interleave(2, 0)

    piece = Workpiece.of(Pairs().eval(), Task([rand(32, 8)], axes=0), Jobs())
    student = _student(piece, "dense@4c | act@8")
    monkeypatch.setattr(losses, "ENTRIES", 3 * sum(site.entries for site in piece.survey))
    assert tune(student, piece, Tuning(steps=2, batch=16)).startswith("not tuned: ")


def test_tuning_that_harms_is_undone_to_the_last_bit():
    piece = _piece()
    student = _student(piece, "dense@8c | act@8")
    before = {k: v.clone() for k, v in student.state_dict().items()}
    note = tune(student, piece, Tuning(steps=5, batch=16, scales=5.0, biases=50.0, ranges=5.0))
    assert note.startswith("tuning undone")
    assert all(torch.equal(before[k], v) for k, v in student.state_dict().items())


@pytest.mark.parametrize(
    ("count", "steps", "word"), [(1, 5, "too few examples"), (16, 0, "no steps")]
)
def test_tuning_says_why_it_did_nothing(count, steps, word):
    piece = _piece()
    piece.task = replace(piece.task, batches=[piece.task.read()[0][:count]])
    student = _student(piece)
    before = {k: v.clone() for k, v in student.state_dict().items()}
    note = tune(student, piece, Tuning(steps=steps))
    assert note.startswith("not tuned")
    assert word in note
    assert all(torch.equal(before[k], v) for k, v in student.state_dict().items())


@pytest.mark.slow
def test_tuning_that_was_killed_goes_on_from_its_last_checkpoint(tmp_path):
    settings = Tuning(steps=105, batch=4)
    steps = []

    def killer(stage, done, _):
        if stage == "tuning":
            steps.append(done)
            if done == 103:
                raise KeyboardInterrupt

    def tuned(folder, progress=lambda *_: None):
        piece = _piece(folder, progress=progress)
        student = _student(piece)
        tune(student, piece, settings)
        return student.state_dict()

    with pytest.raises(KeyboardInterrupt):
        tuned(tmp_path, killer)
    assert steps == list(range(1, 104))
    steps.clear()
    resumed = tuned(
        tmp_path, lambda stage, done, _: steps.append(done) if stage == "tuning" else None
    )
    assert steps == [101, 102, 103, 104, 105]
    straight = tuned(None)
    assert all(torch.equal(resumed[k], straight[k]) for k in straight)


# Batches for tuning


@settings(max_examples=40)
@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6), share=st.floats(0.01, 0.9))
def test_splitting_batches_keeps_every_example_once_and_in_order(sizes, share):
    numbers = iter(torch.arange(sum(sizes)).split(sizes))
    batches = [{"x": n.float(), "scale": 2.0} for n in numbers]
    axes = Axes((0,))
    kept, held = axes.hold_back(batches, share)
    both = [x for b in (*kept, *held) for x in b["x"].tolist()]
    assert both == list(range(sum(sizes)))
    assert held
    assert sum(map(axes.count, held)) == max(1, round(sum(sizes) * share))


def test_drawn_images_are_as_many_and_as_large_and_depend_on_the_generator_alone():
    pool = Pool.of([rand(8, 3, 8, 8, seed=k) for k in range(3)], Axes((0,)))
    assert pool.image == 0
    a, b, c = (pool.draw(10, torch.Generator().manual_seed(k)) for k in (1, 1, 2))
    assert a.shape == (10, 3, 8, 8)
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_an_image_that_is_cut_is_a_window_of_its_reflection():
    image = rand(1, 2, 8, 8)
    wide = F.pad(image, [1] * 4, mode="reflect")
    windows = [wide[0, :, a : a + 8, b : b + 8] for a in range(3) for b in range(3)]
    windows += [w.flip(2) for w in windows]
    for seed in range(10):
        window = cropped(image, torch.Generator().manual_seed(seed))[0]
        assert any(torch.equal(window, w) for w in windows)


def test_a_mixed_image_lies_between_two_images():
    images = torch.stack([torch.full((1, 8, 8), float(k)) for k in range(6)])
    mixture = mixed(images, torch.Generator().manual_seed(0))
    assert mixture.shape == images.shape
    assert mixture.min() >= 0
    assert mixture.max() <= 5
    assert any(torch.equal(a, b) for a, b in zip(mixture, images, strict=True))
    assert not torch.equal(mixture, images)


def test_tokens_and_vectors_are_drawn_as_they_are():
    whole = {tuple(row.tolist()) for b in tokens() for row in b}
    pool = Pool.of(tokens(), Axes((0,)))
    assert pool.image is None
    assert all(tuple(r.tolist()) in whole for r in pool.draw(4, torch.Generator()))


def test_batches_of_different_shapes_are_drawn_whole():
    batches = [rand(4, 3, 8, 8), rand(2, 3, 9, 9)]
    drawn = Pool.of(batches, Axes((0,))).draw(64, torch.Generator().manual_seed(0))
    assert any(drawn is b for b in batches)


@pytest.mark.parametrize("name", NETWORKS)
def test_gathered_examples_are_the_first_ones(name):
    case = network(name)
    task = Task(case.batches)
    joined = task.gathered(7)
    size = task.examples.count
    assert size(joined) == min(7, sum(map(size, case.batches)))
    first = tensors(case.batches[0])[0]
    count = min(len(first), 7)
    assert torch.equal(tensors(joined)[0][:count], first[:count])
    with torch.no_grad():
        assert outputs(task.run(case.model, joined))


def test_without_rank_bits_alone_are_on_the_menu():
    piece = _piece()
    for site in piece.survey:
        menu = Joint(rank=False).menu(site)
        assert {terms[0].form.name for terms in menu} == {"dense"}
        assert len(menu) - len(Joint().grids) in (0, len(Joint().groups))
        assert all(len(terms) == 1 for terms in menu)
    assert any(len(terms) > 1 for site in piece.survey for terms in Joint().menu(site))


def test_a_result_says_how_far_each_layer_is_from_the_one_that_it_replaces():
    """In its output, on the float network's inputs; in a stored weight itself."""
    torch.manual_seed(0)
    layers = {"rnn": nn.GRU(12, 20, batch_first=True), "head": nn.Linear(20, 6)}
    model = nn.ModuleDict(layers).eval()
    data = [rand(4, 5, 12, seed=k) for k in range(2)]
    task = Task(data, lambda m, x: m["head"](m["rnn"](x)[0]))
    plan = "head dense@3c | act@8\nrnn.weight_ih_l0 dense@2hc\nrnn.weight_hh_l0 dense@8c"
    result = fit(model, plan, task, Joint(tuning=Tuning(steps=0)))
    with torch.no_grad():
        x = model["rnn"](data[0])[0]
        wanted, found = model["head"](x), result.model["head"](x)
    error = float((found - wanted).norm() / wanted.norm())
    assert result.layers["head"].error == pytest.approx(error, rel=1e-4)
    weights = [dict(model.named_parameters())["rnn.weight_ih_l0"]]
    weights.append(stored_weights(result.model)["rnn.weight_ih_l0"].canonical)
    error = float((weights[1] - weights[0]).norm() / weights[0].norm())
    assert result.layers["rnn.weight_ih_l0"].error == pytest.approx(error, rel=1e-4)
    assert result.layers["rnn.weight_hh_l0"].error < 0.02 < result.layers["head"].error
    part = fit(model, "head dense@3c", task, Joint(tuning=Tuning(steps=0)))
    assert part.layers["rnn.weight_ih_l0"].error is None
    assert part.layers["rnn.weight_ih_l0"].plan is None
    assert "%" in str(part).splitlines()[1]
