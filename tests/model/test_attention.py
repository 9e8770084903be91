"""`open_attention`: torch's attention, taken apart, computes the same for every way to call it."""

import itertools

import pytest
import torch
from networks import rand, settled
from torch import nn
from torch.nn.utils import parametrizations

import rabbet
from rabbet.errors import ModelError

MASKS = {
    "none": {},
    "padding": {"key_padding_mask": torch.arange(5).expand(3, 5) > torch.tensor([[4], [2], [1]])},
    "causal": {"attn_mask": torch.ones(4, 5, dtype=torch.bool).triu(1), "is_causal": True},
    "numbers": {"attn_mask": rand(4, 5), "key_padding_mask": rand(3, 5, seed=1)},
    "heads": {
        "attn_mask": rand(6, 4, 5) > 1.5,
        "key_padding_mask": torch.arange(5).expand(3, 5) > 2,
    },
}
BUILT = ({}, {"bias": False}, {"kdim": 6, "vdim": 10}, {"kdim": 6, "vdim": 10, "bias": False})


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("built", BUILT, ids=str)
def test_it_answers_as_torch_does(built, mask):
    for first, weights, average in itertools.product((True, False), repeat=3):
        model = settled(nn.MultiheadAttention(8, 2, batch_first=first, **built))
        widths = (8, built.get("kdim", 8), built.get("vdim", 8))
        given = [
            rand(3, n, w, seed=k) for k, (n, w) in enumerate(zip((4, 5, 5), widths, strict=True))
        ]
        given = given if first else [x.transpose(0, 1) for x in given]
        asked = {"need_weights": weights, "average_attn_weights": average, **MASKS[mask]}
        answers, wanted = (m(*given, **asked) for m in (rabbet.open_attention(model), model))
        torch.testing.assert_close(answers, wanted, rtol=1e-5, atol=1e-6)


def test_one_example_without_a_batch_axis():
    model = settled(nn.MultiheadAttention(8, 2))
    given = (rand(4, 8), rand(5, 8, seed=1), rand(5, 8, seed=2))
    for asked in (
        {},
        {"key_padding_mask": torch.arange(5) > 2},
        {"attn_mask": rand(2, 4, 5), "need_weights": False},
    ):
        torch.testing.assert_close(
            rabbet.open_attention(model)(*given, **asked), model(*given, **asked)
        )


def test_dropout_is_at_work_while_it_trains_and_gradients_flow():
    model = rabbet.open_attention(settled(nn.MultiheadAttention(8, 2, dropout=0.5))).train()
    x = rand(4, 3, 8)
    for asked in (True, False):
        assert not torch.equal(*(model(x, x, x, need_weights=asked)[0] for _ in range(2)))
    model(x, x, x)[0].sum().backward()
    assert all(p.grad is not None and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("asked", "error", "words"),
    [
        ({"is_causal": True}, ValueError, "attn_mask"),
        (
            {"attn_mask": torch.zeros(1, 4)},
            ValueError,
            r"attn_mask has shape \[1, 4\], of 4 queries and 4 keys",
        ),
        ({"attn_mask": torch.zeros(2, 4, 4)}, ValueError, r"attn_mask has shape \[2, 4, 4\]"),
        (
            {"key_padding_mask": torch.zeros(1, 4)},
            ValueError,
            r"shape \[1, 4\], for 3 examples of 4 keys",
        ),
        ({"attn_mask": torch.zeros(4, 4, dtype=torch.long)}, TypeError, "found torch.int64"),
    ],
)
def test_masks_that_torch_refuses_are_refused(asked, error, words):
    x = rand(4, 3, 8)
    model = nn.MultiheadAttention(8, 2)
    with pytest.raises(error, match=words):
        rabbet.open_attention(model)(x, x, x, **asked)
    with pytest.raises((RuntimeError, AssertionError)):
        model(x, x, x, **asked)


def test_a_causal_hint_is_trusted_where_torch_trusts_it():
    model, x = settled(nn.MultiheadAttention(8, 2)), rand(4, 3, 8)
    mask = torch.ones(4, 4).triu(1) * -1e9 + rand(4, 4)  # more than causal
    for asked in (True, False):
        answers, wanted = (
            m(x, x, x, attn_mask=mask, is_causal=True, need_weights=asked)
            for m in (rabbet.open_attention(model), model)
        )
        torch.testing.assert_close(answers, wanted, rtol=1e-5, atol=1e-6)


def test_parameters_that_are_shared_stay_shared_and_what_is_frozen_stays_frozen():
    model = nn.ModuleDict({"a": nn.MultiheadAttention(8, 2), "b": nn.MultiheadAttention(8, 2)})
    model["b"].in_proj_weight, model["b"].in_proj_bias = (
        model["a"].in_proj_weight,
        model["a"].in_proj_bias,
    )
    model["a"].in_proj_bias.requires_grad_(False)
    state = torch.get_rng_state()
    opened = rabbet.open_attention(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert opened["a"].k_proj is opened["b"].k_proj
    assert opened["a"].out_proj is not opened["b"].out_proj
    assert sum(p.numel() for p in opened.parameters()) == sum(p.numel() for p in model.parameters())
    assert {n.rpartition(".")[2] for n, p in opened.named_parameters() if not p.requires_grad} == {
        "bias"
    }


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_an_opened_layer_can_be_stacked():
    layer = rabbet.open_attention(settled(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)))
    assert nn.TransformerEncoder(layer, 2)(rand(2, 3, 8)).shape == (2, 3, 8)


