"""Tensor trains: the shapes of the paper, other digits, what a runtime is given, and errors."""

import itertools
import math

import pytest
import torch
from networks import rand
from torch import nn

import rabbet
from rabbet import Plan
from rabbet.core.plan import LayerPlan
from rabbet.errors import DataError, PlanError
from rabbet.forms.base import Aim
from rabbet.forms.modes import balanced, covering, exactly
from rabbet.forms.tt import TT
from rabbet.forms.ttm import TTM
from rabbet.layers import Site
from rabbet.layers.embedding import Embedding
from rabbet.layers.linear import Linear
from rabbet.model.build import build, plan_of
from rabbet.solve.tensor_train import bonds, half, halves, tt_svd

ATTENTION, UP, DOWN = (
    Site("x", Linear(), shape) for shape in ((768, 768), (3072, 768), (768, 3072))
)
TABLE = Site("x", Embedding(), (30522, 768))


def _entries(form, site):
    return sum(math.prod(shape) for shape in form.shapes(site))


@pytest.mark.parametrize(
    ("site", "ranks", "digits"),
    [
        (ATTENTION, [20, 20, 12, 20, 20, 12], [8, 8, 12, 8, 8, 12]),
        (UP, [20, 20, 12, 20, 20, 16], [8, 8, 12, 12, 16, 16]),
        (DOWN, [20, 20, 16, 20, 20, 12], [12, 16, 16, 8, 8, 12]),
    ],
)
def test_the_usual_shapes_are_those_of_the_paper(site, ranks, digits):
    shapes = TT(20).shapes(site)
    assert [s[0] for s in shapes] == ranks
    assert [s[1] for s in shapes] == digits


@pytest.mark.parametrize(
    ("site", "rank", "modes", "entries"),
    [
        (ATTENTION, 20, None, 10_528),
        (UP, 20, None, 15_440),
        (DOWN, 20, None, 15_440),
        (ATTENTION, 64, None, 78_112),
        (UP, 64, None, 104_848),
        (TABLE, 20, ((16, 20, 10, 10), (4, 4, 8, 6)), 66_480),
        (TABLE, 30, ((16, 20, 10, 10), (4, 4, 8, 6)), 147_720),
    ],
)
def test_there_are_as_many_entries_as_the_paper_counts(site, rank, modes, entries):
    form = TTM if site.looks_up else TT
    assert _entries(form(rank, modes), site) == entries


@pytest.mark.parametrize("size", [1, 2, 3, 23, 26, 768, 870, 3072, 30522])
def test_digits_make_the_size(size):
    for count in (1, 2, 3, 4):
        assert math.prod(balanced(size, count)) == math.prod(exactly(size, count)) == size
        assert len(exactly(size, count)) == len(covering(size, count)) == count
        assert math.prod(covering(size, count)) >= size
        assert len(balanced(size, count)) <= count
        assert 1 not in balanced(size, count) or size == 1


@pytest.mark.parametrize(
    "modes", [((2, 6), (4, 2)), ((12,), (8,)), ((3, 2, 2), (2, 2, 2)), ((2, 2, 3), (8,))]
)
def test_any_digits_write_a_weight(modes):
    site, weight = Site("x", Linear(), (8, 12)), rand(8, 12)
    form = TT(8, modes)
    factors = form.decompose(site, weight, None)
    assert torch.allclose(form.contract(site, factors), weight, atol=1e-5)
    x = rand(5, 12, seed=1)
    assert torch.allclose(
        form.apply(site, x, factors, lambda _, t: t, None), x @ weight.T, atol=1e-4
    )


@pytest.mark.parametrize(
    "modes", [((3, 3), (2, 3)), ((3, 1, 4), (1, 6, 1)), ((2, 2, 2, 2), (1, 2, 3, 1))]
)
def test_any_digits_write_a_table(modes):
    site, table = Site("x", Embedding(), (9, 6)), rand(9, 6)
    form = TTM(TTM(1, modes).full_rank(site), modes)
    factors = form.decompose(site, table, None)
    assert torch.allclose(form.contract(site, factors), table, atol=1e-5)
    ids = torch.tensor([[0, 8, 3], [3, 5, 1]])
    assert torch.allclose(
        form.apply(site, ids, factors, lambda _, t: t, None), table[ids], atol=1e-5
    )


def test_a_tensor_of_the_rank_is_recovered():
    sizes, ranks = (4, 3, 2), [3, 3, 2, 1]
    cores = [rand(a, n, b, seed=n) for a, n, b in zip(ranks[:-1], sizes, ranks[1:], strict=True)]
    assert bonds(sizes, 3, 3) == ranks
    assert torch.allclose(half(tt_svd(half(cores), sizes, ranks)), half(cores), atol=1e-5)


def test_the_metric_is_followed():
    matrix, root = rand(12, 8), rand(8, 8, seed=3)
    second = root @ root.T

    def error(used):
        left, right = halves(matrix, ((2, 6), (4, 2)), ([3, 2, 1], [3, 2, 1]), used)
        delta = half(left).T @ half(right) - matrix
        return float(((delta @ second) * delta).sum())

    assert error(second) < error(None)


