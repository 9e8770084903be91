"""CoRa: bases and adapters, the soft threshold, the search and its ranks under a budget."""

import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from networks import network, thinned
from torch import nn

from rabbet import Budget, CoRa, Jobs, Task, compress, fit, load, plan
from rabbet.errors import BudgetError, DataError, FileError, PlanError
from rabbet.methods.cora.search import Ranking, Residual, butterworth, search_ranks
from rabbet.model.compressed import compressed_layers
from rabbet.report import draw_search
from rabbet.train.tuning import Tuning
from rabbet.workpiece import Workpiece

SHORT = CoRa(bits=3, ranking=Ranking(steps=6, batch=6), tuning=Tuning(steps=0))
PAPER = CoRa(
    bits=3,
    base="clipped",
    svd="plain",
    linears=False,
    ranking=Ranking(6, 6, 4, 0.0, 0.9, "hinge", 0.01, 1.0, "labels", "batch"),
)
BUDGET = "bits <= 4"


def _labelled(name="residual"):
    """A network, and its batches with labels as a task."""
    case = network(name)
    labels = torch.zeros(len(case.batches[0]), dtype=torch.long)
    batches = [(x, labels[: len(x)]) for x in case.batches]
    task = Task(
        batches, forward=lambda m, b: m(b[0]), loss=lambda out, b: F.cross_entropy(out, b[1])
    )
    return case.model, task


def _ranks(lines):
    return {line.name: line.terms[1].form.rank if len(line.terms) > 1 else 0 for line in lines}


def test_the_kernel_passes_the_first_values_and_halves_the_square_at_the_cut_off():
    gain = butterworth(torch.tensor(5.0), 20, 4)
    assert float(gain[0]) == 1
    assert float(gain[5]) ** 2 == pytest.approx(0.5)
    assert (gain.diff() <= 0).all()
    steep = butterworth(torch.tensor(5.0), 20, 40)
    assert steep[:4].min() > 0.999
    assert steep[7:].max() < 1e-3


@pytest.mark.parametrize("order", [1, 4, 6])
@pytest.mark.parametrize("offset", [0.0, 0.5])
def test_the_kernel_is_the_formula_of_the_paper(order, offset):
    gain = butterworth(torch.tensor(3.5, dtype=torch.float64), 9, order, offset)
    for i in range(9):
        # arXiv 2408.00923: with i / R over the normalised cut-off, R cancels
        assert float(gain[i]) == pytest.approx(
            (1 + ((i + offset) / 9 / (3.5 / 9)) ** (2 * order)) ** -0.5
        )


@pytest.mark.parametrize("offset", [0.0, 0.5])
@pytest.mark.parametrize("order", [1, 2, 8, 10, 32])
def test_the_kernel_and_its_gradient_are_finite_at_every_order(order, offset):
    for full, place in itertools.product((1, 512, 4096), (0.25, 1.0, 37.0, 4096.0)):
        cutoff = torch.tensor(place, requires_grad=True)
        gain = butterworth(cutoff, full, order, offset)
        (slope,) = torch.autograd.grad(gain.sum(), cutoff)
        assert gain.isfinite().all()
        assert 0 <= gain.min() <= gain.max() <= 1
        assert slope.isfinite()
        assert slope >= 0


@pytest.mark.parametrize(
    "method", [SHORT, replace(SHORT, ranks="heuristic"), PAPER], ids=["ours", "even", "paper"]
)
@pytest.mark.parametrize("budget", thinned([BUDGET, "bits <= 4.5, bops <= 4%", "macs <= 125%"]))
def test_every_layer_has_the_same_bits_and_the_budget_is_kept(method, budget):
    model, task = _labelled()
    result = compress(model, budget, task, method)
    assert {str(line.terms[0]) for line in result.plan} == {"dense@3c"}
    assert all(str(line.terms[1].grid) == "8c" for line in result.plan if len(line.terms) > 1)
    for limit in Budget.parse(budget).limits:
        assert not limit.broken_by(result.cost, result.float_cost)


def test_a_batch_norm_over_one_value_is_an_error_that_says_so():
    pool = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Conv2d(8, 6, 1),
        torch.nn.BatchNorm2d(6), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(6, 5),
    ).eval()  # fmt: skip
    batches = [(torch.randn(1, 3, 8 + k, 8), torch.zeros(1).long()) for k in range(4)]
    task = Task(
        batches, forward=lambda m, b: m(b[0]), loss=lambda out, b: F.cross_entropy(out, b[1])
    )
    with pytest.raises(DataError, match="one value a channel"):
        compress(pool, "bytes <= 95%", task, replace(PAPER, bits=2))


