"""Dense terms of some outputs: one layer on several grids, from its text to the runtime."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import NETWORKS, network, thinned

import rabbet
from rabbet import Joint, Plan, Task
from rabbet.core.plan import Term
from rabbet.data.batches import outputs
from rabbet.errors import PlanError
from rabbet.forms.dense import rows_of, runs
from rabbet.model.build import LayerPlan, build
from rabbet.model.compressed import compressed_layers
from rabbet.model.prepare import prepared
from rabbet.train.tuning import Tuning

ROWS = st.sets(st.integers(0, 40), min_size=1).map(lambda numbers: tuple(sorted(numbers)))
QUICK = Joint(tuning=Tuning(steps=0))


@given(ROWS)
def test_rows_are_their_text(rows):
    assert rows_of(runs(rows)) == rows
    term = Term.parse(f"dense[{runs(rows)}]@3c")
    assert term.form.rows == rows
    assert str(term) == f"dense[{runs(rows)}]@3c"


@pytest.mark.parametrize(
    "text", ["", "3-", "-3", "5,4", "4,4", "0-1,2", "1-1", "a", "0-99999999999", "9" * 5000]
)
def test_what_is_not_a_set_of_rows(text):
    with pytest.raises(PlanError, match=r"rows|no layer has so many"):
        rows_of(text)


def _split(plan, grids=("4c", "2hc")):
    """Every other output of each layer without groups is on another grid."""
    lines = []
    for site, line in plan:
        if site.groups > 1 or site.shape[0] < 2:
            lines.append(line)
            continue
        outs = range(site.shape[0])
        terms = tuple(
            Term.parse(f"dense[{runs(outs[k::2])}]@{grid}") for k, grid in enumerate(grids)
        )
        lines.append(LayerPlan(line.name, terms, line.act))
    return Plan(tuple(lines))


def _plans(name, grid="4c"):
    case = network(name)
    case = replace(case, model=prepared(case.model, Task(case.batches))[0])
    survey = rabbet.survey(case.model, case.batches)
    whole = Plan(tuple(
        LayerPlan(s.name, (Term.parse(f"dense@{grid}"),), 8 if s.multiplies else None)
        for s in survey
    ))  # fmt: skip
    return case, survey, whole, zip(survey, whole, strict=True)


@pytest.mark.parametrize("name", NETWORKS)
def test_rows_on_one_grid_are_the_layer_on_it(name):
    case, _, whole, pairs = _plans(name)
    split = _split(pairs, ("4c", "4c"))
    a, b = (build(case.model, p, rabbet.survey(case.model, case.batches)) for p in (whole, split))
    for one, other in zip(
        compressed_layers(a).values(), compressed_layers(b).values(), strict=True
    ):
        assert torch.equal(one.canonical, other.canonical)
        assert other.plan in split.layers
    costs = [rabbet.price(case.model, p, case.batches) for p in (whole, split)]
    assert costs[0].macs == costs[1].macs
    assert costs[0].bops == costs[1].bops


@pytest.mark.parametrize("name", thinned(NETWORKS))
def test_a_network_of_rows_is_fitted_and_saved(name, tmp_path):
    case, _, _, pairs = _plans(name)
    split = _split(pairs)
    result = rabbet.fit(case.model, split, case.batches, QUICK)
    assert result.plan == split
    path = tmp_path / "a.safetensors"
    assert result.save(path) == result.cost.bytes == path.stat().st_size
    task = Task(case.batches)
    again = rabbet.load(path, case.model)
    with torch.no_grad():
        answers, wanted = (outputs(task.run(m, case.batches[0])) for m in (again, result.model))
    assert all(torch.equal(a, b) for a, b in zip(answers, wanted, strict=True))


def test_rows_are_solved_as_if_they_were_the_layer():
    case, _, whole, pairs = _plans("residual")
    a, b = (
        rabbet.fit(case.model, p, case.batches, QUICK).model
        for p in (whole, _split(pairs, ("4c", "4c")))
    )
    one, other = (next(iter(compressed_layers(m).values())).canonical for m in (a, b))
    assert (one - other).norm() < 0.02 * one.norm()


def test_a_term_of_some_outputs_alone_can_be_tuned():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Conv2d(4, 2, 3))
    data = [torch.randn(4, 3, 8, 8) for _ in range(4)]
    plan = Plan.parse("0 dense[0-2]@4c | act@8\n2 dense@4c | act@8")
    assert rabbet.fit(model, plan, data, Joint(tuning=Tuning(steps=2))).plan == plan


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("dense[0-99]@4c | act@8", "there is no output 99"),
        ("lowrank[0-2]@4c | act@8", "takes a rank of at least 1"),
        ("dense[2,1]@4c | act@8", "rising order"),
    ],
)
def test_rows_that_are_not_there(body, said):
    case, survey, _, _ = _plans("residual")
    with pytest.raises(PlanError, match=said):
        rabbet.price(case.model, Plan.parse(f"{next(iter(survey)).name} {body}"), case.batches)


def test_layers_with_groups_have_no_rows():
    model = torch.nn.Sequential(torch.nn.Conv2d(4, 4, 3, groups=2))
    with pytest.raises(PlanError, match="dense does not fit"):
        rabbet.price(model, Plan.parse("0 dense[0]@4c | act@8"), [torch.zeros(1, 4, 5, 5)])
