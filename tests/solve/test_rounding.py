"""Laws of the solvers: what each promises about the error in the metric of the layer's inputs."""

import itertools
from dataclasses import replace

import pytest
import torch
from networks import rand

from rabbet.core.plan import LayerPlan
from rabbet.errors import ModelError
from rabbet.grids.grid import Grid
from rabbet.layers import Site
from rabbet.layers.conv import Conv
from rabbet.layers.linear import Linear
from rabbet.reconstruct import candidates
from rabbet.reconstruct.candidates import (
    canonical,
    read_numbers,
    round_rows_of,
    solve_menu,
    solve_site,
)
from rabbet.solve.metric import Metric
from rabbet.solve.rounding import (
    Rows,
    descend,
    feedback,
    refit,
    round_layouts,
    round_rows,
    start,
)
from rabbet.solve.whiten import leading

GRIDS = ("1", "t", "2", "2h", "3", "4", "8")
every_grid = pytest.mark.parametrize("grid", [pytest.param(Grid.parse(t), id=t) for t in GRIDS])


def _second(n, groups=1, seed=0):
    """The second moment of correlated inputs: a few strong directions over weak ones."""
    x = rand(groups, 4 * n, n, seed=seed) @ (
        rand(groups, n, n, seed=seed + 1) / n**0.5 + 0.3 * torch.eye(n)
    )
    return x.mT @ x / (4 * n)


def _rows(grid, rows=12, n=70, groups=2, seed=0):
    metric = Metric(_second(n, groups, seed))
    return start(rand(groups, rows, n, seed=seed + 5), grid, metric), metric


@pytest.mark.parametrize(("n", "groups"), [(300, 2), (40, 3)])
def test_the_factor_is_of_the_inverse_with_columns_in_their_order(n, groups):
    metric = Metric(_second(n, groups))
    for second, order, factor in zip(metric.second, metric.order, metric.factor, strict=True):
        ordered = second[order][:, order].double()
        assert torch.equal(factor, factor.triu())
        one = factor.double().mT @ factor.double() @ ordered
        torch.testing.assert_close(one, torch.eye(n, dtype=torch.float64), atol=1e-3, rtol=0)


@every_grid
def test_error_feedback_beats_rounding_to_nearest(grid):
    for seed in range(3):
        rows, metric = _rows(grid, seed=10 * seed)
        rounded = feedback(rows, metric)
        assert rounded.error(metric).mean() < rows.error(metric).mean()
        assert torch.equal(rounded.scale, rows.scale)


@every_grid
def test_coordinate_descent_harms_no_row(grid):
    for seed, sweeps in itertools.product(range(2), (1, 3)):
        rows, metric = _rows(grid, seed=10 * seed)
        for given in (rows, feedback(rows, metric)):
            assert (
                descend(given, metric, sweeps).error(metric) <= given.error(metric) * (1 + 1e-4)
            ).all()


def test_coordinate_descent_ends_where_no_single_step_helps():
    rows, metric = _rows(Grid.parse("3"), rows=4, n=20, groups=1)
    rounded = descend(rows, metric, sweeps=50)
    best = rounded.error(metric)
    for column, step in itertools.product(range(20), (-1, 1)):
        moved = rounded.codes.clone()
        moved[:, :, column] = (moved[:, :, column] + step).clamp(-4, 3)
        other = replace(rounded, codes=moved)
        assert (other.error(metric) >= best * (1 - 1e-4)).all()


@every_grid
def test_refitting_scales_harms_no_row_beyond_the_rounding_of_the_scale(grid):
    rows, metric = _rows(grid)
    refitted = refit(rows, metric)
    assert torch.equal(refitted.codes, rows.codes)
    assert torch.equal(refitted.scale, refitted.scale.to(torch.bfloat16).float())
    # the exact minimum is never worse; its bfloat16 neighbour is off by 2^-8 of the values at most
    size = metric.error(rows.values)
    assert (refitted.error(metric) <= rows.error(metric) + 2**-16 * size).all()
    assert refitted.error(metric).sum() <= rows.error(metric).sum() + 2**-16 * size.sum()


