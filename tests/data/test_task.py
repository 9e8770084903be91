"""Batches of every structure are cut, joined and drawn from; what all examples share is kept."""

from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from networks import rand
from torch import nn

from rabbet import Task
from rabbet.data.augment import PARTS, Pool, judging_parts
from rabbet.data.batches import replaced, suited, tensors
from rabbet.data.examples import Axes
from rabbet.errors import DataError

Pair = namedtuple("Pair", ["x", "y"])
SHARED = torch.arange(20.0).view(5, 4)  # such as positions, or a mask
KINDS = {
    "tensor": lambda x: x,
    "tuple": lambda x: (x, 2 * x),
    "list": lambda x: [x, 2 * x],
    "named tuple": lambda x: Pair(x, 2 * x),
    "mapping": lambda x: {"x": x, "y": 2 * x},
    "nested": lambda x: (x, {"deep": [2 * x, (3 * x,)]}),
    "shared": lambda x: (x, SHARED),
    "one number": lambda x: (x, torch.tensor(3.0)),
}


def rows(first, last):
    return torch.arange(float(first), float(last))[:, None].expand(-1, 3).clone()


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


def same(a, b):
    assert type(a) is type(b)
    return all(torch.equal(x, y) for x, y in zip(tensors(a), tensors(b), strict=True))


@pytest.fixture
def axes(kind):
    return Axes.along(kind(rows(0, 8)), 0)


def test_what_is_joined_and_cut_is_what_was_there(kind, axes):
    whole = axes.join([kind(rows(0, 8)), kind(rows(8, 11))])
    assert axes.count(whole) == 11
    assert same(whole, kind(rows(0, 11)))
    assert same(axes.first(whole, 4), kind(rows(0, 4)))
    assert same(axes.take(whole, torch.tensor([2, 1])), kind(rows(0, 3).flip(0)[:2]))


def test_a_limit_holds_whatever_batches_are(kind):
    batches = [kind(rows(8 * k, 8 * k + 8)) for k in range(4)]
    assert len(Task(batches, limit=20).read()) == 3
    task = Task(batches, limit=20, axes=0)
    assert sum(map(task.examples.count, task.read())) == 20
    assert same(task.gathered(1024), kind(rows(0, 20)))


def test_a_pool_draws_as_many_examples_as_are_asked_for(kind, axes):
    pool = Pool.of([kind(rows(8 * k, 8 * k + 8)) for k in range(4)], axes)
    drawn = pool.draw(5, torch.Generator().manual_seed(0))
    assert axes.count(drawn) == 5
    assert type(drawn) is type(kind(rows(0, 5)))
    assert pool.draws(8) == 4


def test_what_is_held_back_is_not_kept(kind, axes):
    kept, held = axes.hold_back([kind(rows(8 * k, 8 * k + 8)) for k in range(4)], 0.25)
    first, last = (axes.join(x) for x in (kept, held))
    assert same(first, kind(rows(0, 24)))
    assert same(last, kind(rows(24, 32)))


@pytest.mark.parametrize("axes", [Axes(), Axes((None,))])
def test_where_examples_are_not_known_to_lie_a_batch_is_one(axes):
    batches = [rows(0, 8), rows(8, 16), rows(16, 24)]
    assert axes.count(batches[0]) == 1
    assert same(axes.first(batches[0]), batches[0])
    assert [len(part) for part in axes.hold_back(batches, 0.125)] == [2, 1]
    pool = Pool.of(batches, axes)
    assert len(pool.draw(2, torch.Generator().manual_seed(0))) == 8
    assert axes.gathered(batches, 1024) == (batches[0], batches[1:])


def test_time_may_come_first():
    axes = Axes((1, 0, None))

    def batch(first, last):
        count = last - first
        return torch.rand(6, count, 3), torch.arange(first, last), torch.ones(count)

    whole = axes.join([batch(0, 4), batch(4, 7)])
    assert [tuple(t.shape) for t in whole] == [(6, 7, 3), (7,), (4,)]
    assert axes.count(whole) == 7
    assert [tuple(t.shape) for t in axes.first(whole, 2)] == [(6, 2, 3), (2,), (4,)]
    drawn = Pool.of([whole], axes).draw(3, torch.Generator().manual_seed(0))
    assert [tuple(t.shape) for t in drawn] == [(6, 3, 3), (3,), (4,)]


