"""TTQAT: transformers as tensor trains, distilled and trained on their grid (arXiv 2306.01076).

Linear layers become tensor trains, products of cores, and embedding tables tensor-train matrices.
They start from the best approximation of the float weights, in the metric of their inputs; they are
distilled from the blocks of the float network, first in float, then on their grids, where scales
are learnt as well (LSQ).
"""

from dataclasses import dataclass

from rabbet.choose.program import Option, allocate, require_feasible
from rabbet.choose.scoring import scored
from rabbet.choose.sensitivity import require_gradients
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
    """Tensor trains of given ranks, or of ranks and bits chosen for the budget; see `Settings`."""

    def plan(self, piece: Workpiece, budget: Budget) -> Plan:
        """Chains of the given rank, or those that harm least in the budget; see `Method.plan`."""
        for name in self.keep_dense:
            piece.survey[name]  # raises for a layer that is not there
        menus = {site.name: self.menu(site) for site in piece.survey}
        piece.expect(self._line(s, terms) for s in piece.survey for terms in menus[s.name])
        table = [[self._option(piece, s, terms) for terms in menus[s.name]] for s in piece.survey]

        require_feasible(table, budget, piece)
        if all(len(row) == 1 for row in table):
            return Plan(tuple(row[0].plan for row in table))
        require_gradients(piece)
        scores = scored(piece, menus, learns=True)
        return allocate(scores, table, budget, piece)

    def menu(self, site: Site) -> tuple[tuple[Term, ...], ...]:
        """Every candidate for a layer: chains smaller than the dense layer, or else that.

        The size of the dense layer is that on `dense_bits`. If the rank is to be chosen, the dense
        layer is a candidate in any case, on `dense_bits` and on the grids of `choices`.
        """
        dense = Term(Dense(), Grid.of_weights(self.dense_bits, axis=0))
        if site.name in self.keep_dense:
            return ((dense,),)
        given_rank = self.table_rank if site.looks_up else self.rank
        entries = self._chains(site, given_rank, term_lengths(site, dense).bytes)
        if given_rank is None:
            entries += [(Term(Dense(), Grid.parse(text)),) for text in self.choices.grids]
        if given_rank is None or not entries:
            entries.append((dense,))
        return tuple(dict.fromkeys(entries))

    def _chains(self, site: Site, given_rank: int | None, limit: int) -> list[tuple[Term, ...]]:
        """The chains of a layer that take less than `limit` bytes, by rank and bits."""
        chain: type[Chain] = TTM if site.looks_up else TT
        full = 0 if site.space or chain.name not in self.choices.forms else chain(1).full_rank(site)
        if not full:
            return []
        entries: list[tuple[Term, ...]] = []
        for rank in self.choices.ranks if given_rank is None else (given_rank,):
            for bits in self.widths:
                grid = Grid.of_weights(bits, "half" if bits == 2 else "signed")
                term = Term(chain(min(rank, full)), grid)
                if term_lengths(site, term).bytes < limit:
                    entries.append((term,))
        return entries

    def _option(self, piece: Workpiece, site: Site, terms: tuple[Term, ...]) -> Option:
        line = self._line(site, terms)
        return Option(line, piece.layer_cost(site, line))

    def _line(self, site: Site, terms: tuple[Term, ...]) -> LayerPlan:
        return LayerPlan(site.name, terms, self.act if site.multiplies else None)

    def fit(self, piece: Workpiece, plan: Plan) -> Fitted:
        """Train in float, then on the grid; the best epoch on the grid counts. See `Method.fit`."""
        validate(plan, piece.survey)
        other = next((x for x in plan if len(x.terms) > 1), None)
        if other is not None:
            raise PlanError(f"TTQAT trains layers of one term; {other} has {len(other.terms)}")
        require_gradients(piece)
        course = Teaching(self, piece, plan)
        before, after = course.train()
        network = course.network()
        notes = [f"taught {course.summary}; held-back {course.measure} {before:.4g} -> {after:.4g}"]
        if course.steps and after == before:
            notes.append(
                "no epoch was better than the start, rounded and not trained, which was kept: try "
                "a smaller rate, more epochs, or more batches"
            )
        if course.lacks_attention:
            notes.append("no attention is taught, for none was seen")
        return Fitted(network, tuple(notes))
