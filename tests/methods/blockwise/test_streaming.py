"""Decoders, one block at a time: in memory, and from a folder into a folder."""

import contextlib
import copy
import itertools
import json
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch
from networks import Blocks, network, thinned
from safetensors.torch import load_file
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

import rabbet
from rabbet import Blockwise, Jobs, Task, hf
from rabbet.core.budget import Budget
from rabbet.core.plan import Term
from rabbet.errors import BudgetError, DataError, FileError, ModelError, PlanError
from rabbet.methods.blockwise.folder import Shards
from rabbet.methods.blockwise.gathering import Gathering, level
from rabbet.methods.blockwise.shelf import Shelf
from rabbet.methods.blockwise.stack import Stack
from rabbet.reconstruct.candidates import canonical, read_numbers, solve_site
from rabbet.workpiece import Workpiece

WORDS = 120
SHORT = Blockwise(
    grids=("2g32z", "3g32", "4g32", "8c"), adapters=(("3g32", 0.1),), epochs=0, passes=0
)
# the tables are of words and places; the head is tied to the first in all but one
CONFIGS = {
    "llama": LlamaConfig(vocab_size=WORDS, hidden_size=32, intermediate_size=64,
                         num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                         tie_word_embeddings=True),
    "untied": LlamaConfig(vocab_size=WORDS, hidden_size=32, intermediate_size=64,
                          num_hidden_layers=3, num_attention_heads=4, tie_word_embeddings=False),
    "gpt2": GPT2Config(vocab_size=WORDS, n_embd=32, n_layer=2, n_head=4, n_positions=32,
                       bos_token_id=0, eos_token_id=0),
    "opt": OPTConfig(vocab_size=WORDS, hidden_size=32, ffn_dim=64, num_hidden_layers=2,
                     num_attention_heads=4, max_position_embeddings=32, word_embed_proj_dim=32),
}  # fmt: skip
KINDS = {LlamaConfig: LlamaForCausalLM, GPT2Config: GPT2LMHeadModel, OPTConfig: OPTForCausalLM}


def decoder(name):
    torch.manual_seed(0)
    model = KINDS[type(CONFIGS[name])](copy.deepcopy(CONFIGS[name])).eval()
    with torch.no_grad():  # scores of a network that was not trained say nothing
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(5)
    model.config.use_cache = False
    return model


def scores(model, batch):
    return model(batch["input_ids"], use_cache=False).logits


def sentences(count=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(WORDS, (3, 16), generator=g)} for _ in range(count)]


def task(count=6):
    return Task(sentences(count), forward=scores)


def divergence(model, other):
    """Of the scores, in nats a word."""
    total = 0.0
    with torch.no_grad():
        for batch in sentences(8, seed=1):
            p, q = (scores(m, batch).log_softmax(-1) for m in (model, other))
            total += float((p.exp() * (p - q)).sum(-1).mean())
    return total / 8


def answers(model):
    with torch.no_grad():
        return torch.cat([scores(model, batch) for batch in sentences()])


@pytest.fixture(params=CONFIGS)
def name(request):
    return request.param


def test_blocks_one_by_one_are_the_network(name):
    model = decoder(name)
    stack = Stack(model)
    assert len(stack) == model.config.num_hidden_layers
    for batch in sentences(2):
        with torch.no_grad(), stack.ends():
            hidden, calls = stack.enter(task(), batch)
            for k, call in enumerate(calls):
                with stack.block(k) as block:
                    hidden = call(block, hidden)
            left = stack.leave(task(), batch, hidden)
        with torch.no_grad():
            assert torch.allclose(left, scores(model, batch), atol=1e-4)
    assert model.get_submodule(stack.path) is stack.blocks


@pytest.mark.parametrize("name", thinned(["llama", "untied", "opt", "gpt2"]))
def test_what_choosing_foretells_is_what_is_found(name):
    model = decoder(name)
    piece = Workpiece.of(model, task(8), Jobs())
    chooser = SHORT.chooser(piece)
    for budget in ("bpw <= 5.5", "bpw <= 4.5"):
        plan = chooser.plans([Budget.parse(budget)])[0]
        found = divergence(model, SHORT.fit(piece, plan).model)
        assert 0.4 < chooser.harm(plan) / found < 2.5


