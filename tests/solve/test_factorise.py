"""One weight, every solver: `rabbet.solve.factorise`."""

import itertools

import pytest
import torch
from networks import rand

from rabbet.errors import FileError, PlanError
from rabbet.solve import factorise, quantised_cp
from rabbet.solve.als import khatri_rao

PARTS = [rand(n, 6, seed=k) for k, n in enumerate((12, 10, 9))]
WEIGHT = torch.einsum("or,ir,kr->oik", *PARTS).view(12, 10, 3, 3) + 0.3 * rand(12, 10, 3, 3, seed=3)
SHORT = {"sweeps": 4, "inner": 5}


def test_a_grid_may_be_named_by_its_bits():
    named, told = (factorise(WEIGHT, 8, grid, solver="nearest").error for grid in (4, "4"))
    assert named == told


def _put_together(found):
    a, b, c = found.factors
    return (a.double() @ khatri_rao((b.double(), c.double())).mT).view(WEIGHT.shape)


@pytest.mark.parametrize(
    ("solver", "start"),
    itertools.product(("admm", "feedback", "nearest"), ("random", "svd", "als", "epc", "varpro")),
)
def test_the_error_is_that_of_the_factors(solver, start):
    found = factorise(WEIGHT, 8, solver=solver, start=start, **SHORT)
    error = (_put_together(found) - WEIGHT.double()).norm() / WEIGHT.double().norm()
    assert found.error == pytest.approx(float(error), rel=1e-5)
    assert found.error == pytest.approx(min(found.history), rel=1e-9)
    assert (len(found.primal) > 0) == (solver == "admm")
    assert all(-8 <= q.codes.min() <= q.codes.max() <= 7 for q in found.numbers)
    again = factorise(WEIGHT, 8, solver=solver, start=start, **SHORT)
    assert all(map(torch.equal, found.factors, again.factors))


def test_the_papers_order_of_solvers_holds():
    """ADMM below rounding, EPC below ALS and a random start, more bits below fewer."""
    admm, nearest = (factorise(WEIGHT, 8, solver=s).error for s in ("admm", "nearest"))
    assert admm < nearest
    assert admm < factorise(WEIGHT, 8, start="random").error
    errors = [factorise(WEIGHT, 8, grid).error for grid in ("8", "4", "2")]
    assert errors == sorted(errors)


def test_in_the_metric_the_error_is_that_of_the_outputs():
    inputs = rand(200, 90, seed=1) * torch.linspace(2, 0.1, 90)
    second = inputs.mT @ inputs / 200
    found = factorise(WEIGHT, 8, metric=second, start="varpro", solver="feedback", **SHORT)
    delta = (_put_together(found) - WEIGHT.double()).flatten(1)
    whole = WEIGHT.double().flatten(1)
    error = ((delta @ second.double()) * delta).sum() / ((whole @ second.double()) * whole).sum()
    assert found.error == pytest.approx(float(error.sqrt()), rel=1e-4)


def _chained(found, kernel):
    """The kernel that the factors of a chain stand for."""
    v, u, *cores = (f.double() for f in found.factors)
    product = u
    for core in cores:
        product = torch.tensordot(product, core.view(len(core), product.shape[-1], -1), ([-1], [1]))
    return (product @ v.mT).movedim(-1, 0).reshape(kernel.shape)


KERNELS = {"3x3": WEIGHT, "1x3": WEIGHT[:, :, :1], "3": WEIGHT[:, :, 0]}


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=list(KERNELS))
@pytest.mark.parametrize("form", ["tucker", "tt"])
@pytest.mark.parametrize(
    ("solver", "start"),
    [*itertools.product(("admm", "feedback", "nearest"), ("random", "svd", "als"))],
)
def test_the_error_of_a_chain_is_that_of_its_factors(kernel, form, solver, start):
    found = factorise(kernel, 7, form=form, solver=solver, start=start, **SHORT)
    error = (_chained(found, kernel) - kernel.double()).norm() / kernel.double().norm()
    assert found.error == pytest.approx(float(error), rel=1e-5)
    assert found.error == pytest.approx(min(found.history), rel=1e-9)
    if solver == "admm":
        assert found.error < found.history[0]
    assert found.start_error < found.error or start == "random"


def test_a_tensor_train_of_a_kernel_of_one_axis_is_tucker_with_its_own_ranks():
    """A train over inputs, places and outputs is Tucker-2; only how one rank sets two differs."""
    kernel = WEIGHT[:10, :, 0]  # as many outputs as inputs: both ranks are the same
    tucker, train = (factorise(kernel, 5, form=form, **SHORT) for form in ("tucker", "tt"))
    assert all(map(torch.equal, tucker.factors, train.factors))


