"""Decoders in files that people run answer as the compressed network does, on every grid."""

import json

import numpy as np
import pytest
import torch
from decoding import compressed, gpt2, llama, opened, opt, prompts
from networks import thinned

import rabbet
from rabbet import hf
from rabbet.errors import FileError, ModelError
from rabbet.export.decoders import genai, predict_bytes
from rabbet.export.decoders.blocks import Blocks
from rabbet.export.decoders.genai import genai_content, write_genai
from rabbet.grids.grid import Grid, Quantised
from rabbet.model.build import build, plan_of
from rabbet.runtime.decoding import Writing
from rabbet.runtime.session import Session

NEW = 16
COARSE = ("u4c", "1g32")  # on which random weights may say one word again and again
NETWORKS = {"llama": llama, "gpt2": gpt2, "opt": opt}
GRIDS = (
    "4g64", "4g32z", "4c", "4", "4hg32", "u4c", "3g128", "3c", "2g64z", "2g16", "2hg64", "1g32",
    "tg64", "tc", "5g64", "6c", "8c", "8g64z", "4g48", "4g24", "f16",
)  # fmt: skip


@pytest.fixture(scope="module", params=list(NETWORKS))
def network(request):
    return opened(NETWORKS[request.param])


@pytest.mark.parametrize("grid", thinned(GRIDS, 2))
def test_onnxruntime_says_the_same_16_words_as_torch(network, grid):
    model = compressed(network, grid, " + lowrank[5]@8c")
    session = Session(genai_content(model, exact=True)[0])
    for batch in (1, 2):
        ids, mask = prompts(batch)
        with torch.no_grad():
            said = model.generate(
                ids, attention_mask=mask, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False,
                use_cache=True, eos_token_id=None, return_dict_in_generate=True, output_logits=True,
            )  # fmt: skip
        wanted = said.sequences[:, ids.shape[1] :].numpy()
        assert len(np.unique(wanted)) > 1 or grid in COARSE  # it does not just repeat itself
        found = Writing(session).greedy(ids.numpy(), NEW, mask.numpy())
        for row in range(batch):
            other = np.flatnonzero(found[row] != wanted[row])
            if len(
                other
            ):  # from where two words are as likely, but for float noise, all may differ
                best = said.logits[other[0]][row].topk(2).values
                assert float(best[0] - best[1]) < 1e-4 * float(best[0].abs())