@pytest.mark.parametrize(
    ("name", "size"),
    thinned([(n, s) for n in ("gpt2", "untied", "opt", "llama") for s in ("20KB", "1GB")], keep=8),
)
def test_from_a_folder_comes_what_comes_from_memory(name, size, tmp_path):
    model = decoder(name)
    result = rabbet.compress(model, "bpw <= 4.6", task(), SHORT)
    model.save_pretrained(tmp_path / "in", max_shard_size=size)
    before = {p.name: p.read_bytes() for p in (tmp_path / "in").iterdir()}
    stored = hf.compress_pretrained(
        tmp_path / "in", "bpw <= 4.6", task(), tmp_path / "out", method=SHORT
    )
    assert {p.name: p.read_bytes() for p in (tmp_path / "in").iterdir()} == before
    if name != "opt":  # whose table of places counts among the weights in memory
        assert {str(line) for line in stored.plan} == {str(line) for line in result.plan}
    assert sum(path.stat().st_size for path in stored.files) == stored.cost.bytes
    assert len(stored.files) == len(Shards(tmp_path / "in").paths) or size == "1GB"
    again = hf.from_pretrained(tmp_path / "out")
    if name != "opt":
        assert torch.equal(answers(again), answers(result.model))
    assert divergence(model, again) < 0.2
    assert {p.name for p in (tmp_path / "out").iterdir()} >= {"config.json"}
    assert not (tmp_path / "out" / ".rabbet-work").exists()


@pytest.mark.slow
def test_a_budget_of_bytes_is_kept_by_all_files_together(tmp_path):
    decoder("untied").save_pretrained(tmp_path / "in", max_shard_size="20KB")
    for budget in ("bytes <= 31000", "bpw <= 3.4, bytes <= 30%"):
        stored = hf.compress_pretrained(
            tmp_path / "in", budget, task(), tmp_path / "out", method=SHORT
        )
        Budget.parse(budget).check(stored.cost, stored.float_cost)
        assert sum(path.stat().st_size for path in stored.files) == stored.cost.bytes
        assert str(stored.cost.bytes) in str(stored).replace(",", "")


def test_a_budget_that_cannot_be_met_is_refused_before_anything_is_measured(tmp_path, monkeypatch):
    decoder("llama").save_pretrained(tmp_path / "in")
    monkeypatch.setattr(Gathering, "hook", lambda *_: pytest.fail("it was measured"))
    with pytest.raises(BudgetError, match="smallest reachable"):
        hf.compress_pretrained(tmp_path / "in", "bytes <= 1%", task(), tmp_path / "out")


class StoppedError(Exception):
    pass


