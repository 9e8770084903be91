"""Where the examples of a batch lie is told by running the network, and never guessed."""

import pytest
import torch
from torch import nn

from rabbet import Joint, Task, compress, survey
from rabbet.data.batches import replaced, tensors
from rabbet.data.task import call
from rabbet.errors import DataError, ModelError
from rabbet.model.independence import UNCONFIRMED, with_axes
from rabbet.train.tuning import Tuning

QUICK = Joint(forms=(), adapters=(), tuning=Tuning(steps=0))
rand = torch.rand


class Calls(nn.Module):
    """A network whose forward is a function of its layers and the batch."""

    def __init__(self, function, *layers):
        super().__init__()
        self.layers, self.function = nn.ModuleList(layers), function

    def forward(self, *batch):
        return self.function(self.layers, *batch)


def encoder(first):
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=first)
    return nn.Sequential(
        nn.Linear(6, 16), nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
    )


def graph(layers, x, edges):
    return layers[0](torch.zeros_like(x).index_add_(0, edges[1], x[edges[0]]))


EDGES = torch.randint(0, 30, (2, 90))
BAGS = (torch.randint(0, 50, (40,)), torch.arange(0, 40, 5))

CASES = {
    "rows": (nn.Linear(6, 4), rand(8, 6), (0,)),
    "one image": (nn.Conv2d(3, 4, 3, padding=1), rand(1, 3, 16, 16), (0,)),
    "tokens and a mask": (
        Calls(lambda ls, ids, mask: ls[0](ids) * mask[..., None], nn.Embedding(50, 8)),
        (torch.randint(0, 50, (5, 7)), torch.ones(5, 7)),
        (0, 0),
    ),
    "shared positions": (
        Calls(lambda ls, x, p: ls[0](x + p), nn.Linear(6, 4)),
        (rand(8, 5, 6), rand(5, 6)),
        (0, None),
    ),
    "flat outputs": (
        Calls(lambda ls, x: ls[0](x).flatten(0, 1), nn.Linear(6, 4)),
        rand(8, 5, 6),
        (0,),
    ),
    "a loss beside": (Calls(lambda ls, x: (ls[0](x), x.sum()), nn.Linear(6, 4)), rand(8, 6), (0,)),
    "batch first": (encoder(True), rand(8, 24, 6), (0,)),
    "time first": (encoder(False), rand(24, 8, 6), (1,)),
    "time first, one sequence": (encoder(False), rand(24, 1, 6), (1,)),
    "a recurrent layer": (nn.LSTM(6, 16), rand(24, 8, 6), (1,)),
    "one place in time": (nn.MultiheadAttention(6, 2), (rand(1, 8, 6),) * 3, (1, 1, 1)),
    "a mean of one": (Calls(lambda ls, x: ls[0](x - x.mean(0)), nn.Linear(6, 4)), rand(1, 6), ()),
    "means of the batch, in kelvin": (
        Calls(lambda ls, x: ls[0](x - x.mean(0)) + 300, nn.Linear(6, 4)),
        rand(64, 6),
        (),
    ),
    "rows, in kelvin": (Calls(lambda ls, x: ls[0](x) + 300, nn.Linear(6, 4)), rand(64, 6), (0,)),
    "at most eight": (
        Calls(lambda ls, x: ls[0](x + torch.zeros(8, 6)[: len(x)]), nn.Linear(6, 4)),
        rand(8, 6),
        (),
    ),
    "its state beside": (nn.GRU(6, 16), (rand(24, 8, 6), rand(1, 8, 16)), (1, 1)),
    "a graph": (Calls(graph, nn.Linear(6, 4)), (rand(30, 6), EDGES), ()),
    "bags": (
        Calls(lambda ls, *bags: ls[1](ls[0](*bags)), nn.EmbeddingBag(50, 8), nn.Linear(8, 4)),
        BAGS,
        (),
    ),
    "no batch": (nn.Conv2d(3, 4, 3, padding=1), rand(3, 16, 16), ()),
    "a list of images": (
        Calls(lambda ls, *images: ls[0](torch.stack(images)), nn.Conv2d(3, 4, 3, padding=1)),
        [rand(3, 16, 16) for _ in range(4)],
        (),
    ),
    "means of the batch": (
        Calls(lambda ls, x: ls[0](x - x.mean(0)), nn.Linear(6, 4)),
        rand(8, 6),
        (),
    ),
    "chance": (
        Calls(lambda ls, x: ls[0](x) + torch.randn(len(x), 4), nn.Linear(6, 4)),
        rand(8, 6),
        (),
    ),
    "one number": (Calls(lambda ls, x: ls[0](x).sum(), nn.Linear(6, 4)), rand(8, 6), ()),
}


