"""A frontier is what compress would choose, budget after budget."""

import itertools
import json
import math
from dataclasses import replace

import pytest
import torch
from networks import network, thinned
from torch import nn

import rabbet
from rabbet import Jobs, Joint, demo
from rabbet.choose.measured import interpolated, next_try
from rabbet.data.accuracy import deviation
from rabbet.errors import BudgetError, DataError, PlanError
from rabbet.methods import QUALITY
from rabbet.report.sweeps import sweep_facts
from rabbet.train.tuning import Tuning

FAST = QUALITY["fast"]


SHARED = Jobs()  # what is solved for one test is known to the others


def _frontier(name="residual", **given):
    case = network(name)
    return case, rabbet.frontier(case.model, case.batches, method=FAST, jobs=SHARED, **given)


@pytest.mark.parametrize(
    ("name", "axis", "beside"),
    thinned(
        [
            ("attention", "bits", None),
            ("residual", "macs", "bytes <= 20%"),
            ("residual", "bytes", None),
        ]
    ),
)
def test_points_are_what_compress_chooses_and_keep_their_limits(name, axis, beside):
    case, frontier = _frontier(name, axis=axis, beside=beside, points=12)
    assert frontier.axis == axis
    assert len(frontier.points) > 5
    for point in frontier.points[:: len(frontier.points) // 3]:
        budget = point.limit.text if beside is None else f"{point.limit.text}, {beside}"
        rabbet.Budget.parse(budget).check(point.cost, frontier.float_cost)
        assert point.plan == rabbet.plan(case.model, budget, case.batches, FAST, jobs=SHARED)
        assert point.plan == frontier.at(budget)
        assert rabbet.price(case.model, point.plan, case.batches) == point.cost


def test_a_tighter_point_never_harms_less():
    _, frontier = _frontier(points=40)
    amounts = [point.cost.bytes for point in frontier.points]
    assert amounts == sorted(amounts, reverse=True)
    harms = [point.harm for point in frontier.points]
    assert all(b >= a * (1 - 1e-6) for a, b in itertools.pairwise(harms))
    assert len({point.plan for point in frontier.points}) == len(frontier.points)


@pytest.mark.slow
def test_ends_are_those_asked_for_or_those_that_can_be_reached():
    case, frontier = _frontier(limits=("13%", "25%"), points=10)
    shares = [point.limit.value for point in frontier.points]
    assert max(shares) <= 0.2501
    assert min(shares) >= 0.129
    assert frontier.points[-1].limit.text == "bytes <= 13%"
    _, whole = _frontier(points=10)
    with pytest.raises(BudgetError, match="cannot be met"):
        whole.at(f"bytes <= {whole.points[-1].cost.bytes - 200}")
    with pytest.raises(BudgetError, match="smallest reachable"):
        rabbet.frontier(case.model, case.batches, limits=("0.1%", "20%"), method=FAST)


def test_a_point_is_fitted_under_its_budget():
    _, frontier = _frontier(points=10)
    point = frontier.points[4]
    result = frontier.fit(point)
    assert result.plan == point.plan
    assert result.cost == point.cost
    assert str(result.budget) == point.limit.text
    assert frontier.fit(point.limit.text).plan == point.plan


def test_measured_points_have_intervals_and_are_not_fitted_again(monkeypatch):
    case, frontier = _frontier(points=12)
    reference = case.model(*case.batches[:1])

    def near(model):
        return -float((model(*case.batches[:1]) - reference).square().mean())

    told = frontier.measure(4, near)
    assert sum(point.measured for point in told.points) == 4
    assert told.points[0].measured
    assert told.points[-1].measured
    for point in told.points:
        value, low, high = point.accuracy
        assert low <= value <= high
    fitted = []
    monkeypatch.setattr(type(frontier), "fit", lambda self, point: fitted.append(point))
    assert [p.accuracy for p in frontier.measure(4, near).points] == [
        p.accuracy for p in told.points
    ]
    assert not fitted
    assert "measure of the float network: " in str(told)
    assert "measure of the float network: " in told._repr_html_()
    assert told.facts()["float"]["measure"] == told.reference == pytest.approx(0, abs=1e-9)
    assert told.facts()["points"][0]["measured"] is True


@pytest.mark.slow
def test_the_smallest_within_a_drop_is_found_on_the_users_measure():
    batches = demo.labelled()
    frontier = rabbet.frontier(
        demo.model(), demo.calibration(), method=FAST, points=60, jobs=SHARED
    )
    found = frontier.within(1.0, lambda model: rabbet.accuracy(model, batches), 1347)
    assert found.drop <= 1.0
    assert found.deviation >= 0
    assert len(found.tried) <= 4
    assert found.result.cost.bytes == found.point.cost.bytes
    assert found.result.cost.bytes < 0.12 * found.result.float_cost.bytes
    assert "fitted" in str(found)
    lost = rabbet.accuracy(demo.model(), batches) - rabbet.accuracy(found.result.model, batches)
    assert lost == pytest.approx(found.drop)
    # what is tighter and was tried lost more than was allowed
    tighter = [drop for limit, drop in found.tried if limit.value < found.point.limit.value]
    assert all(drop > 1.0 for drop in tighter)


@pytest.mark.slow
def test_a_drop_that_no_plan_keeps_is_said():
    frontier = rabbet.frontier(demo.model(), demo.calibration(), method=FAST, points=5)
    scores = iter([1.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    with pytest.raises(BudgetError, match="the least was 1 at"):
        frontier.within(0.5, lambda _: next(scores))


def test_mistakes_are_told():
    case, frontier = _frontier(points=4)
    with pytest.raises(BudgetError, match="unknown axis 'size'"):
        rabbet.frontier(case.model, case.batches, "size")
    with pytest.raises(BudgetError, match="is the axis"):
        rabbet.frontier(case.model, case.batches, beside="bytes <= 10%")
    for other in (rabbet.ADMM(), rabbet.CoRa(), rabbet.CGMQ()):  # the last two search otherwise
        with pytest.raises(PlanError, match=f"{type(other).__name__} does not"):
            rabbet.frontier(case.model, case.batches, method=other)
    with pytest.raises(PlanError, match="at least 2; found 1"):
        rabbet.frontier(case.model, case.batches, points=1)
    with pytest.raises(DataError, match="nothing says how good"):
        frontier.measure()
    with pytest.raises(PlanError, match="at least 0"):
        frontier.within(-1.0, lambda _: 0.0)
    with pytest.raises(BudgetError, match="was not measured"):
        frontier.at("latency <= 50%")


def test_the_loosest_point_allows_what_its_plan_takes():
    _, frontier = _frontier(axis="macs", points=6)
    assert frontier.points[0].cost.macs == frontier.float_cost.macs
    assert frontier.points[0].limit.text == "macs <= 100%"
    assert frontier.at("macs <= 100%") == frontier.points[0].plan


def test_a_tighter_point_costs_less_though_a_dead_layer_may_take_anything():
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Linear(10, 12), nn.ReLU(), nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, 3)
    ).eval()
    with torch.no_grad():
        model[2].weight.zero_()
    points = rabbet.frontier(model, [torch.randn(16, 10)], method=FAST, points=30).points
    assert len(points) > 5
    amounts = [point.cost.bytes for point in points]
    assert all(b < a for a, b in itertools.pairwise(amounts))
    harms = [point.harm for point in points]
    assert all(b >= a * (1 - 1e-6) for a, b in itertools.pairwise(harms))


def test_the_ends_of_an_axis_are_the_limits_that_were_given():
    case, frontier = _frontier(limits=("3,001 B", "20%"), points=5)
    assert frontier.points[0].limit.text == "bytes <= 20%"
    assert frontier.points[-1].limit.text == "bytes <= 3,001 B"
    close = rabbet.frontier(case.model, case.batches, limits=("20%", "20.003%"), method=FAST)
    whole = frontier.float_cost
    assert all(p.limit.amount(whole) <= 0.20003 * whole.bytes for p in close.points)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"limits": ("10%",)}, "both ends"),
        ({"limits": "10%"}, "both ends"),
        ({"limits": (0.1, 0.3)}, "both ends"),
        ({"limits": ("13%, macs <= 1%", "25%")}, "one limit of bytes"),
        ({"points": 2.5}, "whole number"),
        ({"axis": ["bytes"]}, "unknown axis"),
    ],
)
def test_what_is_no_axis_is_refused(given, message):
    with pytest.raises((BudgetError, PlanError), match=message):
        _frontier(**given)


