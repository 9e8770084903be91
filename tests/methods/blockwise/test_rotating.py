"""Networks whose hidden states are turned: the same answers, where that can be, and a note else."""

import pytest
import torch
from texts import WORDS, divergence, scores, task, words

import rabbet
from rabbet.hf import compress_pretrained, from_pretrained
from rabbet.jobs import Jobs
from rabbet.methods.blockwise.method import Blockwise, _bench
from rabbet.methods.blockwise.rotate import turn
from rabbet.workpiece import Workpiece

transformers = pytest.importorskip("transformers")

WIDTH = 48  # three blocks of Hadamard's, of 16


def network(kind="llama", tied=False, plain=False):
    """plain: all norms have weights of one value."""
    if kind == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=WORDS, n_embd=WIDTH, n_layer=2, n_head=4, n_positions=32,
            bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
        model = transformers.GPT2LMHeadModel(config)
    else:
        config = transformers.LlamaConfig(
            vocab_size=WORDS, hidden_size=WIDTH, intermediate_size=96, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tied,
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config)
    model.config.use_cache = False
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(4)
            elif not plain:
                p.uniform_(0.3, 2)
    return model.eval()


@pytest.mark.parametrize("width", [1, 3, 16, 48, 96])
def test_a_turn_is_orthogonal(width):
    about = turn(width, seed=3)
    assert torch.allclose(about @ about.T, torch.eye(width), atol=1e-6)
    assert torch.equal(about, turn(width, seed=3))
    if width >= 16:  # no channel stays what it was
        assert float(about.abs().max()) < 0.9


@pytest.mark.parametrize(("tied", "plain"), [(False, False), (False, True), (True, True)])
def test_a_turned_network_answers_the_same(tied, plain):
    model = network(tied=tied, plain=plain)
    bench = _bench(Workpiece.of(model, task(), Jobs()), True)
    assert bench.notes == ()
    other = bench.stack.model
    wanted = scores(model)
    assert float((scores(other) - wanted).abs().max()) < 1e-4 * float(wanted.abs().max())
    changed = [n for n, p in other.named_parameters() if not torch.equal(p, model.get_parameter(n))]
    assert len([n for n in changed if n.endswith("proj.weight")]) == 2 * 7
    assert "model.embed_tokens.weight" in changed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "why"),
    [
        (lambda: network(tied=True), "lm_head shares the table of words"),
        (lambda: network("gpt2"), "left out"),
    ],
)
def test_what_cannot_be_turned_says_so_and_is_compressed_as_it_is(model, why):
    model = model()
    method = Blockwise(grids=("4g16",), rank=False, epochs=0, passes=0, rotate=True)
    plain = Blockwise(grids=("4g16",), rank=False, epochs=0, passes=0)
    result = rabbet.compress(model, "bpw <= 7", task(), method)
    assert any(why in note for note in result.notes)
    assert torch.equal(
        scores(result.model), scores(rabbet.compress(model, "bpw <= 7", task(), plain).model)
    )


def test_a_turn_spreads_large_channels():
    model = network()
    with torch.no_grad():  # a few channels of all hidden states are far larger than the others
        for name, p in model.named_parameters():
            if name.endswith(("embed_tokens.weight",)):
                p[:, ::16] *= 20
            elif name.endswith(("o_proj.weight", "down_proj.weight")):
                p[::16] *= 20
    off = {}
    for rotate in (False, True):
        method = Blockwise(
            grids=("3g16",),
            rank=False,
            epochs=0,
            passes=0,
            scale=False,
            permute=False,
            rotate=rotate,
        )
        result = rabbet.compress(model, "bpw <= 7", task(), method)
        off[rotate] = divergence(model, result.model, words(8, seed=2)), result.cost.bytes
    assert off[True][0] < 0.85 * off[False][0]
    assert off[True][1] == off[False][1]


@pytest.mark.slow
def test_a_turned_folder_is_the_turned_network_in_memory(tmp_path):
    model = network()
    model.save_pretrained(tmp_path / "float", max_shard_size="60KB")
    method = Blockwise(grids=("3g16", "4g16"), rank=False, epochs=0, passes=0, rotate=True)
    stored = compress_pretrained(
        tmp_path / "float", "bpw <= 6", task(), tmp_path / "out", method=method
    )
    assert stored.notes == ()
    result = rabbet.compress(model, "bpw <= 6", task(), method)
    other = from_pretrained(tmp_path / "out")
    assert torch.equal(scores(other), scores(result.model))
    assert divergence(model, other) < 0.1
