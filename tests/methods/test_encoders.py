"""TTQAT on the shapes that transformers come in, tiny and with random weights."""

import math

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    RobertaConfig,
    RobertaForMaskedLM,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
)

import rabbet
from rabbet import TTQAT
from rabbet.methods.ttqat import Distillation
from rabbet.runtime.session import Session
from rabbet.train.distil import Recorder, find_blocks

SIZES = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
}
PLACES = {"bert": 10, "roberta": 10, "gpt2": 10, "wav2vec2": 39}
BLOCKS = {
    "bert": "bert.encoder.layer",
    "roberta": "roberta.encoder.layer",
    "gpt2": "transformer.h",
    "wav2vec2": "wav2vec2.encoder.layers",
}
TABLES = {
    "bert": ("bert.embeddings.word_embeddings", "cls.predictions.decoder"),
    "roberta": ("roberta.embeddings.word_embeddings", "lm_head.decoder"),
    "gpt2": ("transformer.wte", "lm_head"),
}


def network(name):
    torch.manual_seed(0)
    if name == "bert":
        model = BertForMaskedLM(BertConfig(vocab_size=90, max_position_embeddings=16, **SIZES))
    elif name == "roberta":  # positions begin behind the padding's
        config = RobertaConfig(
            vocab_size=90, max_position_embeddings=20, type_vocab_size=1, **SIZES
        )
        model = RobertaForMaskedLM(config)
    elif name == "gpt2":
        sizes = {"n_positions": 16, "n_embd": 48, "n_layer": 2, "n_head": 4}
        words = {"vocab_size": 90, "bos_token_id": 0, "eos_token_id": 0}
        model = GPT2LMHeadModel(GPT2Config(use_cache=False, **sizes, **words))
    else:
        convs = {
            "conv_dim": (32, 32),
            "conv_kernel": (10, 3),
            "conv_stride": (5, 2),
            "num_feat_extract_layers": 2,
            "num_conv_pos_embeddings": 16,
            "num_conv_pos_embedding_groups": 4,
        }
        config = Wav2Vec2Config(vocab_size=32, apply_spec_augment=False, **convs, **SIZES)
        model = Wav2Vec2ForCTC(config)
    return model.eval()


def batches(name, count=3):
    found = []
    for k in range(count):
        generator = torch.Generator().manual_seed(k)
        if name == "wav2vec2":
            found.append({"input_values": torch.randn(4, 400, generator=generator)})
            continue
        mask = torch.ones(4, 10, dtype=torch.long)
        mask[0, 7:] = 0
        ids = torch.randint(3, 90, (4, 10), generator=generator)
        found.append({"input_ids": ids, "attention_mask": mask})
    return found


def taught(name, epochs):
    method = TTQAT(
        4, 6, 6, start="plain", epochs=epochs, finish=1, distil=Distillation(contrast=0.5)
    )
    return rabbet.compress(network(name), "bytes <= 60%", batches(name), method)


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_attention_and_tied_tables_are_found(name):
    model, data = network(name), batches(name)
    survey = rabbet.survey(model, data)
    blocks = find_blocks(model, survey)
    assert blocks == [f"{BLOCKS[name]}.{k}" for k in range(2)]
    with torch.no_grad():
        shown = Recorder(model, blocks)(lambda: model(**data[0]))
        told = model(**data[0], output_hidden_states=True)
    places = PLACES[name]
    assert [tuple(h.shape) for h in shown.hidden] == [(4, places, 48)] * 3
    assert [tuple(a.shape) for a in shown.attention] == [(4, 4, places, places)] * 2
    for a in shown.attention:
        assert torch.allclose(a.sum(-1), torch.ones(4, 4, places), atol=1e-5)
    assert torch.allclose(shown.hidden[1], told.hidden_states[1], atol=1e-6)
    if name == "gpt2":  # no place looks ahead
        assert not shown.attention[0].triu(1).any()
    tied = {site.name: site.heads for site in survey if site.heads}
    assert tied == ({TABLES[name][0]: TABLES[name][1:]} if name in TABLES else {})


@pytest.mark.slow
@pytest.mark.parametrize("name", BLOCKS)
def test_every_linear_becomes_a_chain_that_is_trained_stored_and_read_again(name, tmp_path):
    result, model = taught(name, 2), network(name)
    form_of = {line.name: line.terms[0].form.name for line in result.plan}
    inside = {n: f for n, f in form_of.items() if n.startswith(BLOCKS[name])}
    assert len(inside) == (8 if name == "gpt2" else 12)
    assert set(inside.values()) == {"tt"}
    assert all(form_of[table] == "ttm" for table, _ in TABLES.values() if table in form_of)
    assert len(result.notes) == 1  # nothing to complain of
    before, after = (float(x) for x in result.notes[0].rpartition(" loss ")[2].split(" -> "))
    assert math.isfinite(before)
    assert after < before
    path = tmp_path / "small.safetensors"
    assert result.save(path) == result.cost.bytes == path.stat().st_size
    again = rabbet.load(path, model)
    for batch in batches(name):
        assert torch.equal(again(**batch)[0], result.model(**batch)[0])


@pytest.mark.slow
@pytest.mark.parametrize("name", BLOCKS)
def test_what_is_exported_answers_as_the_network(name, tmp_path):
    result, batch = taught(name, 1), batches(name)[1]
    result.export(tmp_path / "small.onnx")
    session = Session((tmp_path / "small.onnx").read_bytes())
    answer = torch.from_numpy(session.run(session.feed(list(batch.values())))[0])
    wanted = result.model(**batch)[0]
    # cores are contracted to 8 bits
    assert (answer - wanted).norm() < 0.05 * wanted.norm()
