"""Laws of the factorising solvers: errors are true, bounds hold, more steps are never worse."""

import itertools

import pytest
import torch
from networks import rand

from rabbet.core.layout import factor_shapes
from rabbet.core.plan import Term
from rabbet.errors import PlanError
from rabbet.forms import RANKED
from rabbet.grids.grid import Grid, Quantised
from rabbet.layers import Site
from rabbet.layers.conv import Conv
from rabbet.reconstruct.candidates import solve_site
from rabbet.solve import quantised_cp
from rabbet.solve.admm import admm
from rabbet.solve.als import (
    CPProblem,
    als,
    balanced,
    khatri_rao,
    random_start,
    sensitivity,
    solved,
    svd_start,
)
from rabbet.solve.cp import khatri_rao_rows, start
from rabbet.solve.epc import epc, loosened, predicted
from rabbet.solve.feedback import alternate
from rabbet.solve.gram import Gram
from rabbet.solve.kernel_train import TrainProblem, Tucker2Problem
from rabbet.solve.metric_cp import MetricCP, joined
from rabbet.solve.varpro import Inserted, Lean, project
from rabbet.solve.whiten import leading, noise_left, spectrum

SHAPES = [(12, 10, 9), (16, 6, 3), (10, 14)]
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
RANK = 6


def smooth(shape, noise=0.3, rank=4):
    """A tensor near a low rank, as trained kernels are."""
    factors = [rand(n, rank, seed=k).double() for k, n in enumerate(shape)]
    return full(factors) + noise * rand(*shape, seed=9).double()


def full(factors):
    return (factors[0] @ khatri_rao(factors[1:]).mT).view([len(f) for f in factors])


def apart(tensor, factors):
    return float((full(factors) - tensor).norm() / tensor.norm())


def on_grid(factors, text="4"):
    return [Quantised.nearest(f.float(), Grid.parse(text)).values.double() for f in factors]


# Float factors


@every_shape
def test_the_error_of_every_mode_is_the_true_one(shape):
    tensor, factors = smooth(shape), random_start(shape, RANK)
    problem = CPProblem(tensor)
    for mode in range(len(shape)):
        gram, right, rest = problem.sides(factors, mode)
        assert problem.error(gram, right, rest, factors[mode]) == pytest.approx(
            apart(tensor, factors), rel=1e-6
        )


CHAINS = [
    Tucker2Problem(smooth((8, 6, 9))),
    TrainProblem(smooth((8, 6, 3, 5))),
    TrainProblem(smooth((5, 9, 4))),
    TrainProblem(smooth((4, 6, 3, 2, 3))),
]
every_chain = pytest.mark.parametrize("problem", CHAINS, ids=lambda p: f"{p.shape}")


def chained(problem, factors):
    """The tensor [out, in, *kernel] that the factors of a chain stand for."""
    v, u, *cores = factors
    product = u
    for core in cores:
        bond = product.shape[-1]
        product = torch.tensordot(product, core.view(len(core), bond, -1), ([-1], [1]))
    return (product @ v.mT).movedim(-1, 0)


@every_chain
def test_the_error_of_a_chain_is_the_true_one(problem):
    tensor = problem.flat.view(problem.shape)
    for factors in (problem.random(3, seed=1), problem.leading(3, seed=0)):
        assert len(factors) == len(problem.shape) == len(problem.channel_axes)
        wanted = float((chained(problem, factors) - tensor).norm() / tensor.norm())
        for mode, factor in enumerate(factors):
            error = problem.error(*problem.sides(factors, mode), factor)
            assert error == pytest.approx(wanted, rel=1e-6)


@every_chain
def test_the_matrix_of_a_chains_factor_is_what_its_parts_stand_for(problem):
    factors = problem.random(3, seed=1)
    for mode, factor in enumerate(factors):
        gram, right, _ = problem.sides(factors, mode)
        whole = Gram(gram.dense)
        assert torch.allclose(gram.times(factor), whole.times(factor))
        assert torch.allclose(gram.mean, whole.mean)
        assert torch.allclose(gram.inverse(0.1)(right), whole.inverse(0.1)(right))


@every_chain
def test_singular_vectors_start_a_chain_near_its_best_and_least_squares_mends_the_rest(problem):
    begun = problem.relative(problem.leading(3, seed=0))
    fit = als(problem, problem.leading(3, seed=0), 20, 0.0)
    assert all(b <= a + 1e-9 for a, b in itertools.pairwise((begun, *fit.history)))
    # TT-SVD is within the root of the number of bonds of the best (Oseledets 2011, corollary 2.4)
    assert begun <= fit.error * (len(problem.shape) - 1) ** 0.5
    assert begun < problem.relative(problem.random(3, seed=1))
    assert problem.relative(problem.leading(problem.full_rank, seed=0)) < 1e-6