@every_grid
def test_alternating_keeps_the_best_of_every_row(grid):
    rows, metric = _rows(grid)
    previous = rows.error(metric)
    for rounds in (1, 2, 4):
        error = round_rows(rows, metric, rounds).error(metric)
        assert (error <= previous * (1 + 1e-4)).all()
        previous = error


@every_grid
def test_codes_of_every_solver_lie_on_the_grid(grid):
    rows, metric = _rows(grid)
    for rounded in (rows, feedback(rows, metric), descend(rows, metric), round_rows(rows, metric)):
        assert torch.equal(rounded.codes, rounded.codes.round())
        assert grid.low <= rounded.codes.min()
        assert rounded.codes.max() <= grid.high


def test_rounding_all_grids_in_one_pass_is_rounding_each_alone():
    metric = Metric(_second(40))
    parts = [start(rand(1, 6, 40), Grid.parse(text), metric) for text in GRIDS]
    together = round_rows(Rows.stack(parts), metric).split(6)
    for alone, stacked in zip(parts, together, strict=True):
        assert torch.equal(round_rows(alone, metric).codes, stacked.codes)
        assert torch.equal(round_rows(alone, metric).scale, stacked.scale)


def test_rounding_layouts_together_is_rounding_each_alone():
    metric = Metric(_second(96))
    weight = rand(1, 24, 96, seed=1)
    layouts = [
        Rows.stack([start(weight, Grid.parse(text), metric) for text in grids])
        for grids in (("3g32", "4g32"), ("3g32z",), ("tg16", "4g16"), ("8c", "2c"), ("3g64",))
    ]
    together = round_layouts(layouts, metric, 2)
    for alone, rows in zip(layouts, together, strict=True):
        single = round_rows(alone, metric, 2)
        assert rows.size == single.size
        assert (rows.codes == single.codes).float().mean() > 0.99  # sums in another order
        assert torch.allclose(rows.error(metric).sum(), single.error(metric).sum(), rtol=1e-3)


def test_without_a_metric_rounding_is_that_in_the_identity_whatever_the_number_of_rows():
    target = rand(1, 2100, 8, seed=3)  # more rows than are rounded at once
    wanted = [(Grid.parse(text), target) for text in ("tc", "2hc", "3c", "8c")]
    plain, general = (
        round_rows_of(wanted, metric)
        for metric in (Metric.plain(1, 8), Metric(torch.eye(8)[None], damping=0.0))
    )
    for ours, theirs in zip(plain, general, strict=True):
        assert torch.equal(ours.codes, theirs.codes)
        assert torch.equal(ours.scale, theirs.scale)


def test_what_feedback_errs_in_another_metric_is_foretold_from_both():
    one, other = Metric(_second(48)), _second(48, seed=9)
    u = one.factor[0]
    steps = torch.randn(20000, 48, generator=torch.Generator().manual_seed(0))
    there = other[:, one.order[0]][:, :, one.order[0]][0]
    rows = steps / u.diagonal() @ u
    found = ((rows @ there) * rows).sum(1).mean()
    assert torch.isclose(one.fed_back(other)[0], found, rtol=0.03)
    # and on a fine grid, but for what scales are fitted to, errors are such noise
    grid = Grid.parse("8")
    rounded = feedback(start(rand(1, 400, 48, seed=5), grid, one), one)
    off, step = rounded.values - rounded.target, rounded.scale[0, :, 0]
    erred = ((off @ other) * off).sum(2)[0] / (step.square() / 12)
    assert torch.isclose(erred.mean(), one.fed_back(other)[0], rtol=0.25)


