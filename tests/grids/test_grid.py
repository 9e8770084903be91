"""Laws of every grid."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import rand

from rabbet.errors import PlanError
from rabbet.grids.grid import Grid, Quantised, stored

BOOKS = (
    *(f"{b}" for b in range(2, 9)),
    *(f"u{b}" for b in range(2, 9)),
    *(f"{b}h" for b in range(2, 9)),
    "1",
    "t",
)
LAYOUTS = ("", "c", "c1", "g2", "g8", "g64")
# every codebook with some layout and every layout with some codebooks: they are independent
TEXTS = tuple(
    dict.fromkeys(
        [
            *(f"{book}{LAYOUTS[k % len(LAYOUTS)]}" for k, book in enumerate(BOOKS)),
            *(f"{book}{layout}" for book in ("4", "2h", "t") for layout in LAYOUTS),
        ]
    )
)
ZEROS = ("4g8z", "2g3z", "u4g64z", "3hg8z", "tg4z")
GRIDS = [pytest.param(Grid.parse(text), id=text) for text in TEXTS]
every_grid = pytest.mark.parametrize("grid", GRIDS)


def _tensor(grid: Grid, seed: int = 0) -> torch.Tensor:
    x = rand(6, 5, 4, seed=seed) * torch.logspace(-2, 1, 6)[:, None, None]
    return x.abs() if grid.kind == "unsigned" else x


def _loss(
    grid: Grid, x: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor | float = 1.0
) -> torch.Tensor:
    return grid.scales.slices((grid.project(x, scale) - x).square() * weight).double().sum(1)


@pytest.mark.parametrize("text", [*TEXTS, *ZEROS])
def test_a_grid_is_its_text(text):
    assert str(Grid.parse(text)) == text
    assert Grid.parse(str(Grid.parse(text))) == Grid.parse(text)


def test_no_two_texts_are_one_grid():
    assert len({Grid.parse(text) for text in TEXTS}) == len(TEXTS)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "0",
        "9",
        "16",
        "c",
        "h",
        "u",
        "u1",
        "1h0",
        "uh",
        "u4h",
        "4x",
        "4 c",
        "-4",
        "T",
        "4c-1",
        "4g",
        "4g0",
        "4g1",
        "4gz",
        "4g8c",
        "g8",
        "4g08",
    ],
)
def test_what_is_not_a_grid_is_refused(text):
    with pytest.raises(PlanError):
        Grid.parse(text)


@pytest.mark.parametrize(("text", "levels", "low", "high"), [
    ("1", 2, -1, 0), ("t", 3, -1, 1), ("2h", 4, -2, 1), ("2", 4, -2, 1), ("u2", 4, 0, 3),
    ("3c", 8, -4, 3), ("8", 256, -128, 127), ("u8", 256, 0, 255),
])  # fmt: skip
def test_the_integers_of_a_grid_are_the_stated_ones(text, levels, low, high):
    grid = Grid.parse(text)
    assert (grid.levels, grid.low, grid.high) == (levels, low, high)


@pytest.mark.parametrize(("text", "values"), [
    ("1", [-0.5, 0.5]), ("t", [-1, 0, 1]), ("2h", [-1.5, -0.5, 0.5, 1.5]),
    ("3", [-4, -3, -2, -1, 0, 1, 2, 3]),
])  # fmt: skip
def test_the_points_of_a_grid_of_scale_one_are_the_stated_ones(text, values):
    x = torch.linspace(-9, 9, 1001)
    assert Grid.parse(text).project(x, torch.ones(1)).unique().tolist() == values


@every_grid
def test_codes_are_integers_in_range(grid):
    x = _tensor(grid)
    codes = grid.codes(x * 3, grid.mse(x))
    assert torch.equal(codes, codes.round())
    assert grid.low <= codes.min()
    assert codes.max() <= grid.high
    assert codes.unique().numel() <= grid.levels


@every_grid
def test_projecting_twice_is_projecting_once(grid):
    x = _tensor(grid)
    scale = grid.mse(x)
    once = grid.project(x, scale)
    assert torch.equal(grid.project(once, scale), once)


@every_grid
def test_codes_of_the_values_of_codes_are_the_codes(grid):
    x = _tensor(grid)
    q = Quantised.nearest(x, grid)
    assert torch.equal(grid.codes(q.values, q.scale), q.codes)


@every_grid
def test_no_point_of_the_grid_is_nearer_than_the_projection(grid):
    x = _tensor(grid)
    scale = grid.mse(x)
    distance = (grid.project(x, scale) - x).abs()
    for code in range(grid.low, grid.high + 1):
        other = (grid.values(torch.full_like(x, code), scale) - x).abs()
        assert (distance <= other + 1e-6 * x.abs()).all()


@every_grid
def test_a_scale_has_one_entry_per_part_and_is_a_bfloat16(grid):
    x = _tensor(grid)
    codes = grid.codes(x, grid.minmax(x))
    for scale in (grid.minmax(x), grid.mse(x), grid.refit(x, codes, grid.minmax(x))):
        assert scale.shape == grid.scale_shape(tuple(x.shape))
        assert torch.equal(scale, scale.to(torch.bfloat16).float())
        assert (scale != 0).all()


@every_grid
def test_minmax_covers_the_largest_magnitude(grid):
    x = _tensor(grid)
    reach = (
        grid.spread(grid.minmax(x), x.shape).abs()
        * (grid.levels - 1)
        / (1 if grid.kind == "unsigned" else 2)
    )
    assert (x.abs() <= reach * (1 + 2**-8)).all()  # up to the rounding of a bfloat16


@every_grid
def test_the_searched_scale_is_never_worse_than_minmax(grid):
    for seed in range(3):
        x = _tensor(grid, seed)
        assert (_loss(grid, x, grid.mse(x)) <= _loss(grid, x, grid.minmax(x)) * (1 + 1e-6)).all()


@every_grid
def test_the_searched_scale_is_never_worse_than_minmax_under_weights(grid):
    for seed in range(3):
        x, weight = _tensor(grid, seed), rand(5, 4, seed=9).square()
        loss = _loss(grid, x, grid.mse(x, weight), weight)
        assert (loss <= _loss(grid, x, grid.minmax(x), weight) * (1 + 1e-6)).all()


def test_weights_move_the_scale_to_the_entries_that_count():
    grid, x = Grid.parse("2"), torch.tensor([1.0, 1.1, 0.9, 4.0])
    weight = torch.tensor([1.0, 1.0, 1.0, 0.0])
    assert _loss(grid, x, grid.mse(x, weight), weight) < 0.1 * _loss(grid, x, grid.mse(x), weight)


@every_grid
def test_a_refitted_scale_never_increases_the_error(grid):
    for seed in range(3):
        x = _tensor(grid, seed)
        scale = grid.minmax(x)
        codes = grid.codes(x, scale)
        error = [
            grid.scales.slices((grid.values(codes, s) - x).square()).sum(1)
            for s in (scale, grid.refit(x, codes, scale))
        ]
        assert (error[1] <= error[0] * (1 + 1e-6)).all()


@every_grid
def test_a_refitted_scale_is_the_least_squares_one(grid):
    x = _tensor(grid)
    scale = grid.minmax(x)
    codes = grid.codes(x, scale)
    z, rows = (
        grid.scales.slices(codes + grid.codebook.shift).double(),
        grid.scales.slices(x).double(),
    )
    for refitted, start, a, b in zip(grid.refit(x, codes, scale), scale, z, rows, strict=True):
        exact = (
            torch.linalg.lstsq(a[:, None], b[:, None]).solution.item() if a.any() else start.item()
        )
        assert refitted.item() == pytest.approx(exact, rel=2**-8)


def test_a_scale_refitted_in_a_metric_is_best_in_that_metric():
    grid, x = Grid.parse("3c"), rand(6, 12)
    root = rand(12, 12, seed=1)
    metric = root @ root.T
    scale = grid.minmax(x)
    codes = grid.codes(x, scale)

    def error(s: torch.Tensor) -> torch.Tensor:
        delta = grid.values(codes, s) - x
        return ((delta @ metric) * delta).sum(1)

    best = error(grid.refit(x, codes, scale, metric))
    assert (best <= error(scale) * (1 + 1e-5)).all()
    assert (best < error(grid.refit(x, codes, scale)) * (1 + 1e-5)).all()
    assert best.sum() < error(scale).sum()


@pytest.mark.parametrize("text", ["3", "3c", "t", "1c", "2h"])
def test_where_all_codes_are_zero_the_scale_is_kept(text):
    grid = Grid.parse(text)
    scale = grid.minmax(torch.ones(2, 3))
    x = torch.zeros(2, 3)
    if grid.codebook.shift:  # a half-step grid has no zero code, so every code counts
        assert torch.isfinite(grid.refit(x, grid.codes(x, scale), scale)).all()
    else:
        assert torch.equal(grid.refit(x, grid.codes(x, scale), scale), scale)


@every_grid
def test_a_tensor_of_zeros_has_a_usable_scale(grid):
    x = torch.zeros(3, 4, 5)
    q = Quantised.nearest(x, grid)
    assert torch.isfinite(q.values).all()
    assert q.values.abs().max() < 1e-6


@every_grid
def test_short_grids_that_reach_further_on_one_side_are_worth_mirroring(grid):
    whole = grid.with_axis(None)
    low, high = whole.project(torch.tensor([-1e4, 1e4]), torch.ones(1)).tolist()
    assert grid.mirrored == (low != -high and low < 0 and grid.bits <= 4)


def test_a_negative_scale_mirrors_the_grid():
    grid, scale = Grid.parse("3"), torch.tensor([0.5])
    x = torch.linspace(-3, 3, 41)
    assert torch.equal(grid.project(x, -scale), -grid.project(-x, scale))
    # -4 * -0.5: the long end is now the upper one
    assert grid.project(torch.tensor([9.0]), -scale).item() == 2.0


def test_a_grid_of_an_axis_that_is_not_there_is_refused():
    with pytest.raises(PlanError, match="axis 2"):
        Grid.parse("4c2").scale_shape((3, 4))


@pytest.mark.parametrize(
    ("text", "zero"), [("u8", 7.0), ("u8", 0.0), ("u8", 255.0), ("u4", 3.0), ("u2", 1.0)]
)
def test_with_a_zero_point_zero_stays_exactly_zero(text, zero):
    grid, scale = Grid.parse(text), torch.tensor([0.1372])
    assert grid.values(grid.codes(torch.zeros(3), scale, zero), scale, zero).tolist() == [0.0] * 3
    assert grid.fake(torch.zeros(3), scale, torch.tensor([zero])).tolist() == [0.0] * 3


def test_a_zero_point_shifts_the_range_of_an_unsigned_grid():
    grid, scale, zero = Grid.parse("u2"), torch.tensor([0.5]), 1.0
    x = torch.tensor([-9.0, -0.5, -0.2, 0.3, 0.9, 9.0])
    assert grid.values(grid.codes(x, scale, zero), scale, zero).tolist() == [
        -0.5,
        -0.5,
        0.0,
        0.5,
        1.0,
        1.0,
    ]


@every_grid
def test_fake_gives_the_values_of_project(grid):
    x = _tensor(grid)
    scale = grid.mse(x)
    assert torch.allclose(grid.fake(x, scale), grid.project(x, scale), rtol=1e-6, atol=0)


def _slopes(grid, x, scale, zero=0.0, pull=None):
    x, scale = x.clone().requires_grad_(), scale.clone().requires_grad_()
    out = grid.fake(x, scale, zero)
    out.backward(torch.ones_like(out) if pull is None else pull)
    return x.grad, scale.grad


def test_the_gradient_of_fake_has_the_values_derived_by_hand():
    # 3 bits, scale 0.5: the range is -2 .. 1.5. Esser et al. 2020, eq. 3: inside it round(x/s) -
    # x/s, outside the end.
    x = torch.tensor([0.6, -0.8, 5.0, -9.0])
    dx, ds = _slopes(Grid.parse("3"), x, torch.tensor([0.5]))
    assert dx.tolist() == [1.0, 1.0, 0.0, 0.0]
    by_hand = (1 - 1.2) + (-2 + 1.6) + 3 - 4
    assert ds.item() == pytest.approx(by_hand / math.sqrt(4 * 3), rel=1e-5)


def test_the_gradient_of_fake_is_weighted_by_the_gradient_it_receives():
    x, pull = torch.tensor([0.6, 5.0]), torch.tensor([2.0, -3.0])
    dx, ds = _slopes(Grid.parse("3"), x, torch.tensor([0.5]), pull=pull)
    assert dx.tolist() == [2.0, 0.0]
    assert ds.item() == pytest.approx((2 * (1 - 1.2) - 3 * 3) / math.sqrt(2 * 3), rel=1e-5)


def test_the_gradient_of_fake_counts_the_zero_point():
    # u2, zero 1: codes 0..3 stand for -1..2 steps. x = -0.7 is code 0 (inside), x = 9 is code 3,
    # two steps above zero.
    x = torch.tensor([-0.7, 9.0])
    dx, ds = _slopes(Grid.parse("u2"), x, torch.tensor([1.0]), torch.tensor([1.0]))
    assert dx.tolist() == [1.0, 0.0]
    assert ds.item() == pytest.approx(((-1 + 0.7) + 2) / math.sqrt(2 * 3), rel=1e-5)


@pytest.mark.parametrize("text", ["4c", "3hc", "2c1", "tc", "1c", "5"])
def test_the_gradient_of_fake_is_that_of_the_formula(text):
    grid = Grid.parse(text)
    x, pull = _tensor(grid), rand(6, 5, 4, seed=3)
    scale = grid.mse(x) * 0.7
    dx, ds = _slopes(grid, x, scale, pull=pull)
    v = x / grid.spread(scale, x.shape) - grid.codebook.shift
    inside = (v >= grid.low) & (v <= grid.high)
    step = torch.where(
        inside, v.round() - v, v.round().clamp(grid.low, grid.high) + grid.codebook.shift
    )
    gain = 1 / math.sqrt(x.numel() / scale.numel() * max(grid.high, 1))
    assert torch.equal(dx, pull * inside)
    assert torch.allclose(ds, grid.scales.slices(step * pull).sum(1) * gain, rtol=1e-4, atol=1e-5)


def test_latent_codes_round_and_let_the_gradient_through_inside_the_range():
    latent = torch.tensor([-9.0, -2.4, 0.4, 1.4, 1.6], requires_grad=True)
    codes = Grid.parse("2").round_latent(latent)
    codes.sum().backward()
    assert codes.tolist() == [-2, -2, 0, 1, 1]
    assert latent.grad.tolist() == [0, 1, 1, 1, 0]


@pytest.mark.parametrize("text", ZEROS)
def test_zero_points_are_codes_and_zero_lies_on_the_grid(text):
    grid = Grid.parse(text)
    x = rand(6, 5, 4) + 0.7
    q = Quantised.nearest(x, grid)
    assert q.zero.shape == q.scale.shape == grid.scale_shape((6, 5, 4))
    assert torch.equal(q.zero, q.zero.round().clamp(grid.low, grid.high))
    assert torch.equal(grid.codes(q.values, q.scale, q.zero), q.codes)
    zeros = torch.zeros_like(x)
    exact = grid.project(zeros, q.scale, q.zero)
    assert exact.abs().max() == 0 or grid.codebook.shift


@pytest.mark.parametrize(("text", "plain"), [("4g8z", "4g8"), ("3g64z", "3g64"), ("2g8z", "2g8")])
def test_zero_points_help_where_values_lie_on_one_side(text, plain):
    x = rand(6, 40).abs() + 0.5
    ours, theirs = (
        float((Quantised.nearest(x, Grid.parse(t)).values - x).square().sum())
        for t in (text, plain)
    )
    assert ours < theirs


def test_smaller_groups_of_inputs_have_less_error():
    x = rand(8, 256) * torch.logspace(-1, 1, 256)
    errors = [
        float((Quantised.nearest(x, Grid.parse(t)).values - x).square().sum())
        for t in ("4", "4c", "4g128", "4g32", "4g8")
    ]
    assert all(b < a for a, b in itertools.pairwise(errors))


def test_groups_are_of_consecutive_inputs_of_one_output():
    grid, x = Grid.parse("8g3"), torch.arange(20.0).view(2, 5, 2)
    assert grid.scale_shape((2, 5, 2)) == (8,)
    rows = grid.scales.slices(x)
    assert rows.tolist()[:4] == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 0, 0]]
    spread = grid.spread(torch.arange(8.0), (2, 5, 2))
    assert spread.flatten().tolist()[:10] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3]


def test_a_gradient_reaches_every_scale_of_a_group():
    grid, x = Grid.parse("3g4"), rand(5, 10)
    scale = grid.mse(x)
    dx, ds = _slopes(grid, x, scale, pull=rand(5, 10, seed=2))
    assert dx.shape == x.shape
    assert ds.shape == scale.shape
    assert (ds != 0).all()


@given(st.floats(-1e30, 1e30))
def test_a_stored_scale_survives_the_file_and_is_never_zero(x):
    scale = stored(torch.tensor([x], dtype=torch.float32))
    assert scale.item() != 0
    assert torch.equal(stored(scale), scale)
    assert torch.equal(scale.to(torch.bfloat16).float(), scale)


@pytest.mark.parametrize(
    ("bits", "kind"),
    [
        *itertools.product((0, 9), ("signed", "unsigned", "half")),
        (3, "ternary"),
        (1, "signed"),
        (1, "unsigned"),
    ],
)
def test_a_grid_that_does_not_exist_cannot_be_made(bits, kind):
    with pytest.raises(PlanError):
        Grid.of(bits, kind)


@pytest.mark.parametrize("text", ["3c", "2g4z", "4g8", "tc", "8g3z", "f16", "4"])
@pytest.mark.parametrize("shape", [(7, 12), (5, 3, 4), (9, 10)])
def test_a_large_tensor_means_the_same_in_parts(text, shape, monkeypatch):
    known = Quantised.nearest(rand(*shape), Grid.parse(text))
    whole = known.values
    monkeypatch.setattr("rabbet.grids.grid.MANY", 30)
    assert torch.equal(known.values, whole)