@every_chain
def test_balancing_a_chain_changes_no_product_and_evens_both_sides_of_its_last_bond(problem):
    factors = tuple(f * 10.0**k for k, f in enumerate(problem.random(3, seed=1)))
    even = problem.balanced(factors)
    assert torch.allclose(chained(problem, even), chained(problem, factors))
    v, *_, core = even
    assert torch.allclose(v.norm(dim=0), core.view(-1, v.shape[1]).norm(dim=0))


@every_chain
@pytest.mark.parametrize("solver", [admm, alternate])
def test_solvers_lower_the_error_of_a_rounded_chain(problem, solver):
    grids = [Grid.parse("3")] * len(problem.shape)
    start = problem.leading(3, seed=0)
    rounded = solver(problem, start, grids, 10)
    assert rounded.error < problem.relative(tuple(on_grid(start, "3")))
    values = tuple(q.values.double() for q in rounded.factors)
    tensor = problem.flat.view(problem.shape)
    assert rounded.error == pytest.approx(
        float((chained(problem, values) - tensor).norm() / tensor.norm()), rel=1e-6
    )


def test_a_core_too_large_to_be_rounded_in_turn_is_refused_and_admm_takes_it():
    problem = TrainProblem(rand(100, 100, 2, 2).double())
    factors, grids = problem.leading(100, seed=0), [Grid.parse("4")] * 4
    with pytest.raises(PlanError, match="bonds of 100 and 100 in turn needs a matrix of 10,000"):
        alternate(problem, factors, grids, 1)
    rounded = admm(problem, factors, grids, 1, 3)
    assert rounded.error < rounded.history[0]


@every_shape
@pytest.mark.parametrize("start", [random_start, svd_start])
def test_each_sweep_of_least_squares_lowers_the_error(shape, start):
    tensor = smooth(shape)
    first = start(shape, RANK) if start is random_start else start(tensor, RANK)
    solution = als(CPProblem(tensor), first, 20, 0.0)
    assert all(b <= a + 1e-9 for a, b in itertools.pairwise(solution.history))
    assert solution.error == pytest.approx(apart(tensor, solution.factors), abs=1e-6)


def test_least_squares_says_that_it_stalled():
    assert als(CPProblem(smooth((8, 6, 4), 0.0)), svd_start(smooth((8, 6, 4), 0.0), 6), 200).stalled


@every_shape
def test_balancing_changes_no_product_and_evens_the_norms(shape):
    factors = tuple(f * 10.0**k for k, f in enumerate(random_start(shape, RANK)))
    even = balanced(factors)
    assert torch.allclose(full(even), full(factors))
    norms = torch.stack([f.norm(dim=0) for f in even])
    assert torch.allclose(norms, norms[:1].expand_as(norms))


# EPC


@every_shape
def test_correction_keeps_the_bound_and_lowers_the_sensitivity(shape):
    problem = CPProblem(smooth(shape))
    start = als(problem, random_start(shape, RANK), 60)
    for slack in (1.02, 1.1, 1.5):
        corrected = epc(problem, start.factors, slack * start.error)
        assert corrected.error <= slack * start.error * (1 + 1e-9)
        assert sensitivity(corrected.factors) < sensitivity(balanced(start.factors))


def test_a_looser_bound_makes_less_sensitive_factors():
    problem = CPProblem(smooth((12, 10, 9)))
    start = als(problem, random_start((12, 10, 9), RANK), 60)
    sensitivities = [
        sensitivity(epc(problem, start.factors, s * start.error).factors) for s in (1.01, 1.1, 1.3)
    ]
    assert sensitivities[0] > sensitivities[1] > sensitivities[2]


def test_sensitivity_is_the_error_that_noise_makes():
    factors = random_start((12, 10, 9), RANK)
    noise = 1e-3
    g = torch.Generator().manual_seed(1)
    noisy = [
        [f + noise * torch.randn(f.shape, generator=g, dtype=f.dtype) for f in factors]
        for _ in range(300)
    ]
    squares = [(full(fs) - full(factors)).square().sum() for fs in noisy]
    assert float(torch.stack(squares).mean()) == pytest.approx(
        noise**2 * sensitivity(factors), rel=0.05
    )


@pytest.mark.parametrize("text", ["4", "6", "8"])
def test_the_predicted_error_is_the_one_of_rounding(text):
    tensor = smooth((24, 20, 9))
    problem, grids = CPProblem(tensor), [Grid.parse(text)] * 3
    fit = loosened(problem, als(problem, svd_start(tensor, 12), 80), grids)
    assert predicted(problem, fit, grids) == pytest.approx(
        apart(tensor, on_grid(fit.factors, text)), rel=0.1
    )