def test_a_metric_that_is_singular_but_for_rounding_is_followed():
    """As behind a LayerNorm, whose outputs add up to nothing."""
    inputs = rand(4096, 16)
    inputs = (inputs - inputs.mean(1, keepdim=True)) / inputs.std(1, keepdim=True)
    second, matrix = inputs.T @ inputs / len(inputs), rand(32, 16, seed=1)
    for shift in (0.0, 1e-7):  # of the diagonal, by which sums in single precision may be off
        off = second - shift * torch.eye(16)
        left, right = halves(matrix, ((4, 8), (4, 4)), ([16, 8, 1], [16, 4, 1]), off)
        delta = half(left).T @ half(right) - matrix
        assert float(((delta @ second) * delta).sum()) < 1e-3 * float((matrix**2).sum())


@pytest.mark.parametrize("form", [TT(3), TTM(3)])
def test_a_runtime_is_given_the_same_layer(form):
    site = Site("x", Embedding() if isinstance(form, TTM) else Linear(), (24, 12))
    factors = form.decompose(site, rand(24, 12), None)
    other, parts = form.for_runtime(site, factors)
    assert [tuple(f.shape) for f in parts] == list(other.shapes(site))
    assert torch.allclose(other.contract(site, parts), form.contract(site, factors), atol=1e-5)


def test_unusual_digits_are_written_in_the_plan():
    text = "fc tt[3:2x6:4x2]@4 + tt[2]@8 | act@8"
    assert str(LayerPlan.parse(text)) == text
    assert LayerPlan.parse(text).terms[0].form.modes == ((2, 6), (4, 2))
    model = nn.Sequential(nn.Linear(12, 8))
    built = build(model, Plan.parse(f"0 {text[3:]}"), rabbet.survey(model, [rand(2, 12)]))
    assert plan_of(built, rabbet.survey(model, [rand(2, 12)])) == Plan.parse(f"0 {text[3:]}")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("0 tt[3:2x5:4x2]@4", "the modes 2x5 make 10 inputs; the layer has 12"),
        ("0 tt[3:2x6:4x4]@4", "the modes 4x4 make 16 outputs; the layer has 8"),
        ("0 tt[9]@4", "rank 9 is more than the 8"),
        ("0 ttm[2]@4", "ttm does not fit this linear"),
        ("0 tt[3:0x6:4x2]@4", "a mode is at least 1"),
        ("0 lowrank[3:2x6:4x2]@4", "lowrank takes no modes"),
        ("0 tt[3:2x6]@4", "takes a rank, and modes of both axes"),
        ("1 ttm[2:2x2:2x3]@4", "the modes 2x2 make 4 rows; the layer has at least 9"),
        ("1 ttm[2:3x3:3x3]@4", "the modes 3x3 make 9 columns; the layer has 6"),
        ("1 ttm[2:3x3:6]@4", "as many of rows as of columns"),
        ("1 tt[2]@4", "tt does not fit this embedding"),
    ],
)
def test_what_does_not_fit_is_refused(line, words):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.add_module("0", nn.Linear(12, 8))
            self.add_module("1", nn.Embedding(9, 6))

        def forward(self, x, ids):
            return self.get_submodule("0")(x), self.get_submodule("1")(ids)

    model = Two()
    batch = (rand(2, 12), torch.tensor([[1], [2]]))
    with pytest.raises(PlanError, match=words.replace("[", r"\[")):
        build(model, Plan.parse(line), rabbet.survey(model, [batch]))


@pytest.mark.parametrize("index", [9, -1, 100])
def test_an_index_that_a_table_does_not_have_is_refused(index):
    model = nn.Sequential(nn.Embedding(9, 6))
    batch = torch.tensor([[1, 2], [3, 8]])
    built = build(model, Plan.parse("0 ttm[3]@8"), rabbet.survey(model, [batch]))
    assert built(batch).shape == (2, 2, 6)
    with pytest.raises(DataError, match="indices are 0 to 8"):
        built(torch.tensor([[index]]))


def test_more_steps_never_increase_the_error():
    site, weight, form = Site("x", Linear(), (24, 30)), rand(24, 30), TT(5)
    errors = [
        float(
            (form.contract(site, form.decompose(site, weight, None, Aim(steps=n))) - weight)
            .square()
            .sum()
        )
        for n in (0, 5, 40)
    ]
    assert all(b <= a * (1 + 1e-6) for a, b in itertools.pairwise(errors))
    assert errors[2] < errors[0]


@pytest.mark.parametrize(
    ("form", "site"),
    [(TT(5), Site("x", Linear(), (24, 30))), (TTM(5), Site("x", Embedding(), (90, 8)))],
)
def test_a_start_from_given_factors_never_ends_worse_than_they_are(form, site):
    weight = rand(*site.shape)

    def error(factors):
        return float((form.contract(site, factors) - weight).square().sum())

    known = form.decompose(site, weight, None, Aim(steps=60))
    assert error(form.decompose(site, weight, None, Aim(start=known, steps=0))) <= error(known) * (
        1 + 1e-6
    )
    assert error(form.decompose(site, weight, None, Aim(steps=0))) > 1.01 * error(known)
