"""The key of work on a task: what computes the same finds it, what does not never does."""

import functools
import threading
from pathlib import Path

import pytest
import torch
from networks import rand, settled
from torch import nn

import rabbet
from rabbet import Task
from rabbet.jobs import Jobs
from rabbet.workpiece import Workpiece


class Own(nn.Sequential):
    """A network whose forward is the user's."""

    def __init__(self, bend=torch.relu):
        super().__init__(nn.Linear(6, 5), nn.Linear(5, 4))
        self.bend = bend

    def forward(self, x, *_):
        return self[1](self.bend(self[0](x)))


def powered(power):
    return lambda outputs, batch: (outputs**power).sum()


class Scaled:
    def __init__(self, k):
        self.k = k

    def __call__(self, outputs, batch):
        return self.k * outputs.sum()


def _key(jobs=None, bend=torch.relu, batches=None, **functions):
    task = rabbet.Task([rand(4, 6)] if batches is None else batches, **functions)
    return Workpiece.of(settled(Own(bend)), task, jobs or Jobs()).key("work", {}, {})


OTHERS = {
    "a lambda with another constant": [{"loss": powered(2)}, {"loss": powered(4)}],
    "another object of one class": [{"loss": Scaled(1)}, {"loss": Scaled(2)}],
    "another way to run": [
        {"forward": lambda m, b: m(b)},
        {"forward": lambda m, b: m(2 * b)},
    ],
    "another variation": [
        {"vary": functools.partial(torch.mul, other=1)},
        {"vary": functools.partial(torch.mul, other=2)},
    ],
    "another network of the same numbers": [{"bend": torch.relu}, {"bend": torch.tanh}],
    "another number in a batch": [{"batches": [(rand(4, 6), 1)]}, {"batches": [(rand(4, 6), 2)]}],
}


@pytest.mark.parametrize("pair", OTHERS.values(), ids=OTHERS)
def test_what_computes_something_else_has_another_key(pair):
    one, other, again = (_key(**given) for given in (*pair, pair[0]))
    assert one == again
    assert one != other


def test_a_judge_counts_where_it_has_a_say():
    pieces = [
        Workpiece.of(settled(nn.Linear(6, 4)), Task([rand(4, 6)], evaluate=judge), Jobs())
        for judge in (lambda m: 1.0, lambda m: 2.0)
    ]
    for judged in (False, True):
        one, other = (
            piece.key("work", {}, {}, judge=piece.task.evaluate if judged else None)
            for piece in pieces
        )
        assert (one == other) != judged


def test_work_with_what_cannot_be_told_is_kept_for_this_run_alone(tmp_path, caplog):
    lock, jobs = threading.Lock(), Jobs(folder=tmp_path)

    def loss(outputs, batch):
        with lock:
            return outputs.sum()

    task = rabbet.Task([rand(4, 6)], loss=loss)
    pieces = [Workpiece.of(settled(Own()), task, jobs) for _ in range(2)]
    first, again, other = (piece.key("work", {}, {}) for piece in (pieces[0], *pieces))
    assert first == again != other
    jobs.keep(first, {"y": torch.ones(1)})
    assert jobs.kept(first)["y"] == 1
    assert jobs.kept(other) is None
    assert list(tmp_path.iterdir()) == []
    assert "the task's loss depends on an object of _thread.lock" in caplog.text
    assert len(caplog.records) == 1


def test_a_folder_has_no_answer_of_another_loss(tmp_path):
    data = [(rand(16, 6), torch.arange(16) % 4)]
    method = rabbet.CGMQ(steps=4, finish=1, batch=16, augment=False, rate=0.05)

    def written(folder, power):
        task = rabbet.Task(data, forward=lambda m, b: m(b[0]), loss=powered(power))
        path = tmp_path / "a.safetensors"
        jobs = Jobs(folder=folder)
        rabbet.compress(settled(Own()), "bops <= 3%", task, method, jobs=jobs).save(path)
        return path.read_bytes()

    first = written(Path(tmp_path / "kept"), 2)
    assert written(tmp_path / "kept", 4) == written(None, 4) != first