def test_a_loss_that_is_cut_off_from_the_outputs_is_an_error():
    case = network("residual")
    labels = torch.zeros(len(case.batches[0]), dtype=torch.long)
    task = Task(
        [(x, labels[: len(x)]) for x in case.batches],
        forward=lambda m, b: m(b[0]),
        loss=lambda out, b: F.cross_entropy(out.flatten(1), b[1]).detach(),
    )
    with pytest.raises(DataError, match="no gradient comes through the loss"):
        compress(case.model, BUDGET, task, PAPER)


def test_the_papers_settings_take_changes_and_no_others():
    assert CoRa.paper(bits=3) == replace(CoRa.paper(), bits=3)
    assert CoRa.paper(bits=PAPER.bits, ranking=PAPER.ranking) == PAPER
    assert replace(PAPER.ranking, steps=250, batch=32) == CoRa.paper().ranking
    with pytest.raises(PlanError, match="no setting 'rank'"):
        CoRa.paper(rank=3)


@pytest.mark.parametrize("method", [SHORT, PAPER], ids=["ours", "paper"])
def test_a_search_lands_close_below_its_budget(method):
    model, task = _labelled()
    result = compress(model, BUDGET, task, method)
    assert any(_ranks(result.plan).values())
    # one more rank of the cheapest adapter would not fit, or the search did not want it: within
    # one layer's rank
    assert 3.6 < result.cost.bits <= 4


def test_the_search_gives_rank_to_the_layer_that_needs_it():
    """Two linears; the residual of one does nothing to the output, that of the other everything."""
    torch.manual_seed(0)
    dead = torch.nn.Linear(16, 16, bias=False)
    model = torch.nn.Sequential(dead, torch.nn.Linear(16, 16, bias=False)).eval()
    x = [torch.randn(32, 16)]
    piece = Workpiece.of(model, Task(x, outputs="scores"), Jobs())
    wide = torch.linalg.svd(torch.randn(16, 16))
    price = torch.tensor([1.0], dtype=torch.float64)
    residuals = {
        "0": Residual(wide[0] * 1e-4, wide[2], torch.full((16,), 1e-4), price),
        "1": Residual(wide[0], wide[2], torch.ones(16), price),
    }
    student = compress(
        model, "bits <= 8", x, CoRa(bits=8, tuning=Tuning(steps=0), ranks="heuristic")
    ).model
    # the base lacks exactly its residual, so that letting the residual through restores the network
    with torch.no_grad():
        for name, layer in compressed_layers(student).items():
            layer.terms[0][0].codes.zero_()
            layer.terms[0][0].scale.zero_()
            piece.model.get_submodule(name).weight.copy_(
                residuals[name].left @ residuals[name].right
            )
            if name == "0":
                layer.terms[0][0].codes.fill_(1)
                layer.terms[0][0].scale.fill_(0.3)
                piece.model.get_submodule(name).weight.add_(0.3)
    search = search_ranks(
        student, piece, residuals, torch.tensor([0.6], dtype=torch.float64), Ranking(steps=40)
    )
    assert search.ranks["1"] > 4 * search.ranks["0"]
    assert float(search.excess.abs().max()) < 0.05
    assert search.losses[-1] < search.losses[0]


def test_the_hinge_brings_cut_offs_from_above_down_to_the_budget():
    model, task = _labelled()
    piece = Workpiece.of(model, task, Jobs())
    search = replace(PAPER, ranking=replace(PAPER.ranking, steps=120, rate=0.02)).search(
        piece, Budget.parse(BUDGET)
    )
    assert float(search.excess[0]) > 0.1
    assert float(search.excess[-1]) < 0.02


def test_one_seed_gives_one_plan_and_one_search():
    model, task = _labelled()
    assert plan(model, BUDGET, task, SHORT, seed=3) == plan(model, BUDGET, task, SHORT, seed=3)


def test_a_search_that_was_kept_is_not_run_again(tmp_path):
    model, task = _labelled()
    seen = []
    jobs = Jobs(folder=tmp_path, progress=lambda stage, *_: seen.append(stage))
    first = plan(model, BUDGET, task, SHORT, jobs=jobs)
    assert "searching ranks" in seen
    seen.clear()
    assert plan(model, BUDGET, task, SHORT, jobs=jobs) == first
    assert "searching ranks" not in seen