def test_attention_without_its_projection_is_ignored():
    model = nn.Sequential(nn.Linear(8, 8))
    model[0].idle = nn.MultiheadAttention(8, 2)
    model[0].idle.out_proj = None
    assert [s.name for s in rabbet.survey(rabbet.open_attention(model), [rand(2, 8)])] == ["0"]


# torch itself packs sentences into nested tensors
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested")
@pytest.mark.parametrize("padded", [False, True])
def test_torchs_encoder_and_decoder(padded):
    model = settled(nn.Transformer(8, 2, 2, 2, 16, batch_first=True))
    source, target = rand(3, 5, 8), rand(3, 4, 8, seed=1)
    hidden = MASKS["padding"]["key_padding_mask"]
    masks = {"src_key_padding_mask": hidden, "memory_key_padding_mask": hidden} if padded else {}
    causal = nn.Transformer.generate_square_subsequent_mask(4)
    opened = rabbet.open_attention(model)
    with torch.no_grad():
        answer, wanted = (m(source, target, tgt_mask=causal, **masks) for m in (opened, model))
    torch.testing.assert_close(answer, wanted, rtol=1e-4, atol=1e-5)
    names = {s.name for s in rabbet.survey(opened, [(source, target)])}
    assert {f"decoder.layers.1.multihead_attn.{x}_proj" for x in ("q", "k", "v", "out")} <= names
    assert not any("attn" in left.name for left in rabbet.survey(opened, [(source, target)]).left)


def test_the_network_is_left_alone_and_one_attention_stays_one():
    shared = nn.MultiheadAttention(8, 2)
    model = nn.ModuleDict({"a": shared, "b": shared})
    opened = rabbet.open_attention(model)
    assert opened["a"] is opened["b"]
    assert model["a"] is shared
    assert not any(isinstance(m, nn.MultiheadAttention) for m in opened.modules())


def _hooked(model):
    model.register_forward_hook(lambda *_: None)
    return model


def _patched(model):
    model.forward = lambda *x: nn.MultiheadAttention.forward(model, *x)
    return model


def _more(model):
    model.adapter = nn.Linear(8, 8)
    return model


class Own(nn.MultiheadAttention):
    """A user's own attention."""


@pytest.mark.parametrize(
    "model",
    [
        nn.MultiheadAttention(8, 2, add_bias_kv=True),
        nn.MultiheadAttention(8, 2, add_zero_attn=True),
        parametrizations.weight_norm(nn.MultiheadAttention(8, 2), "in_proj_weight"),
        _hooked(nn.MultiheadAttention(8, 2)),
        _more(nn.MultiheadAttention(8, 2)),
        Own(8, 2),
    ],
)
def test_what_is_more_than_four_linears_stays(model):
    class Whole(nn.ModuleDict):
        def forward(self, x):
            return self["other"](self["attention"](x, x, x)[0])

    whole = Whole({"attention": model, "other": nn.Linear(8, 8)})
    assert isinstance(rabbet.open_attention(whole)["attention"], nn.MultiheadAttention)
    left = {x.name: x.reason for x in rabbet.survey(whole, [rand(4, 3, 8)]).left}
    assert "open_attention" not in str(left)


def test_a_forward_that_keeps_the_object_it_was_made_for_is_refused():
    model = _patched(nn.MultiheadAttention(8, 2))
    assert isinstance(rabbet.open_attention(model), nn.MultiheadAttention)
    task = rabbet.Task([rand(4, 3, 8)], lambda m, x: m(x, x, x)[0])
    with pytest.raises(ModelError, match="of the network itself, by a function"):
        rabbet.survey(model, task)


def test_closed_attention_is_opened_without_being_asked():
    model = nn.TransformerEncoderLayer(32, 4, 32, batch_first=True).eval()
    chosen = rabbet.plan(model, "bytes <= 25%", [rand(4, 3, 32)])
    assert [line.name for line in chosen][:2] == ["self_attn.q_proj", "self_attn.k_proj"]
    assert type(model.self_attn) is nn.MultiheadAttention


def test_attention_whose_weights_other_code_reads_stays_closed():
    """Opened, it would have no such weights; so they are stored."""

    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(32, 2, batch_first=True)
            self.last = nn.Linear(32, 4)

        def forward(self, x):
            scale = self.attention.in_proj_weight.square().mean()
            return self.last(self.attention(x, x, x)[0] * scale)

    model = settled(Reads())
    names = [site.name for site in rabbet.survey(model, [rand(4, 3, 32)])]
    assert names == ["last", "attention.in_proj_weight", "attention.out_proj.weight"]
