"""Commands whose network is a decoder, and whose data is text."""

import json

import pytest
import torch
from commands import QUICK

import rabbet

pytest.importorskip("transformers")
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

WORDS = ["the", "a", "dog", "cat", "sees", "hears", "and", "sleeps", "in", "house", "old", "new"]


def _text(seed, count=1200):
    drawn = torch.randint(len(WORDS), (count,), generator=torch.Generator().manual_seed(seed))
    return " ".join(WORDS[k] for k in drawn)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A decoder and a classifier, each with its tokenizer; texts."""
    place = tmp_path_factory.mktemp("decoder")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={x: k for k, x in enumerate(["<end>", *letters])}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>", pad_token="<end>")
    torch.manual_seed(0)
    shape = {"vocab_size": 264, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
    GPT2LMHeadModel(GPT2Config(**shape)).save_pretrained(place / "gpt2")
    GPT2LMHeadModel(GPT2Config(**shape)).save_pretrained(place / "bare")
    shape = {"vocab_size": 264, "hidden_size": 32, "num_hidden_layers": 1,
             "num_attention_heads": 4, "intermediate_size": 48}  # fmt: skip
    BertForSequenceClassification(BertConfig(**shape)).save_pretrained(place / "bert")
    tokenizer.save_pretrained(place / "gpt2")
    tokenizer.save_pretrained(place / "bert")
    (place / "use.txt").write_text(_text(0))
    (place / "test.jsonl").write_text(
        "".join(json.dumps({"text": _text(k, 60)}) + "\n" for k in range(1, 20))
    )
    (place / "held.txt").write_text(_text(99))
    (place / "short.txt").write_text("a cat")
    return place


@pytest.fixture
def here(saved, monkeypatch):
    monkeypatch.chdir(saved)
    return saved


DATA = ("--data", "use.txt length=32 limit=8 batch=2")
TEST = ("--test", "test.jsonl length=32 limit=6")


def test_a_decoder_is_compressed_and_judged_by_text(run, here):
    given = ("gpt2", *DATA, *TEST, "--budget", "bits <= 4", *QUICK)
    code, out, err = run("compress", *given, "-o", "small.safetensors", "--html", "page.html")
    assert code == 0, err
    assert "perplexity: " in out
    assert " ± " in out
    assert "times the float network's perplexity over 6 windows" in out.replace("\n", " ")
    page = (here / "page.html").read_text()
    assert "perplexity" in page
    assert "what follows" in page
    assert "make of the task's prompts" in page
    code, out, err = run("compress", *given, "-o", "small.safetensors", "--json")
    assert code == 0, err
    told = json.loads(out)["evaluation"]
    assert told["quantity"] == "perplexity"
    assert told["windows"] == 6
    assert told["ratio"] == pytest.approx(told["after"] / told["before"], rel=1e-6)
    assert 0 < told["ratio_error"] < told["after_error"] / told["before"]
    code, out, err = run("eval", "small.safetensors", "--model", "gpt2", *TEST, "--json")
    assert code == 0, err
    assert json.loads(out)["value"] == pytest.approx(told["after"], rel=1e-4)


@pytest.mark.slow
def test_a_folder_is_shown_and_judged_and_so_is_what_it_is_exported_to(run, here):
    given = ("gpt2", *DATA, *TEST, "--budget", "bpw <= 6", "-o", "folder", "--json")
    code, out, err = run("compress", *given, "--method", "blockwise grids=('4g32','8c')")
    assert code == 0, err
    told = json.loads(out)
    code, out, err = run("show", "folder", "--json")
    assert code == 0, err
    assert json.loads(out)["cost"]["bytes"] == sum(told["files"].values())
    assert run("check", "folder", "--budget", "bpw <= 6")[0] == 0
    assert run("compare", "folder", "folder")[0] == 0
    assert run("report", "folder", "-o", "folder.html")[0] == 0
    for target, near in {"genai-exact": 1e-4, "openvino-decoder": 1e-4, "genai": 0.02}.items():
        assert run("export", "folder", "--target", target, "-o", target)[0] == 0
        code, out, err = run("eval", target, *TEST, "--json")
        assert code == 0, err
        assert json.loads(out)["value"] == pytest.approx(told["evaluation"]["after"], rel=near)
    code, out, err = run("eval", "folder", *TEST, "--json")
    assert json.loads(out)["value"] == pytest.approx(told["evaluation"]["after"], rel=1e-6)
    assert run("export", "folder", "--target", "gguf", "-o", "llama")[0] == 0
    (here / "empty").mkdir(exist_ok=True)
    for line, why in {
        "eval llama": "llama.cpp, which is not run here",
        "eval folder --model gpt2": "leave out this option",
        "show gpt2": "a folder without a native file",
        "eval empty": "holds neither a native file",
    }.items():
        code, out, err = run(*line.split(), *(TEST if line.startswith("eval") else ()))
        assert (code, out) == (2, "")
        assert why in err


@pytest.mark.slow
def test_the_least_that_lets_a_perplexity_rise_so_far_is_found(run, here):
    code, out, err = run(
        "compress", "gpt2", *DATA, "--held", "held.txt length=32 limit=6", "--drop", "<= 300",
        *QUICK, "-o", "least.safetensors",
    )  # fmt: skip
    assert code == 0, err
    assert "a rise of" in out.replace("\n", " ")


def test_a_text_of_another_network_is_still_a_text_a_line(run, here):
    code, out, err = run("survey", "bert", "--data", "use.txt length=16")
    assert code == 0, err
    assert "classifier" in out


MISTAKES = {
    "fewer than a window of 32": ("gpt2", "--data", "short.txt length=32"),
    "a window has 65 tokens, and the network takes 64": ("gpt2", "--data", "use.txt length=65"),
    "'words' is no setting here; there are batch, length, limit": (
        "gpt2", "--data", "use.txt words=3",
    ),
    "there is no file none.txt": ("gpt2", "--data", "none.txt"),
    "numbered by a tokenizer, and the network brings none": ("bare", "--data", "use.txt"),
    "holds documents, which are text for a decoder": ("bert", "--data", "test.jsonl"),
}  # fmt: skip


@pytest.mark.parametrize("words", MISTAKES)
def test_a_text_that_cannot_be_used_is_one_line(run, here, words):
    code, out, err = run("survey", *MISTAKES[words])
    assert (code, out) == (2, "")
    assert words in err.replace("\n", " ")


@pytest.mark.slow
def test_a_test_may_have_a_stride(run, here):
    given = ("eval", "small.safetensors", "--model", "gpt2", "--json", "--test")
    network = rabbet.hf.from_pretrained(here / "gpt2")
    task = rabbet.Task([{"input_ids": torch.randint(200, (2, 32))}])
    rabbet.fit(network, "transformer.wte dense@8c", task).save(here / "small.safetensors")
    values = {}
    for settings in ("", " stride=31", " stride=8"):
        code, out, err = run(*given, f"held.txt length=32{settings}")
        assert code == 0, err
        values[settings] = json.loads(out)["value"]
    assert len(set(values.values())) == 3


BLOCKWISE = ("--method", "blockwise grids=('3g32','4g32','8c') epochs=0", "--budget", "bpw <= 5")


def test_a_folder_is_compressed_into_a_folder(run, here):
    code, out, err = run("compress", "gpt2", *DATA, *TEST, *BLOCKWISE, "-o", "small")
    assert code == 0, err
    assert "times the float network's perplexity" in out.replace("\n", " ")
    assert "expected divergence" in out
    names = {path.name for path in (here / "small").iterdir()}
    assert names >= {"rabbet.safetensors", "config.json", "tokenizer.json"}
    assert ".rabbet-work" not in names
    code, out, err = run("eval", "small", *TEST, "--json")
    code, out, err = run("compress", "gpt2", *DATA, *BLOCKWISE, "-o", "small", "--json")
    assert code == 0, err
    told = json.loads(out)
    assert told["files"] == {
        "rabbet.safetensors": (here / "small" / "rabbet.safetensors").stat().st_size
    }


INTO_FOLDERS = {
    "is the method blockwise's": ("gpt2", *DATA, "--method", "joint", "-o", "other"),
    "has no such option": ("gpt2", *DATA, "--drop", "<= 1", "-o", "other"),
    "block by block, which has no such": ("gpt2", *DATA, "--quality", "fast", "-o", "other"),
    "is not known of a network": ("gpt2", *DATA, "--budget", "onnx <= 20%", "-o", "other"),
    "is no folder of save_pretrained": ("rabbet.demo:model", *DATA, "-o", "other"),
    "lies in the network's own folder": ("gpt2", *DATA, "-o", "gpt2/small"),
    "smallest reachable": ("gpt2", *DATA, "--budget", "bytes <= 1%", "-o", "other"),
    "needs batches": ("gpt2", "-o", "other"),
}


@pytest.mark.parametrize("words", INTO_FOLDERS)
def test_what_a_folder_cannot_be_made_of_is_one_line(run, here, words):
    code, _, err = run("compress", *INTO_FOLDERS[words])
    assert code in (1, 2)
    assert words in err.replace("\n", " ")
    assert "Traceback" not in err
