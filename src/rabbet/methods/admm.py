"""Quantised CP factorisation by ADMM, post-training and without labels (arXiv 2308.04595).

Every conv with a kernel larger than 1 x 1, except in the first layer and in groups, becomes three
factors at one rate and one bit-width; the other layers are rounded to nearest at 8 bits. BatchNorm
statistics are re-estimated, and inputs are quantised. The paper does not allocate ranks or bits to
a budget, so the budget is only checked. Each choice that the paper left open is a setting.
"""

import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rabbet.calibrate.ranges import calibrate_ranges
from rabbet.core.budget import Budget
from rabbet.core.plan import LayerPlan, Plan, Term
from rabbet.errors import PlanError, check_fields, check_least
from rabbet.forms import RANKED, Dense
from rabbet.grids.grid import Grid, Quantised
from rabbet.jobs import Job, Tensors
from rabbet.layers import Site
from rabbet.methods.base import Fitted
from rabbet.methods.bn_gain import round_to_nearest, with_gain, without_gain
from rabbet.model.build import build, validate
from rabbet.model.compressed import Numbers
from rabbet.reconstruct.norms import recalibrate_norms
from rabbet.solve.factorise import first_factors, onto_grids
from rabbet.workpiece import Workpiece

Start = Literal["random", "svd", "als", "epc"]
Solver = Literal["admm", "feedback", "nearest"]
LOST = 0.5  # relative error of a kernel that deserves a word
SOLVED = ("dense", *(name for name, form in RANKED.items() if form.channel_axes))


@dataclass(frozen=True)
class ADMM:
    """The method of the paper.

    The defaults are the paper's, except for 20 x 20 iterations in place of 1,000 x 1,000. A file
    stores a scale per channel in either case: the gain of the BatchNorm is folded into them.
    """

    bits: int = 4
    """Of the factors."""
    rate: float = 2.0
    """How many times fewer parameters a factorised layer has."""
    ranks: tuple[tuple[str, int], ...] = ()
    """(layer, rank) where the rank is not that of `rate`."""
    start: Start = "epc"
    """Factors that ADMM begins with; "epc" (error-preserving correction) is the paper's."""
    slack: float | None = 1.0
    """EPC's bound, in units of the ALS error (1: the paper's); None: the best by closed form."""
    solver: Solver = "admm"
    """"feedback" is error-feedback rounding; "nearest" only rounds."""
    form: Literal["cp", "tucker"] = "cp"
    """CP (the paper's) or Tucker-2, which begins from "svd"."""
    scales: Literal["tensor", "channel"] = "tensor"
    """One scale for each factor (the paper's), or for each channel of it."""
    rest: int = 8
    """Bits of the layers that are not factorised."""
    act: int | None = 8
    """Bits of inputs and of the tensors between factors; None: float."""
    norms: int = 2048
    """Images that the statistics of BatchNorms are estimated on anew, as in the paper; 0: none."""
    sweeps: int = 20
    """Over all factors; in the paper 1,000."""
    inner: int = 20
    """Iterations of ADMM for a factor in a sweep; in the paper 1,000."""

    def __post_init__(self) -> None:
        check_fields(self)
        for bits in (self.bits, self.rest):
            Grid.of(bits)
        if self.act is not None:
            Grid.of(self.act, "unsigned")
        check_least(self, 0, "norms")
        if self.rate <= 0:
            raise PlanError(
                f"a rate divides the parameters of a layer and must be positive; found {self.rate}"
            )
        if self.form == "tucker" and self.start != "svd":
            raise PlanError(
                "Tucker-2 starts from singular vectors only; write start='svd' "
                f"(found {self.start!r})"
            )

    def plan(self, piece: Workpiece, budget: Budget) -> Plan:
        """The same form, rate and bits for every kernel.

        Raises BudgetError if that costs more than the budget allows.
        """
        known = {s.name for s in piece.survey}
        for name, _ in self.ranks:
            if name not in known:
                raise PlanError(
                    f"ranks name {name!r}, which is not a layer that can be compressed here"
                )
        plan = Plan(tuple(self._line(site, first=k == 0) for k, site in enumerate(piece.survey)))
        validate(plan, piece.survey)
        budget.check(piece.cost(plan), piece.float_cost)
        return plan

    def fit(self, piece: Workpiece, plan: Plan) -> Fitted:
        """Solve each layer by itself, then estimate statistics and ranges; see `Method.fit`."""
        validate(plan, piece.survey)
        other = next((x for x in plan if len(x.terms) > 1 or not _solvable(x.terms[0])), None)
        if other is not None:
            raise PlanError(
                f"ADMM fits one term of {', '.join(SOLVED)}, of all outputs; {other} is not that"
            )
        chains = [layer for layer in plan if layer.terms[0].form.channel_axes]
        names = (chain.name for chain in chains)
        solutions = dict(zip(names, self._solve(piece, chains), strict=True))
        numbers: dict[str, Numbers] = {}
        for layer in plan:
            site, term = piece.survey[layer.name], layer.terms[0]
            if layer.name in solutions:
                numbers[layer.name] = [_read(piece, site, term, solutions[layer.name])]
            else:
                numbers[layer.name] = [[round_to_nearest(piece, site, term.grid)]]
        student = build(piece.model, plan, piece.survey, numbers)
        calibrate_ranges(student, piece.task, piece.seed, progress=piece.jobs.progress)
        if self.norms:
            recalibrate_norms(student, piece, self.norms)
            calibrate_ranges(student, piece.task, piece.seed)
        return Fitted(student, tuple(_notes(solutions)))

    def _line(self, site: Site, first: bool) -> LayerPlan:
        """The line of the plan for a layer; first: whether it is the first layer."""
        act = self.act if site.multiplies else None
        form = RANKED[self.form]
        full = 0 if first else form(1).full_rank(site)
        if not full:
            return LayerPlan(site.name, (Term(Dense(), Grid.of(self.rest, axis=0)),), act)
        grid = Grid.of(self.bits, axis=0)

        def entries(rank: int) -> int:
            return sum(math.prod(shape) for shape in form(rank).shapes(site))

        # The largest rank that keeps the rate; for CP it is floor(numel / (I + J + K) / rate).
        rank = bisect_right(range(1, full + 1), site.numel / self.rate, key=entries)
        rank = dict(self.ranks).get(site.name, max(rank, 1))
        return LayerPlan(site.name, (Term(form(rank), grid),), act)

    def _solve(self, piece: Workpiece, chains: list[LayerPlan]) -> list[Tensors]:
        """The results of `solve_kernel`, in the order of the chains."""
        jobs: list[Job] = []
        for layer in chains:
            weight = without_gain(piece, piece.survey[layer.name], layer.terms[0].grid)
            settings = {"term": layer.terms[0], "method": self, "seed": piece.seed}
            jobs.append((solve_kernel, {"weight": weight}, settings))
        return piece.jobs.run("factorising layers", jobs)


