"""Second moments of few words: what is known of them, and what is not."""

import itertools

import pytest
import torch
from torch import nn

from rabbet import Jobs, Task
from rabbet.grids.grid import Grid
from rabbet.methods.blockwise.gathering import Gathering
from rabbet.model.hooks import hooked
from rabbet.reconstruct.candidates import round_rows_of
from rabbet.solve.metric import Metric
from rabbet.solve.shrinking import shrunk
from rabbet.workpiece import Workpiece

WIDTH = 32
EYE = torch.eye(WIDTH, dtype=torch.bool)


def inputs(words, alike, seed=0):
    """Inputs [words, n] of a few large directions; each is met `alike` times, as in one text."""
    g = torch.Generator().manual_seed(seed)
    mixed = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(7))
    mixed = mixed * torch.logspace(0, -1, WIDTH)[:, None]
    return (torch.randn(words // alike, WIDTH, generator=g) @ mixed).repeat(alike, 1)


def summed(parts):
    """Over two halves, of different words."""
    return torch.stack([(p.mT @ p)[None] for p in parts]), [len(p) for p in parts]


@pytest.mark.parametrize("alike", [1, 4])
@pytest.mark.parametrize("words", [16, 64])
def test_rounding_errs_no_more_on_words_that_were_not_seen(words, alike):
    grid, off = Grid.parse("3g16z"), []
    weight = torch.randn(1, 64, WIDTH, generator=torch.Generator().manual_seed(3))
    far = inputs(2**14, 1, seed=9)
    unseen = Metric((far.mT @ far)[None] / 2**14)
    totals, counts = summed([inputs(words, alike, seed=s) for s in (1, 2)])
    for second in (totals.sum(0) / sum(counts), shrunk(totals, counts)):
        rows = round_rows_of([(grid, weight)], Metric(second))[0]
        off.append(float(unseen.error(rows.values - weight).sum()))
    assert off[1] < (1.02 if alike == 1 else 0.95) * off[0]


def test_sizes_stay_and_correlations_shrink_alike():
    totals, counts = summed([inputs(32, 4, seed=s) for s in (1, 2)])
    kept = totals.clone()
    found, mean = shrunk(totals, counts)[0], totals.sum(0)[0] / sum(counts)
    assert torch.equal(totals, kept)  # what is summed goes on being summed
    assert torch.allclose(found.diagonal(), mean.diagonal())
    share = found[~EYE] / mean[~EYE]
    assert float(share.std()) < 1e-4
    assert float(share.mean()) < 0.9


def test_many_words_are_believed():
    totals, counts = summed([inputs(2**14, 1, seed=s) for s in (1, 2)])
    assert torch.allclose(shrunk(totals, counts), totals.sum(0) / sum(counts), atol=0.02)


def test_what_one_pass_saw_is_taken_as_it_is():
    rows = inputs(8, 1)
    totals = torch.stack([(rows.mT @ rows)[None], torch.zeros(1, WIDTH, WIDTH)])
    assert torch.equal(shrunk(totals, [8, 0]), totals[0] / 8)


def test_the_same_halves_however_the_batches_are_dealt_out():
    layer = nn.Linear(WIDTH, 4)
    site = next(iter(Workpiece.of(layer, Task([torch.randn(2, WIDTH)]), Jobs()).survey))
    batches = [inputs(8, 1, seed=s) for s in range(7)]

    def seen(parts):
        whole = Gathering()
        for part in parts:
            gathering = Gathering()
            with hooked(before=[(layer, gathering.hook(site))]):
                for batch in part:
                    layer(batch)
                    gathering.done()
            whole.add(gathering)
        return whole

    first, *others = [
        seen([batches[i:j] for i, j in itertools.pairwise(cuts)])
        for cuts in ([0, 7], [0, 1, 2, 3, 4, 5, 6, 7], [0, 3, 4, 7])
    ]
    for other in others:
        assert other.rows == first.rows
        assert torch.allclose(other.totals[site.name], first.totals[site.name], rtol=1e-5)
    assert first.rows[site.name] == [32, 24]


def test_layers_that_were_sent_no_word_have_no_moments():
    """Such as those of an expert, which share their input."""
    layers = nn.ModuleDict({"gate": nn.Linear(WIDTH, 4), "up": nn.Linear(WIDTH, 4)})
    task = Task([torch.randn(2, WIDTH)], forward=lambda m, x: m["gate"](x) + m["up"](x))
    sites = list(Workpiece.of(layers, task, Jobs()).survey)
    gathering = Gathering()
    with hooked(before=[(layers[s.name], gathering.hook(s)) for s in sites]):
        none = torch.zeros(0, WIDTH)
        task.forward(layers, none)
    gathering.done()
    assert dict(gathering.means(Jobs(), "")) == {}