def test_fewer_bits_are_given_a_looser_bound():
    tensor = smooth((24, 20, 9))
    problem = CPProblem(tensor)
    start = als(problem, svd_start(tensor, 12), 200, 1e-7)
    errors = [loosened(problem, start, [Grid.parse(b)] * 3).error for b in ("8", "3")]
    assert errors[0] < errors[1]


# On a grid


@every_shape
@pytest.mark.parametrize("solve", [admm, alternate])
@pytest.mark.parametrize("text", ["3", "4", "4c", "4c1", "8"])
def test_a_solver_ends_on_its_grids_and_no_worse_than_it_began(shape, solve, text):
    tensor = smooth(shape)
    problem, grids = CPProblem(tensor), [Grid.parse(text)] * len(shape)
    start = als(problem, svd_start(tensor, RANK), 40).factors
    solution = solve(problem, start, grids, 4)
    values = [q.values.double() for q in solution.factors]
    assert solution.error == pytest.approx(apart(tensor, values), rel=1e-4)
    assert solution.error <= apart(tensor, on_grid(start, text)) * (1 + 1e-6)
    for q, grid in zip(solution.factors, grids, strict=True):
        assert q.grid == grid
        assert torch.equal(q.codes, q.codes.round())
        assert grid.low <= q.codes.min()
        assert q.codes.max() <= grid.high


def test_admm_shows_both_residuals_of_every_factor_and_sweep():
    tensor = smooth((12, 10, 9))
    solution = admm(CPProblem(tensor), svd_start(tensor, RANK), [Grid.parse("4")] * 3, 3)
    assert len(solution.primal) == len(solution.dual) == 3 * solution.steps
    assert all(0 <= r < 1 for r in solution.primal)
    assert len(solution.history) == solution.steps + 1


def test_the_ladder_of_the_paper_holds_on_a_trained_like_kernel():
    # arXiv 2308.04595: EPC helps rounding, ADMM helps more, and a random start is worse than EPC
    tensor = smooth((24, 20, 9), 0.5)
    problem, grids = CPProblem(tensor), [Grid.parse("4")] * 3
    plain = als(problem, svd_start(tensor, 30), 100)
    corrected = epc(problem, plain.factors, 1.03 * plain.error)
    ladder = [
        apart(tensor, on_grid(plain.factors)),
        apart(tensor, on_grid(corrected.factors)),
        admm(problem, corrected.factors, grids, 10).error,
    ]
    assert ladder[0] > ladder[1] > ladder[2]
    assert admm(problem, random_start(tensor.shape, 30), grids, 10).error > ladder[2]
    assert quantised_cp(tensor.float().view(24, 20, 3, 3), 30, 4).error < ladder[2]


@pytest.mark.parametrize("scales", ["tensor", "column"])
def test_quantised_cp_reports_its_error_and_is_deterministic(scales):
    weight = smooth((16, 12, 9)).float().view(16, 12, 3, 3)
    first, again = (quantised_cp(weight, 10, 4, scales) for _ in range(2))
    values = [q.values.double() for q in first.factors]
    assert [list(v.shape) for v in values] == [[16, 10], [12, 10], [9, 10]]
    assert first.error == pytest.approx(apart(weight.flatten(2).double(), values), rel=1e-4)
    assert all(
        torch.equal(a.codes, b.codes) for a, b in zip(first.factors, again.factors, strict=True)
    )


REFUSED = [((8, 6, 1, 1), 3, "one place"), ((8, 6), 3, "one place"), ((8, 6, 3, 3), 0, "rank 0"),
           ((8, 6, 3, 3), 999, "rank 999")]  # fmt: skip


@pytest.mark.parametrize(("shape", "rank", "words"), REFUSED)
def test_quantised_cp_refuses_what_it_cannot_write(shape, rank, words):
    with pytest.raises(PlanError, match=words):
        quantised_cp(rand(*shape), rank, 4)


# Variable projection


def test_projection_gives_the_best_last_factor_and_lowers_the_loss():
    matrix, second = rand(8, 20), rand(20, 20, seed=3)
    second = second @ second.mT
    start = [rand(5, 20, seed=4)]
    before, after = (project(lambda s: s[0], start, matrix, second, 0.0, n) for n in (0, 40))
    assert after.loss < before.loss
    for solution in (before, after):
        delta = solution.last @ solution.small[0] - matrix
        assert torch.allclose(delta @ second @ solution.small[0].mT, torch.zeros(8, 5), atol=0.05)


