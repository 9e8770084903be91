"""GGUF files hold the compressed network exactly: transformers reads the same answers from them."""

import json

import gguf
import numpy as np
import pytest
import torch
from decoding import WORDS, compressed, gpt2, llama, opened, opt, prompts
from transformers import AutoModelForCausalLM, AutoTokenizer

from rabbet import hf
from rabbet.errors import ModelError
from rabbet.export.decoders.ggml import size, stored
from rabbet.grids.grid import Grid, Quantised

TYPES = {
    "4g64": "Q4_0", "4c": "Q4_0", "3g128": "Q4_0", "2g64z": "Q4_0", "2hg64": "Q4_0",
    "1g32": "Q4_0", "tg64": "Q4_0", "u4c": "Q4_1", "4g32z": "Q5_0", "4hg32": "Q5_0", "5g64": "Q5_0",
    "u5c": "Q5_1", "6c": "Q8_0", "8c": "Q8_0", "8g32": "Q8_0", "2g256": "TQ2_0", "2c": "TQ2_0",
    "tc": "TQ1_0", "1c": "TQ1_0", "8g64z": None, "8hc": None, "4g48": None, "f16": None,
}  # fmt: skip


@pytest.mark.parametrize("grid", list(TYPES))
def test_a_type_holds_a_grid_to_the_last_bit(grid):
    numbers = Quantised.nearest(torch.randn(6, 512), Grid.parse(grid))
    found = stored(numbers)
    assert (found and found.type) == TYPES[grid]
    assert size(numbers.grid, (6, 512)) == (found and found.content.size)
    if found is not None:
        kind = gguf.GGMLQuantizationType[found.type]
        assert np.array_equal(gguf.dequantize(found.content, kind), numbers.values.numpy())


def test_a_scale_that_float16_lacks_is_no_scale_of_a_type():
    numbers = Quantised.nearest(torch.randn(6, 64), Grid.parse("4c"))
    numbers.scale[2] = 1.1e-9
    assert stored(numbers) is None


MAKES = {
    "llama": lambda: llama(256),
    "llama, two tables": lambda: llama(64, tied=False),
    "gpt2": lambda: gpt2(64, 1024),  # transformers does not read the number of positions
}


@pytest.fixture(scope="module", params=list(MAKES))
def network(request):
    return opened(MAKES[request.param])


def answers(model):
    with torch.no_grad():
        return model(prompts(1)[0]).logits


def near(ours, theirs, most=1e-3):
    return float((ours - theirs).norm() / theirs.norm()) < most


@pytest.mark.parametrize("grid", ["4g32", "2g64z", "2hg64", "4hg32", "8c", "tc"])
def test_transformers_reads_the_compressed_network(network, grid, tmp_path):
    model = compressed(network, grid)
    written = hf.export(model, tmp_path, "gguf")
    assert written.bytes == (tmp_path / "model.gguf").stat().st_size
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf").eval()
    assert near(answers(read), answers(model))


def test_adapters_are_a_file_beside_it(network, tmp_path):
    model = compressed(network, "4g32", " + lowrank[5]@8c")
    written = hf.export(model, tmp_path, "gguf")
    assert any("--lora" in note for note in written.notes)
    base = gguf.GGUFReader(tmp_path / "model.gguf")
    whole = {t.name: gguf.dequantize(t.data, t.tensor_type) for t in base.tensors}
    adapter = {t.name: t.data for t in gguf.GGUFReader(tmp_path / "adapter.gguf").tensors}
    pairs = {name.rpartition(".")[0] for name in adapter}
    assert pairs
    assert pairs <= whole.keys()
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf").eval()
    assert not near(answers(read), answers(model))
    # The weights that adapters change, as transformers has them: read by its own mapping.
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, get_gguf_hf_weights_map

    processor = TENSOR_PROCESSORS[read.config.model_type](read.config.to_dict())
    places = get_gguf_hf_weights_map(read, processor)
    state = read.state_dict()
    for name in pairs:
        total = whole[name] + adapter[f"{name}.lora_b"] @ adapter[f"{name}.lora_a"]
        turned = processor.process(total, name).weights
        state[places[name]].copy_(torch.from_numpy(np.ascontiguousarray(turned)))
    assert near(answers(read), answers(model))


