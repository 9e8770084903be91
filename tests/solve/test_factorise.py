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


def test_tucker_and_one_axis_are_factorised_too():
    assert factorise(WEIGHT, 6, "8", form="tucker", start="svd", **SHORT).error < 0.8
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
        ({"form": "tt"}, "form is one of cp, tucker"),
        ({"solver": "sgd"}, "solver is one of admm"),
        ({"start": "zero"}, "start is one of random"),
        ({"form": "tucker"}, "begins with start='svd'"),
        ({"metric": torch.eye(4)}, r"is \[90, 90\]; found \[4, 4\]"),
        ({"metric": torch.eye(90), "slack": None}, "only without a metric"),
        ({"weight": rand(4, 4, 1, 1)}, "more than one place"),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_refused(given, words):
    settings = {"weight": WEIGHT, "rank": 4} | given
    with pytest.raises(PlanError, match=words):
        factorise(**settings)