@pytest.mark.slow
def test_measures_that_say_nothing_or_change_the_network_are_refused():
    case, frontier = _frontier(points=4)

    def zeroed(model):
        with torch.no_grad():
            next(model.parameters()).zero_()
        return 1.0

    def replaced(model):
        name, _ = next(model.named_children())
        setattr(model, name, nn.Identity())
        return 1.0

    mistakes = {
        lambda _: float("inf"): "finite",
        lambda _: None: "gave NoneType",
        lambda _: torch.ones(2): r"gave float32\[2\]",
        lambda model: float(model.half() is None): "changes",
        zeroed: "changes",
        replaced: "changes",
        5.0: "function of a network",
    }
    for measure, message in mistakes.items():
        _, fresh = _frontier(points=4)
        with pytest.raises(DataError, match=message):
            fresh.within(1.0, measure)
    for wrong in (0, -3, 2.5):
        with pytest.raises(PlanError, match="examples is a whole number"):
            frontier.measure(2, lambda _: 1.0, wrong)
        with pytest.raises(PlanError, match="examples is a whole number"):
            frontier.within(1.0, lambda _: 1.0, wrong)
    moved = frontier.within(1.0, lambda model: float(model.double().float() is not None))
    assert torch.isfinite(moved.result.model(*case.batches[:1])).all()