@pytest.mark.parametrize("name", CASES)
def test_axes_are_those_that_the_network_treats_one_by_one(name):
    model, batch, axes = CASES[name]
    assert with_axes(model.eval(), Task([batch])).axes == axes


def test_what_is_declared_is_not_tried():
    model = Calls(lambda _, x: pytest.fail("ran"))
    assert with_axes(model, Task([rand(8, 6)], axes=1)).axes == 1


def test_what_is_declared_and_another_axis_is_proven_is_refused():
    model, batch, _ = CASES["time first"]
    with pytest.raises(DataError, match=r"axes=0 was declared.*pass axes=1"):
        compress(model.eval(), "bits <= 6", Task([batch], axes=0), QUICK)


@pytest.mark.parametrize(
    ("name", "axes", "told"),
    [("means of the batch", 0, 1), ("time first", 1, 0), ("a graph", (), 0), ("rows", 0, 0)],
)
def test_what_is_declared_and_a_run_does_not_confirm_is_told(name, axes, told):
    model, batch, _ = CASES[name]
    result = compress(model.eval(), "bits <= 6", Task([batch], axes=axes), QUICK)
    assert result.survey.notes.count(UNCONFIRMED) == told


@pytest.mark.parametrize("sequences", [1, 8])
def test_a_layer_costs_what_one_sequence_of_it_costs_whichever_axis_comes_first(sequences):
    shapes = {False: (24, sequences, 6), True: (sequences, 24, 6)}
    sites = [survey(encoder(kind).eval(), [rand(shapes[kind])]) for kind in (False, True)]
    assert [s.macs for s in sites[0]] == [s.macs for s in sites[1]]
    assert sites[0]["0"].macs == 24 * 6 * 16


@pytest.mark.parametrize(
    "name", ["a list of images", "time first", "a graph", "bags", "means of the batch"]
)
def test_networks_of_every_kind_of_batch_are_compressed_and_corrected(name):
    model, batch, axes = CASES[name]
    several = [replaced(batch, lambda t: t.clone()) for _ in range(3)]
    result = compress(model.eval(), "bits <= 6", Task(several, limit=64), QUICK)
    assert all("layers not solved again" not in note for note in result.notes)
    assert any("Task(batches, axes=...)" in n for n in result.survey.notes) == (not axes)


def test_a_batch_that_is_one_example_is_exported_with_its_own_shape(tmp_path):
    """Nodes of graphs differ in number, so that axis is free in the file; where only one graph is
    known, its sizes stand in the file."""
    from rabbet.runtime.session import Session

    model = CASES["a graph"][0].eval()
    graphs = [(rand(n, 6), torch.randint(0, n, (2, 3 * n))) for n in (30, 20, 270)]
    result = compress(model, "bits <= 6", graphs, QUICK)
    result.export(tmp_path / "graph.onnx")
    session = Session((tmp_path / "graph.onnx").read_bytes())
    for batch in graphs:
        given = session.feed(tensors(batch))
        with torch.no_grad():
            wanted = call(result.model, batch)
        assert torch.allclose(torch.from_numpy(session.run(given)[0]), wanted, atol=0.1)


def test_an_error_of_the_forward_is_the_users():
    def broken(layers, x):
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        compress(Calls(broken, nn.Linear(6, 4)).eval(), "bits <= 6", [rand(8, 6)], QUICK)
    with pytest.raises(ModelError):
        compress(nn.Sequential(nn.ReLU()).eval(), "bits <= 6", [rand(8, 6)], QUICK)
