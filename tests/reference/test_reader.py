"""The native file, read by a program with numpy that knows docs/format.md, not rabbet or torch."""

import ast
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import NETWORKS, network, settled
from torch import nn

from rabbet import Jobs, Plan, Task, survey
from rabbet.core.plan import LayerPlan, Term
from rabbet.export.base import Parcel
from rabbet.export.writing import write_native
from rabbet.forms import FORMS, RANKED, Dense
from rabbet.grids.grid import Grid
from rabbet.model.build import build
from rabbet.model.compressed import compressed_layers
from rabbet.workpiece import Workpiece

ROOT = Path(__file__).parents[2]
READER = ROOT / "examples" / "read_format.py"


@pytest.fixture(scope="module")
def reader():
    spec = importlib.util.spec_from_file_location("read_format", READER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reader_knows_neither_torch_nor_rabbet():
    tree = ast.walk(ast.parse(READER.read_text()))
    names = {a.name for n in tree if isinstance(n, ast.Import) for a in n.names}
    tree = ast.walk(ast.parse(READER.read_text()))
    names |= {n.module for n in tree if isinstance(n, ast.ImportFrom)}
    assert {name.split(".")[0] for name in names} <= {
        "json",
        "math",
        "re",
        "sys",
        "collections",
        "pathlib",
        "zlib",
        "numpy",
    }


def _terms(draw, site):
    terms = []
    for _ in range(draw(st.integers(1, 3))):
        full = {n: f(*[1] * (n in RANKED)).full_rank(site) for n, f in FORMS.items()}
        form = draw(st.sampled_from([name for name in FORMS if full[name]]))
        bodies = ["1", "t", "2", "2h", "3", "4", "5h", "6", "7", "8", "u3", "u8"]
        layouts = ["", "c", "c1", "g3", "g64", "g4z"]
        integers = st.builds("{}{}".format, st.sampled_from(bodies), st.sampled_from(layouts))
        grid = Grid.parse(draw(integers | st.sampled_from(["f32", "f16", "bf16"])))
        settings = [draw(st.integers(1, full[form]))] if form in RANKED else []
        if form == "tt" and draw(st.booleans()):
            settings.append(((site.columns,), (site.shape[0],)))
        if form == "dense" and site.groups == 1 and draw(st.booleans()):
            rows = draw(st.sets(st.integers(0, site.shape[0] - 1), min_size=1))
            settings.append(tuple(sorted(rows)))
        terms.append(Term(FORMS[form](*settings), grid))
    return tuple(terms)


PIECES = {
    name: Workpiece.of(network(name).model, Task(network(name).batches), Jobs())
    for name in NETWORKS
}


@pytest.mark.parametrize("name", NETWORKS)
@settings(max_examples=8)
@given(data=st.data())
def test_the_reader_finds_every_number_of_every_layer(name, data, reader, tmp_path_factory):
    piece = PIECES[name]
    sites = [s for s in piece.survey if data.draw(st.booleans())] or list(piece.survey)
    acts = st.none() | st.integers(2, 8)
    plan = Plan(
        tuple(
            LayerPlan(s.name, _terms(data.draw, s), data.draw(acts) if s.multiplies else None)
            for s in sites
        )
    )
    student = build(piece.model, plan, piece.survey)
    layers = compressed_layers(student)
    for layer in layers.values():
        for k, act in enumerate(layer.quantisers):
            act.set_range(torch.tensor(0.5 + k), torch.tensor(float(k)))
    path = tmp_path_factory.mktemp("reader") / "f"
    write_native(Parcel(student, plan, piece.survey, piece.rest(plan), piece.task), path)
    read = {name: rest for name, *rest in reader.read(path)}
    assert list(read) == [line.name for line in plan]
    for line in plan:
        layer = layers[line.name]
        text, weight, bias, ranges = read[line.name]
        assert text == line.body
        assert np.allclose(weight, layer.canonical.numpy(), rtol=1e-6, atol=1e-6)
        assert np.array_equal(bias, [] if layer.bias is None else layer.bias.numpy())
        assert ranges == [(a.scale.item(), a.zero.item()) for a in layer.quantisers]


@pytest.mark.parametrize("name", NETWORKS)
def test_safetensors_itself_reads_what_is_kept_as_it_is(name, tmp_path):
    piece = PIECES[name]
    plan = Plan((LayerPlan(piece.survey.sites[0].name, (Term(Dense(), Grid.parse("4c")),)),))
    student = build(piece.model, plan, piece.survey)
    write_native(Parcel(student, plan, piece.survey, piece.rest(plan), piece.task), tmp_path / "f")
    state = student.state_dict()
    with safetensors.safe_open(tmp_path / "f", framework="pt") as file:
        assert file.metadata()["format"] == "rabbet/1"
        kept = [n for n in file.keys() if not n.startswith("rabbet.")]  # noqa: SIM118
        assert set(kept) == {r.name for r in piece.rest(plan)}
        assert all(torch.equal(file.get_tensor(n), state[n]) for n in kept)


def test_every_value_lies_at_a_multiple_of_its_width(tmp_path):
    for name, piece in PIECES.items():
        plan = Plan((LayerPlan(piece.survey.sites[-1].name, (Term(Dense(), Grid.parse("3c")),)),))
        student = build(piece.model, plan, piece.survey)
        write_native(
            Parcel(student, plan, piece.survey, piece.rest(plan), piece.task), tmp_path / name
        )
        data = (tmp_path / name).read_bytes()
        size = int.from_bytes(data[:8], "little")
        entries = json.loads(data[8 : 8 + size])
        entries.pop("__metadata__")
        widths = {"F64": 8, "I64": 8, "F32": 4, "BF16": 2, "U8": 1}
        assert size % 8 == 0
        end = 0
        for entry in entries.values():
            assert entry["data_offsets"][0] == end  # no gaps
            assert end % widths[entry["dtype"]] == 0
            end = entry["data_offsets"][1]
        assert 8 + size + end == len(data)


def test_the_example_of_the_documentation_is_true(tmp_path):
    """The numbers of the last section of docs/format.md."""
    page = (ROOT / "docs" / "format.md").read_text()
    model = settled(
        nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(),
            nn.LayerNorm(128), nn.Linear(128, 10),
        )
    )  # fmt: skip
    surveyed, plan = (
        survey(model, [torch.zeros(1, 3, 8, 8)]),
        Plan.parse("0 dense@4c + lowrank[2]@8c | act@8\n5 dense@tc"),
    )
    piece = Workpiece.of(model, Task([torch.zeros(1, 3, 8, 8)]), Jobs())
    student = build(model, plan, surveyed)
    for act in (a for layer in compressed_layers(student).values() for a in layer.quantisers):
        act.set_range(torch.tensor(1.0), torch.tensor(0.0))
    written = write_native(
        Parcel(student, plan, surveyed, piece.rest(plan), piece.task), tmp_path / "f"
    ).bytes
    data = (tmp_path / "f").read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    assert f"{header} bytes of header and {written - header:,} of values make {written:,}." in page
    entries = json.loads(data[8:header])
    assert json.loads(entries["__metadata__"]["survey"])["sites"][0] == json.loads(
        '["0","conv2d",[8,3,3,3],16,64,{"stride":[2,2],"pads":[1,1,1,1],"norm":"1"}]'
    )
    assert {n: e["shape"][0] for n, e in entries.items() if n.startswith("rabbet.")} == {
        "rabbet.biases": 18, "rabbet.act_scales": 2, "rabbet.scales": 28,
        "rabbet.act_zeros": 2, "rabbet.codes": 434,
    }  # fmt: skip
