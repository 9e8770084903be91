"""Decoders in OpenVINO answer as the compressed network does, and their weights stay compressed."""

import numpy as np
import pytest
import torch
from decoding import compressed, gpt2, llama, opened, opt, prompts

from rabbet import hf
from rabbet.errors import FileError
from rabbet.export.decoders import openvino, predict_bytes
from rabbet.model.build import plan_of
from rabbet.runtime.decoding import Writing
from rabbet.runtime.openvino import Compiled

pytest.importorskip("openvino")

NEW = 16
NETWORKS = {"llama": llama, "gpt2": gpt2, "opt": opt}
WIDTHS = {"4g32": "u4", "4g64": "u4", "2g64z": "u2", "3c": "u4"}


@pytest.fixture(scope="module", params=list(NETWORKS))
def network(request):
    return opened(NETWORKS[request.param])


def says_the_same(model, text, batch):
    """Whether 16 greedy words are torch's, and words at all, not one for ever."""
    ids, mask = prompts(batch)
    with torch.no_grad():
        said = model.generate(
            ids, attention_mask=mask, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False,
            use_cache=True, eos_token_id=None,
        )  # fmt: skip
    wanted = said[:, ids.shape[1] :].numpy()
    assert len(np.unique(wanted)) > 1
    return Writing(text).greedy(ids.numpy(), NEW, mask.numpy()).tolist() == wanted.tolist()


def kinds(text):
    """The types of the matrices that the compiled file multiplies with, by how many there are."""
    found = {}
    for node in text.model.get_runtime_model().get_ordered_ops():
        if node.get_rt_info()["layerType"].value == "FullyConnected":
            kind = node.input_value(1).get_element_type().get_type_name()
            found[kind] = found.get(kind, 0) + 1
    return found


@pytest.mark.parametrize("grid", list(WIDTHS))
def test_openvino_says_the_same_16_words_as_torch_with_short_codes(network, grid):
    model = compressed(network, grid)
    text = Compiled(openvino.openvino_content(model)[0])
    assert says_the_same(model, text, 1)
    assert says_the_same(model, text, 2)
    linears = sum((s.multiplies and not s.looks_up) or bool(s.heads) for s in network.survey)
    assert kinds(text) == {WIDTHS[grid]: linears}


@pytest.mark.parametrize("make", [llama, gpt2])
def test_rows_that_end_within_a_block_stay_short(make):
    network = opened(lambda: make(72))
    model = compressed(network, "4c", " + lowrank[5]@8c")
    text = Compiled(openvino.openvino_content(model)[0])
    assert says_the_same(model, text, 2)
    assert kinds(text).keys() == {"u4", "u8"}


def test_a_grid_without_blocks_is_long_once_loaded_and_named():
    network = opened(gpt2)
    model = compressed(network, "4g24")
    content, notes = openvino.openvino_content(model)
    named = {n.partition(" ")[0] for n in notes if "4g24 is not in blocks" in n}
    assert named == {s.name for s in network.survey}
    text = Compiled(content)
    assert says_the_same(model, text, 2)
    assert not kinds(text).keys() & {"u4", "i4"}


def test_a_folder_is_as_long_as_foretold_and_names_what_is_wider(network, tmp_path):
    model = compressed(network, "3c", " + lowrank[5]@8c")
    plan = plan_of(model, network.survey)
    predicted = predict_bytes(network.model, plan, network.survey, "openvino-decoder")
    written = hf.export(model, tmp_path, "openvino-decoder")
    assert predicted == written.bytes == (tmp_path / "model.onnx").stat().st_size
    assert written.error < 1e-5
    assert [n for n in written.notes if n.startswith("3c takes 4 bits")] == [written.notes[0]]
    assert (tmp_path / "config.json").is_file()


def test_without_openvino_the_file_is_tried_elsewhere_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(openvino, "openvino_known", lambda: False)
    network = opened(llama)
    written = hf.export(compressed(network, "2g64z"), tmp_path, "openvino-decoder")
    assert openvino.UNTRIED in written.notes
    assert written.error < 1e-5


def test_what_openvino_cannot_read_is_one_line():
    with pytest.raises(FileError, match=r"^OpenVINO does not run the file: [^\n]+$"):
        Compiled(b"no file")
