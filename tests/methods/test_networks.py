"""Networks as users bring them: what may be folded, what is left alone, what must still run."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from networks import NETWORKS, Case, Tokens, image_networks, network, rand, settled, tokens
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from rabbet import Joint, Task, compress, fit, load, survey
from rabbet.data.batches import outputs
from rabbet.model.bn_fold import fold
from rabbet.model.build import plan_of
from rabbet.model.compressed import Compressed, compressed_layers
from rabbet.model.prepare import prepared
from rabbet.train.tuning import Tuning

QUICK = Joint(
    grids=("3c", "8c"),
    adapters=(("2hc", 0.3),),
    forms=("cp",),
    shares=(0.5,),
    factor_grids=("4c",),
    tuning=Tuning(steps=2, batch=4),
)
EXACT = Joint(grids=("8c",), adapters=(), forms=(), act=None, tuning=Tuning(steps=0))


def run(model, batch):
    with torch.no_grad():
        return outputs(Task(()).run(model, batch))


def error(model, reference, batch):
    pairs = list(zip(run(model, batch), run(reference, batch), strict=True))
    return max((a.float() - b.float()).norm().item() / b.float().norm().item() for a, b in pairs)


def saved_and_loaded(result, model, path):
    """The network of the written file, compared with the one that was written."""
    assert result.save(path) == result.cost.bytes == path.stat().st_size
    again = load(path, model)
    ours, theirs = result.model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    return again


# Batch norms


@pytest.mark.parametrize("name", NETWORKS)
def test_a_folded_network_answers_as_before(name):
    case = network(name)
    plain, _ = prepared(case.model, Task(case.batches))
    folded = fold(plain, survey(case.model, case.batches))
    for batch in case.batches:
        for a, b in zip(run(folded, batch), run(case.model, batch), strict=True):
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)


@settings(max_examples=25)
@given(image_networks())
def test_folding_changes_nothing_but_the_batch_norms(case):
    surveyed = survey(case.model, case.batches)
    norms = {n for n, m in case.model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert {s.norm for s in surveyed} - {None} == norms
    folded = fold(case.model, surveyed)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    for batch in case.batches:
        assert torch.allclose(
            run(folded, batch)[0], run(case.model, batch)[0], rtol=1e-5, atol=1e-5
        )


class Ends(nn.Module):
    """A conv, a batch norm, and a given forward."""

    def __init__(self, forward, **norm):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.other = nn.Conv2d(4, 4, 1)
        self.norm = nn.BatchNorm2d(4, **norm)
        self.run = forward

    def forward(self, x):
        return self.run(self, x)


def _twice(m, x):
    y = m.conv(x)
    return m.norm(y) + y


def _in_place(m, x):
    y = m.conv(x)
    y.add_(1.0)
    return m.norm(y)


def _returned(m, x):
    y = m.conv(x)
    return m.norm(y), y


def _returned_inside(m, x):
    y = m.conv(x)
    return {"out": m.norm(y), "more": [y]}


NOT_FOLDED = {
    "the output of the conv is used twice": _twice,
    "the output of the conv is returned": _returned,
    "the output of the conv is returned inside a dict": _returned_inside,
    "the output of the conv is changed in place": _in_place,
    "an activation lies between": lambda m, x: m.norm(F.relu(m.conv(x))),
    "another conv lies between": lambda m, x: m.norm(m.other(m.conv(x)).sigmoid()),
    "a view lies between": lambda m, x: m.norm(m.conv(x)[:, :, 1:]),
    "the norm comes first": lambda m, x: (
        m.norm(m.other(m.norm(torch.cat([x, x[:, :1]], 1)))) + 0 * m.conv(x)
    ),
    "the conv runs twice": lambda m, x: m.norm(m.conv(x)) + m.conv(x.flip(2)),
    "the norm runs twice": lambda m, x: m.norm(m.conv(x)) + m.norm(m.other(m.conv(x)).abs()),
}


@pytest.mark.parametrize("why", NOT_FOLDED)
def test_a_batch_norm_is_not_folded_where(why, tmp_path):
    model = settled(Ends(NOT_FOLDED[why]))
    x = rand(3, 3, 6, 6)
    surveyed = survey(model, [x])
    assert surveyed["conv"].norm is None
    for a, b in zip(run(fold(model, surveyed), x), run(model, x), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)
    result = compress(model, "bits <= 8.5", [x], EXACT)
    assert error(result.model, model, x) < 0.02
    saved_and_loaded(result, model, tmp_path / "a")


@pytest.mark.parametrize(
    "norm", [{"track_running_stats": False}, {"affine": False}, {"eps": 0.5}, {}]
)
def test_a_batch_norm_behind_its_conv_is_folded_if_it_has_statistics(norm):
    model = settled(Ends(lambda m, x: F.relu_(m.norm(m.conv(x))), **norm))
    x = rand(3, 3, 6, 6)
    surveyed = survey(model, [x])
    assert surveyed["conv"].norm == (None if "track_running_stats" in norm else "norm")
    assert torch.allclose(run(fold(model, surveyed), x)[0], run(model, x)[0], rtol=1e-5, atol=1e-5)


def test_a_batch_norm_that_the_user_watches_is_not_folded():
    model = settled(Ends(lambda m, x: m.norm(m.conv(x))))
    model.norm.register_forward_hook(lambda *_: None)
    assert survey(model, [rand(3, 3, 6, 6)])["conv"].norm is None


def test_a_batch_norm_with_two_names_is_never_lost(tmp_path):
    model = settled(Ends(lambda m, x: m.norm(m.conv(x))))
    model.alias = model.norm
    x = rand(3, 3, 6, 6)
    result = compress(model, "bits <= 8.5", [x], EXACT)
    assert error(result.model, model, x) < 0.02
    saved_and_loaded(result, model, tmp_path / "a")


@pytest.mark.parametrize(("shape", "folded"), [((6, 5), True), ((6, 7, 5), False)])
def test_a_batch_norm_behind_a_linear_is_folded_only_where_both_work_on_one_axis(shape, folded):
    class Places(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.norm = nn.Linear(5, 7), nn.BatchNorm1d(7)

        def forward(self, x):
            return self.norm(self.fc(x))

    model = settled(Places())
    x = rand(*shape)
    surveyed = survey(model, [x])
    assert (surveyed["fc"].norm == "norm") == folded
    assert torch.allclose(run(fold(model, surveyed), x)[0], run(model, x)[0], rtol=1e-5, atol=1e-5)


# What is found, and what is left alone


def test_sites_come_in_the_order_in_which_they_run():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.first = nn.Linear(4, 3), nn.Linear(5, 4)

        def forward(self, x):
            return self.last(self.first(x))

    assert [s.name for s in survey(Backwards(), [rand(2, 5)])] == ["first", "last"]


def test_what_is_left_is_named_with_its_reason():
    case = network("twice")
    left = {x.name: x.reason for x in survey(case.model, case.batches).left}
    assert "never ran" in left["spare"]
    assert "a BatchNorm that alone reads the output of no layer" in left["norm"]
    case = network("attention")
    assert survey(case.model, case.batches).left == ()


def test_a_layer_that_runs_twice_is_one_site_under_both_names(tmp_path):
    case = network("twice")
    surveyed = survey(case.model, case.batches)
    body = surveyed["body"]
    assert (body.calls, body.positions, body.tied) == (2, 2, ("again",))
    assert body.macs == 2 * 12 * 12
    result = compress(case.model, "bits <= 8.5", case.batches, EXACT)
    assert result.model.body is result.model.again
    assert isinstance(result.model.body, Compressed)
    again = saved_and_loaded(result, case.model, tmp_path / "a")
    assert again.body is again.again


def test_layers_left_alone_keep_their_numbers(tmp_path):
    case = network("twice")
    result = compress(case.model, "bits <= 4", case.batches, QUICK)
    again = saved_and_loaded(result, case.model, tmp_path / "a")
    for name in ("spare.weight", "spare.bias", "norm.running_mean", "norm.num_batches_tracked"):
        assert torch.equal(again.state_dict()[name], case.model.state_dict()[name])


@pytest.mark.parametrize(
    "make", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.orthogonal]
)
def test_a_parametrised_weight_is_made_once(make, tmp_path):
    model = settled(nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3)))
    make(model[0])
    x = rand(5, 6)
    surveyed = survey(model, [x])
    assert [s.name for s in surveyed] == ["0", "2"]
    assert not surveyed.left
    result = compress(model, "bits <= 8.5", [x], EXACT)
    assert error(result.model, model, x) < 0.02
    saved_and_loaded(result, model, tmp_path / "a")
    assert nn.utils.parametrize.is_parametrized(model[0])


def test_a_parametrisation_that_draws_is_left_as_it_is():
    class Noisy(nn.Module):
        def forward(self, weight):
            return weight + 1e-3 * torch.randn_like(weight)

    model = settled(nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3)))
    nn.utils.parametrize.register_parametrization(model[0], "weight", Noisy())
    surveyed = survey(model, [rand(5, 6)])
    assert [s.name for s in surveyed] == ["2"]
    assert any("parametrised" in x.reason for x in surveyed.left)


def test_an_old_weight_norm_is_made_once(tmp_path):
    model = settled(nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3)))
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(model[0])
    model(rand(5, 6))  # leaves a weight behind that cannot be copied
    result = compress(model, "bits <= 8.5", [rand(5, 6)], EXACT)
    assert [line.name for line in result.plan] == ["0", "2"]
    assert error(result.model, model, rand(5, 6)) < 0.02
    saved_and_loaded(result, model, tmp_path / "a")


def test_a_layer_with_hooks_of_the_user_is_left_alone():
    case = network("stack")
    case.model[3].register_forward_pre_hook(lambda *_: None)
    surveyed = survey(case.model, case.batches)
    assert "3" not in [s.name for s in surveyed]
    assert any(x.name == "3" and "hooks" in x.reason for x in surveyed.left)


def test_a_layer_with_a_forward_of_the_users_own_is_left_alone():
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = settled(nn.Sequential(Scaled(6, 6), nn.Linear(6, 3)))
    assert [s.name for s in survey(model, [rand(2, 6)])] == ["1"]


def test_an_embedding_is_compressed_and_its_input_never_quantised():
    case = network("tokens")
    result = compress(case.model, "bits <= 3", case.batches, QUICK)
    assert result.plan["table"].act is None
    assert isinstance(result.model.table, Compressed)


# Unusual networks


def _calls(monkeypatch):
    """Names of the compressed layers that run; without hooks, which turn off torch's fused path."""
    seen = []
    forward = Compressed.forward
    monkeypatch.setattr(
        Compressed, "forward", lambda self, x: seen.append(self.site.name) or forward(self, x)
    )
    return seen


