"""Laws of every form on every kind of layer."""

import itertools

import pytest
import torch
from networks import rand, thinned
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers.pytorch_utils import Conv1D

from rabbet.forms import FORMS, RANKED
from rabbet.layers import KINDS, kind_of
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
    "conv3d": (lambda: nn.Conv3d(4, 5, (3, 2, 3), stride=(1, 2, 1), padding=1), (2, 4, 4, 5, 3)),
    "conv3d pointwise": (lambda: nn.Conv3d(4, 6, 1), (2, 4, 2, 3, 3)),
    "transposed conv1d": (
        lambda: nn.ConvTranspose1d(5, 8, 4, stride=3, output_padding=2, dilation=2),
        (2, 5, 6),
    ),
    "transposed conv2d": (lambda: nn.ConvTranspose2d(6, 8, 3, 2, 1, 1), (2, 6, 4, 5)),
    "transposed conv2d cut": (lambda: nn.ConvTranspose2d(6, 4, 2, 2, 1, bias=False), (2, 6, 4, 3)),
    "transposed conv2d grouped": (
        lambda: nn.ConvTranspose2d(6, 9, (3, 2), (2, 1), groups=3),
        (2, 6, 4, 3),
    ),
    "transposed conv3d": (lambda: nn.ConvTranspose3d(4, 5, 2, 2), (2, 4, 2, 3, 2)),
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
    return layer, site, site.kind.weight(layer).detach(), x


def _form(form, rank=1):
    """A form at a rank, if it has one."""
    return RANKED[form](rank) if form in RANKED else FORMS[form]()


FITTING = [(f, n) for f, n in itertools.product(FORMS, LAYERS) if _form(f).full_rank(_case(n)[1])]
every_form = pytest.mark.parametrize(("form", "name"), FITTING)
every_ranked_form = pytest.mark.parametrize(
    ("form", "name"), [(f, n) for f, n in FITTING if f in RANKED]
)


