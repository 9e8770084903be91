"""The score of a change is the energy of its effect on the outputs, to first order."""

import pytest
import torch
from networks import rand, settled
from torch import nn
from torch.func import functional_call, jvp

from rabbet import Jobs, Task
from rabbet.choose.sensitivity import output_errors
from rabbet.workpiece import Workpiece


class Scalar(nn.Module):
    """One layer between smooth functions; one output per example, so random signs do not matter."""

    def __init__(self, layer, shape=None):
        super().__init__()
        self.layer, self.shape = layer, shape

    def forward(self, x):
        y = x if not x.is_floating_point() else torch.tanh(x)
        if self.shape == "windows":  # [n, 4, 6] -> [n * 2, 2, 6], as attention over windows does
            y = y.reshape(-1, 2, *y.shape[2:])
        elif self.shape == "frames":  # [n, 3, c, h, w] -> [n * 3, c, h, w]
            y = y.flatten(0, 1)
        elif self.shape == "time first":
            y = y.transpose(0, 1)
        out = torch.sin(self.layer(y))
        if self.shape == "twice":
            out = torch.sin(self.layer(out))
        if self.shape == "time first":
            out = out.transpose(0, 1)
        return out.reshape(len(x), -1).square().sum(1, keepdim=True)


class Tied(nn.Module):
    """A table that is both looked up and used as a matrix."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Embedding(9, 5), nn.Linear(5, 9)
        self.head.weight = self.layer.weight

    def forward(self, x):
        return (
            torch.sin(self.head(torch.tanh(self.layer(x)))).flatten(1).square().sum(1, keepdim=True)
        )


CASES = {
    "linear": lambda: (Scalar(nn.Linear(6, 5)), rand(4, 6)),
    "linear over tokens": lambda: (Scalar(nn.Linear(6, 5)), rand(4, 7, 6)),
    "linear over windows": lambda: (Scalar(nn.Linear(6, 5), "windows"), rand(5, 4, 6)),
    "linear that runs twice": lambda: (Scalar(nn.Linear(6, 6), "twice"), rand(4, 6)),
    "conv2d": lambda: (Scalar(nn.Conv2d(4, 6, 3, stride=2, padding=1)), rand(4, 4, 7, 6)),
    "conv2d grouped": lambda: (Scalar(nn.Conv2d(4, 6, 3, groups=2, padding=1)), rand(4, 4, 6, 6)),
    "conv2d reflect": lambda: (Scalar(nn.Conv2d(4, 6, 3, padding_mode="reflect", padding=1)),
                               rand(4, 4, 6, 6)),
    "conv2d dilated": lambda: (Scalar(nn.Conv2d(4, 6, 3, dilation=2, padding="same")),
                               rand(4, 4, 6, 6)),
    "conv2d over frames": lambda: (Scalar(nn.Conv2d(4, 6, 3, groups=2), "frames"),
                                   rand(4, 3, 4, 6, 5)),
    "conv1d": lambda: (Scalar(nn.Conv1d(4, 6, 3, groups=2, stride=2)), rand(4, 4, 9)),
    "embedding": lambda: (Scalar(nn.Embedding(9, 5)), torch.arange(20).view(4, 5) % 9),
    "embedding with a head": lambda: (Tied(), torch.arange(20).view(4, 5) % 9),
}  # fmt: skip


def _true(model, x, change):
    """The mean energy of the derivative along a change, relative to the variance of the output.

    One example at a time, by forward differentiation.
    """

    def energy(one):
        def out(weight):
            return functional_call(model, {"layer.weight": weight}, (one[None],))

        return jvp(out, (model.layer.weight,), (change,))[1].square().sum()

    return (sum(map(energy, x)) / len(x) / model(x).var(correction=0)).item()


@pytest.mark.parametrize("name", CASES)
def test_the_score_is_the_energy_of_the_derivative_along_the_change(name):
    model, x = CASES[name]()
    model = settled(model).requires_grad_(False)
    piece = Workpiece.of(model, Task([x[:2], x[2:]]), Jobs())
    site = piece.survey.sites[0]
    weight = site.kind.weight(model.layer)
    changes = torch.stack([0.1 * rand(*weight.shape, seed=k) for k in range(3)])
    scores = output_errors(piece, {site.name: changes})[site.name]
    exact = [_true(model, x, change) for change in changes]
    assert scores.tolist() == pytest.approx(exact, rel=1e-3)


@pytest.mark.slow
def test_examples_whose_number_does_not_divide_the_first_axis_are_scored_right_on_average():
    model = settled(Scalar(nn.Linear(6, 5), "time first")).requires_grad_(False)
    x = rand(3, 7, 6)  # time first: 7 rows for 3 examples
    change = 0.1 * rand(5, 6)
    scores = []
    for seed in range(400):
        piece = Workpiece.of(model, Task([x]), Jobs(), seed)
        scores.append(output_errors(piece, {"layer": change[None]})["layer"].item())
    assert sum(scores) / len(scores) == pytest.approx(_true(model, x, change), rel=0.1)


def test_the_score_of_several_outputs_is_right_on_average():
    model = settled(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))).requires_grad_(
        False
    )
    x = rand(64, 6)
    change = 0.1 * rand(8, 6)
    exact = jvp(
        lambda w: functional_call(model, {"0.weight": w}, (x,)), (model[0].weight,), (change,)
    )[1]
    wanted = (exact.square() / model(x).var(0, correction=0)).mean().item()
    scores = []
    for seed in range(40):
        piece = Workpiece.of(model, Task([x]), Jobs(), seed)
        scores.append(output_errors(piece, {"0": change[None]})["0"].item())
    assert sum(scores) / len(scores) == pytest.approx(wanted, rel=0.1)


def test_small_scores_predict_small_errors():
    model = settled(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))).requires_grad_(
        False
    )
    x = rand(256, 6)
    change = 0.01 * rand(8, 6)
    piece = Workpiece.of(model, Task([x]), Jobs())
    score = output_errors(piece, {"0": change[None]})["0"].item()
    moved = functional_call(model, {"0.weight": model[0].weight + change}, (x,))
    real = ((moved - model(x)).square().mean(0) / model(x).var(0, correction=0)).mean()
    assert score == pytest.approx(real.item(), rel=0.25)


@pytest.mark.parametrize("length", [8, 12, 5])
def test_a_layer_scores_the_same_whichever_axis_the_examples_lie_along(length):
    torch.manual_seed(0)
    net = settled(nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4)))

    class Summed(nn.Module):
        def __init__(self, first):
            super().__init__()
            self.net, self.first = net, first

        def forward(self, x):  # one output per example
            return self.net(x).sum((2, 1 - self.first))[:, None]

    x = rand(4, length, 6)
    changes = {"net.0": 0.01 * rand(3, 16, 6), "net.2": 0.01 * rand(3, 4, 16)}
    scores = []
    for first, batch in ((0, x), (1, x.transpose(0, 1).contiguous())):
        piece = Workpiece.of(Summed(first), Task([batch]), Jobs())
        assert piece.task.axes == (first,)
        scores.append(output_errors(piece, changes))
    for name in changes:
        assert torch.allclose(scores[0][name], scores[1][name], rtol=1e-4)


class Shaped(nn.Module):
    """Numbers that no layer holds, in a shape of their own."""

    def __init__(self, *shape):
        super().__init__()
        self.w, self.layer = nn.Parameter(rand(*shape, seed=3)), nn.Linear(32, 10)

    def forward(self, x):
        flat = self.w.reshape(-1)
        return self.layer(torch.tanh(x * flat[:32] + flat[32:64]))


def test_a_stored_weight_scores_the_same_whatever_its_shape():
    scores = []
    for shape in ((16, 32), (4, 4, 32), (16, 1, 32)):
        torch.manual_seed(0)
        piece = Workpiece.of(Shaped(*shape).eval(), Task([rand(16, 32)]), Jobs())
        site = next(s for s in piece.survey if not s.runs)
        change = rand(3, *piece.weight(site).shape, seed=5)
        scores.append(output_errors(piece, {site.name: change})[site.name])
    assert (scores[0] > 0).all()
    for other in scores[1:]:
        assert torch.allclose(other, scores[0])
