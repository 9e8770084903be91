"""Bytes of an exported file as a budget: predicted for every kind, form and grid, and kept."""

import itertools
from dataclasses import replace

import pytest
import torch
from exporting import CASES, GRIDS, parcel
from networks import Case, rand, settled, thinned
from torch import nn
from transformers.pytorch_utils import Conv1D

import rabbet
from rabbet import Jobs, Joint, Task
from rabbet._bench import landed, opened
from rabbet.choose.filesize import FileGauge
from rabbet.choose.program import picked
from rabbet.core.budget import FILES, Budget
from rabbet.core.plan import LayerPlan, Plan, Term
from rabbet.errors import BudgetError
from rabbet.export.onnx.merge import merged
from rabbet.export.onnx.short import shortened
from rabbet.export.onnx.write import assemble, write_onnx, write_openvino
from rabbet.layers import KINDS
from rabbet.methods import METHODS
from rabbet.train.tuning import Tuning
from rabbet.workpiece import Workpiece

LAYERS = {
    "conv1d": (lambda: nn.Conv1d(6, 8, 3, padding=1), (4, 6, 9)),
    "conv2d": (lambda: nn.Conv2d(6, 8, 3, padding=1), (4, 6, 7, 5)),
    "conv3d": (lambda: nn.Conv3d(4, 6, 3, padding=1), (4, 4, 4, 5, 3)),
    "convtranspose1d": (lambda: nn.ConvTranspose1d(6, 8, 4, 2, 1), (4, 6, 6)),
    "convtranspose2d": (lambda: nn.ConvTranspose2d(6, 8, 3, 2, 1, 1), (4, 6, 4, 5)),
    "convtranspose3d": (lambda: nn.ConvTranspose3d(4, 6, 2, 2), (4, 4, 2, 3, 2)),
    "linear": (lambda: nn.Linear(12, 8), (4, 12)),
    "linear over places": (lambda: nn.Linear(12, 8), (4, 5, 12)),
    "transposed_linear": (lambda: Conv1D(8, 12), (4, 5, 12)),
    "embedding": (lambda: nn.Embedding(12, 8), None),
    "stored": (lambda: nn.GRU(16, 16, batch_first=True), (4, 5, 16)),
}
"""A small layer of every kind, and the shape of its input."""

QUICK = Joint(
    grids=("2hc", "3c", "4c", "8c"),
    adapters=(("2hc", 0.2),),
    forms=("lowrank", "cp"),
    shares=(0.5,),
    factor_grids=("4c", "8c"),
    tuning=Tuning(steps=0),
)


WRITERS = {"onnx": write_onnx, "openvino": write_openvino}


class Several(nn.Module):
    """Layers side by side, an output each."""

    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x):
        results = [layer(x) for layer in self.layers]
        return tuple(r[0] if isinstance(r, tuple) else r for r in results)


TERMS = (
    *GRIDS,
    *("dense@4g4", "dense@3g4z", "dense@4c1", "lowrank[2]@4c", "lowrank[3]@3c", "cp[3]@6c"),
    *("tucker[2]@3c", "tt[2]@4", "ttm[2]@3", "dense@2hc + lowrank[1]@8c"),
    "dense[even]@4c + dense[odd]@2hc",
)


def _terms(name):
    """All terms for three kinds of layers; for the others a fourth, for each another one."""
    if name in ("conv2d", "linear", "stored"):
        return TERMS
    return TERMS[list(LAYERS).index(name) % 4 :: 4]


@pytest.mark.parametrize(("name", "target"), thinned([(n, t) for n in LAYERS for t in FILES], 11))
def test_a_file_is_as_long_as_predicted_whatever_the_kind_the_form_and_the_grid(name, target):
    make, shape = LAYERS[name]
    data = [torch.zeros(4, 5, dtype=torch.long) if shape is None else rand(*shape)]
    terms = _terms(name)
    model = settled(Several([make() for _ in range(6 if name == "stored" else len(terms))]))
    compressed = parcel(Case(model, data), terms)
    gauge = FileGauge(Workpiece.of(model, Task(data), Jobs()), target == "onnx")
    predicted = gauge.network(compressed.plan)
    made = assemble(merged(compressed.model), compressed.task, target == "onnx")
    written = len(shortened(made.content))
    assert 0.999 * written <= predicted <= 1.03 * written
    certain = gauge.written(compressed.plan)
    assert written <= certain == gauge.network(compressed.plan)


def test_every_kind_has_its_layer():
    tried = {kind.name for kind in KINDS.values()} - {"head"}
    found = set()
    for make, shape in LAYERS.values():
        data = [torch.zeros(4, 5, dtype=torch.long) if shape is None else rand(*shape)]
        found |= {s.kind.name for s in rabbet.survey(settled(Several([make()])), data)}
    assert found == tried


NETS = ("heads", "bert", "cifar resnet", "tied")


def _between(piece, target, share):
    """The bytes at this share of the way from all layers on 2 bits to all on 8."""
    ends = [
        getattr(piece.cost(Plan(tuple(_line(s, grid) for s in piece.survey))), target)
        for grid in ("2hc", "8c")
    ]
    return round(ends[0] + share * (ends[1] - ends[0]))


def _line(site, grid):
    return LayerPlan(site.name, (Term.parse(f"dense@{grid}"),), 8 if site.multiplies else None)


