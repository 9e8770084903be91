"""Bits of inputs chosen beside those of weights."""

import pytest
import torch
from networks import network, tokens

import rabbet
from rabbet import Jobs, Joint, Task
from rabbet.calibrate.ranges import calibrate_ranges
from rabbet.choose.sensitivity import input_errors
from rabbet.core.plan import LayerPlan, Plan
from rabbet.methods.joint import Tuning
from rabbet.model.build import build
from rabbet.workpiece import Workpiece

PLAIN = {"grids": ("2hc", "4c", "8c"), "rank": False, "tuning": Tuning(steps=0)}


@pytest.mark.parametrize("name", ["residual", "tokens", "blocks"])
def test_fewer_bits_of_an_input_cost_more_each_about_what_it_does(name):
    case = network(name)
    piece = Workpiece.of(case.model, Task(case.batches), Jobs())
    found = input_errors(piece, (3, 4, 8))
    assert found.keys() == {s.name for s in piece.survey if s.multiplies}
    for each in found.values():
        assert each[3] > each[4] > each[8] >= 0


def test_what_is_told_of_one_input_is_what_rounding_it_does():
    case, batches = network("tokens"), tokens(count=120)
    piece = Workpiece.of(case.model, Task(batches), Jobs())
    told = input_errors(piece, (4,))["head"][4]
    plan = Plan((LayerPlan.parse("head dense@f32 | act@4"),))
    student = build(piece.model, plan, piece.survey)
    calibrate_ranges(student, piece.task)
    with torch.no_grad():
        parts = [
            float(piece.answers.error([student(batch)], [case.model.eval()(batch)]))
            for batch in batches
        ]
    assert told == pytest.approx(sum(parts) / len(parts), rel=0.3)


def test_the_program_chooses_bits_of_inputs_no_worse_than_one_width_for_all():
    case = network("residual")
    piece = Workpiece.of(case.model, Task(case.batches), Jobs())
    budget = rabbet.Budget.parse("bops <= 1.5%")
    free = Joint(**PLAIN, acts=(3, 4, 6, 8)).chooser(piece)
    plan = free.plans([budget])[0]
    assert len({line.act for line in plan}) > 1
    budget.check(piece.cost(plan), piece.float_cost)
    for bits in (4, 6):
        one = Joint(**PLAIN, act=bits).chooser(piece).plans([budget])[0]
        lines = [layer.lines for layer in free.layers]
        assert all(line.terms in known for line, known in zip(one, lines, strict=True))
        # harms of both, by what the free search knows of them or hopes for
        assert free.harm(plan) <= free.harm(one) * (1 + 1e-6)


def test_without_a_choice_nothing_is_measured_of_inputs(monkeypatch):
    case = network("residual")
    monkeypatch.setattr("rabbet.choose.search.input_errors", lambda *_: pytest.fail("measured"))
    plan = rabbet.plan(case.model, "bits <= 4", case.batches, Joint(**PLAIN))
    assert {line.act for line in plan} == {8}


def test_a_width_that_there_is_not_is_refused():
    with pytest.raises(rabbet.RabbetError, match="bits"):
        Joint(acts=(4, 12))
