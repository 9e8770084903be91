"""Networks whose answers are pictures, judged by PSNR."""

import math

import pytest
import torch
from torch import nn

import rabbet
from rabbet.errors import DataError
from rabbet.tasks import PSNR, super_resolution


class Twice(nn.Module):
    """Twice as large, by a conv and a shuffle of pixels; with `off` added to each."""

    def __init__(self, off=0.0):
        super().__init__()
        self.conv = nn.Conv2d(3, 12, 3, padding=1)
        self.off = off

    def forward(self, x):
        return nn.functional.pixel_shuffle(self.conv(x), 2) + self.off


def _pairs(model, count=3):
    torch.manual_seed(1)
    small = [torch.rand(2, 3, 8, 6) for _ in range(count)]
    with torch.no_grad():
        return [(x, model(x).clamp(0, 1)) for x in small]


def test_a_known_error_is_a_known_ratio():
    model = Twice()
    nn.init.constant_(model.conv.bias, 0.5)
    nn.init.zeros_(model.conv.weight)
    pairs = _pairs(model)
    assert PSNR.of(pairs)(_off(model, 0.1)) == pytest.approx(20, abs=1e-4)
    assert PSNR.of([(x, 255 * y) for x, y in pairs], 255)(Scaled(_off(model, 0.01))) == (
        pytest.approx(40, abs=1e-3)
    )
    # answers are cut to what a picture can hold
    assert PSNR.of(pairs)(_off(model, 9.0)) == pytest.approx(-20 * math.log10(0.5), abs=1e-4)
    assert PSNR.of(pairs)(model) > 140  # no error at all is no infinity


def _off(model, off):
    """The same network, with a number added to every pixel."""
    other = Twice(off)
    other.load_state_dict(model.state_dict())
    return other


class Scaled(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return 255 * self.inner(x)


def test_an_edge_may_be_left_out():
    model = Twice()
    pairs = _pairs(model, 1)
    y = pairs[0][1]
    y[:, :, 0] = 1 - y[:, :, 0]
    assert PSNR.of(pairs)(model) < 40
    assert PSNR.of(pairs, border=1)(model) > 140


def test_a_network_is_compressed_and_judged():
    torch.manual_seed(0)
    model = Twice().eval()
    pairs = _pairs(model)
    task = super_resolution([x for x, _ in pairs], pairs)
    result = rabbet.compress(model, "bits <= 4", task, quality="fast")
    finer = rabbet.compress(model, "bits <= 8", task, quality="fast")
    assert task.evaluate(model) > task.evaluate(finer.model) > task.evaluate(result.model) > 10
    assert rabbet.sweep(model, "bits <= 4", task, quality="fast").rows[0].measure == pytest.approx(
        task.evaluate(result.model), abs=1e-6
    )


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda p: PSNR.of(p, 0), "the largest value of a pixel"),
        (lambda p: PSNR.of(p, "1"), "the largest value of a pixel"),
        (lambda p: PSNR.of(p, border=-1), "border is how many pixels"),
        (lambda p: PSNR.of(p, border=True), "border is how many pixels"),
        (lambda p: PSNR.of([]), "no pictures"),
        (lambda p: PSNR.of([x for x, _ in p]), "inputs, wanted pictures"),
        (lambda p: PSNR.of([(x, torch.zeros(2)) for x, _ in p]), "inputs, wanted pictures"),
        (lambda p: PSNR.of([(x, x) for x, _ in p])(Twice()), "are wanted"),
        (lambda p: PSNR.of(p, border=6)(Twice()), "left out"),
    ],
)
def test_mistakes_are_named(make, why):
    with pytest.raises(DataError, match=why):
        make(_pairs(Twice()))