def test_the_fused_transformer_layer_does_not_bypass_compressed_linears(monkeypatch, tmp_path):
    case = network("tokens")
    result = compress(case.model, "bits <= 4", case.batches, QUICK)
    names = [layer.name for layer in result.plan]
    assert {"layer.linear1", "layer.linear2"} <= set(names)
    again = saved_and_loaded(result, case.model, tmp_path / "a")
    seen = _calls(monkeypatch)
    for model in (result.model, again):
        seen.clear()
        run(model, case.batches[0])
        assert seen == names


class Padded(nn.Module):
    """Transformer layers with a padding mask: torch uses a nested tensor where it can."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(20, 16)
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(16, 2, 24, batch_first=True), 2
        )
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        hidden = self.encoder(self.table(x), src_key_padding_mask=x == 0)
        return self.head(hidden[:, 0])


def test_a_masked_transformer_stack_runs_its_compressed_linears(monkeypatch, tmp_path):
    model = settled(Padded())
    batches = [b.masked_fill(torch.arange(7) > 4, 0) for b in tokens()]
    batches[0][0] = 3  # one example has no padding
    result = compress(model, "bits <= 8.5", batches, EXACT)
    names = [layer.name for layer in result.plan]
    assert len(names) == 14
    again = saved_and_loaded(result, model, tmp_path / "a")
    seen = _calls(monkeypatch)
    assert error(again, model, batches[0]) < 0.05
    assert sorted(seen) == sorted(names)


def test_a_gpt2_of_transformers_is_compressed(tmp_path):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    model = GPT2LMHeadModel(config).eval()
    batches = [{"input_ids": t} for t in tokens(40, 9, 4)]
    surveyed = survey(model, batches)
    assert {s.kind.name for s in surveyed} == {"transposed linear", "embedding"}
    assert surveyed["transformer.wte"].heads == ("lm_head",)
    assert not any("wte" in x.name or "lm_head" in x.name for x in surveyed.left)
    result = compress(model, "bits <= 8.5", batches, EXACT)
    assert error(result.model, model, batches[0]) < 0.02
    again = saved_and_loaded(result, model, tmp_path / "a")
    assert isinstance(again.transformer.h[0].mlp.c_fc, Compressed)
    small = compress(model, "bits <= 3", batches, QUICK)
    assert error(small.model, model, batches[0]) > error(result.model, model, batches[0])
    saved_and_loaded(small, model, tmp_path / "b")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["stack", "tokens", "twice"])
def test_a_checkpoint_of_another_precision_is_compressed_and_what_is_left_keeps_its_type(
    dtype, name, tmp_path
):
    case = network(name)
    model = case.model.to(dtype)
    result = compress(model, "bits <= 8.5", case.batches, EXACT)
    assert all(t.dtype == dtype for t in model.state_dict().values() if t.is_floating_point())
    reference = network(name).model
    assert error(result.model, reference, case.batches[0]) < 0.08
    saved_and_loaded(result, model, tmp_path / "a")
    whole = network(name)
    single = compress(whole.model, "bits <= 8.5", whole.batches, EXACT)
    if name != "stack" and dtype != torch.float64:  # what is left takes half the bytes
        assert result.cost.bytes < single.cost.bytes


def test_a_network_that_is_one_layer_is_compressed(tmp_path):
    case = network("single")
    result = compress(case.model, "bits <= 4", case.batches, QUICK)
    assert isinstance(result.model, Compressed)
    assert str(result.plan).startswith('""')
    again = saved_and_loaded(result, case.model, tmp_path / "a")
    assert isinstance(again, Compressed)


def test_odd_padding_and_dilation_are_kept(tmp_path):
    case = network("padded")
    result = compress(case.model, "bits <= 8.5", case.batches, EXACT)
    assert error(result.model, case.model, case.batches[0]) < 0.02
    saved_and_loaded(result, case.model, tmp_path / "a")


def test_batches_of_keywords_are_taken_and_plain_values_in_them_stay(tmp_path):
    case = network("keyword")
    result = compress(case.model, "bits <= 8.5", case.batches, EXACT)
    assert error(result.model, case.model, case.batches[0]) < 0.02
    assert set(result.model(**case.batches[0])) == {"scores", "hidden"}
    saved_and_loaded(result, case.model, tmp_path / "a")


@pytest.mark.parametrize("name", ["stack", "tokens", "twice", "single", "residual"])
def test_a_single_example_is_enough(name, tmp_path):
    case = network(name)
    result = compress(case.model, "bits <= 4", [case.batches[0][:1]], QUICK)
    assert all(torch.isfinite(t).all() for t in run(result.model, case.batches[0]))
    saved_and_loaded(result, case.model, tmp_path / "a")


class Positions(nn.Module):
    """Token and position tables, positions without a batch axis; a flatten before the head."""

    def __init__(self, flat):
        super().__init__()
        self.words, self.places, self.head, self.flat = (
            nn.Embedding(20, 8),
            nn.Embedding(7, 8),
            nn.Linear(8, 5),
            flat,
        )

    def forward(self, x):
        y = self.words(x) + self.places(torch.arange(7))
        return self.head(y.flatten(0, 1)) if self.flat else self.head(y)


@pytest.mark.parametrize("flat", [False, True])
def test_layers_whose_input_has_no_batch_axis_or_a_flattened_one_are_compressed(flat, tmp_path):
    model = settled(Positions(flat))
    result = compress(model, "bits <= 8.5", tokens(), EXACT)
    assert error(result.model, model, tokens()[0]) < 0.02
    tight = compress(model, "bits <= 4", tokens(), QUICK)
    saved_and_loaded(tight, model, tmp_path / "a")


def test_images_of_different_sizes_are_taken():
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = (
                nn.Conv2d(3, 6, 3),
                nn.Conv2d(6, 6, 3, padding=1),
                nn.Linear(6, 4),
            )

        def forward(self, x):
            return self.head(F.relu(self.b(F.relu(self.a(x)))).mean((2, 3)))

    model = settled(Pooled())
    batches = [rand(4, 3, 6, 6), rand(2, 3, 11, 9), rand(1, 3, 12, 8)]
    result = compress(model, "bits <= 4", batches, QUICK)
    assert all(torch.isfinite(run(result.model, b)[0]).all() for b in batches)


def test_a_batch_of_several_tensors_is_passed_by_position():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = nn.Bilinear(3, 4, 5), nn.Linear(5, 2)

        def forward(self, a, b):
            return self.right(self.left(a, b))

    model = settled(Both())
    batch = (rand(4, 3), rand(4, 4))
    for form in (batch, list(batch)):
        result = compress(model, "bits <= 8.5", [form], EXACT)
        assert error(result.model, model, batch) < 0.02


def test_labels_in_a_batch_need_a_forward_of_the_users_own():
    case = network("stack")
    pairs = [(x, torch.zeros(len(x), dtype=torch.long)) for x in case.batches]
    task = Task(pairs, forward=lambda model, batch: model(batch[0]))
    plain = compress(case.model, "bits <= 4", case.batches, QUICK)
    assert compress(case.model, "bits <= 4", task, QUICK).plan == plain.plan


def test_the_example_limit_is_kept():
    case = network("stack")
    seen = []

    def forward(model, batch):
        seen.append(len(batch))
        return model(batch)

    endless = (rand(4, 3, 8, 8, seed=k) for k in range(10**9))
    compress(case.model, "bits <= 8.5", Task(endless, forward, limit=10, axes=0), EXACT)
    assert (
        sum(Task([rand(4, 3, 8, 8)] * 9, limit=10, axes=0).read()[k].shape[0] for k in range(3))
        == 10
    )
    assert seen
    assert max(seen) <= 10


def test_a_plan_made_by_hand_leaves_the_other_layers_in_float(tmp_path):
    case = network("residual")
    plan = "# only two\n0 dense@4c | act@8\n\n3.conv2 dense@2hc + lowrank[2]@8c\n"
    result = fit(case.model, plan, case.batches, QUICK)
    assert list(compressed_layers(result.model)) == ["0", "3.conv2"]
    assert isinstance(result.model[3].conv1, nn.Conv2d)
    assert plan_of(result.model, result.survey) == result.plan
    saved_and_loaded(result, case.model, tmp_path / "a")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_folded_layer_without_a_line_is_stored_in_float32_whatever_it_was(dtype, tmp_path):
    case = network("stack")
    model = case.model.to(dtype)
    result = fit(model, "3 dense@4c | act@8\n10 dense@8c", case.batches, QUICK)
    types = {r.name: r.dtype for r in result.parcel.rest}
    assert types == {
        "0.weight": "F32",
        "0.bias": "F32",
        "6.weight": {"float16": "F16", "bfloat16": "BF16"}[str(dtype)[6:]],
    }
    saved_and_loaded(result, model, tmp_path / "a")


@pytest.mark.slow
def test_more_bits_are_nearer_to_the_network():
    case = Case(settled(Tokens()), tokens())
    errors = [
        error(
            compress(
                case.model, f"bits <= {bits}", case.batches, Joint(tuning=Tuning(steps=0))
            ).model,
            case.model,
            case.batches[0],
        )
        for bits in (2, 4, 7)
    ]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.1


class Frozen(nn.Module):
    """A body that runs without gradients, before a head that has them."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x):
        with torch.no_grad():
            hidden = F.relu(self.body(x))
        return self.head(hidden)


