"""Statistics of BatchNorms that are estimated anew, from more examples than fit into memory."""

import pytest
import torch
from networks import network, rand

from rabbet import ADMM, Budget, Jobs
from rabbet.data.examples import Axes
from rabbet.data.task import Task
from rabbet.model.build import build
from rabbet.model.compressed import compressed_layers
from rabbet.reconstruct import norms
from rabbet.workpiece import Workpiece


def _recalibrated(batches, limit=2048):
    """Scales and biases of all layers, and how many examples went through in each pass."""
    piece = Workpiece.of(network("residual").model, Task.of(batches), Jobs())
    plan = ADMM(rate=4.0, act=None).plan(piece, Budget.parse("bytes <= 1000%"))
    student = build(piece.model, plan, piece.survey)
    passes = []
    hook = student.register_forward_hook(lambda _, given, __: passes.append(len(given[0])))
    norms.recalibrate_norms(student, piece, limit)
    hook.remove()
    layers = compressed_layers(student).values()
    values = [f[-1].scale for layer in layers for f in layer.factors]
    return [*values, *(layer.bias for layer in layers if layer.bias is not None)], passes


def test_every_example_counts_where_few_fit_into_memory(monkeypatch):
    batches = [rand(5, 3, 8, 8, seed=k) for k in range(3)]
    monkeypatch.setattr(norms, "affordable", lambda _: 6)
    found, passes = _recalibrated(batches)
    assert passes == [5, 5, 5]
    alone = [_recalibrated([batch])[0] for batch in batches]
    for got, *parts in zip(found, *alone, strict=True):
        torch.testing.assert_close(got, torch.stack(parts).mean(0), rtol=1e-2, atol=1e-4)
    assert any(not torch.equal(got, part) for got, part in zip(found, alone[0], strict=True))


@pytest.mark.parametrize(("limit", "passes"), [(4, [4]), (7, [4, 3]), (2048, [5, 5, 5])])
def test_no_more_examples_are_taken_than_asked_for(monkeypatch, limit, passes):
    monkeypatch.setattr(norms, "affordable", lambda _: 6)
    assert _recalibrated([rand(5, 3, 8, 8, seed=k) for k in range(3)], limit)[1] == passes


def test_portions_hold_all_examples_in_order_and_are_as_large_as_asked_for():
    axes = Axes((0,))
    batches = [torch.arange(5.0)[:, None], torch.arange(5.0, 7)[:, None]]
    portions = list(axes.portions(batches, 3))
    assert [len(p) for p in portions] == [3, 3, 1]
    assert torch.equal(torch.cat(portions), torch.cat(batches))
    apart = [torch.zeros(2, 3), torch.zeros(2, 4)]
    assert [p.shape for p in axes.portions(apart, 3)] == [(2, 3), (2, 4)]
    assert list(Axes().portions(["a", "b"], 3)) == ["a", "b"]
