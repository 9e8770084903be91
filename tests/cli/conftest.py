"""What the tests of the command line share: a way to run it, a file, and a user's own network."""

import math

import pytest
from commands import QUICK

from rabbet.cli import main, terminal

MINE = """
import torch
from torch import nn
import rabbet

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10))

def batches():
    torch.manual_seed(1)
    for _ in range(2):
        yield torch.rand(16, 3, 8, 8)

def labelled():
    for batch in batches():
        yield batch, torch.arange(16) % 10

def judge(model):
    return float(model(torch.ones(1, 3, 8, 8)).argmax())

def task():
    return rabbet.Task(list(batches()), evaluate=judge)

def scored():
    return rabbet.Task(list(batches()), outputs="scores")

def with_nan():
    return [torch.full((16, 3, 8, 8), torch.nan)]

def breaking():
    yield torch.rand(16, 3, 8, 8)
    yield 1 // 0

def unlabelled():
    return [torch.rand(16, 3, 8, 8)]

def broken():
    return nn.Lineer(3, 3)

def number():
    return 7

def odd():
    network = nn.Sequential()
    network.add_module("[red]a b", nn.Linear(9, 9))
    return network

def left():
    return nn.Sequential(nn.Linear(9, 9), nn.LayerNorm(9))

def nines():
    return [torch.rand(8, 9)]
"""


@pytest.fixture(scope="session")
def kept(tmp_path_factory):
    """Solved layers that the tests share, as solving is not what they test."""
    return tmp_path_factory.mktemp("kept")


@pytest.fixture(scope="session")
def small(kept, tmp_path_factory):
    """The demo network, compressed."""
    path = tmp_path_factory.mktemp("small") / "small.safetensors"
    assert main(["compress", "--output", str(path), "--resume", str(kept), *QUICK]) == 0
    return path


@pytest.fixture
def run(capsys, monkeypatch):
    """Runs a command and gives its exit code, stdout and stderr, however long it takes."""
    monkeypatch.setattr(terminal, "EVERY", math.inf)

    def call(*arguments):
        capsys.readouterr()
        code = main([str(a) for a in arguments])
        return (code, *capsys.readouterr())

    return call


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A user's own file in the current folder, as a module and as a path."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine_of_user.py").write_text(MINE)
    return "mine_of_user"
