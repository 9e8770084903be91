"""Rank and bits of a decoder's matrices by one integer program; block by block, without labels.

The divergence of the network's scores that each candidate of each matrix costs is foretold from two
passes over the blocks (`looking`), the program picks one for each under all limits at once, and the
blocks are then fitted one after the other (`fitting`), and tuned together (`together`). Never more
than one block is worked on.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from rabbet.calibrate.ranges import calibrate_ranges
from rabbet.choose.program import Allocator, Option, Priced
from rabbet.choose.search import Chooser, Layer
from rabbet.core.budget import Budget
from rabbet.core.cost import layer_cost
from rabbet.core.layout import TYPES
from rabbet.core.plan import LayerPlan, Plan, Term, quoted
from rabbet.core.survey import Survey
from rabbet.errors import PlanError, check_fields, check_least
from rabbet.forms import Dense, LowRank
from rabbet.grids.grid import Grid
from rabbet.layers import Site
from rabbet.methods.base import Fitted
from rabbet.methods.blockwise.bench import Bench, Menus
from rabbet.methods.blockwise.draft import rest_among
from rabbet.methods.blockwise.fitting import Finished, errors_of, fit_blocks, numbers_of
from rabbet.methods.blockwise.prepare import Ways
from rabbet.methods.blockwise.rotate import turned
from rabbet.methods.blockwise.stack import Stack
from rabbet.methods.blockwise.together import tuned_together
from rabbet.methods.blockwise.tuning import Pacing
from rabbet.model.build import build, validate
from rabbet.model.compressed import Numbers
from rabbet.reconstruct.candidates import Terms
from rabbet.workpiece import Workpiece


@dataclass(frozen=True)
class Blockwise:
    """For decoders: groups of inputs that share a scale, low rank beside; a block at a time.

    The first output is taken for scores of words unless the task says that it is values.
    """

    grids: tuple[str, ...] = (
        "tg64", "2g64z", "2g128z", "2hg64", "3g64z", "3g64", "3g128", "4g64", "4g128", "5g128",
        "6g128", "8c",
    )  # fmt: skip
    """Of dense weights, as a plan writes them."""
    adapters: tuple[tuple[str, float], ...] = (("2g64z", 0.03), ("3g128", 0.03))
    """Dense weights with a low-rank adapter: the weight's grid, the adapter's share of entries."""
    adapter_grids: tuple[str, ...] = ("8c", "4c")
    """Of the adapters' factors."""
    rank: bool = True
    """False leaves rank out: no adapters, bits alone."""
    act: int | None = None
    """Bits of every layer's input; None: float, as decoders run fastest one word at a time."""
    scale: bool = True
    """Whether scales may move from what makes a layer's inputs into the layer, where that pays."""
    permute: bool = True
    """Whether channels between layers may be put in an order in which those alike share scales."""
    rotate: bool = False
    """Whether hidden states are turned by a random orthogonal matrix, where that is exact."""
    scored: int = 16
    """Examples that gradients are taken of, to tell what errors of a matrix do."""
    epochs: int = 4
    """Passes over the batches in which each block is tuned; 0: no tuning."""
    codes: float = 1e-2
    """Learning rate of the codes, in steps of the grid."""
    scales: float = 2e-3
    """Learning rate of scales and biases, relative to their mean magnitude."""
    passes: int = 2
    """Passes over the batches in which scales and biases of all blocks are tuned; 0: not tuned."""
    together: float = 4e-3
    """Learning rate of scales and biases there, relative to their mean magnitude."""

    def __post_init__(self) -> None:
        check_fields(self)
        check_least(self, 1, "scored")
        check_least(self, 0, "epochs", "codes", "scales", "passes", "together")
        if not self.grids:
            raise PlanError("Blockwise needs at least one grid to choose from")
        for text in (*self.grids, *self.adapter_grids, *(g for g, _ in self.adapters)):
            Grid.parse(text)
        if self.act is not None:
            Grid.of(self.act, "unsigned")

    def plan(self, piece: Workpiece, budget: Budget) -> Plan:
        """Choose a candidate for every layer; see `Method.plan`."""
        return self.chosen(_bench(piece, self.rotate), piece, budget)

    def chooser(self, piece: Workpiece) -> Chooser:
        """What plans are chosen from; see `Searching.chooser`."""
        bench = _bench(piece, self.rotate)
        return Measured(piece, Allocator(self._table(bench.survey), piece), bench, self)

    def require_feasible(self, survey: Survey, priced: Priced, budget: Budget) -> None:
        """Raise BudgetError if no choice keeps a budget."""
        Allocator(self._table(survey), priced).require_feasible(budget)

    def chosen(self, bench: Bench, priced: Priced, budget: Budget) -> Plan:
        """The plan of least divergence under a budget, for a network that is read block by block.

        Raises BudgetError, before anything is measured, if no choice keeps the budget.
        """
        allocator = Allocator(self._table(bench.survey), priced)
        allocator.require_feasible(budget)
        harms = bench.known(self.menus(bench.survey), self.scored).harms
        return allocator.plan([harms[s.name] for s in bench.survey], budget)

    def fit(self, piece: Workpiece, plan: Plan) -> Fitted:
        """Fit the blocks of a plan in order; see `Method.fit`."""
        validate(plan, piece.survey)
        stored = next((x.name for x in plan if not piece.survey[x.name].runs), None)
        if stored is not None:
            raise PlanError(
                f"{quoted(stored)} is a tensor that no layer holds, which Blockwise leaves in "
                "float; remove its line"
            )
        bench = _bench(piece, self.rotate)
        numbers: dict[str, Numbers] = {}
        biases: dict[str, Tensor] = {}
        rest: dict[str, Tensor] = {}
        errors: dict[str, float] = {}
        for each in self.fitted(bench, plan):
            found = each.numbers
            numbers |= {name: numbers_of(found, plan[name]) for name in each.names}
            biases |= {n: found[f"{n}/bias"] for n in each.names if f"{n}/bias" in found}
            rest |= rest_among(found)
            errors |= errors_of(found)
        student = build(bench.stack.model, plan, piece.survey, numbers)
        for name, value in rest.items():
            student.get_parameter(name).data.copy_(value)
        for name, bias in biases.items():
            own: Any = student.get_submodule(name).bias
            own.data.copy_(bias)
        if any(line.act is not None for line in plan):
            calibrate_ranges(student, piece.task, piece.seed, progress=piece.jobs.progress)
        return Fitted(student, bench.notes, errors=errors)

    def fitted(self, bench: Bench, plan: Plan) -> Iterator[Finished]:
        """The numbers of the ends, then of each block; see `fitting.fit_blocks`.

        Inputs are in float meanwhile, whatever the plan says of them.
        """
        plan = Plan(tuple(replace(line, act=None) for line in plan if line.name in bench.survey))
        known = bench.known(self.menus(bench.survey), self.scored)
        pacing, ways = Pacing(self.epochs, self.codes, self.scales), Ways(self.scale, self.permute)
        fitted = fit_blocks(bench, plan, pacing, known, ways)
        if self.passes == 0:
            return fitted
        return tuned_together(bench, plan, fitted, self.passes, self.together)

    def menus(self, survey: Survey) -> Menus:
        """Every candidate for each site."""
        return {site.name: self.menu(site) for site in survey}

    def menu(self, site: Site) -> tuple[Terms, ...]:
        """Every candidate for a site: dense ones, and dense ones with an adapter."""
        dense: list[Terms] = [(Term(Dense(), Grid.parse(g)),) for g in self.grids]
        full = LowRank(1).full_rank(site)
        for base, share in self.adapters if self.rank else ():
            rank = round(share * site.numel / (site.shape[0] + site.columns))
            if 1 <= rank < full:
                dense += [
                    (Term(Dense(), Grid.parse(base)), Term(LowRank(rank), Grid.parse(g)))
                    for g in self.adapter_grids
                ]
        return tuple(dict.fromkeys(dense))

    def _table(self, survey: Survey) -> list[list[Option]]:
        rows = []
        for site in survey:
            act = self.act if site.multiplies else None
            lines = [LayerPlan(site.name, terms, act) for terms in self.menu(site)]
            rows.append([Option(line, layer_cost(site, line)) for line in lines])
        return rows


@dataclass
class Measured(Chooser):
    """All options with their divergence as it was foretold: nothing is solved to choose."""

    bench: Bench
    method: Blockwise

    @property
    def layers(self) -> list[Layer]:
        """What is known of the options of each layer."""
        harms = self.bench.known(self.method.menus(self.bench.survey), self.method.scored).harms
        return [
            Layer(
                row[0].plan.name,
                [option.plan.terms for option in row],
                harms[row[0].plan.name],
                1.0,
                harms=dict(enumerate(harms[row[0].plan.name])),
            )
            for row in self.allocator.table
        ]

    def _learn(self, options: Sequence[tuple[Layer, int]]) -> bool:
        del options
        return False


def _bench(piece: Workpiece, rotate: bool) -> Bench:
    """A network in memory, block by block; what was measured of it is kept in the jobs."""
    sites = tuple(site for site in piece.survey if site.runs)
    survey = replace(piece.survey, sites=sites)
    answers = piece.answers if piece.task.outputs is not None else None
    types = {name: TYPES[kind] for name, kind in piece.types.items()}
    stack = Stack(piece.model.eval(), types=types)
    bench = Bench(stack, survey, piece.task, piece.jobs, piece.seed, piece.told, answers)
    return turned(bench) if rotate else bench