def _forms(form, site):
    """A form at a low, a middle and the full rank."""
    full = _form(form).full_rank(site)
    ranks = sorted({1, max(1, full // 2), full}) if form in RANKED else [1]
    return [_form(form, rank) for rank in ranks]


def _second(site, columns_of=None):
    root = rand(site.groups, site.columns, site.columns, seed=7) + torch.eye(site.columns)
    return root @ root.mT / site.columns


def test_every_form_fits_some_layer_and_dense_fits_all():
    assert {f for f, _ in FITTING} == set(FORMS)
    assert [n for f, n in FITTING if f == "dense"] == list(LAYERS)


def test_every_kind_of_layer_is_among_the_cases():
    """But for stored weights, which are no layers: `tests/model/test_stored.py`."""
    running = {kind for kind in KINDS.values() if kind.runs}
    assert {kind_of(make()) for make, _ in LAYERS.values()} == running


@pytest.mark.parametrize("name", [n for n in LAYERS if "grouped" in n or "depthwise" in n])
def test_a_grouped_conv_takes_dense_only(name):
    assert [f for f, n in FITTING if n == name] == ["dense"]


@every_form
def test_the_stated_shapes_are_those_of_the_factors(form, name):
    _, site, weight, _ = _case(name)
    for one, second in itertools.product(_forms(form, site), (None, _second(site))):
        shapes = tuple(tuple(f.shape) for f in one.decompose(site, weight, second))
        assert shapes == one.shapes(site)
        assert one.observed(shapes) == one
        assert len(one.macs(site)) == one.gaps(site) + 1


@every_form
def test_a_form_is_its_text(form, name):
    _, site, _, _ = _case(name)
    for one in _forms(form, site):
        assert FORMS[form].read(one.inside or None) == one
        assert str(one) == (f"{form}[{one.inside}]" if one.inside else form)


@every_form
def test_at_full_rank_the_factors_are_the_weight(form, name):
    _, site, weight, _ = _case(name)
    full = _forms(form, site)[-1]
    for second in (None, _second(site)):
        contracted = full.contract(site, full.decompose(site, weight, second))
        assert contracted.shape == weight.shape
        assert torch.allclose(contracted, weight, atol=1e-4)


@every_form
def test_applying_factors_is_the_layer_with_the_contracted_weight(form, name):
    layer, site, weight, x = _case(name)
    bias = getattr(layer, "bias", None)
    for one in _forms(form, site):
        factors = one.decompose(site, weight, None)
        output = one.apply(site, x, factors, lambda _, t: t, bias)
        with torch.no_grad():
            layer.weight.copy_(site.native(one.contract(site, factors)))
            assert torch.allclose(output, layer(x), atol=1e-4, rtol=1e-4)


@every_form
def test_every_gap_between_factors_is_shown_once_in_order(form, name):
    _, site, weight, x = _case(name)
    seen = []
    one = _forms(form, site)[0]
    factors = one.decompose(site, weight, None)
    one.apply(site, x, factors, lambda k, t: seen.append(k) or t, None)
    assert seen == list(range(one.gaps(site)))


@every_form
def test_what_happens_between_factors_reaches_the_output(form, name):
    _, site, weight, x = _case(name)
    one = _forms(form, site)[-1]
    factors = one.decompose(site, weight, None)
    plain = one.apply(site, x, factors, lambda _, t: t, None)
    for gap in range(one.gaps(site)):
        silenced = one.apply(site, x, factors, lambda k, t, g=gap: t * 0 if k == g else t, None)
        assert not torch.allclose(silenced, plain)
        assert silenced.abs().max() < 1e-6


@every_form
def test_stated_macs_are_those_a_counter_sees(form, name):
    _, site, weight, x = _case(name)
    for one in _forms(form, site):
        factors = one.decompose(site, weight, None)
        with FlopCounterMode(display=False) as counter:
            one.apply(site, x, factors, lambda _, t: t, None)
        seen = counter.get_total_flops()
        if one.contracted:  # contracting the cores does not depend on the input
            with FlopCounterMode(display=False) as counter:
                one.for_runtime(site, factors)
            seen -= counter.get_total_flops()
        assert 2 * len(x) * sum(one.macs(site)) == seen


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
        ours = site.run(x, weight, getattr(layer, "bias", None))
        assert torch.allclose(ours, layer(x), atol=1e-5)
        assert torch.equal(site.native(weight), layer.weight)


@pytest.mark.parametrize("name", [n for n in LAYERS if n != "embedding"])
def test_rows_times_the_weight_are_the_output(name):
    _, site, weight, x = _case(name)
    with torch.no_grad():
        products = site.patches(x, None, torch.Generator()) @ site.matrix(weight).mT
        # [groups, examples * places, out / groups] -> [examples, places, out]
        products = products.view(site.groups, len(x), -1, products.shape[2])
        ours = products.permute(1, 2, 0, 3).flatten(2)
        theirs = site.channels_last(site.run(x, weight)).reshape(ours.shape)
    assert torch.allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_linear_in_its_weight(name):
    """So that what a change does is the layer with the change as its weight."""
    _, site, weight, x = _case(name)
    change = rand(*weight.shape, seed=3)
    moved = site.run(x, weight + change) - site.run(x, weight)
    assert torch.allclose(site.run(x, change), moved, atol=1e-4)


@pytest.mark.parametrize(("form", "name"), thinned([(f, n) for f, n in FITTING if f in RANKED], 4))
@pytest.mark.parametrize("weighted", [False, True])
def test_the_error_falls_with_the_rank(form, name, weighted):
    _, site, weight, _ = _case(name)
    second = _second(site) if weighted else None
    metric = torch.eye(site.columns)[None] if second is None else second
    errors = []
    full = _form(form).full_rank(site)
    # doubled each time: with a local solver, neighbouring ranks may change places
    for rank in [*itertools.takewhile(lambda r: r < full, (2**k for k in itertools.count())), full]:
        one = _form(form, rank)
        delta = site.matrix(one.contract(site, one.decompose(site, weight, second)) - weight)
        errors.append(((delta @ metric) * delta).sum().item())
    slack = 1e-5 * errors[0]
    assert all(b <= a + slack for a, b in itertools.pairwise(errors))
    assert errors[-1] <= slack < errors[0]


@every_ranked_form
def test_a_metric_makes_the_error_it_sees_smaller(form, name):
    _, site, weight, _ = _case(name)
    second = _second(site)
    one = _form(form, max(1, _form(form).full_rank(site) // 8))

    def error(given):
        delta = site.matrix(one.contract(site, one.decompose(site, weight, given)) - weight)
        return ((delta @ second) * delta).sum().item()

    assert error(second) < error(None)


@every_ranked_form
def test_a_weight_has_no_higher_rank_than_its_form_says(form, name):
    _, site, weight, _ = _case(name)
    for one in _forms(form, site):
        most = one.matrix_rank(site)
        if most is not None:
            matrix = one.contract(site, one.decompose(site, weight, None)).flatten(1)
            assert torch.linalg.matrix_rank(matrix, rtol=1e-5) <= most
