"""Claims cost a file nothing: reading takes no more work and memory than its length warrants."""

import json
import math
import subprocess
import sys

import pytest
import torch
from endurance import framed, without_checksum
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from rabbet import Joint, Plan, fit
from rabbet.core.cost import Cost
from rabbet.core.plan import LayerPlan, Term, outputs_named
from rabbet.core.survey import Survey
from rabbet.errors import FileError, PlanError
from rabbet.export.native import read_parts
from rabbet.forms import Dense
from rabbet.forms.modes import balanced
from rabbet.grids.grid import Grid
from rabbet.layers import Site
from rabbet.layers.linear import Linear
from rabbet.report.text import plain, report_parts
from rabbet.train.tuning import Tuning

PRIMES = 2_147_483_647, 2_147_483_629
DEEP = "[" * 100_000
NUMBER = "9" * 4000


@pytest.fixture(scope="module")
def older(tmp_path_factory):
    """A file without a checksum, so that its claims are read: a conv, a table, a linear."""
    path = tmp_path_factory.mktemp("claims") / "f"
    network = nn.Sequential(nn.Embedding(7, 6), nn.Conv1d(5, 8, 3), nn.Flatten(), nn.Linear(32, 4))
    text = "0 dense@4c\n1 dense@4c\n3 dense@4c"
    batch = [torch.zeros(2, 5, dtype=torch.long)]
    fit(network.eval(), text, batch, Joint(tuning=Tuning(steps=0), act=None)).save(path)
    return without_checksum(path.read_bytes())


def _claiming(data, plan=None, sites=(), survey=None, entry=None, header=None):
    """The file with another plan, other facts of some sites, another survey, entry or header."""
    size = int.from_bytes(data[:8], "little")
    values, content = data[8 + size :], json.loads(data[8 : 8 + size])
    facts = content["__metadata__"]
    known = json.loads(facts["survey"])
    for site, part, value in sites:
        known["sites"][site][part] = value
    facts["survey"] = json.dumps(known) if survey is None else survey(facts["survey"])
    facts["plan"] = facts["plan"] if plan is None else plan
    content["rabbet.codes"] |= entry or {}
    return framed((header or json.dumps(content)).encode(), values)


LINES = "0 dense@4c", "1 dense@4c", "3 dense@4c"
CLAIMS = {
    "a conv of a prime number of channels": {
        "plan": "0 dense@4c\n1 tt[8]@4\n3 dense@4c",
        "sites": [(1, 2, [8, math.prod(PRIMES), 3])],
    },
    "a conv of a smaller prime number of channels": {
        "plan": "0 dense@4c\n1 tt[8]@4\n3 dense@4c",
        "sites": [(1, 2, [8, PRIMES[0], 1])],
    },
    "a table of prime sides": {"plan": "0 ttm[2]@4", "sites": [(0, 2, list(PRIMES))]},
    "a number that is too large for any tensor": {"sites": [(2, 2, [4, 2**60])]},
    "a shape that is too large for any tensor": {"sites": [(1, 2, [2**40, 2**40, 3])]},
    "many axes": {"sites": [(1, 2, [2] * 5000)]},
    "a very long number": {"sites": [(2, 3, int(NUMBER))]},
    "a longer number": {"survey": lambda text: text.replace("[4,32]", f"[4, {NUMBER * 9}]")},
    "a long rank": {"plan": f"3 lowrank[{NUMBER}]@4"},
    "a longer rank": {"plan": f"3 tt[{NUMBER * 9}]@4"},
    "many modes": {"plan": f"3 tt[1:{'x'.join('1' * 99_999)}:4]@4"},
    "modes of a very long product": {"plan": f"3 tt[1:{'x'.join('9' * 99_999)}:4]@4"},
    "a long mode": {"plan": f"3 tt[1:{NUMBER}:4]@4"},
    "many outputs": {"plan": "3 " + " + ".join(["dense[0-999999]@4c"] * 2000)},
    "many terms": {"plan": "3 " + " + ".join(["dense@8c"] * 20_000)},
    "many terms of a large layer": {
        "plan": "0 " + " + ".join(["dense@8"] * 2000), "sites": [(0, 2, [2**26, 2**26])],
    },
    "a long grid": {"plan": f"3 dense@{'a' * 300_000}"},
    "a long axis": {"plan": f"3 dense@4c{NUMBER * 9}"},
    "a long line": {"plan": "3 " * 100_000},
    "a quote without an end": {"plan": '"' + "\\" * 100_001},
    "names of one layer": {"sites": [(2, 5, {"tied": ["a"] * 50_000})]},
    "a survey that nests deeply": {"survey": lambda _: DEEP},
    "a fact that nests deeply": {
        "survey": lambda text: text.replace("[4,32]", "[" * 900 + "]" * 900)
    },
    "a header that nests deeply": {"header": '{"a":' + DEEP},
    "a tensor of many axes": {"entry": {"shape": [1] * 10_000}},
    "a tensor of no entries and a long axis": {"entry": {"shape": [0, 2**63]}},
    "a tensor of a long number": {"entry": {"shape": [int(NUMBER)]}},
    "bytes beyond the file": {"entry": {"data_offsets": [0, 2**62]}},
    "a type that nests deeply": {"header": '{"a":{"dtype":' + "[" * 900 + "]" * 900 + "}}"},
    "text that cannot be printed": {"sites": [(2, 0, "\ud800")]},
}  # fmt: skip
READ = """
import sys
from pathlib import Path
from rabbet.cli.stored import Stored
from rabbet.errors import FileError
for path in sorted(Path(sys.argv[1]).iterdir()):
    try:
        Stored.read(path)
        print(path.name, "is read")
    except FileError as e:
        assert len(str(e)) < 1200 + len(str(path))
"""


