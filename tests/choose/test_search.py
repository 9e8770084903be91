"""The search solves few candidates, and chooses as if it had solved all."""

import dataclasses
import itertools

import pytest
import torch
from networks import network, rand, settled
from torch import nn

from rabbet.choose.program import Allocator, allocate
from rabbet.choose.search import Chooser
from rabbet.choose.sensitivity import output_errors
from rabbet.core.budget import Budget
from rabbet.core.plan import Term
from rabbet.data.task import Task
from rabbet.forms import Dense
from rabbet.grids.grid import Grid
from rabbet.jobs import Jobs
from rabbet.layers import Site
from rabbet.layers.conv import Conv
from rabbet.layers.linear import Linear
from rabbet.methods.joint import QUALITY
from rabbet.reconstruct import network as reconstruct
from rabbet.reconstruct.candidates import canonical, forget_metrics, read_numbers, solve_site
from rabbet.reconstruct.network import solve_lines, solve_menus
from rabbet.reconstruct.prediction import predict_site
from rabbet.solve import metric
from rabbet.workpiece import Workpiece

FAST = QUALITY["fast"]


def _search(piece, table, budget):
    """The plan that the program chooses with nothing known before."""
    return Chooser(piece, Allocator(table, piece)).plans([budget])[0]


def _table(piece, method):
    return method.chooser(piece).allocator.table


def _all_scores(piece, table):
    """What the search would measure of every option if it solved all, each for itself."""
    changes = {}
    for site, row in zip(piece.survey, table, strict=True):
        menus = [(site.name, (option.plan.terms,)) for option in row]
        results = solve_menus(piece, "solving all", menus)
        found = [
            canonical(site, menu[0], read_numbers(result, menu, 0))
            for (_, menu), result in zip(menus, results, strict=True)
        ]
        changes[site.name] = torch.stack(found) - piece.weight(site)
    errors = output_errors(piece, changes)
    return [errors[site.name].tolist() for site in piece.survey]


def _random(seed):
    """A conv net of random widths, whose inputs are smooth as images are."""
    draw = torch.Generator().manual_seed(seed)
    widths = [3, *torch.randint(4, 24, (3,), generator=draw).tolist()]
    layers = []
    for one, other in itertools.pairwise(widths):
        layers += [nn.Conv2d(one, other, 3, padding=1), nn.BatchNorm2d(other), nn.ReLU()]
    model = nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * widths[-1], 10)
    )
    smooth = nn.functional.avg_pool2d(rand(64, 3, 14, 14, seed=seed), 3, 1)
    return Workpiece.of(settled(model), Task([smooth]), Jobs())


@pytest.mark.slow
def test_the_choice_is_as_good_as_if_all_were_solved():
    ratios = []
    for seed in range(3):
        torch.manual_seed(seed)
        piece = _random(seed)
        table = _table(piece, FAST)
        scores = _all_scores(piece, table)
        names = [[option.plan for option in row] for row in table]

        def harm(plan, scores=scores, names=names):
            return sum(row[n.index(x)] for row, n, x in zip(scores, names, plan, strict=True))

        for text in ("bits <= 2", "bits <= 4", "macs <= 60%, bits <= 4", "bytes <= 20%"):
            budget = Budget.parse(text)
            best = harm(allocate(scores, table, budget, piece))
            ratios.append(harm(_search(piece, table, budget)) / best)
    # an option whose harm is a smaller share of what is likely than HOPE is missed;
    # another processor, whose sums differ, may meet one
    assert sorted(ratios)[-2] <= 1.01
    assert max(ratios) <= 1.5


def test_few_are_solved_and_none_of_them_twice(monkeypatch):
    solve, seen = reconstruct.solve_site, []

    def counted(**given):
        seen.append((given["site"].name, given["menu"]))
        return solve(**given)

    counted.__module__, counted.__qualname__ = solve.__module__, solve.__qualname__
    monkeypatch.setattr(reconstruct, "solve_site", counted)
    case = network("residual")
    piece = Workpiece.of(case.model, Task(case.batches), Jobs())
    plan = _search(piece, _table(piece, FAST), Budget.parse("bits <= 3"))
    assert len(seen) == len(set(seen))
    assert len(seen) < sum(len(FAST.menu(s)) for s in piece.survey) / 3
    count = len(seen)
    solve_lines(piece, "solving the plan", plan)
    assert len(seen) == count


@pytest.mark.slow
def test_the_same_network_and_seed_give_the_same_choice():
    case = network("residual")
    plans = []
    for _ in range(2):
        piece = Workpiece.of(case.model, Task(case.batches), Jobs())
        plans.append(_search(piece, _table(piece, FAST), Budget.parse("bits <= 3")))
    assert plans[0] == plans[1]


def _site(kind, shape, **facts):
    return Site("x", kind, shape, positions=25, inputs=25, **facts)


CONV = {"stride": (1, 1), "pads": (1, 1, 1, 1), "dilation": (1, 1)}
SITES = {
    "a conv": _site(Conv(2), (24, 16, 3, 3), **CONV),
    "a conv with groups": _site(Conv(2), (24, 1, 3, 3), groups=24, **CONV),
    "a linear of many rows": _site(Linear(), (200, 48)),
}


