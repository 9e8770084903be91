"""Laws of every form on every kind of layer."""

import itertools

import pytest
import torch
from networks import rand
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers.pytorch_utils import Conv1D

from rabbet.forms import FORMS, Contracted
from rabbet.layers.site import KINDS
from rabbet.model.inspect import inspect_network

LAYERS = {
    "conv2d": (lambda: nn.Conv2d(6, 8, 3, padding=1), (2, 6, 7, 5)),
    "conv2d without bias": (lambda: nn.Conv2d(5, 7, (3, 1), bias=False), (2, 5, 6, 6)),
    "conv2d strided": (lambda: nn.Conv2d(6, 4, 3, stride=2, padding=1), (2, 6, 8, 7)),
    "conv2d dilated": (lambda: nn.Conv2d(4, 6, 3, padding=2, dilation=2), (2, 4, 7, 7)),
    "conv2d same": (lambda: nn.Conv2d(4, 6, 4, padding="same"), (2, 4, 7, 7)),
    "conv2d reflect": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (2, 4, 7, 7)),
    "conv2d circular": (
        lambda: nn.Conv2d(4, 6, 3, padding=(1, 2), padding_mode="circular"),
        (2, 4, 7, 7),
    ),
    "conv2d replicate": (
        lambda: nn.Conv2d(4, 6, 3, padding=2, padding_mode="replicate"),
        (2, 4, 7, 7),
    ),
    "conv2d pointwise": (lambda: nn.Conv2d(6, 9, 1), (2, 6, 4, 4)),
    "conv2d grouped": (lambda: nn.Conv2d(6, 9, 3, padding=1, groups=3), (2, 6, 5, 5)),
    "conv2d depthwise": (lambda: nn.Conv2d(6, 6, 3, padding=1, groups=6), (2, 6, 5, 5)),
    "conv1d": (lambda: nn.Conv1d(5, 8, 3, stride=2, padding=2), (2, 5, 9)),
    "conv1d same": (
        lambda: nn.Conv1d(5, 8, 4, padding="same", dilation=3, padding_mode="reflect"),
        (2, 5, 13),
    ),
    "linear": (lambda: nn.Linear(12, 8), (3, 12)),
    "linear over places": (lambda: nn.Linear(6, 11, bias=False), (3, 5, 6)),
    "transposed linear": (lambda: Conv1D(8, 12), (3, 5, 12)),
    "embedding": (lambda: nn.Embedding(9, 6), (3, 5)),
}


def _case(name):
    make, shape = LAYERS[name]
    layer = make().eval()
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(rand(*p.shape, seed=p.ndim))
    x = torch.arange(15).view(3, 5) % 9 if name == "embedding" else rand(*shape, seed=4)
    site = inspect_network(layer, x).sites[0]
    return layer, site, KINDS[site.kind].weight(layer).detach(), x


FITTING = [(f, n) for f, n in itertools.product(FORMS, LAYERS) if FORMS[f].full_rank(_case(n)[1])]
RANKED = [(f, n) for f, n in FITTING if FORMS[f].ranked]
every_form = pytest.mark.parametrize(("form", "name"), FITTING)
every_ranked_form = pytest.mark.parametrize(("form", "name"), RANKED)


