"""CoRa: one bit-width for all layers, and low-rank adapters for the residual (arXiv 2408.00923).

The ranks of all adapters are found by gradient at once, in a hundred batches (`search`); then the
integer program lands them under the budget, and the plan is fitted: either as in the paper, where
nothing is trained, or as `Joint` fits any plan.
"""

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import torch
from torch import Tensor

from rabbet.calibrate.ranges import calibrate_ranges
from rabbet.choose.program import Option, allocate, require_feasible
from rabbet.choose.sensitivity import require_gradients
from rabbet.core.budget import METRICS, Budget
from rabbet.core.plan import LayerPlan, Plan, Term
from rabbet.errors import PlanError, check_fields
from rabbet.forms import Dense, LowRank
from rabbet.grids.grid import Grid, Quantised
from rabbet.layers import Site
from rabbet.methods.base import Fitted, preset
from rabbet.methods.bn_gain import clipped, gain_of
from rabbet.methods.cora.search import Ranking, Residual, Search, heuristic, search_ranks
from rabbet.methods.joint import Joint
from rabbet.model.build import build, validate
from rabbet.model.compressed import Numbers
from rabbet.reconstruct.network import solve_lines
from rabbet.reconstruct.norms import recalibrate_norms
from rabbet.solve.whiten import principal
from rabbet.train.tuning import Tuning
from rabbet.workpiece import Workpiece

RANKS = 128  # ranks of a layer in the integer program