def test_arguments_that_nothing_can_be_done_with_are_refused_before_any_work():
    case, frontier = _frontier(points=4)
    fine = lambda _: 50.0  # noqa: E731
    with pytest.raises(PlanError, match="points is a whole number"):
        rabbet.frontier(case.model, case.batches, points=None)
    with pytest.raises(PlanError, match="count is a whole number"):
        frontier.measure(None, fine)
    with pytest.raises(PlanError, match="fits is a whole number"):
        frontier.within(1, fine, fits=None)


class _Loss:
    smaller_is_better = True

    def __call__(self, model):
        return 50.0


@pytest.mark.parametrize("measure", [lambda _: -5.0, lambda _: 100.5, _Loss()])
def test_examples_stand_behind_shares_in_per_cent_alone(measure):
    _, frontier = _frontier(points=4)
    for ask in (
        lambda n: frontier.measure(2, measure, n),
        lambda n: frontier.within(1, measure, n),
    ):
        with pytest.raises(DataError, match="leave examples out"):
            ask(10)
        ask(None)


def test_small_numbers_of_a_measure_are_shown():
    case, frontier = _frontier(points=4)
    reference = case.model(*case.batches[:1])
    with torch.no_grad():
        found = frontier.measure(
            2, lambda m: -float((m(*case.batches[:1]) - reference).abs().max())
        )
    ends = [row[-3] for row in found.table.rows]
    assert len(set(ends)) == len(ends)
    with pytest.raises(BudgetError, match=r"the least was [0-9.]*[1-9]"):
        frontier.within(0, lambda m: -float((m(*case.batches[:1]) - reference).abs().max()))


def test_a_result_has_the_histories_of_its_own_training():
    _, frontier = _frontier(points=4)
    tuned = replace(frontier, method=Joint(tuning=Tuning(steps=4)))
    counts = [len(tuned.fit(point).histories) for point in tuned.points[:2]]
    assert counts[0] == counts[1] > 0


