"""Tensor trains of kernels: bonds, what runs along each axis, what does not fit, errors."""

import math

import pytest
import torch
from networks import rand
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from rabbet.errors import PlanError
from rabbet.forms import TTConv, Tucker
from rabbet.forms.base import Aim
from rabbet.layers import Site
from rabbet.layers.conv import Conv
from rabbet.model.inspect import inspect_network
from rabbet.solve.kernel_train import train_bonds, tucker_bonds


def _entries(form, site):
    return sum(math.prod(shape) for shape in form.shapes(site))


def _site(layer, *shape):
    """A layer as a site, its weight, and an input of it."""
    x = rand(*shape, seed=4)
    site = inspect_network(layer.eval(), x).sites[0]
    return site, site.kind.weight(layer).detach(), x


def test_no_bond_is_larger_than_the_rank_or_than_can_be_used():
    assert train_bonds((64, 64, 3, 3), 45) == (45, 45, 45)
    assert train_bonds((64, 64, 3, 3), 100) == (64, 100, 64)
    assert train_bonds((32, 16, 3, 3), 20) == (16, 20, 20)
    assert train_bonds((4, 64, 3, 3), 50) == (36, 12, 4)
    assert tucker_bonds((32, 16, 9), 9) == (9, 18)


def test_the_factors_of_a_kernel_are_four_convs():
    site, weight, _ = _site(nn.Conv2d(16, 32, 3, padding=1), 1, 16, 8, 8)
    form = TTConv(20)
    shapes = ((16, 16), (20, 16, 3, 1), (20, 20, 1, 3), (32, 20))
    assert form.shapes(site) == shapes
    assert tuple(f.shape for f in form.decompose(site, weight, None)) == shapes
    assert form.full_rank(site) == 48
    assert form.observed(shapes) == form
    assert TTConv(48).observed(TTConv(48).shapes(site)) == TTConv(48)


CASES = {
    "strided over both": (lambda: nn.Conv2d(6, 8, 3, (2, 3), 1), (2, 6, 9, 8)),
    "wide and dilated": (
        lambda: nn.Conv2d(4, 6, (3, 5), 2, (2, 0), dilation=(2, 1), bias=False),
        (2, 4, 9, 8),
    ),
    "of one row, padded and strided on both axes": (
        lambda: nn.Conv2d(4, 6, (1, 5), (2, 2), (1, 2)),
        (2, 4, 7, 9),
    ),
    "of one column": (lambda: nn.Conv2d(4, 6, (4, 1), (3, 2)), (2, 4, 9, 8)),
    "of an even size": (lambda: nn.Conv2d(4, 6, 4, padding="same", padding_mode="reflect"),
                        (2, 4, 9, 8)),
    "over time": (lambda: nn.Conv1d(5, 8, 3, 2), (2, 5, 9)),
    "over space": (lambda: nn.Conv3d(4, 5, 3, (1, 2, 2), 1), (2, 4, 5, 6, 7)),
    "over space, flat": (lambda: nn.Conv3d(4, 5, (3, 1, 3), 2, (1, 1, 0)), (2, 4, 5, 6, 7)),
    "transposed": (lambda: nn.ConvTranspose1d(5, 8, 4, stride=3), (2, 5, 6)),
    "transposed along one axis": (
        lambda: nn.ConvTranspose2d(5, 8, (1, 4), stride=(2, 3)),
        (2, 5, 6, 4),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_convs_along_the_axes_are_the_layer(name):
    make, shape = CASES[name]
    layer = make()
    site, weight, x = _site(layer, *shape)
    axes = sum(n > 1 for n in site.shape[2:])
    assert len(site.by_axis) == axes
    full = TTConv(1).full_rank(site)
    for form in (TTConv(3), TTConv(full)):
        factors = form.decompose(site, weight, None)
        assert len(factors) == axes + 2
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            output = form.apply(site, x, factors, lambda _, t: t, layer.bias)
        assert counter.get_total_flops() == 2 * len(x) * sum(form.macs(site))
        with torch.no_grad():
            wanted = site.run(x, form.contract(site, factors), layer.bias)
        assert torch.allclose(output, wanted, atol=1e-4)
    assert torch.allclose(form.contract(site, factors), weight, atol=1e-4)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(6, 8, 3),
        nn.Conv2d(6, 8, 3, padding=(2, 1)),
        nn.Conv2d(6, 8, 1),
        nn.Conv2d(6, 8, 3, padding=1, groups=2),
        nn.ConvTranspose2d(6, 8, 3, padding=1),
    ],
    ids=str,
)
def test_a_conv_whose_inner_places_are_not_known_is_refused_with_the_reason(layer):
    site, _, _ = _site(layer, 1, 6, 8, 8)
    assert TTConv(1).full_rank(site) == 0
    with pytest.raises(PlanError, match="padding that keeps the size"):
        TTConv(2).require(site)


def test_the_matrices_of_its_problem_are_its_factors():
    site, weight, _ = _site(nn.Conv3d(4, 5, (3, 2, 3), padding="same"), 1, 4, 5, 5, 5)
    form = TTConv(4)
    problem = form.problem(weight)
    factors = form.arranged(site, problem.leading(4, seed=0))
    assert tuple(f.shape for f in factors) == form.shapes(site)
    apart = (form.contract(site, factors) - weight.double()).norm() / weight.double().norm()
    assert problem.relative(problem.leading(4, seed=0)) == pytest.approx(float(apart), rel=1e-6)


def test_a_kernel_of_one_axis_is_a_tucker_of_the_same_ranks():
    site, weight, _ = _site(nn.Conv1d(6, 6, 3), 1, 6, 9)
    train, tucker = TTConv(4), Tucker(4)
    assert train.shapes(site) == tucker.shapes(site)
    assert train.macs(site) == tucker.macs(site)
    a, b = (form.contract(site, form.decompose(site, weight, None)) for form in (train, tucker))
    assert torch.allclose(a, b, atol=1e-3)


def test_it_goes_on_from_a_start_and_is_no_worse():
    site, weight, _ = _site(nn.Conv2d(12, 16, 3, padding=1), 1, 12, 8, 8)
    form = TTConv(5)
    few = form.decompose(site, weight, None, Aim(steps=2))
    more = form.decompose(site, weight, None, Aim(steps=20, start=few))
    errors = [float((form.contract(site, f) - weight).norm()) for f in (few, more)]
    assert errors[1] < errors[0]


def test_a_rank_takes_no_more_entries_than_it_says():
    site = Site("x", Conv(2), (64, 64, 3, 3), stride=(1, 1), pads=(1,) * 4, dilation=(1, 1))
    assert _entries(TTConv(45), site) == 64 * 45 + 2 * 3 * 45**2 + 45 * 64