def test_every_claim_is_refused_without_the_work_that_it_asks_for(older, tmp_path):
    for name, claim in CLAIMS.items():
        (tmp_path / name).write_bytes(_claiming(older, **claim))
    # Another process: one that hangs, or asks for all memory, must not take the tests along. What
    # is refused takes a fraction of a second each; what is not takes hours.
    command = [sys.executable, "-c", READ, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=570, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_file_that_the_claims_are_put_into_is_sound(older, tmp_path):
    (tmp_path / "f").write_bytes(_claiming(older))
    assert tuple(map(str, read_parts(tmp_path / "f").plan)) == LINES


class Counted(str):
    """A name that counts how often it is compared."""

    count = 0
    __hash__ = str.__hash__

    def __eq__(self, other):
        Counted.count += 1
        return str.__eq__(self, other)


def test_layers_are_found_without_going_through_all_of_them():
    names = [Counted(f"layer{k}") for k in range(500)]
    terms = (Term(Dense(), Grid.parse("4c")),)
    plan = Plan(tuple(LayerPlan(name, terms) for name in names))
    survey = Survey(tuple(Site(name, Linear(), (2, 2)) for name in names), (), 16)
    for k in range(500):
        assert plan.get(f"layer{k}") is plan.layers[k]
        assert survey[f"layer{k}"] is survey.sites[k]
    assert plan.get("nowhere") is None
    assert Counted.count < 20 * 500  # each with each: 500 * 500 / 2
    with pytest.raises(PlanError, match="two lines"):
        Plan((plan.layers[0], *plan.layers))


def test_a_table_is_not_widened_by_one_long_name(tmp_path):
    lines = [LayerPlan(f"layer{k}", (Term(Dense(), Grid.parse("4c")),)) for k in range(400)]
    long = LayerPlan("x" * 100_000, lines[0].terms)
    assert len(str(Plan((long, *lines)))) < 2 * 100_000 + 400 * 300
    sites = tuple(Site(line.name, Linear(), (2, 2)) for line in (long, *lines))
    survey, plan = Survey(sites, (), 16), Plan((long, *lines))
    cost = Cost(bytes=100, weights=4)
    assert len(plain(report_parts(survey, plan, cost, cost))) < 401 * 3000


@given(st.lists(st.tuples(st.integers(0, 9999), st.integers(0, 9999)), min_size=1, max_size=5))
def test_outputs_are_counted_as_they_are_listed(runs):
    ends = sorted({n for run in runs for n in run})
    rising = [f"{a}-{b}" for a, b in zip(ends[::2], ends[1::2], strict=False) if a + 1 < b]
    if rising:
        text = f'"a[0-9] b" dense[{",".join(rising)}]@4c\nc dense@4c # [0-999999]'
        (term, _) = (line.terms[0] for line in Plan.parse(text))
        assert outputs_named(text) == len(term.form.rows)


def _least_sum(size, count, least=2):
    """Every way to write a size as at most so many factors, tried."""
    ways = [(size,)] if size > 1 else []
    for n in range(least, math.isqrt(size) + 1) if count > 1 else ():
        if size % n == 0:
            ways += [(*way, n) for way in _least_sum(size // n, count - 1, n)]
    return ways


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_usual_digits_are_the_factors_of_least_sum(count):
    for size in [*range(1, 1200), 30522, 6912, 720720, 99991 * 7]:
        ways = [tuple(sorted(way, reverse=True)) for way in _least_sum(size, count)]
        best = min(ways, key=lambda f: (sum(f), len(f), f), default=(size,))
        assert balanced(size, count) == best


def test_an_axis_without_usual_digits_says_so():
    assert balanced(PRIMES[0], 3) == (PRIMES[0],)
    assert balanced(2**30, 3) == (1024, 1024, 1024)
    with pytest.raises(PlanError, match="say which"):
        balanced(2**31, 3)


def test_a_refusal_of_a_long_text_is_no_longer_than_it_need_be(older, tmp_path):
    (tmp_path / "f").write_bytes(_claiming(older, sites=[(2, 1, "x" * 10**6)]))
    with pytest.raises(FileError) as caught:
        read_parts(tmp_path / "f")
    assert len(str(caught.value)) < 500 + len(str(tmp_path))