@pytest.mark.parametrize("form", ["tucker", "tt"])
def test_the_order_of_solvers_holds_for_chains(form):
    """ADMM below rounding, least squares below a random start, more bits below fewer."""
    admm, nearest = (factorise(WEIGHT, 6, form=form, solver=s).error for s in ("admm", "nearest"))
    assert admm < nearest
    assert admm < factorise(WEIGHT, 6, form=form, start="random").error
    errors = [factorise(WEIGHT, 6, grid, form=form).error for grid in ("8", "4", "2")]
    assert errors == sorted(errors)


def test_one_axis_is_factorised_too():
    assert factorise(rand(8, 6, 5), 10, "8", **SHORT).error < 0.5


def test_variable_projection_rounded_in_turn_is_quantised_cp():
    found = factorise(WEIGHT, 8, start="varpro", solver="feedback", sweeps=10)
    assert found.error == pytest.approx(quantised_cp(WEIGHT, 8, 4).error, rel=0.05)


def test_the_history_is_drawn(tmp_path):
    factorise(WEIGHT, 4, **SHORT).plot(tmp_path / "a.svg")
    factorise(WEIGHT, 4, solver="nearest").plot(tmp_path / "b.png")
    assert (tmp_path / "a.svg").stat().st_size > 1000
    assert (tmp_path / "b.png").stat().st_size > 1000
    with pytest.raises(FileError, match="cannot write the picture"):
        factorise(WEIGHT, 4, **SHORT).plot(tmp_path / "c.doc")
    assert len([*tmp_path.iterdir()]) == 2


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"rank": 0}, "rank 0 is none"),
        ({"rank": 91}, "1 to 90"),
        ({"form": "ttm"}, "form is one of cp, tucker, tt"),
        ({"solver": "sgd"}, "solver is one of admm"),
        ({"start": "zero"}, "start is one of random"),
        ({"form": "tucker", "start": "epc"}, "start='epc' is for CP"),
        ({"form": "tt", "start": "varpro"}, "start='varpro' is for CP"),
        ({"form": "tucker", "rank": 11}, "1 to 10"),
        ({"form": "tt", "rank": 31}, "1 to 30"),
        ({"form": "tt", "metric": torch.eye(90)}, "tt has no metric here"),
        ({"metric": torch.eye(4)}, r"is \[90, 90\]; found \[4, 4\]"),
        ({"metric": torch.eye(90), "slack": None}, "only without a metric"),
        ({"weight": rand(4, 4, 1, 1)}, "more than one place"),
        ({"weight": rand(4, 4, 3, 3) * torch.nan}, "the weight holds numbers that are not finite"),
        ({"weight": torch.ones(4, 4, 3, 3, dtype=torch.int64)}, "found torch.int64"),
        ({"weight": [1.0]}, "found list"),
        ({"weight": rand(0, 3, 3, 3)}, "more than one place"),
        ({"metric": torch.eye(90) * torch.nan}, "the metric holds numbers that are not finite"),
        ({"metric": -torch.eye(90)}, "no eigenvalue below 0"),
        ({"metric": rand(90, 90)}, "symmetric"),
        ({"metric": [1.0]}, "found list"),
        ({"rank": 2.5}, "rank is a whole number"),
        ({"sweeps": -1}, "sweeps is a whole number, at least 0"),
        ({"inner": 1.5}, "inner is a whole number, at least 0"),
        ({"seed": 1.5}, "seed is a whole number"),
        ({"slack": float("nan")}, "slack is a number from 1"),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_refused(given, words):
    settings = {"weight": WEIGHT, "rank": 4} | given
    with pytest.raises(PlanError, match=words):
        factorise(**settings)


@pytest.mark.parametrize("start", ["random", "svd", "als", "epc", "varpro"])
@pytest.mark.parametrize("metric", [None, torch.eye(27)], ids=["plain", "metric"])
def test_a_kernel_of_zeros_has_factors_of_zeros(start, metric):
    found = factorise(torch.zeros(4, 3, 3, 3), 2, start=start, metric=metric, **SHORT)
    assert found.error == 0.0
    assert not any(f.any() for f in found.factors)
    assert factorise(torch.zeros(4, 3, 3, 3), 2, slack=None, **SHORT).error == 0.0


def test_inputs_that_are_always_zero_leave_nothing_to_factorise():
    metric = torch.zeros(90, 90, requires_grad=True)
    found = factorise(WEIGHT, 4, metric=metric, **SHORT)
    assert found.error == 0.0
    assert not any(f.requires_grad for f in found.factors)
