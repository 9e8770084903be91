"""Layers that few examples show: what their inputs share is not believed more than it foretells."""

import pytest
import torch
from networks import rand, settled
from torch import Tensor, nn

from rabbet import Jobs, Joint, Plan, Task, fit
from rabbet.calibrate.moments import FEW, few_rows, second_moments
from rabbet.train.tuning import Tuning
from rabbet.workpiece import Workpiece

WIDTH = 96


class Classifier(nn.Module):
    """Inputs of few large directions, and a classifier of them."""

    def __init__(self) -> None:
        super().__init__()
        self.mixed = nn.Linear(WIDTH, WIDTH, bias=False)
        self.head = nn.Linear(WIDTH, 24)

    def forward(self, x: Tensor) -> Tensor:
        """The scores."""
        return self.head(torch.relu(self.mixed(x)))


def network() -> nn.Module:
    """The classifier; the classifier is what is compressed."""
    model = settled(Classifier())
    with torch.no_grad():
        model.mixed.weight.mul_(torch.logspace(0, -1.5, WIDTH))
    return model


def piece(examples: int) -> Workpiece:
    """The network and so many examples in two batches."""
    batches = list(rand(examples, WIDTH, seed=1).split(examples // 2))
    return Workpiece.of(network(), Task(batches), Jobs())


def test_what_counts_as_few_is_rows_for_each_column() -> None:
    """Places of an image are rows, too."""
    site = piece(8).survey["head"]
    assert few_rows(site, FEW * WIDTH - 1)
    assert not few_rows(site, FEW * WIDTH)


@pytest.mark.parametrize("examples", [48, 96, 192])
def test_a_layer_solved_from_few_examples_errs_less_on_others(
    examples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Than the same in the metric that believes all that these few share."""
    off = []
    for rows in (0, FEW):
        monkeypatch.setattr("rabbet.calibrate.moments.FEW", rows)
        own = piece(examples)
        plan = Plan.parse("mixed dense@8c\nhead dense@3c")
        method = Joint(act=None, tuning=Tuning(steps=0))
        result = fit(own.model, plan, own.task, method)
        x = rand(4096, WIDTH, seed=9)
        with torch.no_grad():
            off.append(float((result.model(x) - own.model(x)).square().mean()))
    assert off[1] < 0.95 * off[0], off


def test_sizes_are_believed_and_many_rows_are_left_as_they_are() -> None:
    """Only what is off the diagonal shrinks, and only where rows are few."""
    few, many = piece(48), piece(2 * FEW * WIDTH)
    x = torch.cat(few.task.read())
    seen = torch.relu(few.model.mixed(x)).detach()
    plain = (seen.T @ seen) / len(seen)
    found = few.moments()["head"][0]
    assert torch.allclose(found.diagonal(), plain.diagonal(), rtol=1e-4)
    off = ~torch.eye(WIDTH, dtype=torch.bool)
    share = float((found[off] * plain[off]).sum() / plain[off].square().sum())
    assert 0.05 < share < 0.95
    x = torch.cat(many.task.read())
    seen = torch.relu(many.model.mixed(x)).detach()
    own = second_moments(many.model, many.survey, many.task)["head"][0]
    assert torch.allclose(own, seen.T @ seen / len(seen), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("layer", [nn.Conv2d(3, 4, 3), nn.Conv1d(3, 4, 3), nn.Linear(6, 4)])
@pytest.mark.parametrize("count", [1, 3])
def test_batches_of_one_example_fall_into_halves_too(layer: nn.Module, count: int) -> None:
    """Each example into one of them; what the diagonal says stays."""
    shape = {nn.Conv2d: (3, 4, 4), nn.Conv1d: (3, 5), nn.Linear: (6,)}[type(layer)]
    batches = [rand(count, *shape, seed=k) for k in range(3)]
    own = Workpiece.of(nn.Sequential(settled(layer)).eval(), Task(batches), Jobs())
    site, x = own.survey["0"], torch.cat(batches)
    rows = site.patches(x, None, torch.Generator())
    mean = (rows.mT @ rows / rows.shape[1])[0]
    assert torch.allclose(own.moments()["0"][0].diagonal(), mean.diagonal(), rtol=1e-4)


def test_rows_are_places_of_the_output() -> None:
    """A patch of 16x16 is one row, however many places of the input it covers."""
    model = nn.Sequential(nn.Conv2d(3, 8, 16, stride=16)).eval()
    site = Workpiece.of(model, Task([rand(2, 3, 64, 64)]), Jobs()).survey["0"]
    assert few_rows(site, FEW * 768 // 16 - 1)
    assert not few_rows(site, FEW * 768 // 16)


class Tied(nn.Module):
    """A table that is looked up for every word, and multiplied with once."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(30, 16)
        self.head = nn.Linear(16, 30, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        """The scores of the mean of a text."""
        return self.head(self.table(x).mean(1))


def test_a_table_is_judged_by_what_its_head_is_given() -> None:
    """Of 64 words a text comes one row."""
    words = torch.randint(30, (6, 64), generator=torch.Generator().manual_seed(0))
    own = Workpiece.of(settled(Tied()), Task([words]), Jobs())
    site = next(iter(own.survey))
    assert site.heads
    assert few_rows(site, FEW * 16 - 1)
    assert not few_rows(site, FEW * 16)
    assert own.moments()[site.name].shape == (1, 16, 16)


class Twice(nn.Module):
    """A layer that runs twice, on texts and on all of their words one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        """The second call has one axis of words."""
        return self.layer(self.layer(x).flatten(0, 1)).view(x.shape)


def test_halves_are_of_other_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    """However often a layer runs, and whether each has one row or several."""
    seen = []

    def noted(halves: Tensor, rows: list[int]) -> Tensor:
        seen.append(halves.clone())
        return halves.sum(0).float() / sum(rows)

    monkeypatch.setattr("rabbet.calibrate.moments.shrunk", noted)
    model, x = settled(Twice()), rand(4, 5, 6)
    x[::2] = 0  # a half that is silent but for the bias
    own = Workpiece.of(model, Task([x]), Jobs())
    own.moments()
    y = model.layer(x).detach()
    parts = [torch.cat([x[k::2], y[k::2]]).reshape(-1, 6).double() for k in (0, 1)]
    for half, part in zip(seen[0], parts, strict=True):
        assert torch.allclose(half[0], part.T @ part, rtol=1e-4, atol=1e-4)