@pytest.mark.parametrize("epochs", thinned([1, 0], keep=2))
def test_a_run_that_is_stopped_anywhere_goes_on_to_the_same_bytes(tmp_path, epochs):
    decoder("untied").save_pretrained(tmp_path / "in")
    method = Blockwise(grids=SHORT.grids, adapters=SHORT.adapters, epochs=epochs, passes=epochs)

    def run(where, stop=None):
        seen = itertools.count()

        def progress(*_):
            if next(seen) == stop:
                raise StoppedError

        jobs = Jobs(folder=tmp_path / f"work{where}", progress=progress)
        return hf.compress_pretrained(
            tmp_path / "in", "bpw <= 4.6", task(), tmp_path / where, method=method, jobs=jobs
        ), next(seen)

    whole, steps = run("whole")
    for stop in range(3, steps, max(1, steps // 6)):
        with contextlib.suppress(StoppedError):  # there is less to do each time
            run("parts", stop)
    stored, _ = run("parts")
    assert stored.files[0].read_bytes() == whole.files[0].read_bytes()


def test_weights_are_in_memory_only_while_their_block_is_open(tmp_path):
    model = decoder("untied")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    with torch.device("meta"):
        hollow = LlamaForCausalLM(copy.deepcopy(CONFIGS["untied"])).eval()
    stack = Stack(hollow, Shards(tmp_path))
    with stack.block(1) as block:
        assert all(not p.is_meta for p in block.parameters())
        held = [n for n, p in hollow.named_parameters() if not p.is_meta]
        assert all(n.startswith(stack.prefix(1)) for n in held)
        assert torch.equal(block.mlp.up_proj.weight, model.model.layers[1].mlp.up_proj.weight)
    with stack.ends() as ends:
        assert not any(
            n.startswith(stack.path) for n, p in ends.named_parameters() if not p.is_meta
        )
    assert all(p.is_meta for p in hollow.parameters())


def test_one_word_that_is_far_larger_does_not_drown_the_others():
    model = decoder("llama")
    site = Workpiece.of(model, task(), Jobs()).survey["model.layers.0.mlp.up_proj"]
    weight, terms = site.weight(model).detach(), (Term.parse("dense@3g32"),)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1, 400, 32, generator=g) @ torch.randn(32, 32, generator=g)
    x[0, 0] *= 1000  # as decoders have at the first word

    def errors(rows):
        solved = solve_site(weight, rows.mT @ rows, site=site, menu=(terms,))
        found = canonical(site, terms, read_numbers(solved, (terms,), 0))
        apart, wanted = x[0] @ (found - weight).mT, x[0] @ weight.mT
        return float(apart[1:].norm() / wanted[1:].norm()), apart[0].norm() / wanted[0].norm()

    drowned, _ = errors(x)
    levelled, first = errors(x * level(x))
    alone, _ = errors(x[:, 1:])
    assert levelled < 1.1 * alone < drowned
    assert first < 0.2  # it counts like a word, no less


def test_words_count_alike_and_none_for_more_than_two():
    x = torch.randn(1, 50, 8, generator=torch.Generator().manual_seed(0))
    x[0, 7] *= 1e4
    squares = (x * level(x)).square().sum((0, 2))
    middle = x.square().sum((0, 2)).median()
    assert squares.max() <= 2 * middle
    assert (level(x)[0, x.square().sum((0, 2)) == middle] == 1).all()
    assert torch.allclose(level(100 * x), level(x))
    assert level(x[:, :0]).shape == (1, 0, 1)
    assert torch.isfinite(level(torch.zeros(1, 4, 8))).all()


def test_tuning_brings_a_network_nearer():
    model = decoder("llama")
    found = []
    for epochs in (0, 6):
        method = Blockwise(grids=("2g32z", "8c"), adapters=(), epochs=epochs, passes=0)
        found.append(
            divergence(model, rabbet.compress(model, "bpw <= 3.5", task(24), method).model)
        )
    assert found[1] < found[0]


def test_half_precision_that_overflows_is_not_used():
    shelf = Shelf()
    large = torch.tensor([[1e5, 1.0]])
    shelf.put(0, large)
    assert torch.equal(shelf[0], large)
    tiny = Shelf(memory=0)
    tiny.put(0, torch.ones(2, 3))
    tiny.put(0, torch.full((2, 3), 2.0))
    assert torch.equal(tiny[0], torch.full((2, 3), 2.0))
    assert len(tiny) == 1


class Skipping(Blocks):
    """The second block works on what was there before the first."""

    def forward(self, x):
        y = self.table(x)
        return self.head(self.blocks[0](y) + self.blocks[1](y))


class Masked(Blocks):
    """What the first block leaves says where the second looks."""

    def forward(self, x):
        y = self.blocks[0](self.table(x))
        return self.head(self.blocks[1](y, y[0, :, :7] @ torch.ones(7, 7)))


class Backwards(Blocks):
    def forward(self, x):
        y = self.table(x)
        for block in reversed(self.blocks):
            y = block(y)
        return self.head(y)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Skipping(), "works on something else"),
        (Masked(), "depends on other blocks"),
        (Backwards(), "runs after 0 others"),
        (nn.Sequential(nn.Linear(4, 4)), "no list of equal blocks"),
    ],
)
def test_a_network_that_is_no_chain_of_blocks_is_refused(model, message):
    batches = [torch.rand(8, 4)] if isinstance(model, nn.Sequential) else network("blocks").batches
    with pytest.raises(ModelError, match=message):
        rabbet.compress(model.eval(), "bits <= 4", batches, SHORT)


def test_a_network_of_values_is_chosen_for_by_their_error():
    case = network("blocks")
    result = rabbet.compress(case.model, "bits <= 4", Task(case.batches, outputs="values"), SHORT)
    assert result.cost.bits <= 4


def test_mistakes_are_named(tmp_path):
    with pytest.raises(PlanError, match="at least one grid"):
        Blockwise(grids=())
    with pytest.raises(FileError, match=r"no config\.json"):
        hf.compress_pretrained(tmp_path, "bpw <= 4", task(), tmp_path / "out")
    model = decoder("llama")
    model.save_pretrained(tmp_path / "in", max_shard_size="20KB")
    with pytest.raises(FileError, match="own folder"):
        hf.compress_pretrained(tmp_path / "in", "bpw <= 4", task(), tmp_path / "in")
    with pytest.raises(PlanError, match="leave out act"):
        hf.compress_pretrained(
            tmp_path / "in", "bpw <= 4", task(), tmp_path / "out", method=Blockwise(act=8)
        )
    index = tmp_path / "in" / "model.safetensors.index.json"
    places = json.loads(index.read_text())
    lost = next(iter(places["weight_map"].values()))
    (tmp_path / "in" / lost).rename(tmp_path / "elsewhere")
    with pytest.raises(FileError, match=f"holds no {lost}"):
        hf.compress_pretrained(tmp_path / "in", "bpw <= 4", task(), tmp_path / "out")
    names = load_file(tmp_path / "elsewhere").keys()
    assert names
    wrong = [{"input_ids": torch.full((2, 8), WORDS)}]
    with pytest.raises((DataError, IndexError)):
        rabbet.compress(model, "bpw <= 4", Task(wrong, forward=scores), SHORT)