def test_values_between_are_linear_in_the_logarithm_of_the_harm():
    told = interpolated([1e-4, 1e-3, 1e-2], {0: 90.0, 2: 80.0})
    assert told[1] == pytest.approx((85.0, 80.0, 90.0))
    assert told[0] == (90.0, 90.0, 90.0)
    # a measured point outside of both beside it widens all intervals by as much
    told = interpolated([1e-4, 1e-3, 1e-2, 1e-1, 1], {0: 90.0, 2: 92.0, 4: 80.0})
    assert told[1] == pytest.approx((91.0, 88.0, 94.0))
    # so does chance
    told = interpolated([1e-4, 1e-3, 1e-2], {0: 90.0, 2: 90.0}, 100)
    assert told[1][2] - told[1][0] == pytest.approx(1.645 * 3.0)
    # a share of examples is never above 100, and any other measure may be
    assert interpolated([1e-4, 1e-2], {0: 100.0, 1: 50.0}, 100)[0][1:] == (
        pytest.approx(100 - 1.645 * 5.0),
        100.0,
    )
    assert interpolated([1e-4, 1e-3, 1e-2], {0: 120.0, 2: 90.0})[1][2] == 120.0
    # few examples that are all right, or all wrong, are not certain
    low, high = interpolated([1e-4, 1e-2], {0: 100.0, 1: 100.0}, 1)[0][1:]
    assert low < 25
    assert high == 100.0
    assert interpolated([1e-4, 1e-2], {0: 0.0, 1: 0.0}, 10)[1][2] > 20


def test_the_next_try_closes_in():
    harms = [1e-4 * 1.3**k for k in range(40)]
    amounts = [1000 - 20 * k for k in range(40)]
    lost = [30 * h for h in harms]  # 1 at a harm of 0.033
    tried = {}
    for last in (False, False, False, True):
        place = next_try(harms, amounts, tried, 0.5, last)
        if place is None:
            break
        tried[place] = lost[place]
    best = max(k for k, drop in tried.items() if drop <= 0.5)
    assert lost[best] > 0.25
    assert next_try(harms, amounts, {20: 9.0, 10: 8.0, 5: 7.0}, 0.5, True) == 0


def test_a_sweep_fits_each_combination_and_says_what_cannot_be(tmp_path):
    case = network("residual")
    task = rabbet.Task(case.batches, evaluate=lambda model: float(model(*case.batches[:1]).std()))
    jobs = rabbet.Jobs(folder=tmp_path)
    method = Joint(tuning=rabbet.methods.joint.Tuning(steps=0))
    given = ["bytes <= 20%", "bytes <= 1%"], task, {"act": (8, None)}, method
    found = rabbet.sweep(case.model, *given, jobs=jobs)
    assert [(str(r.budget), r.settings["act"]) for r in found.rows] == [
        ("bytes <= 20%", 8), ("bytes <= 20%", None), ("bytes <= 1%", 8), ("bytes <= 1%", None)
    ]  # fmt: skip
    for row in found.rows[:2]:
        assert row.cost.bytes <= 0.2 * found.float_cost.bytes
        assert row.measure is not None
        assert row.plan.layers[0].act == row.settings["act"]
    assert all("cannot be met" in row.error and row.plan is None for row in found.rows[2:])
    assert "cannot be met" in str(found)
    found.plot(tmp_path / "sweep.svg")
    assert (tmp_path / "sweep.svg").stat().st_size > 1000
    again = rabbet.sweep(case.model, *given, jobs=rabbet.Jobs(folder=tmp_path))
    assert again.rows == found.rows


