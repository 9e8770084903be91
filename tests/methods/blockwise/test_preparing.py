"""Blocks written otherwise before they are rounded: exact, used where it helps, and only there."""

import pytest
import torch
from texts import WORDS, divergence, scores, task, words
from torch import nn

import rabbet
from rabbet import Task
from rabbet.core.plan import Plan
from rabbet.hf import compress_pretrained, from_pretrained
from rabbet.jobs import Jobs
from rabbet.methods.blockwise.draft import REST, Draft
from rabbet.methods.blockwise.looking import by_block
from rabbet.methods.blockwise.method import Blockwise, _bench
from rabbet.methods.blockwise.wiring import Wiring
from rabbet.workpiece import Workpiece

transformers = pytest.importorskip("transformers")

GRIDS = ("3g32",)

READERS = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight")


def network(kind):
    """A small decoder of transformers, larger weights than it is born with."""
    if kind == "llama":
        config = transformers.LlamaConfig(
            vocab_size=WORDS, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config)
    elif kind == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=WORDS, n_embd=64, n_layer=2, n_head=4, n_positions=32,
            bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
        model = transformers.GPT2LMHeadModel(config)
    else:
        config = transformers.OPTConfig(
            vocab_size=WORDS, hidden_size=64, ffn_dim=96, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=32, word_embed_proj_dim=64,
        )  # fmt: skip
        model = transformers.OPTForCausalLM(config)
    model.config.use_cache = False
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim > 1:
                p.mul_(4)
            elif name.endswith("bias"):
                p.normal_(0, 0.1)
    return model.eval()


