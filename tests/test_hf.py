"""Networks of transformers in folders, compressed."""

import json

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

import rabbet
from rabbet import hf
from rabbet.errors import FileError, ModelError
from rabbet.train.tuning import Tuning


@pytest.fixture(scope="module")
def compressed():
    torch.manual_seed(0)
    config = BertConfig(vocab_size=60, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                        intermediate_size=32, max_position_embeddings=16)  # fmt: skip
    network = BertForSequenceClassification(config).eval()
    batches = [{"input_ids": torch.randint(1, 60, (4, 9))} for _ in range(2)]
    method = rabbet.Joint(forms=(), adapters=(), tuning=Tuning(steps=0))
    return rabbet.compress(network, "bits <= 4", batches, method), batches


def test_a_compressed_network_comes_back_from_its_folder(compressed, tmp_path):
    result, batches = compressed
    folder = hf.save_pretrained(result, tmp_path / "deep" / "small", data="four random sentences")
    assert (folder / hf.NATIVE).stat().st_size == result.cost.bytes
    again = hf.from_pretrained(folder)
    assert isinstance(again, BertForSequenceClassification)
    assert not again.training
    with torch.no_grad():
        for batch in batches:
            assert torch.equal(again(**batch).logits, result.model(**batch).logits)


def test_the_card_says_what_was_done_and_how_to_run_it(compressed, tmp_path):
    result, _ = compressed
    text = (hf.save_pretrained(result, tmp_path, data="sentences of ours") / hf.CARD).read_text()
    assert text.startswith("---\nlibrary_name: rabbet\n")
    for words in ("bits <= 4", f"{result.cost.bytes:,} bytes", "sentences of ours", str(result)):
        assert words in text


def test_a_network_of_another_kind_is_refused(tmp_path):
    result = rabbet.compress(
        nn.Linear(4, 4).eval(), "bits <= 8", [torch.rand(8, 4)], quality="fast"
    )
    with pytest.raises(ModelError, match="no network of transformers"):
        hf.save_pretrained(result, tmp_path / "small")
    assert not (tmp_path / "small").exists()


def test_a_place_that_cannot_be_written_is_named(compressed, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="cannot write into"):
        hf.save_pretrained(compressed[0], tmp_path / "file")


def test_a_damaged_folder_is_refused(compressed, tmp_path):
    folder = hf.save_pretrained(compressed[0], tmp_path)
    content = (folder / hf.NATIVE).read_bytes()
    (folder / hf.NATIVE).write_bytes(content[:-1])
    with pytest.raises(FileError, match="damaged"):
        hf.from_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["Unknown"]}))
    with pytest.raises(FileError, match="names the architecture 'Unknown'"):
        hf.from_pretrained(folder)


def test_what_is_no_network_of_transformers_is_refused_and_nothing_is_changed(compressed, tmp_path):
    result, _ = compressed
    before, state = result.model.config.architectures, torch.get_rng_state()
    with pytest.raises(ModelError, match="tokenizer is one of transformers"):
        hf.save_pretrained(result, tmp_path / "small", tokenizer="bert")
    assert not (tmp_path / "small").exists()
    again = hf.from_pretrained(hf.save_pretrained(result, tmp_path / "small"))
    assert result.model.config.architectures == before
    assert torch.equal(torch.get_rng_state(), state)
    assert again.name_or_path == str(tmp_path / "small")