def test_groups_do_not_see_each_other():
    both, target = _second(20, groups=2), rand(2, 5, 20)
    grid = Grid.parse("3")
    whole = round_rows(start(target, grid, Metric(both)), Metric(both))
    for g in range(2):
        metric = Metric(both[g : g + 1])
        alone = round_rows(start(target[g : g + 1], grid, metric), metric)
        assert torch.equal(alone.codes, whole.codes[g : g + 1])


def test_error_feedback_in_blocks_is_error_feedback_column_by_column():
    rows, metric = _rows(Grid.parse("3"), rows=3, n=150, groups=1)
    order = metric.order[0]
    u = metric.factor[0].double()
    work, codes = rows.target[0][:, order].double(), torch.empty(3, 150)
    scale = rows.scale[0, :, 0].double()
    for j in range(150):
        codes[:, j] = (work[:, j] / scale).round().clamp(-4, 3)
        error = (work[:, j] - codes[:, j] * scale) / u[j, j]
        work[:, j + 1 :] -= error[:, None] * u[j, j + 1 :]
    in_blocks = feedback(rows, metric).codes[0][:, order]
    assert (in_blocks != codes).float().mean() < 0.02  # ties may fall either way in float32


def test_inputs_that_never_vary_still_give_a_metric():
    second = torch.zeros(1, 8, 8)
    second[:, 0, 0] = 4.0
    rows = start(rand(1, 3, 8), Grid.parse("3"), Metric(second))
    assert torch.isfinite(round_rows(rows, Metric(second)).values).all()
    assert torch.isfinite(Metric(torch.zeros(1, 8, 8)).factor).all()


def test_a_metric_that_is_not_finite_is_refused():
    with pytest.raises(ModelError, match="finite"):
        Metric(torch.full((1, 4, 4), torch.nan))


@pytest.mark.parametrize("rows", [12, 30])
@pytest.mark.parametrize("rank", [1, 3, 7])
def test_whitened_factors_are_the_optimum_of_qera(rank, rows):
    second = _second(20)[0].double()
    matrix = rand(rows, 20).double()
    left, right = leading(matrix, rank, second)
    # theorem 1 of arXiv 2410.06040: truncate the SVD of M H^(1/2), then undo the root
    values, vectors = torch.linalg.eigh(second)
    root = vectors @ values.sqrt().diag() @ vectors.T
    u, s, vh = torch.linalg.svd(matrix @ root, full_matrices=False)
    exact = u[:, :rank] @ s[:rank].diag() @ vh[:rank] @ torch.linalg.inv(root)
    assert torch.allclose(left @ right, exact, atol=1e-8)
    delta = matrix - left @ right
    assert ((delta @ second) * delta).sum().item() == pytest.approx(
        s[rank:].square().sum().item(), rel=1e-6
    )


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_whitened_factors_beat_plain_ones_in_the_metric_and_lose_without(rank):
    second, matrix = _second(20)[0], rand(12, 20)

    def errors(given):
        left, right = leading(matrix, rank, given)
        delta = matrix - left @ right
        return ((delta @ second) * delta).sum(), delta.square().sum()

    (seen, own), (plain_seen, plain_own) = errors(second), errors(None)
    assert seen < 0.99 * plain_seen
    assert plain_own < 0.99 * own


@pytest.mark.parametrize("shape", [(9, 14), (14, 9)])
def test_plain_factors_are_the_truncated_svd_and_are_balanced(shape):
    matrix = rand(*shape)
    left, right = leading(matrix, 4)
    u, s, vh = torch.linalg.svd(matrix)
    assert torch.allclose(left @ right, u[:, :4] @ s[:4].diag() @ vh[:4], atol=1e-4)
    assert torch.allclose(left.norm(dim=0), right.norm(dim=1), rtol=1e-4)


MENU = tuple(
    LayerPlan.parse(f"x {text}").terms
    for text in (
        "dense@2c",
        "dense@3",
        "dense@tc",
        "dense@2c + lowrank[2]@8c",
        "dense@1c + lowrank[3]@4c + dense@2c",
    )
)


