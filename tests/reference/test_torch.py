"""Against torch: its own fake quantisers, its own layers, and arithmetic in whole numbers."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from networks import rand
from torch import nn

from rabbet.core.plan import Plan
from rabbet.grids.grid import Grid, Quantised
from rabbet.model.build import build
from rabbet.model.compressed import ActQuant, compressed_layers
from rabbet.model.inspect import inspect_network


@pytest.mark.parametrize("bits", range(2, 9))
def test_signed_grids_are_those_of_torch_per_tensor(bits):
    grid, x = Grid.of(bits), rand(40, 30)
    scale = grid.mse(x)
    theirs = torch.fake_quantize_per_tensor_affine(x, scale.item(), 0, grid.low, grid.high)
    assert torch.allclose(grid.project(x, scale), theirs, atol=1e-6)


@pytest.mark.parametrize(("bits", "axis"), list(itertools.product(range(2, 9), (0, 1))))
def test_signed_grids_are_those_of_torch_per_channel(bits, axis):
    grid, x = Grid.of(bits, axis=axis), rand(40, 30)
    scale = grid.mse(x)
    zeros = torch.zeros(len(scale), dtype=torch.int32)
    theirs = torch.fake_quantize_per_channel_affine(x, scale, zeros, axis, grid.low, grid.high)
    assert torch.allclose(grid.project(x, scale), theirs, atol=1e-6)


@pytest.mark.parametrize(("bits", "zero"), [(8, 0), (8, 100), (8, 255), (4, 7), (2, 1)])
def test_quantised_activations_and_their_gradient_are_those_of_torch(bits, zero):
    act = ActQuant(bits)
    act.set_range(torch.tensor(0.05 * 2 ** (8 - bits)), torch.tensor(float(zero)))
    x = (4 * rand(50, 20)).requires_grad_()
    y = (4 * rand(50, 20)).requires_grad_()
    ours = act(x)
    theirs = torch.fake_quantize_per_tensor_affine(y, act.scale.item(), zero, 0, 2**bits - 1)
    assert torch.allclose(ours, theirs, atol=1e-6)
    pull = rand(50, 20, seed=2)
    ours.backward(pull)
    theirs.backward(pull)
    # up to half a step outside the range torch still lets the gradient through; LSQ (eq. 3) does
    # not
    code = (x / act.scale + zero).detach()
    near = ((code > -0.5) & (code < 0)) | ((code > 2**bits - 1) & (code < 2**bits - 0.5))
    assert torch.equal(x.grad[~near], y.grad[~near])
    assert not x.grad[near].any()


def test_halves_are_rounded_to_even_as_torch_does():
    x = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5])
    assert Grid.of(4).codes(x, torch.ones(1)).tolist() == [-2, -2, 0, 0, 2, 2]


LAYERS = {
    "linear": (nn.Linear(20, 6), rand(7, 20)),
    "conv1d": (nn.Conv1d(4, 6, 3, stride=2, padding=1), rand(3, 4, 9)),
    "conv2d": (nn.Conv2d(4, 6, 3, padding=1, groups=2), rand(3, 4, 6, 5)),
    "dilated": (nn.Conv2d(4, 6, 3, padding=2, dilation=2), rand(3, 4, 6, 5)),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("grid", ["8c", "4c", "tc", "3"])
def test_a_layer_can_be_run_in_whole_numbers(name, grid):
    """What an integer kernel does: codes times codes in int64, then one product of scales."""
    layer, x = LAYERS[name]
    model = nn.Sequential(layer).eval()
    student = build(model, Plan.parse(f"0 dense@{grid} | act@8"), inspect_network(model, x))
    compressed = compressed_layers(student)["0"]
    act, factor = compressed.quantisers[0], compressed.factors[0][0]
    act.set_range(torch.tensor(0.03), torch.tensor(117.0))
    inputs = (act.grid.codes(x, act.scale, act.zero) - act.zero).to(torch.int64)
    codes = factor.codes.to(torch.int64)
    whole = compressed.site.run(inputs.double(), codes.double())  # exact: far below 2**53
    assert torch.equal(whole, whole.round())
    axis = 1
    scale = factor.scale.double() * act.scale.double()
    shape = [-1 if d == axis else 1 for d in range(whole.ndim)]
    out = whole * (scale.view(shape) if len(scale) > 1 else scale) + layer.bias.double().view(shape)
    assert torch.allclose(student(x).double(), out, rtol=1e-4, atol=1e-4)


def test_a_compressed_layer_is_the_layer_with_its_canonical_weight():
    layer, x = LAYERS["dilated"]
    model = nn.Sequential(layer).eval()
    student = build(model, Plan.parse("0 dense@2hc + lowrank[3]@6c"), inspect_network(model, x))
    weight = compressed_layers(student)["0"].weight
    assert torch.allclose(
        student(x), F.conv2d(x, weight, layer.bias, padding=2, dilation=2), atol=1e-4
    )


def test_nearest_numbers_of_eight_bits_are_within_half_a_step():
    x = rand(16, 40)
    q = Quantised.nearest(x, Grid.of(8, axis=0))
    inside = (x / q.scale[:, None]).abs() < 127
    assert ((q.values - x).abs() <= q.scale.abs()[:, None] * (0.5 + 1e-4))[inside].all()
    assert inside.float().mean() > 0.99


def test_every_activation_between_factors_has_a_quantiser_of_its_own():
    layer, x = LAYERS["linear"]
    model = nn.Sequential(layer).eval()
    line = "0 lowrank[2]@8c + dense@2hc + lowrank[3]@8c | act@8"
    compressed = compressed_layers(build(model, Plan.parse(line), inspect_network(model, x)))["0"]
    ranges = [
        (0.05, 128.0),
        (0.5, 100.0),
        (0.25, 90.0),
    ]  # the input, then between the factors of each lowrank
    for act, (scale, zero) in zip(compressed.quantisers, ranges, strict=True):
        act.set_range(torch.tensor(scale), torch.tensor(zero))

    def on(k, t):
        return torch.fake_quantize_per_tensor_affine(t, ranges[k][0], int(ranges[k][1]), 0, 255)

    (a, b), (dense,), (c, d) = ([f() for f in term] for term in compressed.factors)
    rounded = on(0, x)
    by_hand = (
        on(1, rounded @ a.T) @ b.T + rounded @ dense.T + on(2, rounded @ c.T) @ d.T + layer.bias
    )
    assert torch.allclose(compressed(x), by_hand, atol=1e-4)
