"""A file for OpenVINO is tried in OpenVINO, and is right there or not written."""

import pytest
import torch
from networks import rand, settled
from torch import nn

import rabbet
from rabbet.errors import ModelError
from rabbet.export.onnx import compare, write
from rabbet.methods import QUALITY
from rabbet.runtime.openvino import run_openvino

pytest.importorskip("openvino")

PLAN = "conv dense@8c | act@8\nhead dense@8c | act@8"


class Rows(nn.Module):
    """A conv whose output meets rows of zeros, then a layer that shows every channel as it is."""

    def __init__(self, rank):
        super().__init__()
        conv = (nn.Conv1d, nn.Conv2d)[rank - 1]
        self.conv, self.head = conv(3, 8, 3, padding=1), conv(8, 8, 1)
        with torch.no_grad():
            self.conv.bias.copy_(torch.tensor([-3.0, -2, -1, -0.5, 0.5, 1, 2, 3]))
            self.head.weight.copy_(torch.eye(8).view(self.head.weight.shape))
            self.head.bias.zero_()

    def forward(self, x):
        made = self.conv(x)
        return self.head(torch.cat([made, torch.zeros_like(made[:, :, :1])], 2))


class Patches(nn.Module):
    """The beginning of a vision transformer."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 32, 8, 8), nn.Linear(32, 16)
        self.token = nn.Parameter(torch.randn(1, 1, 32))
        self.places = nn.Parameter(torch.randn(1, 17, 32))

    def forward(self, x):
        patches = self.conv(x).flatten(2).mT
        token = self.token.expand(x.shape[0], -1, -1)
        return self.head(torch.cat([token, patches], 1) + self.places)


def _fitted(model, x):
    return rabbet.fit(settled(model).requires_grad_(False), PLAN, [x], QUALITY["fast"])


@pytest.mark.parametrize(
    ("make", "x"),
    [
        (lambda: Rows(1), rand(8, 3, 32)),
        (lambda: Rows(2), rand(8, 3, 32, 32)),
        (Patches, rand(8, 3, 32, 32)),
    ],
    ids=["rows", "planes", "patches"],
)
def test_openvino_answers_as_the_network_does(make, x, tmp_path):
    torch.manual_seed(1)
    result = _fitted(make(), x)
    written = result.export(tmp_path / "a.onnx", "openvino")
    assert not any("OpenVINO" in note for note in written.notes)
    session = rabbet.Session(tmp_path / "a.onnx")
    (answer,) = run_openvino((tmp_path / "a.onnx").read_bytes(), session.feed(x))
    wanted = result.model(x)
    assert (torch.from_numpy(answer) - wanted).norm() < 0.2 * wanted.norm()


def test_a_file_that_openvino_runs_wrongly_is_not_written(tmp_path, monkeypatch):
    result = _fitted(Rows(2), rand(4, 3, 8, 8))
    monkeypatch.setattr(
        compare, "run_openvino", lambda *given: [3 * a for a in run_openvino(*given)]
    )
    with pytest.raises(ModelError, match="in OpenVINO the file's output differs"):
        result.export(tmp_path / "a.onnx", "openvino")
    assert not list(tmp_path.iterdir())
    result.export(tmp_path / "a.onnx")  # onnxruntime's own file is not concerned


class Items(nn.Module):
    """Numbers and a bag of items for each example."""

    def __init__(self, bag):
        super().__init__()
        self.table = bag(50, 16, mode="mean")
        self.conv, self.head = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x, items, offsets):
        return self.head(self.table(items, offsets) + self.conv(x))


class OwnBag(nn.EmbeddingBag):
    """Of a class that is not known, so that it stays the fused operation."""


def _items(bag):
    batch = (rand(16, 8), torch.randint(50, (64,)), torch.arange(0, 64, 4))
    return rabbet.fit(settled(Items(bag)), PLAN, [batch], QUALITY["fast"])


def test_a_bag_of_embeddings_runs_as_a_table(tmp_path):
    written = _items(nn.EmbeddingBag).export(tmp_path / "a.onnx", "openvino")
    assert written.error < 0.03


def test_a_file_that_openvino_does_not_take_is_one_sentence(tmp_path):
    result = _items(OwnBag)
    with pytest.raises(ModelError, match="OpenVINO does not run the file: ") as caught:
        result.export(tmp_path / "a.onnx", "openvino")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_without_openvino_the_result_says_that_it_was_not_tried(tmp_path, monkeypatch):
    result = _fitted(Rows(2), rand(4, 3, 8, 8))
    monkeypatch.setattr(write, "openvino_known", lambda: False)
    written = result.export(tmp_path / "a.onnx", "openvino")
    assert any(note.startswith("not tried in OpenVINO") for note in written.notes)
