"""What is rewritten is held against the network: a fold that changes the answer is taken back."""

import pytest
import torch
from networks import rand, settled
from torch import nn

from rabbet import Task, fit, survey
from rabbet.errors import ModelError
from rabbet.methods import QUALITY
from rabbet.model import proof
from rabbet.model.inspect import inspect_network

FAST = QUALITY["fast"]
X = rand(8, 3, 8, 8)


def _swish(x):
    return x * torch.sigmoid(x)


@torch.jit.script
def _scripted(x: torch.Tensor):
    return x * torch.sigmoid(x)


READERS = {"scripted": _scripted, "mapped": torch.vmap(_swish), "none": lambda y: 0.0}


class Net(nn.Module):
    """Of three norms the second's conv has another reader, which no watching mode may see."""

    def __init__(self, reader):
        super().__init__()
        self.reader = reader
        self.convs = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
        self.norms = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(3))
        self.head = nn.Linear(3, 4)

    def forward(self, x):
        for k, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            y = conv(x)
            x = norm(y) + (READERS[self.reader](y) if k == 1 else 0.0)
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_only_the_fold_at_fault_is_taken_back(reader):
    net = settled(Net(reader))
    sites = survey(net, [X])
    folded = [site.norm for site in sites if site.norm]
    whole = ["norms.0", "norms.1", "norms.2"]
    assert folded == (whole if reader == "none" else ["norms.0", "norms.2"])
    told = [left.reason for left in sites.left if left.name == "norms.1"]
    assert all("more reads the output" in reason for reason in told)
    assert len(told) == (reader != "none")
    plan = "\n".join(f"{site.name} dense@8c | act@8" for site in sites)
    result = fit(net, plan, [X], FAST)
    assert (result.model(X) - net(X)).norm() < 0.05 * net(X).norm()


def test_a_copy_that_is_another_network_is_refused():
    net = settled(nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3)))
    task, sites = Task([rand(4, 6)]), inspect_network(net, rand(4, 6))
    broken = settled(nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3)), seed=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(proof, "fold", lambda *_: broken)
        with pytest.raises(ModelError, match="answers otherwise than the network itself"):
            proof.proven(net, sites, task)


def test_a_network_that_never_answers_alike_is_told_of():
    class Clock(nn.Module):
        ticks = 0

        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 3)

        def forward(self, x):
            Clock.ticks += 1  # of the class: no state of the network
            return self.layer(x) + Clock.ticks

    assert "answers otherwise each time" in survey(Clock().eval(), [rand(4, 6)]).notes[0]
