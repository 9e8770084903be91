"""What torch's exporters are told of a network, and what is said where they cannot follow."""

import pytest
import torch
from networks import rand, settled, tokens
from torch import nn

from rabbet import Task, fit
from rabbet.errors import ModelError
from rabbet.export.onnx.trace import trace
from rabbet.export.signature import exporting, output_names, unlabelled
from rabbet.methods import QUALITY
from rabbet.runtime.session import Session

FAST = QUALITY["fast"]


def _fitted(net, data, *names):
    lines = [f"{name} dense@8c{' | act@8' if act else ''}" for name, act in names]
    return fit(net, "\n".join(lines), data, FAST)


class Denoising(nn.Module):
    """What comes in goes out under the same name."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, sample):
        return {"sample": self.b(torch.relu(self.a(sample)))}


def test_an_output_of_the_name_of_an_input_gets_another(tmp_path):
    result = _fitted(settled(Denoising()), [rand(8, 16)], ("a", True), ("b", True))
    result.export(tmp_path / "a.onnx")
    session = Session(tmp_path / "a.onnx")
    assert (session.names, session.outputs) == (["sample"], ["sample_out"])
    given = {"x": rand(1), "x_out": rand(1), "y": rand(1)}
    assert output_names(given, ["x"]) == ["x_out_out", "x_out", "y"]


class Judging(nn.Module):
    """Answers with a loss where it is given labels, as transformers do; scaled by a true input."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(20, 16), nn.Linear(16, 4)

    def forward(self, ids, scale=None, labels=None, weights=None):
        scores = self.head(self.table(ids).mean(1)) * (1.0 if scale is None else scale)
        answer = {"logits": scores}
        if labels is not None:
            answer["loss"] = nn.functional.cross_entropy(scores, labels)
        return answer


def _labelled():
    return [
        {
            "ids": ids,
            "scale": torch.full((len(ids), 1), 2.0),
            "labels": torch.zeros(len(ids)).long(),
        }
        for ids in tokens()
    ]


@pytest.mark.parametrize("ending", ["onnx", "pt2"])
def test_labels_are_no_inputs_of_a_file(ending, tmp_path):
    net, data = settled(Judging()), _labelled()
    task, names = unlabelled(Task(data), net)
    assert names == ("labels",)
    assert [list(batch) for batch in task.read()] == [["ids", "scale"]] * 2
    result = _fitted(net, data, ("table", False), ("head", True))
    written = result.export(tmp_path / f"a.{ending}")
    assert "labels is no input of the file: only the loss depends on it" in written.notes
    if ending == "onnx":
        session = Session(tmp_path / "a.onnx")
        assert (session.names, session.outputs) == (["ids", "scale"], ["logits"])
        assert session(**data[0]).shape == (6, 4)


@pytest.mark.parametrize("ending", ["onnx", "pt2"])
def test_a_length_that_all_batches_have_is_said_to_be_fixed(ending, tmp_path):
    net = settled(Judging())
    alike = [{"ids": ids, "scale": torch.full((len(ids), 1), 2.0)} for ids in tokens()]
    alike = [{**batch, "ids": batch["ids"][:, :4]} for batch in alike]
    other = [*alike, {**alike[0], "ids": alike[0]["ids"][:, :3]}]
    said = {}
    for data in (alike, other):
        written = _fitted(net, data, ("table", False), ("head", True)).export(
            tmp_path / f"a.{ending}"
        )
        said[len(data)] = [note for note in written.notes if "lengths" in note]
    assert said[len(other)] == []
    assert said[len(alike)] == [
        "the file takes 4 numbers of ids an example, as all batches have; for one that takes any "
        "length, give batches of different lengths"
    ]


def test_what_changes_an_answer_is_no_label():
    net = settled(Judging())
    for batches in ([{k: b[k] for k in ("ids", "scale")} for b in _labelled()], tokens()):
        task, names = unlabelled(Task(batches), net)
        assert names == ()
        assert list(task.source) == batches


class Recurrent(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.table = nn.Embedding(20, 16)
        self.body, self.head = nn.LSTM(16, width, batch_first=True), nn.Linear(width, 4)

    def forward(self, ids):
        return self.head(self.body(self.table(ids))[0][:, -1])


class Gated(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.body, self.head = nn.GRU(16, width, batch_first=True), nn.Linear(width, 4)

    def forward(self, x):
        return self.head(self.body(x)[0])


@pytest.mark.parametrize("width", [32, 64])
@pytest.mark.slow
def test_a_recurrent_layer_of_any_width_is_exported(width, tmp_path):
    net, data = settled(Gated(width)), [rand(4, 10, 16)]
    result = fit(net, "head dense@8c | act@8", data, quality="fast")
    result.export(tmp_path / "small.onnx")
    answer, wanted = Session(tmp_path / "small.onnx")(data[0]), result.model(data[0])
    assert (answer - wanted).norm() < 0.1 * wanted.norm()


@pytest.mark.slow
def test_an_export_depends_on_nothing_but_the_network():
    data = [tokens(length=n)[0] for n in (7, 9)]
    first, second = (trace(settled(Recurrent()), Task(data))[0].bytes() for _ in range(2))
    assert first == second
    assert Session(first)(data[1]).shape == (6, 4)


def test_an_export_of_a_network_that_draws_says_so(tmp_path):
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(8, 4)

        def forward(self, x):
            return self.a(x + torch.randn_like(x))

    result = _fitted(settled(Noisy()), [rand(8, 8)], ("a", True))
    with pytest.raises(ModelError, match="draws random numbers in its forward, which no file"):
        result.export(tmp_path / "a.onnx")
    assert not list(tmp_path.iterdir())


def test_a_network_that_writes_to_itself_is_exported(tmp_path):
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(8, 4)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            self.features = self.a(x)
            return self.features + 0 * self.calls

    result = _fitted(settled(Counting()), [rand(8, 8)], ("a", True))
    result.export(tmp_path / "a.pt2")
    result.export(tmp_path / "a.onnx")
    x, wanted = rand(3, 8, seed=1), result.model.a(rand(3, 8, seed=1))
    assert torch.equal(torch.export.load(tmp_path / "a.pt2").module()(x), wanted)
    assert (Session(tmp_path / "a.onnx")(x) - wanted).norm() < 0.05 * wanted.norm()


@pytest.mark.parametrize("error", [IndexError("list index out of range"), KeyError("x")])
def test_whatever_goes_wrong_in_an_export_is_one_sentence(error):
    net, task = settled(nn.Linear(4, 2)), Task([rand(2, 4)])
    with (
        pytest.raises(ModelError, match=f"to ONNX: {type(error).__name__}: ") as caught,
        exporting("ONNX", net, task),
    ):
        raise error
    assert caught.value.__cause__ is error