@pytest.mark.parametrize("ridge", [0.0, 0.3])
@pytest.mark.parametrize("metric", ["plain", "full", "lean"])
def test_the_slope_of_the_projected_loss_is_that_of_finite_differences(metric, ridge):
    matrix, second = rand(8, 20).double(), rand(20, 20, seed=3).double()
    second = second @ second.mT
    metrics = {"plain": None, "full": second, "lean": Lean.of(second)}
    problem = Inserted(khatri_rao_rows, matrix, metrics[metric], ridge)
    start = [rand(3, n, seed=n).double().requires_grad_() for n in (5, 4)]
    assert torch.autograd.gradcheck(lambda *small: problem.loss(small), start)


def test_a_ridge_keeps_the_factors_small():
    matrix = smooth((12, 90), 0.5).float()
    norms = [
        project(lambda s: s[0], [rand(6, 90, seed=4)], matrix, None, r, 40).last.norm()
        for r in (0.0, 0.3)
    ]
    assert norms[1] < norms[0]


# Candidates


def _conv():
    site = Site(
        "x",
        Conv(2),
        (12, 10, 3, 3),
        stride=(1, 1),
        pads=(1,) * 4,
        dilation=(1, 1),
        positions=36,
        inputs=36,
    )
    root = rand(90, 90, seed=2) + torch.eye(90)
    return site, smooth((12, 10, 9)).float().view(site.shape), (root @ root.mT / 90)[None]


@pytest.mark.parametrize("shape", [(20, 6), (6, 20)])
def test_the_spectrum_is_the_error_that_no_weight_of_a_rank_can_beat(shape):
    root = rand(shape[1], shape[1], seed=2).double()
    second = root @ root.mT
    weight = rand(*shape, seed=3)
    values = torch.linalg.svdvals(weight.double() @ torch.linalg.cholesky(second)).square()
    assert torch.allclose(spectrum(weight, second.float()), values, rtol=1e-4)


@pytest.mark.parametrize(("rows", "columns", "rank"), [(40, 200, 4), (200, 40, 20), (64, 64, 8)])
def test_noise_leaves_what_a_truncated_svd_leaves_of_it(rows, columns, rank):
    shares = []
    for seed in range(5):
        values = torch.linalg.svdvals(
            torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
        ).square()
        shares.append(float(values[rank:].sum() / values.sum()))
    assert noise_left(rows, columns, rank) == pytest.approx(sum(shares) / 5, rel=0.03)


FITTING = [f for f in RANKED if RANKED[f](1).full_rank(_conv()[0])]


@pytest.mark.parametrize("form", FITTING)
def test_more_bits_leave_less_error_of_a_factorised_weight(form):
    site, weight, second = _conv()
    menu = tuple((Term(RANKED[form](6), Grid.parse(f"{b}c")),) for b in (2, 3, 4, 6, 8))
    result = solve_site(weight, second, site=site, menu=menu)
    errors = [float(result[f"{k}.error"]) for k in range(len(menu))]
    assert all(b < a for a, b in itertools.pairwise(errors))


@pytest.mark.parametrize("form", [f for f in FITTING if not RANKED[f].contracted])
def test_the_last_factor_corrects_the_rounding_of_the_others(form):
    site, weight, second = _conv()
    term = Term(RANKED[form](6), Grid.parse("3c"))
    result = solve_site(weight, second, site=site, menu=((term,),))
    factors = term.form.decompose(site, weight, second)
    assert tuple(tuple(f.shape) for f in factors) == factor_shapes(site, term)
    plain = term.form.contract(site, [Quantised.nearest(f, term.grid).values for f in factors])
    delta = (plain - weight).flatten(1)
    assert float(result["0.error"]) < 0.9 * float(((delta @ second[0]) * delta).sum())


# In the metric of the inputs


def in_metric():
    """A kernel [8, 6, 9], a metric that couples all its inputs, and its problem."""
    tensor = smooth((8, 6, 9))
    mix = rand(54, 54, seed=3).double()
    second = mix @ mix.mT / 54 + 4 * torch.ones(54, 54, dtype=torch.float64)
    return tensor, second, MetricCP(tensor, second)


def apart_in(second, tensor, factors):
    a, b, c = MetricCP.joined(factors)
    delta = (full((a, b, c)) - tensor).flatten(1)
    whole = tensor.flatten(1)
    return float((((delta @ second) * delta).sum() / ((whole @ second) * whole).sum()).sqrt())


