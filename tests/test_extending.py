"""The table "to add X, write Y" of docs/architecture.md holds: a toy of each kind is added.

Each toy is one class and one entry of a table. Nothing else knows of it, and it goes from the text
of a plan to the file and back.
"""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from networks import rand, settled
from torch import nn

import rabbet
from rabbet.core.plan import LayerPlan, Plan
from rabbet.forms import FORMS
from rabbet.forms.base import PLAIN, Form
from rabbet.grids.codebook import CODEBOOKS, Codebook, nearest_in, table_lookup
from rabbet.grids.scales import LAYOUTS, Scales
from rabbet.layers import KINDS
from rabbet.layers.linear import Linear
from rabbet.methods import METHODS
from rabbet.methods.base import Fitted
from rabbet.model.build import build
from rabbet.runtime.session import Session


@dataclass(frozen=True)
class Twins(Form):
    """One factor, [out, in / 2]: pairs of inputs of a linear share a weight."""

    name: ClassVar[str] = "twins"

    def full_rank(self, site):
        return int(site.taps == 1 and site.groups == 1 and site.shape[1] % 2 == 0)

    def shapes(self, site):
        return ((site.shape[0], site.shape[1] // 2),)

    def macs(self, site):
        return (site.macs,)

    def decompose(self, site, weight, second, aim=PLAIN):
        return (weight.unflatten(1, (-1, 2)).mean(2),)

    def contract(self, site, factors):
        return factors[0].repeat_interleave(2, 1)

    def apply(self, site, x, factors, between, bias):
        return site.run(x, self.contract(site, factors), bias)


class Scaled(nn.Linear):
    """A linear with a forward of its own."""

    def forward(self, x):
        return F.linear(2 * x, self.weight, self.bias)


@dataclass(frozen=True)
class ScaledKind(Linear):
    """The kind of such linears."""

    name: str = "scaled linear"

    def fits(self, module):
        return type(module) is Scaled

    def run(self, site, x, weight, bias):
        return F.linear(2 * x, weight, bias)

    def patches(self, site, x, places, generator):
        return super().patches(site, 2 * x, places, generator)


@dataclass(frozen=True, slots=True)
class Powers(Codebook):
    """Powers of two with both signs: unequally spaced points."""

    bits: int = 3

    name: ClassVar[str] = "powers"
    points: ClassVar[torch.Tensor] = torch.tensor([-4.0, -2, -1, -0.5, 0.5, 1, 2, 4])

    @classmethod
    def read(cls, text):
        return cls() if text == "p" else None

    @property
    def text(self):
        return "p"

    @property
    def low(self):
        return -4

    @property
    def levels(self):
        return 8

    @property
    def span(self):
        return 4.0

    def encode(self, steps):
        return nearest_in(steps, self.low, self.points)

    def decode(self, codes):
        return table_lookup(codes, self.low, self.points)


@dataclass(frozen=True, slots=True)
class Pairs(Scales):
    """One scale for each pair of slices of axis 0."""

    along_axis: ClassVar[bool] = False

    @classmethod
    def read(cls, text):
        return cls() if text == "w" else None

    @property
    def text(self):
        return "w"

    def count(self, shape):
        return -(-shape[0] // 2)

    def slices(self, x):
        flat = x.flatten(1)
        return F.pad(flat, (0, 0, 0, len(flat) % 2)).reshape(self.count(x.shape), -1)

    def spread(self, scale, shape):
        return scale.repeat_interleave(2)[: shape[0]].view(-1, *[1] * (len(shape) - 1))


@dataclass(frozen=True)
class Everything:
    """A method: everything on one grid, rounded to nearest."""

    grid: str = "8c"

    def plan(self, piece, budget):
        terms = LayerPlan.parse(f"x dense@{self.grid}").terms
        plan = Plan(tuple(LayerPlan(site.name, terms) for site in piece.survey))
        budget.check(piece.cost(plan), piece.float_cost)
        return plan

    def fit(self, piece, plan):
        return Fitted(build(piece.model, plan, piece.survey), ("rounded to nearest",))


def _net(first=nn.Linear):
    return settled(nn.Sequential(first(12, 8), nn.ReLU(), nn.Linear(8, 6)))


DATA = [rand(16, 12, seed=k) for k in range(3)]


def _roundtrip(tmp_path, model, plan):
    """Fit a plan, write and read the file, export it, and compare each with the network."""
    result = rabbet.fit(model, plan, DATA, quality="fast")
    assert str(result.plan).split() == plan.split()
    assert result.save(tmp_path / "a.safetensors") == result.cost.bytes
    ours = result.model(DATA[0])
    assert torch.equal(rabbet.load(tmp_path / "a.safetensors", model)(DATA[0]), ours)
    assert (ours - model(DATA[0])).norm() < 0.35 * model(DATA[0]).norm()
    result.export(tmp_path / "a.onnx")
    runs = Session(tmp_path / "a.onnx")(DATA[0])
    assert (runs - ours).norm() < 0.05 * ours.norm()


def test_a_form_is_a_class_and_a_line(tmp_path, monkeypatch):
    monkeypatch.setitem(FORMS, "twins", Twins)
    model = _net()
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight.copy_(layer.weight[:, ::2].repeat_interleave(2, 1))
    _roundtrip(tmp_path, model, "0 twins@5c\n2 dense@2c + twins@6")


def test_a_kind_of_layer_is_a_class_and_a_line(tmp_path, monkeypatch):
    monkeypatch.setitem(KINDS, "scaled linear", ScaledKind())
    _roundtrip(tmp_path, _net(Scaled), "0 dense@5c | act@8\n2 dense@5c")


def test_a_codebook_is_a_class_and_a_line(tmp_path, monkeypatch):
    monkeypatch.setitem(CODEBOOKS, "powers", Powers)
    _roundtrip(tmp_path, _net(), "0 dense@pc | act@8\n2 dense@pg4 + lowrank[2]@p")


def test_a_scale_layout_is_a_class_and_a_line(tmp_path, monkeypatch):
    monkeypatch.setitem(LAYOUTS, "pairs", Pairs)
    _roundtrip(tmp_path, _net(), "0 dense@5w | act@8\n2 dense@tw + dense@6w")


def test_a_method_is_a_class_and_a_line(tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS, "everything", Everything)
    result = rabbet.compress(_net(), "bits <= 8", DATA, Everything())
    assert {str(t) for line in result.plan for t in line.terms} == {"dense@8c"}
    assert result.notes == ("rounded to nearest",)
    with pytest.raises(rabbet.RabbetError, match="bits <= 4"):
        rabbet.compress(_net(), "bits <= 4", DATA, Everything())