@pytest.mark.parametrize(
    ("axes", "said"),
    [
        (3, "do not fit a batch of float32"),
        ((0, 0), "do not fit a batch of float32"),
        (-1, "numbers from 0"),
        ("0", "numbers from 0"),
        ((0.5,), "numbers from 0"),
    ],
)
def test_axes_that_a_batch_does_not_have_are_refused(axes, said):
    with pytest.raises(DataError, match=said):
        Task([rows(0, 8)], axes=axes).read()


def test_no_more_is_read_than_is_asked_for():
    read = []
    task = Task((read.append(k) or rows(0, 8) for k in range(9)), limit=20, axes=0)
    assert len(task.first()) == 8
    assert read == [0]
    assert [len(b) for b in task.read()] == [8, 8, 4]
    assert read == [0, 1, 2]


def test_every_tensor_is_moved(kind):
    moved = suited(kind(rows(0, 4)), nn.Linear(3, 3).double())
    assert {t.dtype for t in tensors(moved)} == {torch.float64}
    assert same(replaced(moved, lambda t: t.float()), kind(rows(0, 4)))


def test_a_copy_of_a_task_knows_what_a_generator_has_given():
    task = Task(torch.ones(1, 2) for _ in range(3))
    assert len(task.read()) == 3
    other = replace(task, outputs="scores")
    assert (other.outputs, len(other.read()), len(task.read())) == ("scores", 3, 3)


def test_what_was_read_before_an_error_is_not_kept():
    good, bad = rows(0, 8), rows(0, 8) * torch.nan
    task = Task([good, good, bad])
    for _ in range(2):
        with pytest.raises(DataError, match="batch 2 of the data"):
            task.read()


def test_what_all_examples_share_is_never_taken_from_another_batch():
    axes = Axes((0, None))
    batches = [(rows(0, 8), torch.tensor(float(k))) for k in (1, 1, 2, 2)]
    gathered, unused = axes.gathered(batches, 1024)
    assert len(gathered[0]) == 16
    assert [float(t) for _, t in unused] == [2, 2]
    pool = Pool.of(batches, axes)
    assert len(pool.parts) == 4
    assert len(Pool.of(batches[:2], axes).parts) == 1


def test_a_batch_that_is_not_like_the_first_is_refused():
    task = Task([(rows(0, 8), rows(0, 8)), (rows(0, 8),)])
    with pytest.raises(DataError, match="make batches alike"):
        task.read()
    assert len(Task([(rows(0, 8), rows(0, 8)), (rows(0, 8),)], axes=()).read()) == 2


def test_a_limit_is_of_examples_where_a_batch_cannot_be_cut():
    assert [len(b) for b in Task([rows(0, 8)] * 9, axes=(), limit=3).read()] == [8, 8, 8]
    assert [len(b) for b in Task([rows(0, 8)] * 9, limit=20).read()] == [8, 8, 8]


def test_examples_are_told_in_what_a_layer_is_given():
    first, time, none = Axes((0,)), Axes((1,)), Axes()
    x = torch.arange(24.0).view(6, 4, 1)
    assert first.of_layer(x, 3) == 0
    assert first.of_layer(x, 5) is None
    assert time.of_layer(x, 4) == 1
    assert time.of_layer(x, 6) == 0  # what is left of time, such as a mean over it
    assert time.of_layer(x, 3) is None
    assert none.of_layer(x, 1) is None
    one, other = first.halves(x, 3)  # two rows an example
    assert torch.equal(one, x[[0, 1, 4, 5]])
    assert torch.equal(other, x[[2, 3]])
    assert [h.shape[1] for h in time.halves(x, 4)] == [2, 2]
    assert first.halves(x[:1], 1) == none.halves(x, 2) == []


@pytest.mark.parametrize("images", [True, False])
def test_examples_that_judge_come_in_parts_of_about_equal_size(images):
    shape = (3, 8, 8) if images else (5,)
    batches = [torch.rand(9, *shape) for _ in range(5)]
    parts = judging_parts(batches, Axes((0,)), 0)
    assert len(parts) == PARTS
    assert {len(part) for part in parts} == {5 if images else 1}
    assert {len(version) for part in parts for version in part} <= {2, 3}
    assert torch.equal(torch.cat([part[0] for part in parts]), torch.cat(batches))
    apart = judging_parts([*batches, torch.rand(9, *shape[:-1], 11)], Axes((0,)), 0)
    assert {len(part) for part in apart} == {1}
    assert sum(len(part[0]) for part in apart) == 54
    assert [len(p) for p in judging_parts([batches[0][:2]], Axes((0,)), 0)] == [
        5 if images else 1
    ] * 2
    assert judging_parts(batches, Axes(), 0) == [[b] for b in batches]