@pytest.mark.parametrize("grid", ["4g64", "4hg32", "3g128", "2g64z", "2hg64", "tc", "8g64z"])
def test_kernels_of_integers_come_near(network, grid):
    model = compressed(network, grid)
    session = Session(genai_content(model, exact=False)[0])
    ids, mask = prompts(2)
    places = (mask.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        wanted = model(input_ids=ids, attention_mask=mask, position_ids=places).logits.numpy()
    found = Writing(session).read(ids.numpy(), mask.numpy())
    seen = mask.numpy().astype(bool)
    error = np.linalg.norm((found - wanted)[seen]) / np.linalg.norm(wanted[seen])
    assert error < 0.1


@pytest.mark.parametrize(("factor", "least", "most"), [(1, 0.01, 0.06), (30, 0.06, 0.25)])
def test_how_far_rounded_inputs_lead_off_is_said(factor, least, most, tmp_path):
    """A few inputs that are far larger than the others of their block make its steps large."""
    network = opened(llama)
    with torch.no_grad():
        for norm in (m for n, m in network.model.named_modules() if n.endswith("norm")):
            norm.weight[::32] *= factor
    model = compressed(network, "4g32")
    rounded, exact = (hf.export(model, tmp_path / t, t) for t in ("genai", "genai-exact"))
    assert least < rounded.error < most
    told = f"{100 * rounded.error:.2g} % off the network's in torch: kernels round inputs to 8 bits"
    assert any(told in note and "'genai-exact'" in note for note in rounded.notes)
    assert exact.error < 1e-5
    assert not any("in torch" in note for note in exact.notes)


def test_what_is_not_rounded_is_not_said_to_be_and_too_much_of_it_is_refused(tmp_path, monkeypatch):
    network = opened(llama)
    floats = hf.export(network.model, tmp_path / "floats", "genai")
    assert floats.error < 1e-5
    assert not any("in torch" in note for note in floats.notes)
    monkeypatch.setattr(genai, "NEAR", 0.01)
    with pytest.raises(ModelError, match="too coarsely, and 'genai-exact' does not, or something"):
        hf.export(compressed(network, "4g32"), tmp_path / "rounded", "genai")
    assert not (tmp_path / "rounded").exists()


@pytest.mark.parametrize("columns", [64, 72, 200])
@pytest.mark.parametrize("grid", GRIDS[:-2])
def test_blocks_are_the_values_of_the_grid(grid, columns):
    numbers = Quantised.nearest(torch.randn(6, columns), Grid.parse(grid))
    blocks = Blocks.of(numbers)
    each = 8 // blocks.bits
    codes = blocks.blob().reshape(6, -1)
    wide = np.stack([codes >> (blocks.bits * k) & (2**blocks.bits - 1) for k in range(each)], 2)
    wide = wide.reshape(6, -1)[:, :columns].astype(np.float32)
    packed = blocks.zero_points()
    zeros = np.full((6, blocks.count), 2.0 ** (blocks.bits - 1))
    if packed is not None:
        zeros = np.stack([packed >> (blocks.bits * k) & (2**blocks.bits - 1) for k in range(each)])
        zeros = zeros.transpose(1, 2, 0).reshape(6, -1)[:, : blocks.count]
    place = np.arange(columns) // blocks.size
    scales = blocks.scales.numpy()[:, blocks.places]
    values = (wide - zeros[:, place]) * scales[:, place]
    assert np.allclose(values, numbers.values.numpy(), rtol=1e-6, atol=1e-7)


def test_a_folder_for_genai_names_what_the_file_has(network, tmp_path):
    lines = "\n".join(f"{s.name} dense@4g32" for s in network.survey)
    result = rabbet.fit(network.model, lines, network.data, quality="fast")
    written = result.export(tmp_path / "out", "genai-exact")
    assert written.bytes == (tmp_path / "out" / "model.onnx").stat().st_size
    assert written.error < 1e-5
    assert "no tokenizer" in written.notes[-1]
    config = json.loads((tmp_path / "out" / "genai_config.json").read_text())["model"]
    session = Session(tmp_path / "out" / "model.onnx")
    names = config["decoder"]["inputs"] | config["decoder"]["outputs"]
    layers = range(config["decoder"]["num_hidden_layers"])
    meant = {name % n if "%d" in name else name for name in names.values() for n in layers}
    assert meant == {*session.names, *session.outputs}
    assert (config["eos_token_id"], config["pad_token_id"]) == (2, 0)


def test_tokens_that_the_network_lacks_are_not_named_to_genai():
    model = opened(gpt2).model
    model.config.eos_token_id = model.config.bos_token_id = 50256
    model.generation_config.eos_token_id = [2, 50256]
    model.generation_config.bos_token_id = None
    found = genai.genai_config(model)["model"]
    assert (found["eos_token_id"], found["bos_token_id"]) == ([2], 2)
    model.generation_config.eos_token_id = None
    assert "eos_token_id" not in genai.genai_config(model)["model"]


def test_onnxruntime_genai_reads_the_folder(network, tmp_path):
    runtime = pytest.importorskip("onnxruntime_genai")
    model = compressed(network, "4g32")
    hf.export(model, tmp_path, "genai-exact")
    ids = prompts(1)[0].numpy()
    loaded = runtime.Model(str(tmp_path))
    options = runtime.GeneratorParams(loaded)
    options.set_search_options(max_length=ids.shape[1] + NEW, do_sample=False)
    generator = runtime.Generator(loaded, options)
    generator.append_tokens(ids.astype(np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    found = [int(k) for k in generator.get_sequence(0)][ids.shape[1] :]
    wanted = Writing(Session(tmp_path / "model.onnx")).greedy(ids, NEW)[0].tolist()
    assert found == wanted[: len(found)]  # it stops where a text ends
    assert found


def test_a_file_is_smaller_where_codes_are_short(network):
    sizes = {
        grid: len(genai_content(compressed(network, grid), exact=False)[0])
        for grid in ("8g64", "6g64", "5g64", "4g64", "3g64", "tg64", "1g64")
    }
    assert list(sizes.values()) == sorted(sizes.values(), reverse=True)


def test_what_cannot_be_written_is_refused_by_name(network, tmp_path):
    lines = [
        f"{s.name} dense@4g32{' | act@8' if s.multiplies and not s.looks_up else ''}"
        for s in network.survey
    ]
    rounding = build(network.model, rabbet.Plan.parse("\n".join(lines)), network.survey)
    with pytest.raises(ModelError, match="rounds its input"):
        write_genai(rounding, tmp_path / "out", None, exact=True)
    with pytest.raises(ModelError, match="Linear is no decoder"):
        write_genai(torch.nn.Linear(3, 3), tmp_path / "out", None, exact=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="is a file"):
        write_genai(network.model, tmp_path / "file", None, exact=True)
    with pytest.raises(FileError, match="cannot export a decoder to 'onnx'"):
        hf.export(network.model, tmp_path / "out", "onnx")
    network.model.config.activation_function = network.model.config.hidden_act = "mish"
    try:
        with pytest.raises(ModelError, match="'mish' is not known"):
            write_genai(network.model, tmp_path / "out", None, exact=True)
    finally:
        usual = NETWORKS_ACT[type(network.model).__name__]
        network.model.config.activation_function = network.model.config.hidden_act = usual
    assert not (tmp_path / "out").exists()


NETWORKS_ACT = {"LlamaForCausalLM": "silu", "GPT2LMHeadModel": "gelu_new", "OPTForCausalLM": "relu"}


@pytest.mark.parametrize("target", ["genai", "genai-exact", "gguf"])
@pytest.mark.parametrize("grid", thinned(["4g32", "3c", "2g32z", "tg64", "8c"], 2))
def test_bytes_are_known_before_any_number_is(network, grid, target, tmp_path):
    model = compressed(network, grid, " + lowrank[5]@8c")
    plan = plan_of(model, network.survey)
    if target == "gguf" and network.model.config.model_type == "opt":
        with pytest.raises(ModelError, match="no GGUF format here"):
            predict_bytes(network.model, plan, network.survey, target)
        return
    predicted = predict_bytes(network.model, plan, network.survey, target)
    assert predicted == hf.export(model, tmp_path / "out", target).bytes