@pytest.mark.parametrize(("positions", "inner"), [(64, None), (1024, 96), (1024, None)])
def test_what_transformers_does_not_read_of_gpt2_is_said(positions, inner, tmp_path):
    model = compressed(opened(lambda: gpt2(64, positions, inner)), "4g32")
    written = hf.export(model, tmp_path, "gguf")
    told = any("config=" in note for note in written.notes)
    assert told == ((positions, inner) != (1024, None))
    if told:
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf")
    given = {"config": model.config} if told else {}
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", **given).eval()
    assert near(answers(read), answers(model))


def test_what_does_not_fit_is_named_and_can_be_float16(network, tmp_path):
    model = compressed(network, "8g64z")
    with pytest.raises(ModelError, match=r"holds \d+ of the layers exactly: .*dense@8g64z.*4g32"):
        hf.export(model, tmp_path / "out", "gguf")
    assert not (tmp_path / "out").exists()
    written = hf.export(model, tmp_path / "out", "gguf-f16")
    assert any("is float16" in note for note in written.notes)
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file="model.gguf").eval()
    assert near(answers(read), answers(model), 1e-2)


def test_opt_is_refused(tmp_path):
    with pytest.raises(ModelError, match="OPTForCausalLM has no GGUF"):
        hf.export(opt(), tmp_path / "out", "gguf")


def tokenizer(folder, steps=None, kind="BPE"):
    """A byte-level BPE of a few words, in a folder, as `save_pretrained` leaves it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = pre_tokenizers.ByteLevel.alphabet()
    words = {"<pad>": 0, "<s>": 1, "</s>": 2}
    words |= {letter: k for k, letter in enumerate(sorted(letters)[:80], 3)}
    words |= {"ab": 90, "abc": 91}
    if kind == "BPE":
        raw = Tokenizer(models.BPE(vocab=words, merges=[("a", "b"), ("ab", "c")]))
    else:
        raw = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    raw.pre_tokenizer = steps or pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens(["<s>", "</s>"])
    folder.mkdir(exist_ok=True)
    raw.save(str(folder / "tokenizer.json"))
    said = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    return AutoTokenizer.from_pretrained(folder)


def test_the_words_of_a_tokenizer_come_along(network, tmp_path):
    words = tokenizer(tmp_path / "words")
    hf.export(compressed(network, "4g32"), tmp_path / "out", "gguf", tokenizer=words)
    fields = gguf.GGUFReader(tmp_path / "out" / "model.gguf").fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    assert len(tokens) == WORDS
    assert (tokens[1], tokens[91], tokens[95]) == ("<s>", "abc", "[PAD95]")
    kinds = fields["tokenizer.ggml.token_type"].contents()
    assert (kinds[1], kinds[91], kinds[95]) == (3, 1, 5)
    assert fields["tokenizer.ggml.merges"].contents() == ["a b", "ab c"]
    assert fields["tokenizer.ggml.pre"].contents() == "gpt-2"
    read = AutoTokenizer.from_pretrained(tmp_path / "out", gguf_file="model.gguf")
    assert read.encode("abc a") == words.encode("abc a")


@pytest.mark.parametrize("begins", [True, False])
def test_a_token_in_front_of_every_text_is_said(begins, tmp_path):
    from tokenizers import Tokenizer, processors

    words = tokenizer(tmp_path / "words")
    if begins:
        raw = Tokenizer.from_file(str(tmp_path / "words" / "tokenizer.json"))
        front = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
        raw.post_processor = processors.Sequence([processors.ByteLevel(), front])
        raw.save(str(tmp_path / "words" / "tokenizer.json"))
        words = AutoTokenizer.from_pretrained(tmp_path / "words")
    hf.export(compressed(opened(llama), "4g32"), tmp_path / "out", "gguf", tokenizer=words)
    fields = gguf.GGUFReader(tmp_path / "out" / "model.gguf").fields
    assert fields["tokenizer.ggml.add_bos_token"].contents() == begins
    assert (words.encode("abc")[0] == 1) == begins


def test_a_tokenizer_that_llama_cpp_does_not_know_is_refused(tmp_path):
    from tokenizers import pre_tokenizers

    model = compressed(opened(llama), "4g32")
    strange = pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), pre_tokenizers.ByteLevel()])
    with pytest.raises(ModelError, match="no name known here"):
        hf.export(model, tmp_path / "out", "gguf", tokenizer=tokenizer(tmp_path / "a", strange))
    words = tokenizer(tmp_path / "b", kind="WordLevel")
    with pytest.raises(ModelError, match="WordLevel"):
        hf.export(model, tmp_path / "out", "gguf", tokenizer=words)
