"""ResNet-20 on CIFAR-10, with published weights: what a user can expect on a real network."""

import pytest
import torch

from rabbet import Budget, Jobs, Joint, Plan, Task, accuracy, compress, fit, load, survey
from rabbet.calibrate.ranges import calibrate_ranges
from rabbet.core.plan import LayerPlan, Term
from rabbet.forms import Dense, LowRank
from rabbet.grids.grid import Grid, Quantised
from rabbet.jobs import silent
from rabbet.model.bn_fold import fold
from rabbet.model.build import build
from rabbet.reconstruct.candidates import canonical, read_numbers, solve_site
from rabbet.solve.metric import Metric
from rabbet.train.tuning import Tuning
from rabbet.workpiece import Workpiece

pytestmark = pytest.mark.data
PLAIN = Joint(
    grids=("2hc", "3c", "4c", "8c"),
    adapters=(("2hc", 0.1),),
    forms=("lowrank",),
    shares=(0.5,),
    factor_grids=("4c",),
    tuning=Tuning(steps=0),
)


@pytest.fixture(scope="module")
def net(real):
    return real.nets.cifar_resnet(20)


@pytest.fixture(scope="module")
def calibration(real):
    images, _ = real.load.cifar10("train", 128)
    return list(torch.from_numpy(images).split(64))


@pytest.fixture(scope="module")
def test(real):
    images, labels = real.load.cifar10("test", 500)
    return list(
        zip(torch.from_numpy(images).split(250), torch.from_numpy(labels).split(250), strict=True)
    )


@pytest.fixture(scope="module")
def whole(net, test):
    return accuracy(net, test)


@pytest.fixture(scope="module")
def piece(net, calibration):
    return Workpiece.of(net, Task(calibration), Jobs())


def test_every_batch_norm_is_folded_and_the_network_answers_as_before(net, test, whole):
    surveyed = survey(net, [test[0][0]])
    assert len(surveyed.sites) == 20
    assert sum(s.norm is not None for s in surveyed) == 19
    assert not surveyed.left
    folded = fold(net, surveyed)
    with torch.no_grad():
        for x, _ in test:
            assert torch.allclose(folded(x), net(x), rtol=1e-4, atol=1e-4)
    assert accuracy(folded, test) == whole
    assert surveyed.weights == sum(s.numel for s in surveyed) == 268_336
    assert sum(s.macs for s in surveyed) == 40_551_040


@pytest.mark.slow
def test_eight_bits_for_weights_and_inputs_lose_next_to_nothing(piece, test, whole):
    plan = "\n".join(f"{s.name} dense@8c | act@8" for s in piece.survey)
    result = fit(piece.model, plan, piece.task, PLAIN, jobs=piece.jobs)
    assert accuracy(result.model, test) >= whole - 0.5
    assert result.cost.bytes < 0.28 * result.float_cost.bytes


@pytest.mark.slow
def test_three_bits_a_weight_lose_at_most_a_point_and_a_half_without_tuning(
    net, piece, calibration, test, whole, tmp_path
):
    result = compress(net, "bits <= 3", calibration, PLAIN, jobs=piece.jobs)
    score = accuracy(result.model, test)
    assert score >= whole - 1.5
    assert result.cost.bits <= 3
    assert result.save(tmp_path / "f") == result.cost.bytes
    again = load(tmp_path / "f", net)
    with torch.no_grad():
        assert all(torch.equal(result.model(x), again(x)) for x, _ in test)


@pytest.mark.slow
def test_error_feedback_rounding_beats_rounding_to_nearest_at_three_bits(piece, test):
    moments, grid = piece.moments(), Grid.parse("3c")
    terms = (Term(Dense(), grid),)
    plan = Plan(tuple(LayerPlan(s.name, terms) for s in piece.survey))

    def feedback(site):
        result = solve_site(piece.weight(site), moments[site.name], site=site, menu=(terms,))
        return read_numbers(result, (terms,), 0)

    def nearest(site):
        return [[Quantised.nearest(piece.weight(site), grid)]]

    ours, plain = (
        accuracy(
            build(piece.model, plan, piece.survey, {s.name: way(s) for s in piece.survey}), test
        )
        for way in (feedback, nearest)
    )
    assert ours > plain + 5


@pytest.mark.slow
def test_whitened_adapters_beat_plain_ones(piece, test):
    moments = piece.moments()
    base, fine = Grid.parse("3c"), Grid.parse("8c")
    ranks = {s.name: max(1, round(0.08 * s.numel / (s.shape[0] + s.columns))) for s in piece.survey}
    plan = Plan(
        tuple(
            LayerPlan(s.name, (Term(Dense(), base), Term(LowRank(ranks[s.name]), fine)))
            for s in piece.survey
        )
    )

    def adapted(whiten):
        numbers, error = {}, 0.0
        for s in piece.survey:
            weight, metric = piece.weight(s), Metric(moments[s.name])
            first = Quantised.nearest(weight, base)
            parts = LowRank(ranks[s.name]).decompose(
                s, weight - first.values, metric.second if whiten else None
            )
            numbers[s.name] = [[first], [Quantised.nearest(p, fine) for p in parts]]
            delta = canonical(s, plan[s.name].terms, numbers[s.name]) - weight
            error += metric.error(s.matrix(delta)).sum().item()
        return error, accuracy(build(piece.model, plan, piece.survey, numbers), test)

    (white_error, white), (plain_error, plain) = adapted(True), adapted(False)
    assert white_error < 0.9 * plain_error
    assert white > plain


@pytest.mark.slow
def test_a_plan_of_real_layers_keeps_several_limits_at_once(piece):
    chosen = PLAIN.plan(piece, Budget.parse("bytes <= 10%, bops <= 2%, bits <= 2.6"))
    cost, whole = piece.cost(chosen), piece.float_cost
    assert cost.bytes <= 0.1 * whole.bytes
    assert cost.bops <= 0.02 * whole.bops
    assert cost.bits <= 2.6
    assert cost.bits > 2.4  # the budget is used up
    assert len({line.terms for line in chosen}) > 2  # widths differ


def test_ranges_hold_what_really_passes(piece, calibration):
    plan = Plan(
        tuple(LayerPlan(s.name, (Term(Dense(), Grid.parse("8c")),), 8) for s in piece.survey)
    )
    student = build(piece.model, plan, piece.survey)
    calibrate_ranges(student, Task(calibration), progress=silent)
    with torch.no_grad():
        out, true = student(calibration[0]), piece.model(calibration[0])
    assert (out - true).norm() / true.norm() < 0.05