@pytest.mark.parametrize("steering", ["multiplicative", "hinge"])
def test_a_search_that_was_killed_ends_like_one_that_was_not(tmp_path, steering):
    model, task = _labelled()
    method = replace(SHORT, ranking=Ranking(steps=14, batch=6, steering=steering))
    seen = []

    def killer(stage, done, _):
        if stage == "searching ranks" and done == 12:
            raise KeyboardInterrupt

    def search(**given):
        piece = Workpiece.of(model, task, Jobs(**given))
        return method.search(piece, Budget.parse(BUDGET))

    whole = search()
    with pytest.raises(KeyboardInterrupt):
        search(folder=tmp_path, progress=killer)
    again = search(folder=tmp_path, progress=lambda stage, done, _: seen.append((stage, done)))
    assert [done for stage, done in seen if stage == "searching ranks"] == [11, 12, 13, 14]
    assert torch.equal(again.cutoffs, whole.cutoffs)
    assert torch.equal(again.losses, whole.losses)
    assert torch.equal(again.excess, whole.excess)


def test_the_clipped_base_with_adapters_is_nearer_than_without():
    model, task = _labelled()
    errors = []
    for budget in ("bits <= 3.01", "bits <= 6"):
        result = compress(model, budget, task, replace(PAPER, ranks="heuristic", ranking=Ranking()))
        piece = Workpiece.of(model, task, Jobs())
        layers = compressed_layers(result.model)
        errors.append(
            sum(
                float((layers[s.name].canonical - piece.weight(s)).square().sum())
                for s in piece.survey
            )
        )
    assert errors[1] < 0.7 * errors[0]


def test_ends_have_their_own_bits():
    model, task = _labelled()
    lines = list(plan(model, "bits <= 8", task, replace(SHORT, bits=4, act=4, ends=8)))
    assert [str(line.terms[0]) for line in (lines[0], lines[1], lines[-1])] == [
        "dense@8c",
        "dense@4c",
        "dense@8c",
    ]
    assert [line.act for line in (lines[0], lines[1], lines[-1])] == [8, 4, 8]


def test_the_file_holds_what_was_fitted(tmp_path):
    model, task = _labelled()
    result = compress(model, BUDGET, task, SHORT)
    assert result.save(tmp_path / "a.safetensors") == result.cost.bytes
    again = load(tmp_path / "a.safetensors", model)
    x = task.read()[0][0]
    assert torch.equal(again(x), result.model(x))


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_the_search_is_drawn(tmp_path, suffix):
    model, task = _labelled()
    search = SHORT.search(Workpiece.of(model, task, Jobs()), Budget.parse(BUDGET))
    draw_search(search, tmp_path / f"search{suffix}", search.names[0])
    assert (tmp_path / f"search{suffix}").stat().st_size > 1000
    with pytest.raises(PlanError, match="was not searched"):
        draw_search(search, tmp_path / "a.svg", "nowhere")
    with pytest.raises(FileError, match="cannot write"):
        draw_search(search, tmp_path / "none" / "a.svg")


def test_mistakes_are_named():
    case = network("residual")
    with pytest.raises(BudgetError, match="smallest reachable"):
        plan(case.model, "bits <= 2.5", case.batches, SHORT)
    with pytest.raises(DataError, match="loss="):
        plan(case.model, BUDGET, case.batches, PAPER)
    with pytest.raises(PlanError, match="steps"):
        Ranking(steps=0)
    with pytest.raises(PlanError, match="sigmas"):
        CoRa(sigmas=0)


def test_depthwise_layers_have_no_adapter():
    model = torch.nn.Sequential(
        torch.nn.Conv2d(4, 8, 1), torch.nn.Conv2d(8, 8, 3, groups=8), torch.nn.Conv2d(8, 16, 1)
    ).eval()
    ranks = _ranks(plan(model, "bits <= 8", [torch.randn(6, 4, 6, 6)], SHORT))
    assert ranks["0"] > 0
    assert ranks["1"] == 0


def test_a_network_without_a_place_for_adapters_says_so():
    model = torch.nn.Sequential(torch.nn.Conv2d(8, 8, 3, groups=8)).eval()
    with pytest.raises(PlanError, match="no layer of this network can have an adapter"):
        plan(model, "bits <= 8", [torch.randn(6, 8, 6, 6)], SHORT)


@pytest.mark.parametrize("base", ["feedback", "clipped"])
def test_adapters_that_cost_more_than_they_spare_are_said(base):
    torch.manual_seed(0)
    model, data = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 8)), [torch.randn(32, 16)]
    method = CoRa(bits=2, base=base, tuning=Tuning(steps=0))
    for rank, said in ((6, True), (1, False)):
        text = f"0 dense@2c + lowrank[{rank}]@8c | act@8\n2 dense@2c | act@8"
        notes = fit(model, text, data, method).notes
        assert any("more bytes than 8 bits without" in note for note in notes) == said
