"""Quantised CP factorisation by ADMM, post-training and without labels (arXiv 2308.04595).

Every conv with a kernel larger than 1 x 1, except in the first layer and in groups, becomes three
factors at one rate and one bit-width; the other layers are rounded to nearest at 8 bits. BatchNorm
statistics are re-estimated, and inputs are quantised. The paper does not allocate ranks or bits to
a budget, so the budget is only checked, unless several widths are given: then an integer program
chooses among them. Each choice that the paper left open is a setting.
"""

import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rabbet.calibrate.ranges import calibrate_ranges
from rabbet.choose.program import Option, allocate, require_feasible
from rabbet.choose.sensitivity import output_errors, require_gradients
from rabbet.core.budget import Budget
from rabbet.core.history import History
from rabbet.core.plan import LayerPlan, Plan, Term
from rabbet.core.survey import Survey
from rabbet.errors import PlanError, check_fields, check_least
from rabbet.forms import CP, RANKED, Dense, Ranked, TTConv, Tucker
from rabbet.grids.grid import Grid, Quantised
from rabbet.jobs import Job, Tensors
from rabbet.layers import Site
from rabbet.methods.base import Fitted
from rabbet.methods.bn_gain import round_to_nearest, with_gain, without_gain
from rabbet.model.build import build, validate
from rabbet.model.compressed import Numbers
from rabbet.reconstruct.norms import recalibrate_norms
from rabbet.solve.als import Problem
from rabbet.solve.factorise import FormName, first_factors, onto_grids, require_slack, usual_start
from rabbet.workpiece import Workpiece

Start = Literal["random", "svd", "als", "epc"]
Solver = Literal["admm", "feedback", "nearest"]
LOST = 0.5  # relative error of a kernel that deserves a word
SOLVED = ("dense", *(name for name, form in RANKED.items() if form.alternates))
KERNELS: dict[FormName, type[Ranked]] = {"cp": CP, "tucker": Tucker, "tt": TTConv}


@dataclass(frozen=True)
class ADMM:
    """The method of the paper.

    The defaults are the paper's, except for 20 x 20 iterations in place of 1,000 x 1,000. A file
    stores a scale per channel in either case: the gain of the BatchNorm is folded into them.
    """

    bits: int | tuple[int, ...] = 4
    """Of the factors; of several the program chooses one for each layer, under the budget."""
    rate: float = 2.0
    """How many times fewer parameters a factorised layer has."""
    ranks: tuple[tuple[str, int], ...] = ()
    """(layer, rank) where the rank is not that of `rate`."""
    start: Start | None = None
    """Factors that ADMM begins with; "epc" (error-preserving correction) is the paper's.

    None: "epc" for CP, "als" for the others, which have no terms that cancel one another.
    """
    slack: float | None = 1.0
    """EPC's bound, in units of the ALS error (1: the paper's); None: the best by closed form."""
    solver: Solver = "admm"
    """"feedback" is error-feedback rounding; "nearest" only rounds."""
    form: FormName = "cp"
    """CP (the paper's), Tucker-2 or a tensor train (`ttconv` in a plan).

    A kernel that it does not fit is rounded like the other layers.
    """
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
        if not self.widths:
            raise PlanError("bits is a number of bits, or several to choose from; found none")
        for bits in (*self.widths, self.rest):
            Grid.of(bits)
        if self.act is not None:
            Grid.of(self.act, "unsigned")
        check_least(self, 0, "norms", "sweeps")
        if self.rate <= 0:
            raise PlanError(
                f"a rate divides the parameters of a layer and must be positive; found {self.rate}"
            )
        require_slack(self.slack)
        for name, rank in self.ranks:
            if rank < 1:
                raise PlanError(f"a rank is at least 1; ranks give {name!r} {rank}")
            if [each for each, _ in self.ranks].count(name) > 1:
                raise PlanError(f"ranks give {name!r} more than one rank")
        if self.form != "cp" and self.start == "epc":
            raise PlanError(
                f"start='epc' is for CP; {self.form} begins with 'als' (the usual), 'svd' or "
                "'random'"
            )

    @property
    def widths(self) -> tuple[int, ...]:
        """The bits that factors may have."""
        return (self.bits,) if isinstance(self.bits, int) else tuple(dict.fromkeys(self.bits))

    def plan(self, piece: Workpiece, budget: Budget) -> Plan:
        """The same form and rate for every kernel, and the same bits, unless there are several.

        Of several the program chooses those whose rounding changes the network's output least,
        each kernel solved at every width. Raises BudgetError if the budget cannot be kept.
        """
        for name, _ in self.ranks:
            if not any(s.name == name for s in piece.survey):
                raise PlanError(
                    f"ranks name {name!r}, which is not a layer that can be compressed here"
                )
            if not self._full_rank(piece.survey, piece.survey[name]):
                raise PlanError(
                    f"ranks name {name!r}, which is not factorised as {self.form}: the first layer "
                    f"is rounded, and so is what {self.form} does not fit; leave it out"
                )
        rows = [
            [self._line(piece.survey, site, bits) for bits in self.widths] for site in piece.survey
        ]
        rows = [list(dict.fromkeys(row)) for row in rows]
        plan = Plan(tuple(row[0] for row in rows))
        validate(plan, piece.survey)
        if len(self.widths) > 1:
            return self._chosen(piece, budget, rows)
        budget.check(piece.cost(plan), piece.float_cost)
        return plan

    def _chosen(self, piece: Workpiece, budget: Budget, rows: list[list[LayerPlan]]) -> Plan:
        """One line of each row, by what its rounding does to the network's output.

        That is told by the difference from the widest line. What the rank leaves of a kernel is the
        same for all widths and far more: beside it a width that rounds less may look worse.
        """
        table = [
            [Option(line, piece.layer_cost(piece.survey[line.name], line)) for line in row]
            for row in rows
        ]
        require_feasible(table, budget, piece)
        require_gradients(piece)
        several = [row for row in rows if len(row) > 1]
        lines = [line for row in several for line in row]
        found: dict[str, list[Tensor]] = {}
        for line, solution in zip(lines, self._solve(piece, lines), strict=True):
            site, term = piece.survey[line.name], line.terms[0]
            values = [q.values for q in _read(piece, site, term, solution)]
            found.setdefault(line.name, []).append(term.form.contract(site, values))
        widest = self.widths.index(max(self.widths))
        changes = {name: torch.stack(each) - each[widest] for name, each in found.items()}
        errors = output_errors(piece, changes)
        scores = [errors[row[0].name].tolist() if len(row) > 1 else [0.0] for row in rows]
        return allocate(scores, table, budget, piece)

    def fit(self, piece: Workpiece, plan: Plan) -> Fitted:
        """Solve each layer by itself, then estimate statistics and ranges; see `Method.fit`."""
        validate(plan, piece.survey)
        other = next((x for x in plan if len(x.terms) > 1 or not _solvable(x.terms[0])), None)
        if other is not None:
            raise PlanError(
                f"ADMM fits one term of {', '.join(SOLVED)}, of all outputs; {other} is not that"
            )
        chains = [layer for layer in plan if layer.terms[0].form.alternates]
        uneven = next((c for c in chains if c.terms[0].grid.codebook.uniform is None), None)
        if uneven is not None:
            raise PlanError(
                f"ADMM solves factors on grids of equal distances; {uneven} has another: take one "
                "such as 8c, or fit the plan with Joint"
            )
        names = (chain.name for chain in chains)
        solutions = dict(zip(names, self._solve(piece, chains), strict=True))
        errors = {name: tuple(x["history"].tolist()) for name, x in solutions.items()}
        if errors:
            kernels = History("factorising", "sweep", "error of each kernel", errors, first=0)
            piece.histories.append(kernels)
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

    def _full_rank(self, survey: Survey, site: Site) -> int:
        """The largest rank of a layer; 0 for one that is not factorised, as the first is not."""
        return 0 if site is survey.sites[0] else KERNELS[self.form](1).full_rank(site)

    def _line(self, survey: Survey, site: Site, bits: int) -> LayerPlan:
        """The line of the plan for a layer."""
        act = self.act if site.multiplies else None
        form, full = KERNELS[self.form], self._full_rank(survey, site)
        if not full:
            return LayerPlan(site.name, (Term(Dense(), Grid.of(self.rest, axis=0)),), act)
        grid = Grid.of(bits, axis=0)

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
    begun = sum(float(solution["begun"]) for solution in solutions.values()) / len(errors)
    settled = sum(bool(solution["settled"]) for solution in solutions.values())
    yield (
        f"{len(errors)} kernels factorised, mean relative error {mean:.3f}, that of the "
        f"float factors before rounding {begun:.3f}; "
        f"of {settled} the error had settled before the last sweep"
    )
    lost = {name: error for name, error in errors.items() if error >= LOST}
    if lost:
        worst = max(lost, key=lambda name: lost[name])
        yield (
            f"{len(lost)} kernels are further from their weights than half of them, {worst} by "
            f"{lost[worst]:.3g}: take a smaller rate or more bits, or leave out start"
        )