@dataclass(frozen=True)
class CoRa:
    """Adapters for a uniformly quantised network, with ranks found by gradient.

    As in the paper: `CoRa.paper()`.
    """

    bits: int = 4
    """Bits of every layer's weight."""
    act: int | None = 8
    """Bits of every layer's input; None: float."""
    ends: int | None = None
    """Bits of weights and inputs of the first and the last layer; None: as of all other layers."""
    base: Literal["feedback", "clipped"] = "feedback"
    """How weights are rounded.

    "feedback": error feedback in the metric of the inputs, a scale per channel; "clipped": the
    paper's, one scale per tensor for mean +- `sigmas` standard deviations, with nothing solved or
    tuned afterwards.
    """
    sigmas: float = 3.0
    """Standard deviations that "clipped" covers."""
    svd: Literal["whitened", "plain"] = "whitened"
    """SVD of the residual: whitened by the second moment of the inputs, or plain (the paper's)."""
    ranks: Literal["gradient", "heuristic"] = "gradient"
    """Found by gradient (CoRa-O), or the same share of every layer's channels (CoRa-H)."""
    adapter_grid: str = "8c"
    """Grid of the adapters' factors, in the notation of plans."""
    linears: bool = True
    """Whether linear layers get adapters, too; in the paper only convs do."""
    ranking: Ranking = Ranking()  # noqa: RUF009 (frozen)
    """The search for the ranks."""
    tuning: Tuning = Tuning(steps=140)  # noqa: RUF009 (frozen)
    """The tuning at the end, unless the base is "clipped"."""

    @classmethod
    def paper(cls, **changes: Any) -> Self:
        """The settings of the paper and its code, and what changes in them.

        Weights of convs are clipped at three deviations and rounded on one scale, the SVD is plain,
        the ranks are found in 250 batches of 32 examples by labels (`Task(loss=...)`) and a
        penalty, on the statistics of the batch; no weight is trained. Raises PlanError for settings
        that there are not.
        """
        ranking = Ranking(
            steps=250, batch=32, order=4, offset=0.0, start=0.9, steering="hinge", rate=0.01,
            penalty=1.0, loss="labels", norm="batch",
        )  # fmt: skip
        settings = {"base": "clipped", "svd": "plain", "linears": False, "ranking": ranking}
        return preset(cls, settings, changes)

    def __post_init__(self) -> None:
        check_fields(self)
        for bits in (self.bits, *([] if self.ends is None else [self.ends])):
            Grid.of(bits)
        if self.act is not None:
            Grid.of(self.act, "unsigned")
        Grid.parse(self.adapter_grid)
        if self.sigmas <= 0:
            raise PlanError(
                "sigmas is a number of standard deviations and must be positive; "
                f"found {self.sigmas}"
            )

    def plan(self, piece: Workpiece, budget: Budget) -> Plan:
        """The same bits everywhere, and ranks that keep the budget; see `Method.plan`."""
        bases = self._bases(piece)
        piece.expect(each for line in bases for each in self._lines(piece, line))
        table = [self._options(piece, line) for line in bases]
        require_feasible(table, budget, piece)
        if self.ranks == "heuristic":
            return self._even(piece, bases, budget)
        targets = self._targets(self.search(piece, budget))
        # Only options near the target ranks; no adapter is always among them, as the budget was
        # found feasible with that.
        table = [_near(row, targets.get(row[0].plan.name, 0.0)) for row in table]
        prices = {
            r[0].plan.name: (r[-1].cost.bytes - r[0].cost.bytes) / max(_rank(r[-1]), 1)
            for r in table
        }
        highest = max([*prices.values(), 1e-9])

        def score(option: Option) -> float:
            """The squared distance from the target rank, in bytes relative to the highest price."""
            name = option.plan.name
            return ((_rank(option) - targets.get(name, 0.0)) * prices[name] / highest) ** 2

        scores = [[score(option) for option in row] for row in table]
        return allocate(scores, table, budget, piece)

    def search(self, piece: Workpiece, budget: Budget) -> Search:
        """Search for cut-offs under a budget, the first part of `plan`.

        `rabbet.report.draw_search` draws the result. Raises PlanError if no layer can have an
        adapter.
        """
        require_gradients(piece)
        bases = Plan(self._bases(piece))
        numbers = self._rounded(piece, bases)
        residuals, room = self._residuals(piece, bases, numbers, budget)
        if not residuals:
            raise PlanError("no layer of this network can have an adapter; use Joint")
        student = build(piece.model, bases, piece.survey, numbers)
        found = search_ranks(student, piece, residuals, room, self.ranking)
        piece.histories += found.histories
        return found

    def fit(self, piece: Workpiece, plan: Plan) -> Fitted:
        """Find codes and scales as `Joint` does, or with a clipped base; see `Method.fit`."""
        if self.base == "feedback":
            fitted = Joint(tuning=self.tuning).fit(piece, plan)
            return replace(fitted, notes=(*fitted.notes, *_dear(piece, plan)))
        validate(plan, piece.survey)
        numbers = {
            line.name: self._clipped_with_adapters(piece, piece.survey[line.name], line)
            for line in plan
        }
        student = build(piece.model, plan, piece.survey, numbers)
        calibrate_ranges(student, piece.task, piece.seed, progress=piece.jobs.progress)
        if self.ranking.norm == "batch":
            recalibrate_norms(student, piece)
            calibrate_ranges(student, piece.task, piece.seed)
        notes = ("not tuned: the paper trains no weight", *_dear(piece, plan))
        return Fitted(student, notes)

    def _bases(self, piece: Workpiece) -> tuple[LayerPlan, ...]:
        """The line of every layer without an adapter."""
        sites = piece.survey.sites
        running = [site for site in sites if site.runs]
        lines = []
        for site in sites:
            bits, act = self.bits, self.act
            if self.ends is not None and site in (*running[:1], *running[-1:]):
                bits, act = self.ends, None if act is None else self.ends
            term = Term(Dense(), Grid.of(bits, axis=0))
            lines.append(LayerPlan(site.name, (term,), act if site.multiplies else None))
        return tuple(lines)

    def _lines(self, piece: Workpiece, line: LayerPlan) -> list[LayerPlan]:
        """The layer without an adapter, then with an adapter of every rank."""
        site = piece.survey[line.name]
        full = LowRank(1).full_rank(site) if self.linears or site.space else 0
        return [line, *(self._adapted(line, rank) for rank in range(1, full))]

    def _options(self, piece: Workpiece, line: LayerPlan) -> list[Option]:
        """The same with what each costs."""
        site = piece.survey[line.name]
        return [Option(x, piece.layer_cost(site, x)) for x in self._lines(piece, line)]

    def _adapted(self, line: LayerPlan, rank: int) -> LayerPlan:
        """A line with an adapter of this rank; of rank 0, the line itself."""
        if rank < 1:
            return line
        adapter = Term(LowRank(rank), Grid.parse(self.adapter_grid))
        return LayerPlan(line.name, (*line.terms, adapter), line.act)

    def _even(self, piece: Workpiece, bases: tuple[LayerPlan, ...], budget: Budget) -> Plan:
        """CoRa-H: the largest share of all layers' channels in the budget, to a thousandth."""
        hosts = [line for line in bases if len(self._options(piece, line)) > 1]
        sites = [piece.survey[line.name] for line in hosts]

        def at(share: float) -> Plan:
            ranks = dict(zip((s.name for s in sites), heuristic(sites, share), strict=True))
            return Plan(tuple(self._adapted(line, ranks.get(line.name, 0)) for line in bases))

        def over(thousandths: int) -> bool:
            cost = piece.cost(at(thousandths / 1000))
            return any(limit.broken_by(cost, piece.float_cost) for limit in budget.limits)

        return at((bisect_right(range(1, 1000), False, key=over)) / 1000)

    def _targets(self, search: Search) -> dict[str, float]:
        """The ranks to land near, by layer; without an offset rounded up, as in the paper."""
        if self.ranking.offset:
            return search.ranks
        return {name: float(torch.tensor(rank).ceil()) for name, rank in search.ranks.items()}

    def _rounded(self, piece: Workpiece, bases: Plan) -> dict[str, Numbers]:
        """The rounded weights of all layers, before there are adapters."""
        if self.base == "clipped":
            numbers: dict[str, Numbers] = {}
            for line in bases:
                site = piece.survey[line.name]
                numbers[line.name] = [[clipped(piece, site, line.terms[0].grid, self.sigmas)]]
            return numbers
        return solve_lines(piece, "rounding", bases)

    def _residuals(
        self, piece: Workpiece, bases: Plan, numbers: Mapping[str, Numbers], budget: Budget
    ) -> tuple[dict[str, Residual], Tensor]:
        """The residuals of all layers that can have an adapter, and the room for adapters.

        Prices and room are in units, one for each limit: what all these layers would cost dense on
        the adapters' grid. For bytes that is about the number of their weights, so that a price is
        the share of parameters, as in the paper. The room is [limits].
        """
        hosts = {line.name: row for line in bases if len(row := self._options(piece, line)) > 1}
        dense = {
            n: LayerPlan(n, (Term(Dense(), Grid.parse(self.adapter_grid)),), r[0].plan.act)
            for n, r in hosts.items()
        }
        whole, least = piece.float_cost, piece.cost(bases)
        amounts = [METRICS[limit.metric].amount for limit in budget.limits]
        units, room = [], []
        for limit, amount in zip(budget.limits, amounts, strict=True):
            units.append(
                sum(amount(piece.layer_cost(piece.survey[n], line)) for n, line in dense.items())
            )
            room.append((limit.amount(whole) - amount(least)) / max(units[-1], 1))
        residuals = {}
        for name, row in hosts.items():
            left, right, values = self._decomposed(piece, piece.survey[name], numbers[name][0][0])
            largest = row[-1]
            prices = []
            for amount, unit in zip(amounts, units, strict=True):
                cost = amount(largest.cost) - amount(row[0].cost)
                prices.append(len(values) * cost / _rank(largest) / max(unit, 1))
            residuals[name] = Residual(
                left, right, values, torch.tensor(prices, dtype=torch.float64)
            )
        return residuals, torch.tensor(room, dtype=torch.float64)

    def _decomposed(
        self, piece: Workpiece, site: Site, base: Quantised
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The residual of the folded weight: left [out, full], right [full, n], values [full].

        With a clipped base and a plain SVD it is decomposed without the BatchNorm's gain, as in the
        paper.
        """
        residual = (piece.weight(site) - base.values).flatten(1)
        # A layer that no example reached has no moment.
        moment = piece.moments().get(site.name) if self.svd == "whitened" else None
        second = None if moment is None else moment[0]
        gain = None
        if self.base == "clipped" and second is None:
            gain = gain_of(piece, site, base.grid)
        if gain is not None:
            residual = residual / gain[:, None]
        left = principal(residual, second, min(residual.shape))
        right = left.mT @ residual
        weighted = right if second is None else right @ second
        values = (weighted * right).sum(1).clamp_min(0).sqrt()
        return (left if gain is None else left * gain[:, None]), right, values

    def _clipped_with_adapters(
        self, piece: Workpiece, site: Site, line: LayerPlan
    ) -> list[list[Quantised]]:
        """The paper's codes and scales: the base and, if the line has one, the adapter.

        Both factors of the adapter hold the roots of the singular values.
        """
        forms = [t.form.name for t in line.terms]
        if forms not in (["dense"], ["dense", "lowrank"]) or line.terms[0].form.partial:
            raise PlanError(
                f"{line}: CoRa with a clipped base fits a dense term with an adapter, if any"
            )
        base = clipped(piece, site, line.terms[0].grid, self.sigmas)
        if len(forms) == 1:
            return [[base]]
        term = line.terms[1]
        left, right, _ = self._decomposed(piece, site, base)
        rank = term.form.rank
        norms = right[:rank].norm(dim=1).clamp_min(1e-20).sqrt()
        a = (right[:rank] / norms[:, None]).view(-1, *site.shape[1:])
        return [
            [base],
            [
                Quantised.nearest(a, term.grid),
                Quantised.nearest(left[:, :rank] * norms, term.grid),
            ],
        ]


def _rank(option: Option) -> int:
    """The rank of an option's adapter; 0 if it has none."""
    return sum(term.form.rank or 0 for term in option.plan.terms[1:])


def _near(row: Sequence[Option], target: float) -> list[Option]:
    """The option without an adapter, and those of the `RANKS` ranks nearest to a target."""
    start = min(max(1, round(target) - RANKS // 2), max(1, len(row) - RANKS))
    return [row[0], *row[start : start + RANKS]]


def _dear(piece: Workpiece, plan: Plan) -> Iterator[str]:
    """What a user should know of adapters that cost more than they spare."""
    dense = (Term(Dense(), Grid.of(8, axis=0)),)
    dear = [
        line.name
        for line in plan
        if len(line.terms) > 1 and _bytes(piece, line) > _bytes(piece, replace(line, terms=dense))
    ]
    if dear:
        yield (
            f"adapters take more bytes than 8 bits without would, in {len(dear)} layers, such as "
            f"{dear[0]}: a smaller budget, more bits or Joint spends them better"
        )


def _bytes(piece: Workpiece, line: LayerPlan) -> int:
    return piece.layer_cost(piece.survey[line.name], line).bytes