def _ranks(form, site):
    full = FORMS[form].full_rank(site)
    return sorted({1, max(1, full // 2), full}) if FORMS[form].ranked else [None]


def _second(site, columns_of=None):
    root = rand(site.groups, site.columns, site.columns, seed=7) + torch.eye(site.columns)
    return root @ root.mT / site.columns


def test_every_form_fits_some_layer_and_dense_fits_all():
    assert {f for f, _ in FITTING} == set(FORMS)
    assert [n for f, n in FITTING if f == "dense"] == list(LAYERS)


@pytest.mark.parametrize("name", ["conv2d grouped", "conv2d depthwise"])
def test_a_grouped_conv_takes_dense_only(name):
    assert [f for f, n in FITTING if n == name] == ["dense"]


@every_form
def test_the_stated_shapes_are_those_of_the_factors(form, name):
    _, site, weight, _ = _case(name)
    for rank, second in itertools.product(_ranks(form, site), (None, _second(site))):
        factors = FORMS[form].decompose(site, weight, rank, second)
        assert tuple(tuple(f.shape) for f in factors) == FORMS[form].shapes(site, rank)
        assert len(FORMS[form].macs(site, rank)) == FORMS[form].gaps + 1


@every_form
def test_at_full_rank_the_factors_are_the_weight(form, name):
    _, site, weight, _ = _case(name)
    full = FORMS[form].full_rank(site) if FORMS[form].ranked else None
    for second in (None, _second(site)):
        found = FORMS[form].contract(site, FORMS[form].decompose(site, weight, full, second))
        assert found.shape == weight.shape
        assert torch.allclose(found, weight, atol=1e-4)


@every_form
def test_applying_factors_is_the_layer_with_the_contracted_weight(form, name):
    layer, site, weight, x = _case(name)
    bias = getattr(layer, "bias", None)
    for rank in _ranks(form, site):
        factors = FORMS[form].decompose(site, weight, rank, None)
        found = FORMS[form].apply(site, x, factors, lambda _, t: t, bias)
        contracted = FORMS[form].contract(site, factors)
        with torch.no_grad():
            layer.weight.copy_(contracted.T if site.kind == "transposed linear" else contracted)
            assert torch.allclose(found, layer(x), atol=1e-4, rtol=1e-4)


@every_form
def test_every_gap_between_factors_is_shown_once_in_order(form, name):
    _, site, weight, x = _case(name)
    seen = []
    rank = _ranks(form, site)[0]
    FORMS[form].apply(
        site,
        x,
        FORMS[form].decompose(site, weight, rank, None),
        lambda k, t: seen.append(k) or t,
        None,
    )
    assert seen == list(range(FORMS[form].gaps))


@every_form
def test_what_happens_between_factors_reaches_the_output(form, name):
    _, site, weight, x = _case(name)
    factors = FORMS[form].decompose(site, weight, _ranks(form, site)[-1], None)
    plain = FORMS[form].apply(site, x, factors, lambda _, t: t, None)
    for gap in range(FORMS[form].gaps):
        silenced = FORMS[form].apply(
            site, x, factors, lambda k, t, g=gap: t * 0 if k == g else t, None
        )
        assert not torch.allclose(silenced, plain)
        assert silenced.abs().max() < 1e-6


@every_form
def test_stated_macs_are_those_a_counter_sees(form, name):
    _, site, weight, x = _case(name)
    for rank in _ranks(form, site):
        factors = FORMS[form].decompose(site, weight, rank, None)
        with FlopCounterMode(display=False) as counter:
            FORMS[form].apply(site, x, factors, lambda _, t: t, None)
        seen = counter.get_total_flops()
        if isinstance(
            FORMS[form], Contracted
        ):  # putting the cores together does not depend on the input
            with FlopCounterMode(display=False) as counter:
                FORMS[form].finished(site, factors)
            seen -= counter.get_total_flops()
        assert 2 * len(x) * sum(FORMS[form].macs(site, rank)) == seen


@pytest.mark.parametrize("name", LAYERS)
def test_the_macs_of_a_site_are_those_a_counter_sees(name):
    layer, site, _, x = _case(name)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        layer(x)
    assert 2 * len(x) * site.macs == counter.get_total_flops()


@pytest.mark.parametrize("name", LAYERS)
def test_a_site_runs_as_its_layer_does(name):
    layer, site, weight, x = _case(name)
    with torch.no_grad():
        assert torch.allclose(
            site.run(x, weight, getattr(layer, "bias", None)), layer(x), atol=1e-5
        )


@every_ranked_form
@pytest.mark.parametrize("weighted", [False, True])
def test_the_error_falls_with_the_rank(form, name, weighted):
    _, site, weight, _ = _case(name)
    second = _second(site) if weighted else None
    metric = torch.eye(site.columns)[None] if second is None else second
    errors = []
    full = FORMS[form].full_rank(site)
    # doubled each time: two ranks that lie side by side may change places where the solver is a
    # local one
    for rank in [*itertools.takewhile(lambda r: r < full, (2**k for k in itertools.count())), full]:
        found = FORMS[form].contract(site, FORMS[form].decompose(site, weight, rank, second))
        delta = site.matrix(found - weight)
        errors.append(((delta @ metric) * delta).sum().item())
    slack = 1e-5 * errors[0]
    assert all(b <= a + slack for a, b in itertools.pairwise(errors))
    assert errors[-1] <= slack < errors[0]


@every_ranked_form
def test_a_metric_makes_the_error_it_sees_smaller(form, name):
    _, site, weight, _ = _case(name)
    second = _second(site)
    rank = max(1, FORMS[form].full_rank(site) // 8)

    def error(given):
        factors = FORMS[form].decompose(site, weight, rank, given)
        delta = site.matrix(FORMS[form].contract(site, factors) - weight)
        return ((delta @ second) * delta).sum().item()

    assert error(second) < error(None)