def _solvable(term: Term) -> bool:
    return term.form.whole or term.form.alternates


def solve_kernel(weight: Tensor, *, term: Term, method: ADMM, seed: int) -> Tensors:
    """Quantised factors of one kernel [out, in, *k], of least squared error in the weight: a job.

    Returns codes and scale of each factor by its position, the relative error, that of the float
    factors before (begun), and its history.
    """
    problem = term.form.problem(weight)
    grids = _grids(problem, term.grid, method)
    assert term.form.rank is not None
    begin = usual_start(problem, method.start)
    start = first_factors(problem, grids, term.form.rank, begin, method.slack, seed)
    rounded = onto_grids(problem, start, grids, method.solver, (method.sweeps, method.inner))
    result = {
        "error": torch.tensor(rounded.error),
        "begun": torch.tensor(problem.relative(tuple(f.double() for f in start))),
        "history": torch.tensor(rounded.history),
        "settled": torch.tensor(rounded.stalled),
    }
    for k, q in enumerate(rounded.factors):
        result |= {f"{k}.codes": q.codes.to(torch.int8), f"{k}.scale": q.scale}
    return result


def _grids(problem: Problem, grid: Grid, method: ADMM) -> list[Grid]:
    """The grid of each factor, in the order of the tensor's axes."""
    per_channel = method.scales == "channel"
    axes = problem.channel_axes
    return [Grid.of(grid.bits, grid.kind, axis if per_channel else None) for axis in axes]


def _read(piece: Workpiece, site: Site, term: Term, solved: Tensors) -> list[Quantised]:
    """The factors in the order of the form, with the BatchNorm's gain in the last one's scales."""
    grid, count = term.grid, len(term.form.shapes(site))
    codes = term.form.arranged(site, [solved[f"{k}.codes"].float() for k in range(count)])
    last, *scales = (solved[f"{k}.scale"] for k in range(count))
    first = [
        Quantised(grid, part, scale.expand(grid.scale_shape(tuple(part.shape))).clone())
        for part, scale in zip(codes[:-1], scales, strict=True)
    ]
    return [*first, with_gain(piece, site, grid, codes[-1], last)]