def _notes(solutions: Mapping[str, Tensors]) -> Iterator[str]:
    """What a user should know of factorised kernels."""
    if not solutions:
        yield "no kernel factorised: every layer of the plan is dense"
        return
    errors = {name: float(solution["error"]) for name, solution in solutions.items()}
    mean = sum(errors.values()) / len(errors)
    settled = sum(bool(solution["settled"]) for solution in solutions.values())
    yield (
        f"{len(errors)} kernels factorised, mean relative error {mean:.3f}; of {settled} the error "
        "had settled before the last sweep"
    )
    lost = {name: error for name, error in errors.items() if error >= LOST}
    if lost:
        worst = max(lost, key=lambda name: lost[name])
        yield (
            f"{len(lost)} kernels are further from their weights than half of them, {worst} by "
            f"{lost[worst]:.3g}: take a smaller rate or more bits, or begin with start='epc'"
        )


def _solvable(term: Term) -> bool:
    return term.form.whole or bool(term.form.channel_axes)


def solve_kernel(weight: Tensor, *, term: Term, method: ADMM, seed: int) -> Tensors:
    """Quantised factors of one kernel [out, in, *k], of least squared error in the weight: a job.

    Returns codes and scale of each factor by its position, the relative error, and its history.
    """
    problem, grids = term.form.problem(weight), _grids(term, method)
    assert problem is not None
    assert term.form.rank is not None
    start = first_factors(problem, grids, term.form.rank, method.start, method.slack, seed)
    rounded = onto_grids(problem, start, grids, method.solver, (method.sweeps, method.inner))
    result = {
        "error": torch.tensor(rounded.error),
        "history": torch.tensor(rounded.history),
        "settled": torch.tensor(rounded.stalled),
    }
    for k, q in enumerate(rounded.factors):
        result |= {f"{k}.codes": q.codes.to(torch.int16), f"{k}.scale": q.scale}
    return result


def _grids(term: Term, method: ADMM) -> list[Grid]:
    """The grid of each factor, in the order of the tensor's axes."""
    bits, kind = term.grid.bits, term.grid.kind
    per_channel = method.scales == "channel"
    return [Grid.of(bits, kind, axis if per_channel else None) for axis in term.form.channel_axes]


def _read(piece: Workpiece, site: Site, term: Term, solved: Tensors) -> list[Quantised]:
    """The factors in the order of the form, with the BatchNorm's gain in the last one's scales."""
    grid, count = term.grid, len(term.form.channel_axes)
    codes = term.form.arranged(site, [solved[f"{k}.codes"].float() for k in range(count)])
    last, *scales = (solved[f"{k}.scale"] for k in range(count))
    first = [
        Quantised(grid, part, scale.expand(grid.scale_shape(tuple(part.shape))).clone())
        for part, scale in zip(codes[:-1], scales, strict=True)
    ]
    return [*first, with_gain(piece, site, grid, codes[-1], last)]