def with_outliers(model):
    """The same with a few channels behind each norm that are larger than others, undone behind."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1 and name.endswith("layernorm.weight"):
                p[::16] *= 30
            elif name.endswith(READERS):
                p[:, ::16] /= 30
    return model


def wirings(model):
    """Of each block in turn, which is open meanwhile."""
    bench = _bench(Workpiece.of(model, task(), Jobs()), False)
    shelf, calls = bench.begun
    hidden = shelf[0]
    for k, sites in enumerate(by_block(bench.stack, bench.survey)[1]):
        with bench.stack.block(k) as block:
            draft = Draft.of(block, {bench.stack.within(s.name): s for s in sites}, {})
            yield block, Wiring(block, draft, calls[0][k], hidden, bench.stack, k)
            with torch.no_grad():
                hidden = calls[0][k](block, hidden)


FOUND = {
    "llama": (
        {("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")},
        {("v_proj", "o_proj"), ("up_proj", "down_proj")},
        {(("gate_proj", "up_proj"), "down_proj")},
    ),
    "gpt2": ({("c_attn",), ("c_fc",)}, set(), {(("c_fc",), "c_proj")}),
    "opt": (
        {("q_proj", "k_proj", "v_proj"), ("fc1",)},
        {("v_proj", "out_proj"), ("fc1", "fc2")},  # its ReLU lets scales through
        {(("fc1",), "fc2")},
    ),
}


@pytest.mark.parametrize("kind", FOUND)
def test_what_is_found_is_exact(kind):
    def leaf(names):
        return tuple(n.rpartition(".")[2] for n in names)

    g = torch.Generator().manual_seed(3)
    for block, wiring in wirings(network(kind)):
        shared, pairs, hidden = [*wiring.shared()], [*wiring.pairs([])], [*wiring.hidden()]
        assert {leaf(s.readers) for s in shared} == FOUND[kind][0]
        assert {leaf((p.maker, p.reader)) for p in pairs} == FOUND[kind][1]
        assert {(leaf(h.makers), leaf((h.reader,))[0]) for h in hidden} == FOUND[kind][2]
        draft = wiring.draft
        for group in [*shared, *pairs]:
            count = draft.weights[group.readers[0]].shape[1]
            draft = group.scaled(draft, block, (torch.rand(count, generator=g) * 2 - 1).exp())
        for one in hidden:
            count = draft.weights[one.reader].shape[1]
            draft = one.ordered(draft, torch.randperm(count, generator=g))
        with draft.worn(block), torch.no_grad():
            out = wiring._call(block, wiring._hidden)
        assert float((out - wiring.out).abs().max()) < 1e-4 * float(wiring.out.abs().max())
        assert any(not torch.equal(draft.weights[n], w) for n, w in wiring.draft.weights.items())
        with torch.no_grad():  # and nothing of it stays
            assert torch.equal(wiring._call(block, wiring._hidden), wiring.out)


def test_a_norm_that_something_else_reads_is_left_alone():
    class Parallel(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.one, self.two = nn.LayerNorm(16), nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x):
            y = self.norm(x)
            return x + y + self.two(torch.sigmoid(self.one(y)))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(WORDS, 16), nn.Linear(16, WORDS)
            self.layers = nn.ModuleList(Parallel() for _ in range(2))

        def forward(self, input_ids):
            x = self.table(input_ids)
            for layer in self.layers:
                x = layer(x)
            return self.head(x)

    bench = _bench(
        Workpiece.of(Net().eval(), Task([b["input_ids"] for b in words()]), Jobs()), False
    )
    shelf, calls = bench.begun
    sites = by_block(bench.stack, bench.survey)[1][0]
    with bench.stack.block(0) as block:
        draft = Draft.of(block, {bench.stack.within(s.name): s for s in sites}, {})
        wiring = Wiring(block, draft, calls[0][0], shelf[0], bench.stack, 0)
        assert [*wiring.shared()] == []
        assert [*wiring.pairs([])] == []  # sigmoid keeps no scale
        assert [(h.makers, h.reader) for h in wiring.hidden()] == [(("one",), "two")]


@pytest.mark.parametrize(("kind", "stored"), [(torch.bfloat16, 1 / 256), (torch.float16, 1 / 2048)])
def test_a_norm_of_few_bits_is_scaled_to_what_it_can_hold(kind, stored):
    model = network("llama").to(kind).float()
    for block, wiring in wirings(model):
        for group in wiring.shared():
            norm = group.norm.__class__(group.norm.weight, None, 0.0, (kind,))
            scale = torch.linspace(0.3, 3, 64)
            draft = wiring.draft.norm_scaled(block, norm, group.readers, scale)
            value = draft.rest[norm.weight]
            assert torch.equal(value.to(kind).float(), value)
            assert wiring.proves(draft)
            real = block.get_parameter(norm.weight) / value
            assert float((real / scale - 1).abs().max()) <= stored


def prepared_parts(model, **settings):
    """The names of what a fit changed besides codes and scales."""
    method = Blockwise(grids=GRIDS, rank=False, epochs=0, passes=0, **settings)
    bench = _bench(Workpiece.of(model, task(), Jobs()), False)
    plan = method.plan(Workpiece.of(model, task(), Jobs()), rabbet.Budget.parse("bpw <= 6"))
    return {n for each in method.fitted(bench, plan) for n in each.numbers if n.startswith(REST)}


def test_scales_are_moved_where_outliers_share_them_with_others():
    model = with_outliers(network("llama"))
    sites = _bench(Workpiece.of(model, task(), Jobs()), False).survey
    lines = [f"{s.name} dense@{'8c' if s.looks_up else '3g32'}" for s in sites]
    plan = Plan.parse("\n".join(lines))
    off = {}
    for scale in (False, True):
        method = Blockwise(grids=GRIDS, rank=False, epochs=0, passes=0, scale=scale, permute=False)
        result = rabbet.fit(model, plan, task(), method)
        off[scale] = divergence(model, result.model)
        changed = any(
            not torch.equal(p, model.get_parameter(n))
            for n, p in result.model.named_parameters()
            if n.endswith("layernorm.weight")
        )
        assert changed == scale
    assert off[True] < 0.7 * off[False]


@pytest.mark.slow
def test_nothing_is_changed_where_it_does_not_help():
    assert prepared_parts(network("llama"), scale=False, permute=False) == set()
    grids = ("8c",)  # every row has a scale of its own, and inputs are alike
    method = Blockwise(grids=grids, rank=False, epochs=0, passes=0, scale=False)
    plain = Blockwise(grids=grids, rank=False, epochs=0, passes=0, scale=False, permute=False)
    model = network("llama")
    one, other = (rabbet.compress(model, "bpw <= 9", task(), m).model for m in (method, plain))
    assert torch.equal(scores(one), scores(other))


@pytest.mark.slow
@pytest.mark.parametrize("kind", FOUND)
def test_a_folder_and_the_memory_and_a_stopped_run_give_the_same(kind, tmp_path):
    model = with_outliers(network(kind))
    model.save_pretrained(tmp_path / "float")
    method = Blockwise(grids=GRIDS, rank=False, epochs=1, passes=1)
    result = rabbet.compress(model, "bpw <= 6", task(), method)
    result.save(tmp_path / "memory.safetensors")

    class StopError(Exception):
        pass

    def stops(stage, done, _):
        if stage == "fitting blocks" and done == 1:
            raise StopError

    folder, out = tmp_path / "float", tmp_path / "out"
    work = tmp_path / "work"
    jobs = Jobs(folder=work, progress=stops)
    with pytest.raises(StopError):
        compress_pretrained(folder, "bpw <= 6", task(), out, method=method, jobs=jobs)
    compress_pretrained(folder, "bpw <= 6", task(), out, method=method, jobs=Jobs(folder=work))
    whole = tmp_path / "whole"
    compress_pretrained(folder, "bpw <= 6", task(), whole, method=method)
    name = "rabbet.safetensors"
    assert (out / name).read_bytes() == (whole / name).read_bytes()
    other = from_pretrained(out)
    assert torch.equal(scores(other), scores(result.model))
    kept = result.model.state_dict()
    assert all(torch.equal(t, kept[n]) for n, t in other.state_dict().items() if n in kept)
