"""The integer program against brute force: no budget that a choice keeps is refused."""

import itertools
import math
import random

import pytest
import torch
from endurance import budgets, random_table
from torch import nn

from rabbet import Budget, Jobs, Joint, Task, fit
from rabbet.choose.milp import LARGEST, UNIT, IntegerProgram
from rabbet.choose.program import Option, picked, require_feasible
from rabbet.core.layout import header
from rabbet.core.plan import LayerPlan, Plan
from rabbet.errors import BudgetError
from rabbet.train.tuning import Tuning
from rabbet.workpiece import Workpiece


@pytest.mark.parametrize("seed", range(24))
def test_budgets_near_what_a_plan_costs_are_answered_as_by_brute_force(seed, tmp_path):
    budgets(seed, tmp_path)


@pytest.mark.parametrize("seed", range(12))
def test_the_frame_of_a_table_says_how_long_every_header_is(seed):
    draw = random.Random(seed)
    torch.manual_seed(seed)
    piece, table = random_table(draw)
    frame = piece.frame([[option.plan for option in row] for row in table])
    program = IntegerProgram([len(row) for row in table])
    acts = {option.plan.act for row in table for option in row}
    for _ in range(40):
        choice = [draw.randrange(len(row)) for row in table]
        plan = picked(table, choice)
        length = len(header(piece.survey, plan, piece.rest(plan))) - 8
        text = frame.text(program.places(choice))
        # never longer; as long where the same arrays are there for every choice
        assert text <= length
        assert len(acts) > 1 or -(-text // 8) * 8 == length


def test_where_an_array_begins_takes_a_digit_more_at_a_power_of_ten():
    piece = _linear(8, 125)
    rows = [[LayerPlan.parse(f"0 dense@{bits}c | act@8") for bits in (2, 7, 8)]]
    frame = piece.frame(rows)
    assert frame.steps  # 250, 875 and 1,000 bytes of codes
    assert len({frame.text([k]) - frame.lines[k] for k in range(3)}) > 1
    for k in range(3):
        size = len(header(piece.survey, Plan((rows[0][k],)), piece.rest(Plan((rows[0][k],))))) - 8
        assert -(-frame.text([k]) // 8) * 8 == size


def _linear(inputs, outputs):
    network = nn.Sequential(nn.Linear(inputs, outputs)).eval()
    return Workpiece.of(network, Task([torch.zeros(2, inputs)]), Jobs())


def test_the_smallest_file_may_be_one_of_more_codes_and_a_shorter_line():
    # 1,023 codes and a long line against 1,024 codes and a short one: padding decides.
    piece = _linear(3, 5)
    site = piece.survey["0"]
    lines = [
        "0 dense@4c",
        "0 dense[0-2]@4c + dense[3-4]@4c",
        "0 dense@4g2",
        "0 dense@t",
        "0 dense@1",
    ]
    for pair in itertools.combinations(lines, 2):
        options = [Option(x, piece.layer_cost(site, x)) for x in map(LayerPlan.parse, pair)]
        least = min(piece.cost(Plan((option.plan,))).bytes for option in options)
        require_feasible([options], Budget.parse(f"bytes <= {least}"), piece)
        with pytest.raises(BudgetError, match=f"smallest reachable value is {least:,} bytes"):
            require_feasible([options], Budget.parse(f"bytes <= {least - 1}"), piece)


def test_scores_that_differ_by_many_powers_of_ten_are_told_apart():
    program = IntegerProgram([3, 3, 3])
    program.limit([0, 1, 2] * 3, 2)
    scores = [[1e3, 4e-9, 1e-9], [1e3, 2e-9, 1e-9], [2e-9, 1.5e-9, 1e-9]]
    assert program.best(scores).choice == [1, 1, 0]


@pytest.mark.parametrize("exponents", [(0, 0), (-12, 12), (-320, -290)])
def test_the_choice_is_the_best_of_all_however_far_scores_lie_apart(exponents):
    for seed in range(40):
        draw = random.Random(seed)
        counts = [draw.randint(1, 6) for _ in range(draw.randint(1, 5))]
        program, choices = IntegerProgram(counts), list(itertools.product(*map(range, counts)))
        places = [program.places(choice) for choice in choices]
        amounts = [draw.randint(0, 1000) for _ in range(program.options)]
        sums = [sum(amounts[k] for k in chosen) for chosen in places]
        most = draw.choice(sums)
        program.limit(amounts, most)
        flat = [draw.random() * 10 ** draw.uniform(*exponents) for _ in amounts]
        rows = itertools.pairwise(itertools.accumulate([0, *counts]))
        found = program.best([flat[start:end] for start, end in rows]).choice
        totals = [math.fsum(flat[k] for k in chosen) for chosen in places]
        best = min(total for total, size in zip(totals, sums, strict=True) if size <= most)
        assert math.fsum(flat[k] for k in program.places(found)) <= best * (1 + 1e-9)


def test_limits_that_only_together_leave_nothing_are_proven_to():
    program = IntegerProgram([2, 2])
    program.limit([0, 3, 0, 3], 3)
    program.limit([3, 0, 3, 0], 2)
    answer = program.best([[0.0, 1.0], [0.0, 1.0]])
    assert answer.choice is None
    assert answer.proven


def test_choices_that_are_taken_out_do_not_come_back():
    program, seen = IntegerProgram([2, 3]), set()
    while (answer := program.best([[0.0, 1.0], [0.0, 1.0, 2.0]])).choice is not None:
        assert tuple(answer.choice) not in seen
        seen.add(tuple(answer.choice))
        program.exclude(answer.choice)
    assert answer.proven
    assert seen == set(itertools.product(range(2), range(3)))


def test_the_price_of_the_checksum_is_in_the_bytes(tmp_path):
    network = nn.Sequential(nn.Linear(3, 2)).eval()
    result = fit(network, "0 dense@4c", [torch.zeros(2, 3)], Joint(tuning=Tuning(steps=0)))
    size = result.save(tmp_path / "f")
    assert b'"crc32":"' in (tmp_path / "f").read_bytes()
    assert size == result.cost.bytes == (tmp_path / "f").stat().st_size


@pytest.mark.parametrize("most", [1, 63, 64, 65, 12_345, 10**6, 10**9])
def test_limits_reach_the_solver_small_and_exact(most):
    program = IntegerProgram([2, 3])
    amounts = [0, most, 0, most // 2, 1]
    program.limit(amounts, most)
    _, limits, ends = program._matrices()
    scale = float(ends[0]) / most
    assert scale.hex().startswith("0x1.0000000000000p")  # a power of two
    assert scale >= UNIT
    assert most * scale <= LARGEST or scale == UNIT
    found = (limits.toarray()[0] / scale).tolist()
    assert found == amounts