def test_a_folder_with_a_file_missing_is_not_read_as_compressed(tmp_path):
    decoder("untied").save_pretrained(tmp_path / "in", max_shard_size="20KB")
    stored = hf.compress_pretrained(
        tmp_path / "in", "bpw <= 5", task(), tmp_path / "out", method=SHORT
    )
    stored.files[1].unlink()
    with pytest.raises(FileError, match=f"lacks {stored.files[1].name}"):
        hf.from_pretrained(tmp_path / "out")


@pytest.mark.slow
def test_workers_give_the_bytes_of_one_thread(tmp_path):
    decoder("untied").save_pretrained(tmp_path / "in")
    written = []
    for workers in (1, 2, 4):
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as executor:
            stored = hf.compress_pretrained(
                tmp_path / "in",
                "bpw <= 4.6",
                task(),
                tmp_path / str(workers),
                method=SHORT,
                jobs=Jobs(executor, tmp_path / f"work{workers}"),
            )
        written.append(stored.files[0].read_bytes())
    assert written[0] == written[1] == written[2]


@pytest.mark.slow
def test_a_cache_is_not_kept_from_call_to_call():
    model = decoder("llama")
    found = []
    for cached in (False, True):
        model.config.use_cache = cached
        result = rabbet.compress(model, "bpw <= 4.6", sentences(), SHORT)
        assert model.config.use_cache is cached
        found.append(answers(result.model))
    assert torch.equal(*found)


class Remembering(Blocks):
    """Every block is given a list that it writes to."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Counting() for _ in range(2))

    def forward(self, x):
        seen, y = [], self.table(x)
        for block in self.blocks:
            y = block(y, seen)
        return self.head(y)


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(16, 16)

    def forward(self, hidden, seen):
        seen.append(hidden.mean())
        return hidden + self.body(hidden) * sum(seen)


def test_a_block_that_remembers_is_refused():
    with pytest.raises(ModelError, match="when it is called again"):
        rabbet.compress(Remembering().eval(), "bits <= 4", network("blocks").batches, SHORT)


class Routed(nn.Module):
    """Two experts; each word is sent to one of them."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(16, 2)
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))

    def forward(self, hidden):
        chosen = self.router(hidden).argmax(-1)
        out = hidden.clone()
        for k, expert in enumerate(self.experts):
            if (chosen == k).any():
                out[chosen == k] = out[chosen == k] + expert(hidden[chosen == k])
        return out


class Experts(Blocks):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Routed() for _ in range(3))


def test_experts_are_fitted_to_the_words_that_they_are_sent():
    torch.manual_seed(0)
    model = Experts().eval()
    batches = network("blocks").batches
    small = rabbet.compress(model, "bits <= 3", batches, SHORT)
    large = rabbet.compress(model, "bits <= 7", batches, SHORT)
    with torch.no_grad():
        errors = [
            sum(float((r.model(b) - model(b)).square().mean()) for b in batches)
            for r in (small, large)
        ]
    assert errors[1] < errors[0]
    assert {line.name for line in small.plan} >= {"blocks.1.experts.0", "blocks.1.experts.1"}


def test_a_network_in_half_precision_is_what_its_file_is(tmp_path):
    model = decoder("llama").bfloat16()
    result = rabbet.compress(model, "bpw <= 4.6", task(), SHORT)
    result.save(tmp_path / "small.safetensors")
    again = rabbet.load(tmp_path / "small.safetensors", model)
    assert torch.equal(answers(again), answers(result.model))


@pytest.mark.slow
def test_files_of_an_earlier_run_are_taken_away(tmp_path):
    for size, name in (("20KB", "many"), ("1GB", "one")):
        decoder("untied").save_pretrained(tmp_path / name, max_shard_size=size)
    for name in ("many", "one", "many"):
        stored = hf.compress_pretrained(
            tmp_path / name, "bpw <= 4.6", task(), tmp_path / "out", method=SHORT
        )
        there = {path.name for path in (tmp_path / "out").glob("*.safetensors")}
        assert there == {path.name for path in stored.files}
        hf.from_pretrained(tmp_path / "out")


def test_weights_that_are_quantised_already_are_refused(tmp_path):
    decoder("llama").save_pretrained(tmp_path / "in")
    config = tmp_path / "in" / "config.json"
    told = json.loads(config.read_text())
    config.write_text(json.dumps(told | {"quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(FileError, match="quantised already"):
        hf.compress_pretrained(tmp_path / "in", "bpw <= 4", task(), tmp_path / "out")
    assert not (tmp_path / "out").exists()
