"""Commands whose network is a folder written by Hugging Face's `save_pretrained`."""

import json
import shutil
import sys

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import rabbet
from rabbet import hf
from rabbet.model.compressed import compressed_layers
from rabbet.runtime.decoding import Writing
from rabbet.runtime.session import Session

BATCHES = """
import torch

def batches():
    torch.manual_seed(1)
    ids = torch.randint(1, 60, (4, 4, 9))
    return [{"input_ids": x, "attention_mask": torch.ones_like(x)} for x in ids]
"""


def bert():
    config = BertConfig(vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                        intermediate_size=64, max_position_embeddings=16)  # fmt: skip
    return BertForSequenceClassification(config)


def gpt2():
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=60, n_positions=16, n_embd=32, n_layer=2, n_head=4)
    )


NETWORKS = {"bert": bert, "gpt2": gpt2}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder of each network."""
    place = tmp_path_factory.mktemp("saved")
    for name, make in NETWORKS.items():
        torch.manual_seed(0)
        make().save_pretrained(place / name)
    return place


@pytest.fixture
def here(saved, tmp_path, monkeypatch):
    """The current folder, with the networks and a file of batches in it."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    (tmp_path / "batches_of_user.py").write_text(BATCHES)
    return tmp_path


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize(
    "method", ["joint tuning.steps=0", "ttqat rank=6 table_rank=6 epochs=1 finish=1"]
)
@pytest.mark.slow
def test_a_folder_is_surveyed_and_compressed_and_its_file_read_again(run, here, name, method):
    data = ("--data", "batches_of_user:batches")
    code, out, _ = run("survey", name, *data)
    assert code == 0
    assert "embeddings" in out or "embedding, lm_head" in out
    given = ("--budget", "bytes <= 70%", "--output", "small.safetensors")
    code, out, err = run("compress", f"{name}/", *data, *given,
                         "--method", method, "--json")  # fmt: skip
    assert code == 0, err
    again = rabbet.load(here / "small.safetensors", NETWORKS[name]())
    assert compressed_layers(again)
    code, out, err = run(
        "export", "small.safetensors", "--model", name, *data, "--output", "small.onnx", "--json"
    )
    assert code == 0, err


def _edited(folder, **facts):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | facts))


MISTAKES = {
    "has no config.json": lambda folder: (folder / "config.json").unlink(),
    "cannot be read": lambda folder: (folder / "config.json").write_text("{"),
    "architecture 'NinethNet', which transformers does not have": lambda f: _edited(
        f, architectures=["NinethNet"]
    ),
    "architecture 'BertConfig'": lambda folder: _edited(folder, architectures=["BertConfig"]),
    "architecture ''": lambda folder: _edited(folder, architectures=None),
    "holds no *.safetensors": lambda folder: (folder / "model.safetensors").unlink(),
    "cannot be read as BertForSequenceClassification": lambda f: (
        f / "model.safetensors"
    ).write_bytes(b"no"),
    "lacks tensors of BertForMaskedLM": lambda folder: _edited(
        folder, architectures=["BertForMaskedLM"]
    ),
    "rabbet[hf]": None,
}


@pytest.mark.parametrize("words", MISTAKES)
def test_a_folder_that_cannot_be_used_is_one_line(run, here, monkeypatch, words):
    if MISTAKES[words] is None:
        monkeypatch.setitem(sys.modules, "transformers", None)
    else:
        MISTAKES[words](here / "bert")
    code, out, err = run("survey", "bert", "--data", "batches_of_user:batches")
    assert (code, out) == (2, "")
    assert words in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def llama():
    config = LlamaConfig(vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                         num_attention_heads=4, max_position_embeddings=64)  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():  # or it repeats one word
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(5)
    return model


def scores(model, batch):
    return model(**batch, use_cache=False).logits


def test_a_folder_that_compress_wrote_is_exported_and_says_the_same_words(
    run, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    llama().save_pretrained("in", max_shard_size="20KB")
    ids = torch.randint(3, 60, (2, 2, 9), generator=torch.Generator().manual_seed(0))
    task = rabbet.Task([{"input_ids": x} for x in ids], forward=scores)
    method = rabbet.Blockwise(grids=("4g16", "8c"), adapters=(), epochs=0, passes=0)
    stored = hf.compress_pretrained("in", "bpw <= 7", task, "small", method=method)
    code, out, err = run("export", "small", "--target", "genai-exact", "--output", "run", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["native"] == stored.cost.bytes
    assert found["files"] == {"run": (tmp_path / "run" / "model.onnx").stat().st_size}
    said = hf.from_pretrained("small").generate(
        ids[0], max_new_tokens=12, min_new_tokens=12, do_sample=False, eos_token_id=None
    )
    words = Writing(Session((tmp_path / "run" / "model.onnx").read_bytes()))
    assert words.greedy(ids[0].numpy(), 12).tolist() == said[:, 9:].tolist()
    code, _, err = run("export", "small", "--target", "genai", "--output", "run")  # once more
    assert code == 0, err
    for mistake, why in {
        "--output a.onnx": "exported to one of genai, genai-exact, openvino-decoder",
        "--output run --target onnx": "found onnx",
        "--output run --target genai --model in": "a folder says which network it holds",
        "--output small --target genai": "is read by this command",
        "--output in/config.json --target gguf": "is a file; this target writes a folder",
    }.items():
        code, _, err = run("export", "small", *mistake.split())
        assert code != 0
        assert why in " ".join(err.split())


def test_decoders_are_timed_in_turn(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    llama().save_pretrained("in")
    for target in ("genai", "openvino-decoder"):
        assert run("export", "in", "--target", target, "--output", target)[0] == 0
    code, out, err = run("bench", "genai", "--against", "openvino-decoder", "--runs", "21")
    assert (code, err) == (0, "")
    assert "speed against openvino-decoder" in out
    assert "2 times in turn" in out
    facts = json.loads(run("bench", "genai", "--runs", "1", "--threads", "1", "--json")[1])
    (file,) = facts["files"]
    assert file["bytes"] == (tmp_path / "genai" / "model.onnx").stat().st_size
    assert min(file["tokens per second"].values()) > 0
    assert facts["machine"]["threads"] == "1"
    settings = tmp_path / "genai" / "genai_config.json"
    known = json.loads(settings.read_text())
    known["model"]["context_length"] = 30
    settings.write_text(json.dumps(known))
    assert "a prompt of 10 random ones" in run("bench", "genai", "--runs", "1")[1]
    (tmp_path / "file.onnx").write_bytes(b"")
    for mistake, why in {
        "in": "in is for no runtime; write one that is: rabbet export in",
        "genai --batch 4": "on one sequence of random tokens",
        "genai --against file.onnx": "file.onnx is a file",
        "genai --against nowhere": "there is no folder nowhere",
    }.items():
        code, out, err = run("bench", *mistake.split())
        assert (code, out) == (2, "")
        assert why in " ".join(err.split())