@pytest.mark.parametrize(
    "pair",
    [
        ({"a": rows(0, 8), "b": rows(8, 16)}, {"b": rows(0, 8), "a": rows(8, 16)}),
        ((rows(0, 8), 1), (rows(0, 8), 2)),
        ((rows(0, 8), "en"), (rows(0, 8), "fr")),
        ((rows(0, 8), object()), (rows(0, 8), object())),
        (rows(0, 8), rows(0, 8).double()),
        ([rows(0, 8)], (rows(0, 8),)),
    ],
)
def test_batches_that_differ_in_more_than_their_examples_are_kept_apart(pair):
    axes = Axes.along(pair[0], 0)
    assert axes.joinable(pair[0], pair[0])
    assert not axes.joinable(*pair)


def test_labels_beside_sequences_that_lie_along_the_second_axis_are_examples_too():
    sequences, labels, mask = torch.rand(5, 8, 3), torch.arange(8), torch.ones(8, 5)
    assert Axes.along((sequences, labels, mask), 1).each == (1, 0, 0)


def test_features_are_no_examples_where_their_numbers_agree():
    assert Axes((1,)).of_layer(torch.rand(80, 16), 16) is None
    assert Axes((1,)).of_layer(torch.rand(5, 16, 16), 16) == 1


def test_a_limit_counts_graphs_where_each_is_an_example():
    graphs = [torch.rand(3000, 8) for _ in range(4)]
    assert len(Task(graphs, axes=(), limit=2048).read()) == 4


def test_an_iterable_that_fills_its_tensors_anew_is_refused():
    kept = torch.zeros(4, 3)

    def batches():
        for k in range(3):
            yield kept.fill_(k)

    with pytest.raises(DataError, match="yield copies"):
        Task(batches()).read()
    whole = torch.arange(24.0).view(8, 3)
    assert len(Task(part for part in whole.split(2)).read()) == 4


def test_batches_that_memory_has_no_room_for_wait_in_a_folder():
    def made():
        for k in range(4):
            yield {
                "x": rand(3, 5, seed=k),
                "kind": torch.tensor([k]),
                "name": "a",
                "on": torch.ones(7) > 0,
            }

    task = Task(made(), forward=lambda m, b: m(b["x"]), memory=2 * (3 * 5 * 4 + 8 + 7))
    for _ in range(2):
        for batch, wanted in zip(task.read(), made(), strict=True):
            assert batch.keys() == wanted.keys()
            assert batch["name"] == "a"
            assert all(torch.equal(batch[n], wanted[n]) for n in ("x", "kind", "on"))
    folder = Path(task.source._folder.name)
    assert len(list(folder.iterdir())) == 6
    task.read()[-1]["x"].zero_()  # as a forward may do in place
    del task
    assert not folder.exists()


def test_a_list_of_batches_lies_where_it_is():
    batches = [rand(3, 5), rand(3, 5)]
    assert all(a is b for a, b in zip(Task(batches, memory=1).read(), batches, strict=True))


def test_batches_that_are_read_again_count_once_for_the_memory():
    fails = [True]

    class Data:
        def __iter__(self):
            yield torch.ones(500, 2)
            if fails:
                fails.clear()
                raise ValueError("not yet")
            yield torch.ones(500, 2)

    task = Task(Data(), memory=9000)
    with pytest.raises(ValueError, match="not yet"):
        task.read()
    assert len(task.read()) == 2
    assert task.source._folder is None


def test_a_numpy_array_that_is_filled_again_is_noticed():
    def data():
        held = np.zeros((4, 3), np.float32)
        for k in range(3):
            held[:] = k + 1
            yield torch.from_numpy(held)

    with pytest.raises(DataError, match="writes into the same tensors again"):
        Task(data()).read()


@pytest.mark.parametrize(
    "given", [{"memory": "1GB"}, {"memory": None}, {"limit": 10.5}, {"limit": 0}]
)
def test_sizes_are_whole_numbers(given):
    (name,) = given
    with pytest.raises(DataError, match=f"{name} is the .*, a whole number, at least"):
        Task([torch.ones(2, 3)], **given)
