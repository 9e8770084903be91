"""Tasks of text: windows, perplexities, and which way is better."""

import json
import math
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

import rabbet
from rabbet.data import decoder
from rabbet.data.decoder import Continuations, Estimate, Perplexity, token_losses
from rabbet.data.measure import worsening
from rabbet.data.text import Tokens, documents
from rabbet.errors import DataError, FileError
from rabbet.tasks import perplexity

transformers = pytest.importorskip("transformers")

SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
GPT2 = {
    "vocab_size": 64, "n_positions": 128, "n_embd": 32, "n_layer": 2, "n_head": 4,
    "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip


class Plain(nn.Module):
    """A decoder that is not of transformers: the scores hang on two tokens."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(64, 32), nn.Linear(32, 64)

    def forward(self, x):
        seen = self.table(x)
        return self.head(torch.tanh(seen + seen.roll(1, 1)))


DECODERS = {
    "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2)),
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL)),
    # whose scores pass through a tanh behind the head
    "gemma2": lambda: transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=0.5)
    ),
    "plain": Plain,
}


class Letters:
    """A tokenizer of letters, with an end of text, and a begin where it is asked for."""

    eos_token_id = 0
    vocab_size = 60

    def __init__(self, begin=None):
        self.bos_token_id = begin

    def __len__(self):
        return 60

    def encode(self, text, add_special_tokens=True, verbose=True):
        ids = [ord(letter) % 58 + 1 for letter in text]
        begins = add_special_tokens and self.bos_token_id is not None
        return [self.bos_token_id, *ids] if begins else ids

    def decode(self, ids):
        return " ".join(map(str, ids))


WORDS = "".join(chr(97 + (k * k + k // 7) % 26) for k in range(400))


@pytest.fixture(params=DECODERS)
def network(request):
    torch.manual_seed(0)
    made = DECODERS[request.param]().eval()
    with torch.no_grad():  # scores that differ, so that a mistake shows
        for p in made.parameters():
            p.mul_(3)
    return made


def _plain_losses(network, ids):
    with torch.no_grad():
        result = network(ids)
    scores = getattr(result, "logits", result)
    return nn.functional.cross_entropy(scores[:, :-1].mT, ids[:, 1:], reduction="none")


@pytest.mark.parametrize("entries", [2**23, 64 * 3 * 5, 1])
def test_losses_are_those_of_all_scores_at_once(network, monkeypatch, entries):
    monkeypatch.setattr(decoder, "ENTRIES", entries)
    ids = torch.randint(64, (3, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = token_losses(network, ids)
    torch.testing.assert_close(found, _plain_losses(network, ids))


def test_the_body_runs_once_however_many_slices_there_are(monkeypatch):
    monkeypatch.setattr(decoder, "ENTRIES", 64 * 5)
    network, calls, sizes = DECODERS["llama"]().eval(), [], []
    network.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    network.lm_head.register_forward_hook(lambda *a: sizes.append(a[2].shape[1]))
    before = dict(vars(network.model))
    ids = torch.randint(64, (1, 24))
    with torch.no_grad():
        token_losses(network, ids)
        token_losses(network, ids)
    assert len(calls) == 2
    assert sizes == [5, 5, 5, 5, 3] * 2
    assert vars(network.model) == before


@pytest.mark.parametrize(("length", "stride"), [(16, None), (16, 15), (16, 8), (16, 5), (7, 1)])
def test_every_token_is_foretold_once_and_behind_a_whole_window(network, length, stride):
    judge = Perplexity.of(WORDS, Letters(), length, stride)
    step = stride or length
    ids = torch.tensor(Letters().encode(WORDS))
    losses, counts = [], []
    for start in range(0, len(ids) - length + 1, step):
        own = _plain_losses(network, ids[None, start : start + length])[0].double()
        fresh = own if start == 0 or stride is None else own[-stride:]
        losses.append(float(fresh.sum()))
        counts.append(len(fresh))
    assert judge.counts == tuple(counts)
    found = judge(network)
    assert found == pytest.approx(math.exp(sum(losses) / sum(counts)), rel=1e-5)
    assert found.sums == pytest.approx(losses, rel=1e-4)


def test_a_standard_error_is_that_of_windows_drawn_anew():
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(20, 40, (200,), generator=generator).double()
    sums = counts * (2 + 0.3 * torch.randn(200, generator=generator).double())
    found = Estimate(sums.tolist(), counts.int().tolist())
    drawn = torch.randint(200, (2000, 200), generator=generator)
    spread = (sums[drawn].sum(1) / counts[drawn].sum(1)).exp().std()
    assert found.error == pytest.approx(float(spread), rel=0.1)
    assert float(found) == pytest.approx(math.exp(float(sums.sum() / counts.sum())))


def test_a_ratio_is_surer_than_its_parts():
    counts, hard = [30] * 50, [60.0 + 10 * math.sin(k) for k in range(50)]
    before = Estimate(hard, counts)
    after = Estimate([x + 3 + 0.1 * math.cos(k) for k, x in enumerate(hard)], counts)
    ratio, error = after.ratio(before)
    assert ratio == pytest.approx(float(after) / float(before))
    assert ratio == pytest.approx(math.exp(0.1), rel=1e-3)
    assert error < before.error / float(before) / 50
    with pytest.raises(DataError, match="other windows"):
        after.ratio(Estimate([1.0], [30]))
    assert Estimate([1.0], [30]).error is None


def test_a_token_in_front_of_a_text_is_in_front_of_every_window():
    begun, plain = (Tokens.of(WORDS, Letters(begin)) for begin in (59, None))
    assert (begun.begin, plain.begin) == (59, None)
    windows = begun.windows(16)
    assert (windows[:, 0] == 59).all()
    assert torch.equal(windows[:, 1:].flatten(), plain.ids[: windows.shape[0] * 15])
    assert torch.equal(plain.windows(16).flatten(), plain.ids[:400])


def test_texts_may_be_strings_files_and_lists(tmp_path):
    one, two = tmp_path / "one.txt", tmp_path / "two.jsonl"
    one.write_text("a b\n\nc")
    two.write_text('{"text": "a b"}\n\n"c\\nd"\n{"text": " "}\n')
    assert documents("a b\n\nc") == documents(one) == documents(str(one)) == ["a b\n\nc"]
    assert documents(two) == documents(["a b", "c\nd", ""]) == ["a b", "c\nd"]
    # several documents end in the end of text
    assert Tokens.of(["ab", "c"], Letters()).ids.tolist() == [40, 41, 0, 42, 0]
    assert Tokens.of("ab", Letters()).ids.tolist() == [40, 41]


def test_windows_lie_at_equal_distances_over_the_text():
    tokens = Tokens.of(WORDS, Letters())
    assert torch.equal(tokens.windows(16, limit=5), tokens.windows(16)[::5])
    assert torch.equal(tokens.windows(16, limit=99), tokens.windows(16))


TOO_FEW = "the text has 3 tokens, fewer than a window of 16: give more text, or a smaller length"
MISTAKES = {
    TOO_FEW: lambda _: perplexity("abc", Letters(), 16),
    "tokenizer is that of the network, .*; found NoneType": lambda _: perplexity(WORDS, None),
    "tokenizer is that of the network, .*; found str": lambda _: perplexity(WORDS, "gpt2"),
    "a text is a string, .*; found int": lambda _: perplexity(3, Letters()),
    "length is the tokens of a window, a whole number, at least 2; found 1": lambda _: perplexity(
        WORDS, Letters(), 1
    ),
    "the number of windows is .* at least 1; found 0": lambda _: perplexity(
        WORDS, Letters(), 16, windows=0
    ),
    "batch is .* at least 1; found 0.5": lambda _: perplexity(WORDS, Letters(), 16, batch=0.5),
    "places is .* from 1 to 15; found 16": lambda _: perplexity(WORDS, Letters(), 16, places=16),
    "stride is at most the tokens of a window, 16, .*; found 17": lambda _: perplexity(
        WORDS, Letters(), 16, held=WORDS, stride=17
    ),
    "there is no file": lambda folder: perplexity(folder / "none.txt", Letters()),
    "a text lies in a .txt or a .jsonl": lambda folder: perplexity(folder / "a.csv", Letters()),
    "line 2 of .*bad.jsonl is no JSON": lambda folder: perplexity(folder / "bad.jsonl", Letters()),
    'line 1 of .*num.jsonl is neither a string nor .* as its "text"': lambda folder: perplexity(
        folder / "num.jsonl", Letters()
    ),
    "a document holds .* at character 1, half of a surrogate pair": lambda folder: perplexity(
        folder / "half.jsonl", Letters()
    ),
    "latin.txt cannot be read as text": lambda folder: perplexity(folder / "latin.txt", Letters()),
}


@pytest.mark.parametrize("words", MISTAKES)
def test_what_cannot_be_used_is_told(words, tmp_path):
    (tmp_path / "bad.jsonl").write_text('"a"\n{"text"')
    (tmp_path / "num.jsonl").write_text('{"words": "a"}')
    (tmp_path / "latin.txt").write_bytes(b"\xe4")
    (tmp_path / "half.jsonl").write_text(r'"a\ud83d"')
    with pytest.raises((DataError, FileError), match=words):
        MISTAKES[words](tmp_path)


def test_a_mark_of_bytes_at_the_beginning_of_a_file_is_no_text(tmp_path):
    for name, content in (("a.txt", "abc"), ("a.jsonl", '"abc"')):
        (tmp_path / name).write_text(content, encoding="utf-8-sig")
        assert documents(tmp_path / name) == ["abc"]


def test_a_tokenizer_that_does_not_say_its_size_is_taken_at_its_word():
    class Bare:
        def encode(self, text, add_special_tokens=True):
            return Letters().encode(text)

        def decode(self, ids):
            return ""

    network = transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2))
    assert Perplexity.of(WORDS, Bare(), 16)(network) == Perplexity.of(WORDS, Letters(), 16)(network)


@pytest.mark.parametrize(
    ("size", "words"),
    [(50, "60 words, the network 50"), (500, "60 words, the network 500"), (64, "")],
)
def test_a_tokenizer_of_another_vocabulary_is_told(size, words):
    network = transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2 | {"vocab_size": size}))
    judge = Perplexity.of(WORDS, Letters(), 16)
    task = perplexity(WORDS, Letters(), 16)
    if not words:
        assert judge(network) > 1
        return
    with pytest.raises(DataError, match=f"the tokenizer has {words}: take the network's own"):
        judge(network)
    with pytest.raises(DataError, match=f"the tokenizer has {words}"):
        task.run(network, task.first())


def test_a_window_that_the_network_does_not_take_is_told():
    network = transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2 | {"n_positions": 8}))
    with pytest.raises(DataError, match="a window has 16 tokens, and the network takes 8"):
        Perplexity.of(WORDS, Letters(), 16)(network)


@pytest.mark.parametrize("places", [None, 1, 4, 15])
def test_a_task_compares_some_of_the_scores(network, places):
    task = perplexity(WORDS, Letters(), 16, windows=4, places=places, batch=2)
    batches = task.read()
    assert [b["input_ids"].shape for b in batches] == [(2, 16), (2, 16)]
    scores = task.run(network, batches[0])
    all_of = task.forward.whole(network, batches[0])
    if places is None or places == 15:
        assert torch.equal(scores, all_of)
    else:
        torch.testing.assert_close(
            scores, all_of[:, [15 * (k + 1) // places - 1 for k in range(places)]]
        )
    loss, ids = task.judge(network, scores, batches[0]), batches[0]["input_ids"]
    chosen = list(task.forward.places or range(15))
    torch.testing.assert_close(loss, _plain_losses(network, ids)[:, chosen].mean())


def test_a_continuation_is_the_likeliest_token_again_and_again(network):
    prompts = torch.randint(64, (2, 6), generator=torch.Generator().manual_seed(0))
    found = Continuations(prompts, Letters(), 5)(network)
    ids = prompts
    with torch.no_grad():
        for _ in range(5):
            result = network(ids)
            ids = torch.cat([ids, getattr(result, "logits", result)[:, -1:].argmax(2)], 1)
    assert found == {
        Letters().decode(row[:6].tolist()): Letters().decode(row[6:].tolist()) for row in ids
    }


@dataclass(frozen=True)
class Wrong:
    """The share of answers that are wrong on a toy: smaller is better."""

    x: torch.Tensor
    y: torch.Tensor

    smaller_is_better: ClassVar[bool] = True
    quantity: ClassVar[str] = "wrong answers"

    def __call__(self, model):
        with torch.no_grad():
            return 100 * float((model(self.x).argmax(1) != self.y).float().mean())


class Right(Wrong):
    smaller_is_better: ClassVar[bool] = False
    quantity: ClassVar[str] = "right answers"

    def __call__(self, model):
        return 100 - super().__call__(model)


@pytest.fixture(scope="module")
def toy():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 6)).eval()
    x = torch.randn(512, 12)
    with torch.no_grad():
        y = network(x).argmax(1)
    return network, x, y


def test_a_measure_that_falls_chooses_as_one_that_rises(toy):
    network, x, y = toy
    points = rabbet.frontier(network, [x[:64]], points=12, quality="fast")
    found = {kind: points.within(10.0, kind(x, y)) for kind in (Wrong, Right)}
    assert found[Wrong].point == found[Right].point
    assert found[Wrong].drop == pytest.approx(found[Right].drop)
    assert max(drop for _, drop in found[Wrong].tried) > 0
    assert "a rise of" in str(found[Wrong])
    assert "a drop of" in str(found[Right])
    told = points.measure(3, Wrong(x, y))
    assert told.quantity == told.facts()["quantity"] == "wrong answers"
    assert "wrong answers" in told.table.heads
    with pytest.raises(
        rabbet.errors.BudgetError, match="no plan that was fitted rises by at most 0"
    ):
        rabbet.frontier(network, [x[:64]], points=2, limits=("37%", "38%"), quality="fast").within(
            0, Wrong(x, y), fits=1
        )


def test_an_epoch_is_chosen_by_a_measure_that_falls(toy):
    network, x, y = toy
    notes = {}
    for kind in (Wrong, Right):
        task = rabbet.Task([x[:64], x[64:128]], evaluate=kind(x, y))
        result = rabbet.compress(
            network, "bytes <= 60%", task, rabbet.TTQAT(4, epochs=2, finish=2, rate=1e-2)
        )
        notes[kind] = next(note for note in result.notes if "held-back" in note)
        found = kind(x, y)(result.model)
        assert f"-> {found:.4g}" in notes[kind]
    before, after = (float(w) for w in notes[Wrong].rpartition("answers ")[2].split(" -> "))
    assert worsening(Wrong(x, y), before, after) <= 0


def test_a_sample_that_is_no_text_is_told(toy):
    network, x, _ = toy
    task = rabbet.Task([x[:8]], sample=lambda model: {"one": 3})
    with pytest.raises(DataError, match="must give a text for each prompt"):
        task.sampled(network)


def test_a_decoder_is_compressed_written_and_judged_alike(tmp_path):
    torch.manual_seed(0)
    network = DECODERS["gpt2"]().eval()
    task = perplexity(WORDS, Letters(), 16, windows=8, held=WORDS[::-1], places=4)
    result = rabbet.compress(network, "bytes <= 60%", task, quality="fast")
    result.save(tmp_path / "small.safetensors")
    again = rabbet.load(tmp_path / "small.safetensors", network)
    after = task.evaluate(again)
    assert after.error > 0
    assert after == pytest.approx(task.evaluate(result.model), rel=1e-5)
    assert after.counts == task.evaluate(network).counts


@pytest.mark.slow
def test_an_exported_decoder_gives_the_scores_of_all_places(tmp_path):
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    network = DECODERS["gpt2"]().eval()
    task = perplexity(WORDS, Letters(), 16, windows=8, held=WORDS[::-1], places=4)
    result = rabbet.compress(network, "bytes <= 60%", task, quality="fast")
    result.export(tmp_path / "small.onnx")
    session = rabbet.Session(tmp_path / "small.onnx")
    assert session(**task.first()).shape == (1, 16, 64)
    assert task.run(session, task.first()).shape == (1, 4, 64)
    assert task.evaluate(session) == pytest.approx(task.evaluate(result.model), rel=0.05)


def test_estimates_are_plain_numbers_in_json():
    assert json.dumps(Estimate([0.0], [3])) == "1.0"