def _layer(groups=None):
    """A linear, or a grouped conv with a kernel of one place."""
    if groups is None:
        return Site("x", Linear(), (12, 20)), rand(12, 20)
    shape, kind = (12, 20 // groups, 1, 1), Conv(2)
    return Site("x", kind, shape, **kind.usual(shape) | {"groups": groups}), rand(*shape)


def test_several_terms_beat_their_first_one_alone():
    site, weight = _layer()
    metric = Metric(_second(20))
    menu = tuple(LayerPlan.parse(f"x {t}").terms for t in ("dense@2c", "dense@2c + lowrank[2]@8c"))
    errors = [
        metric.error(site.matrix(canonical(site, t, n) - weight)).sum()
        for t, n in zip(menu, solve_menu(site, weight, menu, metric), strict=True)
    ]
    assert errors[1] < 0.8 * errors[0]


@pytest.mark.slow
def test_alternating_over_terms_longer_ends_better(monkeypatch):
    """In the mean: the last turn alone rounds in two rounds, so that one entry may end worse."""
    site, _ = _layer()
    means = []
    for turns in range(1, 6):
        monkeypatch.setattr(candidates, "ALTERNATIONS", turns)
        logs = []
        for seed in range(6):
            weight, metric = rand(12, 20, seed=seed), Metric(_second(20, seed=seed))
            solved = solve_menu(site, weight, MENU[3:], metric)
            for terms, numbers in zip(MENU[3:], solved, strict=True):
                change = site.matrix(canonical(site, terms, numbers) - weight)
                logs.append(float(metric.error(change).sum().log()))
        means.append(sum(logs) / len(logs))
    assert all(b < a + 0.01 for a, b in itertools.pairwise(means))
    assert means[2] < means[0] - 0.1


@pytest.mark.parametrize("groups", [1, 4])
def test_a_solved_menu_reports_its_own_error_and_reads_back(groups):
    site, weight = _layer(groups)
    menu = MENU if groups == 1 else MENU[:3]
    second = _second(20 // groups, groups)
    result = solve_site(weight, second, site=site, menu=menu)
    for k, terms in enumerate(menu):
        numbers = read_numbers(result, menu, k)
        assert [q.grid for qs in numbers for q in qs] == [
            t.grid for t in terms for _ in range(t.form.gaps(site) + 1)
        ]
        delta = site.matrix(canonical(site, terms, numbers) - weight)
        assert result[f"{k}.error"].item() == pytest.approx(
            Metric(second).error(delta).sum().item(), rel=1e-3
        )
        for q in itertools.chain.from_iterable(numbers):
            assert torch.equal(q.scale, q.scale.to(torch.bfloat16).float())
            assert q.grid.low <= q.codes.min()
            assert q.codes.max() <= q.grid.high


def test_more_bits_leave_less_error():
    site, weight = _layer()
    menu = tuple(LayerPlan.parse(f"x dense@{b}c").terms for b in range(2, 9))
    result = solve_site(weight, _second(20), site=site, menu=menu)
    errors = [result[f"{k}.error"].item() for k in range(len(menu))]
    assert all(b < 0.6 * a for a, b in itertools.pairwise(errors))


@pytest.mark.parametrize("text", ["3c", "8c", "2g4z", "5g8"])
def test_rows_are_rounded_alike_in_parts(text, monkeypatch):
    weight, grid = rand(1, 23, 16), Grid.parse(text)
    metric = Metric.plain(1, 16)
    whole = round_rows_of([(grid, weight)], metric)[0]
    monkeypatch.setattr("rabbet.reconstruct.candidates.PART", 5)
    parts = round_rows_of([(grid, weight)], metric)[0]
    assert torch.equal(parts.values, whole.values)
    assert torch.equal(parts.target, weight)
    assert parts.codes.dtype == weight.dtype
