"""TTQAT: transformers as tensor trains, trained on their grid, taught by the float network (arXiv 2306.01076).

Linears become chains of cores, the table of words a tensor-train matrix. They start where the float
weights, in the metric of their inputs, lie nearest; learn in float what the float network's blocks
show; then on their grids, with scales that are learnt as well (LSQ).
"""

from dataclasses import dataclass

from rabbet.choose.program import Option, allocate, require_feasible
from rabbet.choose.scoring import scored
from rabbet.core.budget import Budget
from rabbet.core.layout import term_lengths
from rabbet.core.plan import LayerPlan, Plan, Term
from rabbet.errors import PlanError
from rabbet.forms import TT, TTM, Chain, Dense
from rabbet.grids.grid import Grid
from rabbet.layers import Site
from rabbet.methods.base import Fitted
from rabbet.methods.ttqat.course import Teaching
from rabbet.methods.ttqat.settings import Settings
from rabbet.model.build import validate
from rabbet.workpiece import Workpiece


@dataclass(frozen=True)
class TTQAT(Settings):
    """Tensor trains of given ranks, or of ranks and bits chosen under the budget; see `Settings`."""

    def plan(self, piece: Workpiece, budget: Budget) -> Plan:
        """Chains at the given rank, or at those that harm least under the budget; see `Method.plan`."""
        for name in self.keep_dense:
            piece.survey[name]  # raises for a layer that is not there
        menus = {site.name: self.menu(site) for site in piece.survey}
        table = [[self._option(piece, s, terms) for terms in menus[s.name]] for s in piece.survey]

        require_feasible(table, budget, piece)
        if all(len(row) == 1 for row in table):
            return Plan(tuple(row[0].plan for row in table))
        scores, _ = scored(piece, menus, learns=True)
        return allocate(scores, table, budget, piece)

    def menu(self, site: Site) -> tuple[tuple[Term, ...], ...]:
        """What may become of a layer: chains that are smaller than the layer itself on `dense_bits` bits, or else that.

        Where the rank is to be chosen, the layer itself stands beside them, on `grids` and on
        `dense_bits` bits.
        """
        plain = Term(Dense(), Grid.of(self.dense_bits, axis=0))
        chain: type[Chain] = TTM if site.looks_up else TT
        given = self.table_rank if site.looks_up else self.rank
        if site.name in self.keep_dense:
            return ((plain,),)
        full = 0 if site.space or chain.name not in self.choices.forms else chain(1).full_rank(site)
        entries: list[tuple[Term, ...]] = []
        for rank in self.choices.ranks if given is None else (given,):
            for bits in self.widths:
                if not full:
                    continue
                grid = Grid.of(bits, "half" if bits == 2 else "signed")
                term = Term(chain(min(rank, full)), grid)
                if term_lengths(site, term).bytes < term_lengths(site, plain).bytes:
                    entries.append((term,))
        if given is None:
            entries += [(Term(Dense(), Grid.parse(text)),) for text in self.choices.grids]
        plainly = [(plain,)] if given is None or not entries else []
        return tuple(dict.fromkeys([*entries, *plainly]))

    def _option(self, piece: Workpiece, site: Site, terms: tuple[Term, ...]) -> Option:
        line = LayerPlan(site.name, terms, self.act if site.multiplies else None)
        return Option(line, piece.layer_cost(site, line))

    def fit(self, piece: Workpiece, plan: Plan) -> Fitted:
        """Start, teach in float, teach on the grid, and go back to the best epoch on the grid; see `Method.fit`."""
        validate(plan, piece.survey)
        other = next((x for x in plan if len(x.terms) > 1), None)
        if other is not None:
            raise PlanError(f"TTQAT trains layers of one term; {other} has {len(other.terms)}")
        course = Teaching(self, piece, plan)
        before, after = course.train()
        network = course.network()
        taught = f"taught {course.walked}; held-back {course.measure} {before:.4g} -> {after:.4g}"
        return Fitted(
            network,
            (taught, *(("no attention is taught, for none was seen",) if course.blind else ())),
        )