def test_a_sweep_refuses_settings_that_are_not_there():
    case = network("residual")
    with pytest.raises(PlanError, match="'bit' is no setting; there are grids"):
        rabbet.sweep(case.model, "bytes <= 20%", case.batches, {"bit": [1]})
    with pytest.raises(PlanError, match="no setting"):
        rabbet.sweep(case.model, "bytes <= 20%", case.batches, {"tuning.step": [1]})
    with pytest.raises(BudgetError, match="needs a budget"):
        rabbet.sweep(case.model, [], case.batches)


@pytest.mark.parametrize(
    "settings", [{"foo": []}, {"act": 8}, {3: [1]}, {"act": "8"}, ["act"], "act=8"]
)
def test_a_sweep_refuses_settings_without_names_or_values(settings):
    case = network("residual")
    with pytest.raises(PlanError, match="values to try"):
        rabbet.sweep(case.model, "bytes <= 20%", case.batches, settings)


def test_a_sweep_refuses_what_is_no_budget_or_measure_before_any_work():
    case = network("residual")
    for budgets in (None, 5, {"bytes": 3}):
        with pytest.raises(BudgetError, match="several in a list; found"):
            rabbet.sweep(case.model, budgets, case.batches)
    jobs = Jobs(progress=lambda *_: pytest.fail("worked"))
    with pytest.raises(DataError, match="function of a network"):
        rabbet.sweep(case.model, "bytes <= 20%", case.batches, measure="acc", jobs=jobs)


def test_rows_that_were_kept_cost_what_was_held_against_their_budget(tmp_path):
    # what is predicted of an exported file follows the one that was written last
    net = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    given = net, ["onnx <= 90%", "onnx <= 85%", "bytes <= 60%"], [torch.randn(32, 16)]
    first, again = (
        rabbet.sweep(*given, quality="fast", jobs=Jobs(folder=tmp_path)) for _ in range(2)
    )
    assert any(row.cost is not None for row in first.rows)
    assert again.rows == first.rows


def test_an_infinite_measure_is_null_and_not_drawn(tmp_path):
    case = network("residual")
    values = iter([float("inf"), 5.0, float("inf")])
    found = rabbet.sweep(
        case.model, ["bits <= 4", "bits <= 8"], case.batches, quality="fast", jobs=SHARED,
        measure=lambda _: next(values),
    )  # fmt: skip
    facts = json.loads(json.dumps(found.facts(), allow_nan=False))
    assert [row["measure"] for row in facts["rows"]] == [None, 5.0]
    assert facts["float"]["measure"] is None
    assert facts["float"]["onnx"] is facts["float"]["latency"] is None
    assert [row["y"] for row in sweep_facts(found)["rows"]] == [5.0]
    found.report(tmp_path / "a.html")
    found.plot(tmp_path / "a.svg")
    with pytest.raises(BudgetError, match="unknown metric 'foo'"):
        found.plot(tmp_path / "b.svg", "foo")


def test_a_network_that_runs_in_eval_mode_is_measured_so():
    model = nn.Sequential(nn.Linear(24, 24), nn.Dropout(0.5), nn.Linear(24, 4)).train()
    frontier = rabbet.frontier(model, [torch.randn(64, 24)], method=FAST, points=6)
    modes = []
    frontier.measure(2, lambda m: modes.append(m.training) or 1.0)
    assert modes == [False, False, False]  # the float network, and two points
    assert model.training


def test_a_deviation_does_not_vanish_where_all_examples_are_right():
    assert deviation(100, 90.0) == pytest.approx(3.0)
    assert deviation(450, 440 / 4.5, 444 / 4.5) == pytest.approx(
        100 * math.sqrt((440 * 10 + 444 * 6) / 450**3)
    )
    assert deviation(1, 100.0) == deviation(1, 0.0) == 50.0
    assert deviation(3, 100.0) > 25
    # of none wrong among n, 90 % are sure of no more than this
    for n in (50, 1000):
        assert 1.645 * deviation(n, 100.0) == pytest.approx(100 * (1 - 0.1 ** (1 / n)), rel=0.05)
