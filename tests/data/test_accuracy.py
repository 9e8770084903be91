"""Right answers, and how surely a network differs from another."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

import rabbet
from rabbet.data.accuracy import Accuracy
from rabbet.errors import DataError


class Answers(nn.Module):
    """A network whose inputs are its scores."""

    def forward(self, x: Tensor) -> Tensor:
        """The scores."""
        return x


def of(rights: list[int]) -> Accuracy:
    """An accuracy of one label an example."""
    return Accuracy(rights, [1] * len(rights))


def scores(classes: list[int]) -> Tensor:
    """Scores whose largest are these."""
    return torch.nn.functional.one_hot(torch.tensor(classes), 3).float()


def test_it_is_the_share_of_right_answers_with_the_error_of_a_share() -> None:
    """A number like any other, to be stored and read back."""
    batches = [(scores([0, 1]), torch.tensor([0, 2])), (scores([2, 2]), torch.tensor([2, 2]))]
    found = rabbet.accuracy(Answers(), batches)
    assert found == 75.0
    assert found.rights == (1, 0, 1, 1)
    assert found.examples == 4
    again = copy.deepcopy(found)
    assert again == found
    assert again.is_of_the_same(found)
    many = of([1] * 900 + [0] * 100)
    assert many.error == pytest.approx(100 * math.sqrt(0.9 * 0.1 / 1000), rel=0.02)


def test_nothing_wrong_is_not_certain() -> None:
    """Two standard errors about reach what 95 % of an interval for no failures in n does, 3 / n."""
    for n in (50, 450, 5000):
        assert 2 / n < 2 * of([1] * n).error / 100 < 3.5 / n


def test_a_drop_is_told_example_by_example() -> None:
    """As Agresti and Min give it; far below that of two networks with examples of their own."""
    before, after = of([1] * 900 + [0] * 100), of([1] * 880 + [0] * 20 + [1] * 5 + [0] * 95)
    lost, error = after.drop(before)
    b, c, n = 20, 5, 1000
    told = math.sqrt((b + c + 1) - (b - c) ** 2 / (n + 2)) / (n + 2)
    assert lost == pytest.approx(1.5)
    assert error == pytest.approx(100 * told, rel=1e-3)
    assert error < 0.6 * math.hypot(before.error, after.error)


@pytest.mark.parametrize("share", [0.005, 0.02, 0.1])
def test_two_standard_errors_hold_the_true_drop_in_most_draws(share: float) -> None:
    """A network that answers otherwise at random, as often better as worse, loses nothing."""
    generator, held, draws = torch.Generator().manual_seed(0), 0, 400
    for _ in range(draws):
        first = torch.rand(450, generator=generator) < 0.9
        swapped = torch.rand(450, generator=generator) < share
        second = torch.where(swapped, torch.rand(450, generator=generator) < 0.9, first)
        lost, error = of(second.int().tolist()).drop(of(first.int().tolist()))
        held += abs(lost) <= 2 * error
    assert held / draws > 0.92


def test_labels_of_one_example_count_together() -> None:
    """Ten words that are right or wrong at once are no ten examples."""
    rights = torch.randint(2, (200,), generator=torch.Generator().manual_seed(0))
    together = Accuracy((10 * rights).tolist(), [10] * 200)
    apart = of(rights.repeat(10).tolist())
    assert together == apart
    assert together.error == pytest.approx(of(rights.tolist()).error, rel=1e-9)
    assert together.error > 3 * apart.error


def test_other_examples_cannot_be_compared() -> None:
    """Nor the same in another order: it says how many each has, and what to do."""
    with pytest.raises(DataError, match=r"of other examples \(2 and 3\)"):
        of([1, 0, 1]).drop(of([1, 0]))
    x, y = scores([0, 1, 2]), torch.tensor([0, 1, 1])
    found = rabbet.accuracy(Answers(), [(x, y)])
    with pytest.raises(DataError, match="without shuffling"):
        rabbet.accuracy(Answers(), [(x.flip(0), y.flip(0))]).drop(found)
    with pytest.raises(DataError, match="another accuracy"):
        found.drop(75.0)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="examples with labels"):
        Accuracy([], [])


def test_batches_without_examples_count_nothing() -> None:
    """As the last of a loader may be, of classes or of words."""
    x, y = scores([0, 1]), torch.tensor([0, 1])
    assert rabbet.accuracy(Answers(), [(x[:0], y[:0]), (x, y)]) == 100.0
    words = x[:, :, None].expand(2, 3, 4), y[:, None].expand(2, 4)
    assert rabbet.accuracy(Answers(), [(words[0][:0], words[1][:0]), words]) == 100.0


def test_no_answer_is_not_right() -> None:
    """Scores of NaN are an answer to no class, not to the first."""
    x = torch.stack([torch.full((3,), math.nan), torch.tensor([1.0, 0.0, 0.0])])
    assert rabbet.accuracy(Answers(), [(x, torch.zeros(2).long())]) == 50.0