@pytest.mark.parametrize(
    ("name", "target"), thinned([(n, FILES[k % 2]) for k, n in enumerate(NETS)], keep=4)
)
def test_a_budget_of_the_exported_file_is_kept_by_that_file(name, target, tmp_path):
    case = CASES[name]()
    budget = Budget.parse(f"{target} <= 100%")
    allowed = _between(opened(case.model, budget.metrics, Task(case.batches)), target, 0.4)
    result = rabbet.compress(case.model, f"bytes <= {allowed}", case.batches, QUICK, target=target)
    assert str(result.budget) == f"{target} <= {allowed}"
    path = tmp_path / "a.onnx"
    written = result.export(path, target).bytes
    found = getattr(result.cost, target)
    assert 0.75 * allowed < written == path.stat().st_size <= found <= allowed
    assert getattr(result.float_cost, target) == result.float_cost.bytes
    other = FILES[1 - FILES.index(target)]
    assert getattr(result.cost, other) == 0
    assert f"\n{target} " in str(result)
    assert other not in str(result)
    assert rabbet.Session(path)


@pytest.mark.parametrize("beside", [None, "macs <= 70%"])
def test_the_least_file_of_all_is_the_end_of_an_axis_though_layers_share_in_it(beside):
    # for each layer alone 3 bits are cheapest, but they bring along the function that unpacks them
    network = settled(nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)))
    limits = None if beside is None else Budget.parse(beside)
    piece = opened(network, ["onnx"], [rand(8, 16)])
    method = Joint(grids=("3c", "8c"), adapters=(), forms=("lowrank",), shares=(0.5,))
    allocator = method.chooser(piece).allocator
    costs = [piece.cost(picked(allocator.table, c)) for c in choices(allocator.table)]
    whole = piece.float_cost
    kept = [c for c in costs if limits is None or not limits.limits[0].broken_by(c, whole)]
    assert allocator.ends("onnx", limits)[0].onnx == min(cost.onnx for cost in kept)


@pytest.mark.slow
def test_a_file_that_cannot_be_so_small_is_refused_before_any_work_with_the_smallest():
    class Idle(Jobs):
        def map(self, *args, **kwargs):
            raise AssertionError("something was solved")

    case = CASES["heads"]()
    with pytest.raises(BudgetError, match="smallest reachable value is") as caught:
        rabbet.plan(case.model, "onnx <= 0.5 kB", case.batches, QUICK, jobs=Idle())
    least = int(str(caught.value).split("value is ")[1].split()[0].replace(",", ""))
    assert f"{least:,} bytes of the onnx file" in str(caught.value)
    result = rabbet.compress(case.model, f"onnx <= {least}", case.batches, QUICK)
    assert result.cost.onnx <= least
    with pytest.raises(BudgetError, match="smallest reachable value is"):
        rabbet.plan(case.model, f"onnx <= {least - 1}", case.batches, QUICK, jobs=Idle())


@pytest.mark.parametrize("target", FILES)
def test_a_file_that_is_too_long_after_all_is_not_written_over_an_older_one(target, tmp_path):
    compressed, path = parcel(CASES["vectors"]()), tmp_path / "a.onnx"
    size = WRITERS[target](compressed, path).bytes
    before = path.read_bytes()
    assert WRITERS[target](replace(compressed, most={target: size}), path).bytes == size
    with pytest.raises(BudgetError, match=f"takes {size:,} bytes, {size - 1:,} are allowed"):
        WRITERS[target](replace(compressed, most={target: size - 1}), path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.onnx"]


def test_layers_that_are_exported_one_by_one_are_counted_as_progress():
    network = settled(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)))
    seen = []
    jobs = Jobs(progress=lambda stage, done, total: seen.append((stage, done, total)))
    piece = opened(network, ["onnx"], [rand(8, 8)], jobs=jobs)
    Joint(grids=("4c", "8c"), adapters=(), forms=()).chooser(piece)
    told = [(done, total) for stage, done, total in seen if stage.startswith("exporting layers")]
    assert told == [(done, told[0][1]) for done in range(told[0][1] + 1)]
    assert len(told) > 2


class Gauge:
    """A byte for each bit of each layer's weights, and a rest that is 1,000 more than it seems.

    growing: each file that is written is longer than the last one by this.
    """

    def __init__(self, piece, growing=0):
        self.piece, self.rest, self.growing, self.calls = piece, 10, growing, 0

    def layer(self, site, layer):
        return sum(t.grid.bits for t in layer.terms)

    def expect(self, lines):
        pass

    def network(self, plan):
        return self.rest + sum(self.layer(None, line) for line in plan)

    def steps(self, rows):
        return []

    def written(self, plan):
        self.calls += 1
        self.rest = 1010 + self.growing * self.calls
        return self.network(plan)


def choices(table):
    """Every choice of one option for each layer."""
    return itertools.product(*(range(len(row)) for row in table))


def _planned(growing, text):
    case = CASES["vectors"]()
    piece = Workpiece.of(case.model, Task(case.batches), Jobs())
    piece.gauges["onnx"] = gauge = Gauge(piece, growing)
    method = replace(QUICK, adapters=(), forms=())
    budget = Budget.parse(text)
    return gauge, piece, landed(piece, lambda: method.plan(piece, budget), budget)


def test_a_file_that_is_longer_than_predicted_is_planned_again():
    gauge, piece, plan = _planned(0, "onnx <= 1025")
    assert gauge.calls == 2
    assert piece.cost(plan).onnx <= 1025


def test_files_that_stay_too_long_end_with_the_smallest_that_was_written():
    with pytest.raises(BudgetError, match=r"the smallest of their files takes 1,0\d\d bytes"):
        _planned(4, "onnx <= 1030")


def test_gates_count_no_exported_file():
    case = CASES["vectors"]()
    with pytest.raises(BudgetError, match="such as Joint"):
        rabbet.plan(case.model, "onnx <= 50%", case.batches, METHODS["cgmq"]())
