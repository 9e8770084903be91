"""What is meant plainly is taken, and what is nearly right is answered with what was meant."""

import logging

import numpy as np
import pytest
import torch
from networks import rand, settled
from torch import nn

import rabbet
from rabbet import Budget, Joint, Task, compress, fit
from rabbet.errors import BudgetError, DataError, FileError, PlanError
from rabbet.train.tuning import Tuning

QUICK = Joint(forms=(), adapters=(), tuning=Tuning(steps=0))
X = rand(8, 3, 6, 6)


def net():
    return settled(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 5)))


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("bytes<10%", "bytes <= 10%"),
        ("bytes = 10 %", "bytes <= 10 %"),
        ("bits == 3", "bits <= 3"),
        ("10MB", "bytes <= 10MB"),
        ("1.5 MiB, bops < 2%", "bytes <= 1.5 MiB, bops <= 2%"),
    ],
)
def test_a_budget_whose_meaning_is_plain_is_taken(text, meant):
    assert Budget.parse(text) == Budget.parse(meant)
    assert str(Budget.parse(text)) == meant


@pytest.mark.parametrize("text", ["10%", "10", "3 M", "10 G", "bytes > 10%", "bytes >= 10", "<= 3"])
def test_a_budget_that_may_mean_several_things_is_refused(text):
    with pytest.raises(BudgetError):
        Budget.parse(text)


def test_arrays_of_numpy_are_batches():
    whole = compress(net(), "bits <= 5", [X], QUICK)
    result = compress(net(), "bits <= 5", [X.numpy()], QUICK)
    assert result.plan == whole.plan
    assert all(
        torch.equal(a, b)
        for a, b in zip(result.model.parameters(), whole.model.parameters(), strict=True)
    )
    named = Task([{"input": X.numpy()}, {"input": X.numpy()}])
    assert isinstance(named.read()[0]["input"], torch.Tensor)


def test_a_forward_of_the_users_gets_what_the_iterable_gives():
    task = Task([X.numpy()], forward=lambda model, batch: model(torch.from_numpy(batch)))
    with pytest.raises(DataError, match="found ndarray"):  # tensors are what is counted
        task.read()
    task = Task([(X, X.numpy())], forward=lambda model, batch: model(batch[0]))
    assert isinstance(task.read()[0][1], np.ndarray)


def test_an_array_without_numbers_is_refused():
    with pytest.raises(DataError, match="an array of <U1 holds no numbers"):
        compress(net(), "bits <= 5", [np.array(["a", "b"])], QUICK)


def test_a_layer_that_is_not_there_is_answered_with_one_that_is():
    with pytest.raises(PlanError, match=r"did you mean 3\?"):
        fit(net(), "33 dense@4c", [X], QUICK)


def test_a_layer_without_a_line_is_told():
    result = fit(net(), "0 dense@4c", [X], QUICK)
    assert "no line in the plan, so kept in float: 1 (3)" in result.notes
    whole = fit(net(), "0 dense@4c\n3 dense@4c", [X], QUICK)
    assert not any("no line in the plan" in note for note in whole.notes)


def test_save_makes_folders_and_refuses_the_ending_of_another_kind(tmp_path):
    result = fit(net(), "0 dense@4c", [X], QUICK)
    result.save(tmp_path / "a" / "b" / "small.safetensors")
    with pytest.raises(FileError, match=r"which ends in \.safetensors"):
        result.save(tmp_path / "small.onnx")
    assert not (tmp_path / "small.onnx").exists()
    with pytest.raises(FileError, match="there is no file"):
        rabbet.Session(tmp_path / "small.onnx")


def test_a_survey_is_printed_a_line_a_layer():
    model = nn.Sequential(nn.Linear(9, 9), nn.LayerNorm(9))
    text = str(rabbet.survey(settled(model), [rand(4, 9)]))
    assert text.splitlines()[0] == "0  linear  9x9  81 MACs"
    assert "left alone: 1 (72 bytes): tensors too small to be worth a line" in text


def test_what_is_left_alone_for_one_reason_is_one_line():
    parts = [part for _ in range(5) for part in (nn.Linear(9, 9), nn.LayerNorm(9))]
    result = fit(settled(nn.Sequential(*parts)), "0 dense@4c", [rand(4, 9)], QUICK)
    assert str(result).count("left alone") == 1
    assert "left alone: 1 and 4 more (360 bytes): tensors too small" in str(result)


def test_a_budget_below_what_is_left_alone_names_that():
    """Of a recurrent layer that are its biases: its weights are stored."""
    model = settled(nn.Sequential(nn.Linear(9, 9), nn.GRU(9, 32, batch_first=True)))
    with pytest.raises(BudgetError, match=r"of which is left alone: 1 768"):
        compress(model, "bytes <= 1%", [rand(4, 7, 9)], QUICK)


def test_progress_is_logged(caplog):
    with caplog.at_level(logging.INFO, "rabbet"):
        compress(net(), "bits <= 5", [X], QUICK)
    assert any("of" in record.message for record in caplog.records if record.levelname == "INFO")


def test_arrays_of_any_layout_and_byte_order_are_taken_however_deep_they_lie():
    batch = {"x": [X.numpy()[:, ::-1], X.numpy().astype(">f4")], "y": X}
    seen = Task([batch]).read()[0]
    assert torch.equal(seen["x"][0], X.flip(1))
    assert torch.equal(seen["x"][1], X)
    bare = [X, X]
    assert Task([bare]).read()[0] is bare


def test_labels_of_any_whole_type_are_taken():
    pairs = [(X, torch.zeros(8, dtype=torch.uint16))]
    assert 0 <= rabbet.accuracy(net(), pairs) <= 100
