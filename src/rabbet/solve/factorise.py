"""One weight factorised on a grid: every solver behind one call, with its history."""

import io
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from rabbet.errors import FileError, PlanError
from rabbet.files import write_whole
from rabbet.grids.grid import Grid, Quantised
from rabbet.solve.admm import admm
from rabbet.solve.als import (
    CPProblem,
    Factors,
    Fit,
    Problem,
    Tucker2Problem,
    als,
    balanced,
    random_start,
    svd_start,
)
from rabbet.solve.cp import khatri_rao_rows
from rabbet.solve.cp import start as leading_terms
from rabbet.solve.epc import epc, loosened
from rabbet.solve.feedback import Rounded, alternate
from rabbet.solve.metric_cp import MetricCP
from rabbet.solve.varpro import project

Start = Literal["random", "svd", "als", "epc", "varpro"]
Solver = Literal["admm", "feedback", "nearest"]
STEPS = 60  # evaluations of variable projection


@dataclass(frozen=True)
class Factorisation:
    """Factors of a weight on a grid, and how they were found.

    factors: CP: A [out, R], B [in, R], C [k, R]; Tucker-2: V [out, q], U [in, p] and the core
    [k, q * p]. error: relative, of the weight, or of the layer's output in a metric. start_error:
    that of the float factors that the solver began with. history: the error before the first sweep
    of the solver and after each. primal, dual: both residuals of ADMM for each factor and sweep.
    stalled: whether the last sweep changed too little to go on. seconds: of the whole call.
    """

    factors: Factors
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
    grid: str = "4",
    *,
    form: Literal["cp", "tucker"] = "cp",
    solver: Solver = "admm",
    start: Start = "epc",
    slack: float | None = 1.0,
    metric: Tensor | None = None,
    sweeps: int = 20,
    inner: int = 20,
    seed: int = 0,
) -> Factorisation:
    """Factors of a kernel [out, in, *k] at a rank, each on a grid.

    start: float factors: drawn at random, from singular vectors, by alternating least squares, that
    with error-preserving correction (EPC), or by variable projection. slack: EPC's bound in units
    of the error of least squares; None: the best by closed form. solver: what puts them on the
    grid: ADMM with so many sweeps of so many inner iterations (both arXiv 2308.04595), rounding in
    turn with error feedback, or rounding to nearest. metric: the second moment of the layer's
    inputs [in * k, in * k], in which the error is then (CP alone; each column of the factors has a
    scale). Deterministic by its seed. Raises PlanError for a kernel, a rank or settings that do not
    go together.
    """
    begun = time.perf_counter()
    _check(weight, rank, form, (solver, start), metric)
    if slack is None and metric is not None:
        raise PlanError("the best slack has a closed form only without a metric; name one")
    tensor, kind = weight.detach().float().flatten(2), Grid.parse(grid)
    problem = _problem(tensor, form, metric)
    grids = [kind] * 3 if metric is None else [kind.with_axis(0)] * (1 + 2 * rank)
    factors = first_factors(problem, grids, rank, start, slack, seed)
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


def _check(
    weight: Tensor, rank: int, form: str, ways: tuple[str, str], metric: Tensor | None
) -> None:
    if weight.ndim < 3 or weight.shape[2:].numel() == 1:
        raise PlanError(
            "a kernel [out, in, *k] of more than one place is factorised; found shape "
            f"{list(weight.shape)}"
        )
    solver, start = ways
    for name, value, known in (
        ("form", form, ("cp", "tucker")),
        ("solver", solver, get_args(Solver)),
        ("start", start, get_args(Start)),
    ):
        if value not in known:
            raise PlanError(f"{name} is one of {', '.join(known)}; found {value!r}")
    out, channels, places = weight.shape[0], weight.shape[1], weight.shape[2:].numel()
    most = min(out * channels, out * places, channels * places) if form == "cp" else channels
    if not 1 <= rank <= most:
        raise PlanError(f"rank {rank} is none that {form} of this kernel has: 1 to {most}")
    if form == "tucker" and (start != "svd" or metric is not None):
        raise PlanError("Tucker-2 begins with start='svd' and has no metric here")
    n = channels * places
    if metric is not None and metric.shape != (n, n):
        raise PlanError(f"the metric of this kernel is [{n}, {n}]; found {list(metric.shape)}")


def _problem(tensor: Tensor, form: str, metric: Tensor | None) -> Problem:
    if metric is not None:
        return MetricCP(tensor, metric)
    return CPProblem(tensor) if form == "cp" else Tucker2Problem(tensor)


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
    """The float factors that a solver starts from; see `factorise`."""
    tensor = problem.flat.view(problem.shape)
    if isinstance(problem, Tucker2Problem):
        u, core, v = _hosvd(tensor, rank)
        return (v, u, core)
    split: Callable[..., Factors] = (
        MetricCP.split if isinstance(problem, MetricCP) else lambda *parts: parts
    )
    if start == "random":
        return split(*random_start(problem.shape, rank, seed, tensor.device))
    if start == "varpro":
        return split(*_projected(problem, rank, grids[0]))
    begun = split(*svd_start(tensor, rank, seed))
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
    return balanced((found.last.double(), b.mT.double(), c.mT.double()))


def _hosvd(tensor: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Truncated higher-order SVD of a kernel [out, in, k].

    Returns U [in, p], the core [k, q * p] and V [out, q], p being the rank and q, rounded up, the
    same share of the outputs.
    """
    x = tensor.double()
    out, channels, _ = x.shape
    out_rank = -(-rank * out // channels)
    by_output = x.flatten(1)
    v = torch.linalg.eigh(by_output @ by_output.mT)[1].flip(1)[:, :out_rank]
    by_input = x.transpose(0, 1).flatten(1)
    u = torch.linalg.eigh(by_input @ by_input.mT)[1].flip(1)[:, :rank]
    return u, torch.einsum("ijk,iq,jp->kqp", x, v, u).flatten(1), v