def test_the_error_in_the_metric_is_the_true_one_for_every_column():
    tensor, second, problem = in_metric()
    factors = MetricCP.split(*random_start(tensor.shape, RANK))
    for mode in [0, 3, 9, 4, 12, 0]:
        # one factor has changed since the last time: what the problem keeps must follow
        factors = tuple(f * 1.1 if k == mode else f for k, f in enumerate(factors))
        error = problem.error(*problem.sides(factors, mode), factors[mode])
        assert error == pytest.approx(apart_in(second, tensor, factors), rel=1e-9)


def test_a_solved_column_cannot_be_improved():
    tensor, _, problem = in_metric()
    factors = MetricCP.split(*random_start(tensor.shape, RANK))
    for mode in (0, 2, 10):
        gram, right, rest = problem.sides(factors, mode)
        best = solved(gram, right)
        for seed in range(5):
            other = best + 1e-3 * rand(*best.shape, seed=seed).double()
            assert problem.error(gram, right, rest, best) < problem.error(gram, right, rest, other)


def test_least_squares_in_the_metric_beats_plain_least_squares_there():
    tensor, second, problem = in_metric()
    start = random_start(tensor.shape, 12)
    solution = als(problem, MetricCP.split(*start), 60, 0.0)
    assert all(b <= a + 1e-9 for a, b in itertools.pairwise(solution.history))
    assert solution.error == pytest.approx(apart_in(second, tensor, solution.factors), rel=1e-6)
    plain = als(CPProblem(tensor), start, 200, 0.0)
    assert solution.error < apart_in(second, tensor, MetricCP.split(*plain.factors))


def test_correction_in_the_metric_keeps_its_bound():
    tensor, second, problem = in_metric()
    start = als(problem, MetricCP.split(*random_start(tensor.shape, 12)), 30)
    corrected = epc(problem, start.factors, 1.1 * start.error, 30)
    assert apart_in(second, tensor, corrected.factors) <= 1.1 * start.error * (1 + 1e-6)
    assert problem.sensitivity(corrected.factors) < problem.sensitivity(
        problem.balanced(start.factors)
    )


@pytest.mark.parametrize("solve", [admm, alternate])
def test_rounding_in_the_metric_beats_rounding_to_nearest_there(solve):
    tensor, second, problem = in_metric()
    start = als(problem, MetricCP.split(*random_start(tensor.shape, 12)), 30).factors
    grids = MetricCP.grids(12, 4)
    solution = solve(problem, start, grids, 3)
    held = tuple(q.values.double() for q in solution.factors)
    assert solution.error == pytest.approx(apart_in(second, tensor, held), rel=1e-6)
    nearest = tuple(
        Quantised.nearest(f.float(), g).values.double() for f, g in zip(start, grids, strict=True)
    )
    assert solution.error < 0.8 * apart_in(second, tensor, nearest)
    a, b, c = joined(solution.factors)
    whole = full((a.values.double(), b.values.mT.double(), c.values.mT.double()))
    assert torch.equal(whole, full(MetricCP.joined(held)))


@pytest.mark.parametrize("shape", [(1024, 1040), (1040, 1024)])
def test_a_few_leading_vectors_of_a_large_matrix_leave_as_much_as_exact_ones(shape, monkeypatch):
    """Also where all singular values lie close together, as those of noise do."""
    matrix, mix = rand(*shape, seed=1), rand(shape[1], shape[1], seed=2)
    for second in (None, mix @ mix.mT / shape[1]):
        left = []
        for large in (1024, 2000):
            monkeypatch.setattr("rabbet.solve.whiten.LARGE", large)
            first, last = leading(matrix, 32, second)
            rest = matrix - first @ last
            left.append(((rest if second is None else rest @ second) * rest).sum())
        assert left[1] * 0.9999 <= left[0] <= left[1] * 1.005


def test_a_lean_metric_is_below_the_metric_and_nearly_as_good():
    """What small factors of a large layer are found in."""
    n, rank = 320, 24
    root = rand(600, n, seed=1) * torch.linspace(1, 0.02, n)
    second = root.mT @ root / 600 + 0.01 * torch.eye(n)
    lean = Lean.of(second)
    rest = second - lean.leading @ lean.leading.mT
    assert torch.linalg.eigvalsh(rest.double()).min() > -1e-4
    assert torch.allclose(rest.diagonal().clamp_min(0), lean.rest)
    weight = rand(48, n, seed=2)
    begun = start(weight, second, n // 4, rank)
    losses = [
        project(khatri_rao_rows, begun, weight, metric, 1e-3, steps).loss
        for metric, steps in ((second, 0), (lean, 20), (second, 20))
    ]
    assert losses[1] < losses[2] + 0.5 * (losses[0] - losses[2])
