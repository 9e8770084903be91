"""One weight factorised on a grid: every solver behind one call, with its history."""

import io
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from rabbet.errors import FileError, PlanError, require_count
from rabbet.files import write_whole
from rabbet.grids.grid import Grid, Quantised
from rabbet.solve.admm import admm
from rabbet.solve.als import CPProblem, Factors, Fit, Problem, als, balanced
from rabbet.solve.cp import khatri_rao_rows, require_numbers
from rabbet.solve.cp import start as leading_terms
from rabbet.solve.epc import epc, loosened
from rabbet.solve.feedback import Rounded, alternate
from rabbet.solve.kernel_train import TrainProblem, Tucker2Problem, along_axes
from rabbet.solve.metric_cp import MetricCP
from rabbet.solve.varpro import project

FormName = Literal["cp", "tucker", "tt"]
Start = Literal["random", "svd", "als", "epc", "varpro"]
Solver = Literal["admm", "feedback", "nearest"]
SAME = 1e-4  # of its largest entry: how far a metric may be from symmetric and semidefinite
STEPS = 60  # evaluations of variable projection


@dataclass(frozen=True)
class Factorisation:
    """Factors of a weight on a grid, and how they were found.

    factors: CP: A [out, R], B [in, R], C [k, R]; Tucker-2: V [out, q], U [in, p] and the core
    [k, p * q]; a tensor train: V [out, c], U [in, a], then for each axis of the kernel a core
    [places, bond * bond], see `solve.kernel_train`. error: relative, of the weight, or of the
    layer's output in a metric. start_error: that of the float factors that the solver began with.
    history: the error before the first sweep of the solver and after each. primal, dual: both
    residuals of ADMM for each factor and sweep. stalled: whether the last sweep changed too little
    to go on. seconds: of the whole call.
    """

    factors: Factors = field(repr=False)
    numbers: tuple[Quantised, ...] = field(repr=False)
    error: float
    start_error: float
    history: tuple[float, ...]
    primal: tuple[float, ...]
    dual: tuple[float, ...]
    stalled: bool
    seconds: float

    def plot(self, path: str | Path) -> None:
        """Draw the error by sweep, and with ADMM both residuals, into a file (.png, .svg, .pdf).

        Raises FileError without matplotlib, or for a kind of picture that it does not write.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError:
            raise FileError("pictures are drawn by matplotlib; install rabbet[report]") from None
        path, content = Path(path), io.BytesIO()
        figure = Figure(figsize=(7, 3), layout="constrained")
        left, right = figure.subplots(1, 2)
        left.plot(range(len(self.history)), self.history, marker=".")
        left.axhline(self.start_error, linestyle=":", color="grey", label="float start")
        left.set(xlabel="sweep", ylabel="relative error")
        left.legend()
        for values, name in ((self.primal, "primal"), (self.dual, "dual")):
            if values:
                right.semilogy(values, label=name)
        if self.primal:
            right.set(xlabel="factor and sweep", ylabel="residual")
            right.legend()
        else:
            right.set_axis_off()
        try:
            figure.savefig(content, format=path.suffix.removeprefix(".") or "none")
        except ValueError as e:
            raise FileError(f"cannot write the picture {path}: {e}") from None
        write_whole(path, [content.getvalue()])


def factorise(  # noqa: PLR0913 (those behind the star are options, given by name)
    weight: Tensor,
    rank: int,
    grid: str | int = "4",
    *,
    form: FormName = "cp",
    solver: Solver = "admm",
    start: Start | None = None,
    slack: float | None = 1.0,
    metric: Tensor | None = None,
    sweeps: int = 20,
    inner: int = 20,
    seed: int = 0,
) -> Factorisation:
    """Factors of a kernel [out, in, *k] at a rank, each on a grid.

    grid: as a plan writes it, or bits alone. form: CP, Tucker-2, or a tensor train over inputs,
    each axis of the kernel, and outputs, no bond of which is larger than the rank. start: float
    factors: drawn at random, from singular vectors (and one sweep of least squares), by alternating
    least squares, that with error-preserving correction (EPC), or by variable projection; None: EPC
    for CP, least squares for the others, which have neither EPC nor variable projection. slack:
    EPC's bound in units of the error of least squares; None: the best by closed form. solver: what
    puts them on the grid: ADMM with so many sweeps of so many inner iterations (both arXiv
    2308.04595), rounding in turn with error feedback, or rounding to nearest. metric: the second
    moment of the layer's inputs [in * k, in * k], in which the error is then (CP alone; each column
    of the factors has a scale). Deterministic by its seed. Raises PlanError for a kernel, a rank or
    settings that do not go together, and for a chain whose cores are too large to be rounded in
    turn.
    """
    begun = time.perf_counter()
    _check(weight, (form, solver, start), metric)
    _check_numbers(rank, sweeps, inner, seed, slack)
    if slack is None and metric is not None:
        raise PlanError("the best slack has a closed form only without a metric; name one")
    metric = None if metric is None else metric.detach()
    problem, kind = problem_of(weight.detach().float(), form), Grid.parse(str(grid))
    if not 1 <= rank <= problem.full_rank:
        raise PlanError(
            f"rank {rank} is none that {form} of this kernel has: 1 to {problem.full_rank}"
        )
    grids = [kind] * len(problem.shape)
    if metric is not None:
        problem = MetricCP(problem.flat.view(problem.shape), metric.detach())
        grids = [kind.with_axis(0)] * (1 + 2 * rank)
    factors = first_factors(problem, grids, rank, usual_start(problem, start), slack, seed)
    rounded = onto_grids(problem, factors, grids, solver, (sweeps, inner))
    values = tuple(q.values for q in rounded.factors)
    return Factorisation(
        MetricCP.joined(values) if metric is not None else values,
        rounded.factors,
        rounded.error,
        problem.relative(tuple(f.double() for f in factors)),
        rounded.history,
        rounded.primal,
        rounded.dual,
        rounded.stalled,
        time.perf_counter() - begun,
    )


def require_slack(slack: float | None) -> None:
    """Raise PlanError for a bound of EPC below the error of least squares."""
    known = isinstance(slack, int | float) and 1 <= slack < math.inf
    if slack is not None and not known:
        raise PlanError(
            "slack is a number from 1, where the bound is the error of least squares; "
            f"found {slack!r}"
        )


def _check_numbers(rank: int, sweeps: int, inner: int, seed: int, slack: float | None) -> None:
    for name, value in (("rank", rank), ("sweeps", sweeps), ("inner", inner), ("seed", seed)):
        require_count(name, value, 0)
    require_slack(slack)


def _check(weight: Tensor, ways: tuple[str, str, str | None], metric: Tensor | None) -> None:
    require_numbers("the weight", weight)
    if weight.ndim < 3 or weight.shape[2:].numel() == 1 or not weight.numel():
        raise PlanError(
            "a kernel [out, in, *k] of more than one place is factorised; found shape "
            f"{list(weight.shape)}"
        )
    form, solver, start = ways
    for name, value, known in (
        ("form", form, get_args(FormName)),
        ("solver", solver, get_args(Solver)),
        ("start", start, get_args(Start)),
    ):
        if value not in known and value is not None:
            raise PlanError(f"{name} is one of {', '.join(known)}; found {value!r}")
    if form != "cp" and metric is not None:
        raise PlanError(f"{form} has no metric here, only CP has")
    n = weight[0].numel()
    if metric is None:
        return
    require_numbers("the metric", metric)
    if metric.shape != (n, n):
        raise PlanError(f"the metric of this kernel is [{n}, {n}]; found {list(metric.shape)}")
    wide = metric.detach().double()
    largest = float(wide.abs().max())
    if float((wide - wide.mT).abs().max()) > SAME * largest:
        raise PlanError("the metric is a second moment of inputs, which is symmetric; this is not")
    if float(torch.linalg.eigvalsh(wide).min()) < -SAME * largest:
        raise PlanError(
            "the metric is a second moment of inputs, which has no eigenvalue below 0; this has"
        )


def usual_start(problem: Problem, start: Start | None) -> Start:
    """What a solver begins with: what is asked for, or the usual; see `factorise`.

    Raises PlanError for a start that the problem does not have.
    """
    if start is None:
        return "epc" if problem.cancels else "als"
    if not problem.cancels and start in ("epc", "varpro"):
        raise PlanError(
            f"start={start!r} is for CP: a Tucker-2 or a tensor train has no terms that cancel one "
            "another, and begins with 'als' (the usual), 'svd' or 'random'"
        )
    return start


def problem_of(weight: Tensor, form: str) -> Problem:
    """The least-squares problems of the factors of a kernel [out, in, *k]."""
    if form == "tt":
        return TrainProblem(along_axes(weight))
    kind = CPProblem if form == "cp" else Tucker2Problem
    return kind(weight.flatten(2))


def onto_grids(
    problem: Problem,
    factors: Factors,
    grids: Sequence[Grid],
    solver: str,
    steps: tuple[int, int],
) -> Rounded:
    """Float factors put on their grids by a solver; steps: its sweeps, and inner ones of ADMM."""
    if solver == "admm":
        return admm(problem, factors, grids, *steps)
    if solver == "feedback":
        return alternate(problem, factors, grids, steps[0])
    numbers = tuple(Quantised.nearest(f.float(), g) for f, g in zip(factors, grids, strict=True))
    error = problem.relative(tuple(q.values.double() for q in numbers))
    return Rounded(numbers, error, 0, True, (error,))


def first_factors(
    problem: Problem,
    grids: Sequence[Grid],
    rank: int,
    start: str,
    slack: float | None,
    seed: int,
) -> Factors:
    """The float factors that a solver starts from; see `factorise`. Zeros where nothing counts."""
    if not problem.power:
        return tuple(torch.zeros_like(f) for f in problem.random(rank, seed))
    if start == "random":
        return problem.random(rank, seed)
    if start == "varpro":
        return _projected(problem, rank, grids[0])
    begun = problem.leading(rank, seed)
    if start == "svd":
        return als(problem, begun, sweeps=1).factors
    fit: Fit = als(problem, begun)
    if start == "als":
        return fit.factors
    if slack is None and isinstance(problem, CPProblem):
        return loosened(problem, fit, grids).factors
    return epc(problem, fit.factors, (1.0 if slack is None else slack) * fit.error).factors


def _projected(problem: Problem, rank: int, grid: Grid) -> Factors:
    """CP by variable projection, the ridge standing for the rounding to come."""
    second = problem.second.float() if isinstance(problem, MetricCP) else None
    flat, channels = problem.flat.float(), problem.shape[1]
    begun = leading_terms(flat, second, channels, rank)
    noise = 4.0 / grid.levels**2
    found = project(khatri_rao_rows, begun, flat, second, noise, STEPS)
    b, c = found.small
    factors = balanced((found.last.double(), b.mT.double(), c.mT.double()))
    return MetricCP.split(*factors) if isinstance(problem, MetricCP) else factors
