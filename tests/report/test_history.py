"""Results keep how their searches and trainings went, and pages draw it."""

import itertools
import json

import pytest
from networks import Case, Chain, network, rand, settled
from test_report import Reader, drawn
from torch import nn

import rabbet
from rabbet import ADMM, CGMQ, TTQAT, CoRa, Joint
from rabbet.methods.cora.search import Ranking
from rabbet.train.distil import Distillation
from rabbet.train.tuning import Tuning

UNTUNED = Tuning(steps=0)
NUMBERS = Distillation(scores=False)  # outputs are no scores of classes
METHODS = {
    "joint": (
        "residual",
        Joint(grids=("4c", "8c"), rank=False, tuning=Tuning(steps=7)),
        "bits <= 6",
    ),
    "cora": (
        "residual",
        CoRa(bits=3, ranking=Ranking(steps=5), tuning=UNTUNED),
        "bits <= 4.5",
    ),
    "cgmq": ("residual", CGMQ(epochs=2, finish=1), "bops <= 2%"),
    "admm": ("residual", ADMM(sweeps=3, inner=2), "bytes <= 90%"),
    "ttqat": ("blocks", TTQAT(rank=4, epochs=1, finish=1, distil=NUMBERS), "bytes <= 90%"),
}
SHOWN = {
    "joint": {("tuning", "loss of the step's batch"): 7},
    "cora": {
        ("search for ranks", "cut-off of each layer, in ranks"): 6,
        ("search for ranks", "loss of the step's batch"): 5,
    },
    "cgmq": {
        ("search by gates", "bits of each weight and input"): 4,
        ("search by gates", "share of the budget used"): 4,
        ("search by gates", "loss on held-back examples"): 4,
    },
    "admm": {("factorising", "error of each kernel"): 4},
    "ttqat": {("teaching", "loss of the step's batch"): 2},
}


def blocks():
    """Two blocks with a head: what a method that teaches them one by one takes."""
    model = Chain([nn.Linear(16, 16), nn.Linear(16, 16)], nn.Linear(16, 4))
    return Case(settled(model), [rand(6, 5, 16, seed=k) for k in range(2)])


@drawn
@pytest.mark.parametrize("name", METHODS)
def test_a_result_keeps_what_its_method_went_through(name, tmp_path):
    case, method, budget = METHODS[name]
    known = blocks() if case == "blocks" else network(case)
    result = rabbet.compress(known.model, budget, known.batches, method)
    lengths = {}
    for history in result.histories:
        (lengths[history.stage, history.quantity],) = {*map(len, history.lines.values())}
    assert SHOWN[name].items() <= lengths.items()
    result.report(tmp_path / "a.html")
    read = Reader((tmp_path / "a.html").read_text(encoding="utf-8"))
    drawn_ones = json.loads(read.facts)["histories"]
    for history, told in zip(result.histories, drawn_ones, strict=True):
        assert (
            f"{history.stage}: {history.quantity}, by {history.step}"
            in read.sections["convergence"]
        )
        lines = itertools.groupby(told["values"], lambda v: v["line"])
        values = {line: tuple(v["value"] for v in row) for line, row in lines}
        assert values == dict(history.lines)
