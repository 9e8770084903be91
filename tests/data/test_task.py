"""Batches of every structure are cut, joined and drawn from; what all examples share is kept."""

from collections import namedtuple

import pytest
import torch
from torch import nn

from rabbet import Task
from rabbet.data.augment import Pool, hold_back
from rabbet.data.batches import examples, first_examples, join, replaced, suited, tensors
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


def test_what_is_joined_and_cut_is_what_was_there(kind):
    whole = join([kind(rows(0, 8)), kind(rows(8, 11))])
    assert examples(whole) == 11
    assert same(whole, kind(rows(0, 11)))
    assert same(first_examples(whole, 4), kind(rows(0, 4)))


def test_a_limit_holds_whatever_batches_are(kind):
    task = Task([kind(rows(8 * k, 8 * k + 8)) for k in range(4)], limit=20)
    assert sum(map(examples, task.read())) == 20
    assert same(task.gathered(1024), kind(rows(0, 20)))


def test_a_pool_draws_as_many_examples_as_are_asked_for(kind):
    pool = Pool.of([kind(rows(8 * k, 8 * k + 8)) for k in range(4)])
    drawn = pool.draw(5, torch.Generator().manual_seed(0))
    assert examples(drawn) == 5
    assert type(drawn) is type(kind(rows(0, 5)))
    assert pool.draws(8) == 4


def test_what_is_held_back_is_not_kept(kind):
    kept, held = hold_back([kind(rows(8 * k, 8 * k + 8)) for k in range(4)], 0.25)
    first, last = (join(x) for x in (kept, held))
    assert same(first, kind(rows(0, 24)))
    assert same(last, kind(rows(24, 32)))


def test_every_tensor_is_moved(kind):
    moved = suited(kind(rows(0, 4)), nn.Linear(3, 3).double())
    assert {t.dtype for t in tensors(moved)} == {torch.float64}
    assert same(replaced(moved, lambda t: t.float()), kind(rows(0, 4)))


def test_what_was_read_before_an_error_is_not_kept():
    good, bad = rows(0, 8), rows(0, 8) * torch.nan
    task = Task([good, good, bad])
    for _ in range(2):
        with pytest.raises(DataError, match="batch 2 of the data"):
            task.read()