@pytest.mark.parametrize("name", SITES)
def test_errors_are_foretold_within_a_factor(name):
    site = SITES[name]
    n = site.columns
    root = rand(site.groups, n, n, seed=2) / n**0.5 + 0.3 * torch.eye(n)
    weight, second = rand(*site.shape, seed=3), root @ root.mT
    menu = FAST.menu(site)
    told = predict_site(weight, second, site=site, menu=menu)
    solved = solve_site(weight, second, site=site, menu=menu)
    for k, terms in enumerate(menu):
        ratio = float(told["errors"][k]) / float(solved[f"{k}.error"])
        alone = len(terms) == 1 and terms[0].form == Dense()
        assert (0.7 if alone else 0.3) < ratio < (1.5 if alone else 1.8), (str(terms), ratio)


@pytest.mark.parametrize("name", ["a conv", "a linear of many rows"])
def test_what_little_a_steep_spectrum_leaves_is_foretold(name):
    """Factors of wide grids that err a thousandth or less are not thought to err far more."""
    site = SITES[name]
    n = site.columns
    root = rand(1, n, n, seed=2) * torch.linspace(2, 0.05, n) ** 3 / n**0.5
    rows, spread, columns = torch.linalg.svd(rand(site.shape[0], n, seed=3), full_matrices=False)
    falling = torch.exp(-8 * torch.linspace(0, 1, len(spread)))
    weight, second = ((rows * spread * falling) @ columns).view(site.shape), root.mT @ root
    menu = [terms for terms in FAST.menu(site) if len(terms) == 1 and terms[0].form != Dense()]
    told = predict_site(weight, second, site=site, menu=menu)["errors"]
    power = float(site.matrix(weight)[0].matmul(second[0]).mul(site.matrix(weight)[0]).sum())
    solved = solve_site(weight, second, site=site, menu=menu)
    errors = torch.tensor([float(solved[f"{k}.error"]) for k in range(len(menu))])
    assert errors.min() < 1e-3 * power
    assert (told / errors > 0.3).all()
    assert (told / errors < 15).all()  # with the floor that `noise` has for factors: 61 and 174


def test_a_large_metric_foretells_alike_with_its_stand_in(monkeypatch):
    site = SITES["a conv"]
    n = site.columns
    root = rand(1, n, n, seed=2) * torch.linspace(2, 0.05, n) / n**0.5
    weight, second = rand(*site.shape, seed=3), root.mT @ root
    menu = [terms for terms in FAST.menu(site) if terms[0].form.evaluates]
    exact = predict_site(weight, second, site=site, menu=menu)["errors"]
    forget_metrics()
    monkeypatch.setattr(metric, "LARGE", 64)
    told = predict_site(weight, second, site=site, menu=menu)["errors"]
    forget_metrics()
    assert not torch.equal(told, exact)
    assert (told / exact > 0.9).all()
    assert (told / exact < 1.5).all()  # an eighth of 144 columns is few: of 2,304 it is 1.16


def test_the_noise_is_white_in_the_metric():
    site = SITES["a linear of many rows"]
    n = site.columns
    root = rand(1, n, n, seed=2) / n**0.5 + 0.3 * torch.eye(n)
    weight, second = rand(*site.shape, seed=3), root @ root.mT
    told = predict_site(weight, second, site=site, menu=((Term(Dense(), Grid.parse("4c")),),))
    noise = told["noise"].float() / weight.abs().amax(1, keepdim=True)
    white = noise @ torch.linalg.cholesky(second[0])
    spread = white.mT @ white / len(white)
    assert torch.linalg.eigvalsh(spread).max() < 3  # of pure noise: (1 + sqrt(48 / 200))^2 = 2.2
    assert spread.trace() / n == pytest.approx(1, rel=0.1)


def test_an_entry_of_no_known_kind_is_solved():
    site = SITES["a linear of many rows"]
    menu = tuple((Term.parse(text),) for text in ("dense@4", "dense@4c"))
    weight, second = rand(*site.shape, seed=3), torch.eye(site.columns)[None]
    told = predict_site(weight, second, site=site, menu=menu)
    solved = solve_site(weight, second, site=site, menu=menu[:1])
    assert float(told["errors"][0]) == float(solved["0.error"])


@pytest.mark.slow
def test_no_cheaper_option_of_a_layer_is_much_better():
    """A line that another beats in everything is found out."""
    case = network("residual")
    piece = Workpiece.of(case.model, Task(case.batches), Jobs())
    method = dataclasses.replace(FAST, adapters=())
    table = _table(piece, method)
    plan = _search(piece, table, Budget.parse("bits <= 3"))
    scores = _all_scores(piece, table)
    for line, row, options in zip(plan, scores, table, strict=True):
        k = [o.plan for o in options].index(line)
        cheaper = [
            row[j]
            for j, o in enumerate(options)
            if o.cost.bytes <= options[k].cost.bytes
            and o.cost.code_bits <= options[k].cost.code_bits
        ]
        assert row[k] <= 1.3 * min(cheaper)