class Unlearned(nn.Module):
    """A forward that can only be used, not trained."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(8, 16), nn.Linear(16, 4)

    @torch.no_grad()
    def forward(self, x):
        return self.head(F.relu(self.body(x)))


@pytest.mark.parametrize("make", [Frozen, Unlearned])
def test_a_layer_that_no_gradient_reaches_is_not_free_to_be_harmed(make, tmp_path):
    model, x = settled(make()), rand(64, 8)
    result = compress(model, "bits <= 4.5", [x], Joint(adapters=(), tuning=Tuning(steps=0)))
    bits = [line.terms[0].grid.bits for line in result.plan]
    assert min(bits) >= 3
    saved_and_loaded(result, model, tmp_path / "a")
    # tuning has nothing to do
    saved_and_loaded(compress(model, "bits <= 4.5", [x], QUICK), model, tmp_path / "b")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
@pytest.mark.parametrize("name", ["residual", "tokens", "stack"])
def test_a_network_on_a_cuda_device_is_compressed_there(name, tmp_path):
    case = network(name)
    result = compress(case.model.cuda(), "bits <= 8.5", case.batches, QUICK)
    assert all(t.is_cuda for t in result.model.state_dict().values())
    assert error(result.model, case.model, case.batches[0]) < 0.2
    again = saved_and_loaded(result, case.model, tmp_path / "a")
    here = load(tmp_path / "a", network(name).model)
    for batch in case.batches:
        for a, b in zip(run(again, batch), run(here, batch), strict=True):
            assert torch.allclose(a.cpu(), b, rtol=1e-3, atol=1e-3)


def test_a_layer_that_is_called_by_keyword_is_left_alone_and_the_reason_says_so():
    class Keyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x):
            return self.second(input=self.first(x))

    surveyed = survey(settled(Keyword()), [rand(3, 4)])
    assert [s.name for s in surveyed] == ["first"]
    assert "keyword" in next(left.reason for left in surveyed.left if left.name == "second")


def test_layers_that_share_a_bias_get_one_each_whichever_of_them_a_plan_covers(tmp_path):
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
            self.second.bias = self.first.bias

        def forward(self, x):
            return self.second(self.first(x).relu())

    model, batch = settled(Shared()), rand(16, 4)
    for text in ("first dense@4c", "second dense@4c", "first dense@4c\nsecond dense@4c"):
        result = fit(model, text, [batch], Joint(tuning=Tuning(steps=0)))
        path = tmp_path / "shared.safetensors"
        assert result.save(path) == result.cost.bytes
        with torch.no_grad():
            assert torch.equal(load(path, model)(batch), result.model(batch))
