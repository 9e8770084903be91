"""CGMQ: constraint-guided training of bit-widths for weights and inputs (arXiv 2409.20138).

Epochs in which gates move alternate with epochs in which they rest; weights, biases and ranges
train in both. A state is kept only after its cost was counted in whole numbers, so the budget holds
whatever the training does. If the integer program sets the gates, from how much each width harms
the output, they need not move at all (docs/architecture.md).
"""

import itertools
import math
from dataclasses import dataclass
from typing import Any, Self

import torch

from rabbet.choose.program import Option, require_feasible
from rabbet.choose.sensitivity import require_gradients
from rabbet.core.budget import Budget
from rabbet.core.plan import LayerPlan, Plan, Term
from rabbet.errors import BudgetError, PlanError
from rabbet.forms import Dense
from rabbet.grids.grid import Grid
from rabbet.layers import Site
from rabbet.methods.base import Fitted, preset
from rabbet.methods.cgmq.course import (
    EACH,
    NEAR,
    PROBE,
    FixedWidths,
    cache_key,
    is_image,
)
from rabbet.methods.cgmq.entries import counted, told
from rabbet.methods.cgmq.gates import Gating
from rabbet.methods.cgmq.layer import takes_gates
from rabbet.methods.cgmq.moving import MovingGates
from rabbet.methods.cgmq.settings import Settings
from rabbet.model.build import validate
from rabbet.model.compressed import compressed_layers
from rabbet.reconstruct.network import solved
from rabbet.train.qat import WIDEST
from rabbet.workpiece import Workpiece

LANDED = "landed"  # beside the weights of a search whose gates never kept the budget


@dataclass(frozen=True)
class CGMQ(Settings):
    """Gates under a budget, usually `bops`; its fields are those of `Settings`."""

    @classmethod
    def paper(cls, **changes: Any) -> Self:
        """The paper's own dynamic, and what changes in it.

        All gates start at 32 bits and move in 6 of 12 epochs (`epochs=6` pairs of them): down while
        the budget is not met, up while it is, at the speed of direction 1 and nothing else; widths
        are 2, 4, 8, 16 and 32 bits on one scale for each tensor, and 6 epochs of training follow.
        Raises PlanError for settings that there are not, or that do not go together.
        """
        settings: dict[str, Any] = {
            "start": "widest", "epochs": 6, "finish": 6, "direction": 1, "fourfold": False,
            "landing": "end", "widths": (2, 4, 8, 16, 32), "scales": "tensor", "two": "ternary",
        }  # fmt: skip
        return preset(cls, settings, changes)

    def plan(self, piece: Workpiece, budget: Budget) -> Plan:
        """The plan of the best state under the budget in training with gates; see `Method.plan`."""
        return self.search(piece, budget).plan

    def search(self, piece: Workpiece, budget: Budget) -> Gating:
        """Search as `plan` does, and return its history too; see `rabbet.report.draw_gates`."""
        lines = [self._line(k, site) for k, site in enumerate(piece.survey)]
        timed = any(limit.metric == "latency" for limit in budget.limits)
        if self.granularity == "channel" and timed:
            raise BudgetError(
                "outputs of several widths run apart, and take longer: "
                "a latency needs gates of layers"
            )
        if budget.files:
            raise BudgetError(
                f"gates count the bytes of the native file, not of an exported one: '{budget}' "
                "needs another method, such as Joint"
            )
        other = next((x for x in budget.limits if x.metric != "bops"), None)
        if self.granularity == "weight" and other is not None:
            raise BudgetError(
                "gates of entries count bit operations alone, for no file holds a width for each "
                f"of them; {other.text!r} needs gates of layers or channels"
            )
        self._require(piece, budget, lines)
        require_gradients(piece)
        course = MovingGates(self, piece, lines, budget)
        gating = course.train(piece)
        piece.histories += gating.histories
        if self.epochs:
            found = course.weights() | course.entries()
            if gating.landed:
                found[LANDED] = torch.tensor(True)
            piece.jobs.keep(cache_key(piece, self, gating.plan.compact), found)
        return gating

    def fit(self, piece: Workpiece, plan: Plan) -> Fitted:
        """Train at the plan's widths; see `Method.fit`.

        Training starts from the final weights of the search that found this plan, if gates moved in
        it, else from layers solved in order.
        """
        validate(plan, piece.survey)
        running = [x for x in plan if piece.survey[x.name].runs]
        other = next((x for x in running if not takes_gates(piece.survey[x.name], x)), None)
        if other is not None:
            raise PlanError(
                f"CGMQ trains dense weights, every output on one signed grid; {other} is not one"
            )
        lines = [plan[s.name] for s in piece.survey if plan.get(s.name)]
        require_gradients(piece)
        kept = piece.jobs.kept(cache_key(piece, self, plan.compact))
        each = {k.removesuffix(EACH): t for k, t in (kept or {}).items() if k.endswith(EACH)}
        course = FixedWidths(self, piece, lines, self.finish, each or None)
        if kept is not None:
            course.load_weights(kept)
        else:
            for name, layer in compressed_layers(solved(piece, plan)[0]).items():
                course.layers[name].start_from(layer)
            if self.rate is None:
                distance = course.held_back_loss(PROBE, labels=False)
                course.learning_rate = NEAR * math.sqrt(max(0.0, distance))
        before, after = course.train_fixed(piece)
        notes: tuple[str, ...] = (
            f"trained {course.summary} at these widths: held-back loss {before:.4g} -> {after:.4g}",
        )
        if kept is not None and LANDED in kept:
            landed = (
                "in the search that found this plan no epoch ended under the budget: what harms "
                "least was lowered until it held (landed)"
            )
            notes = (landed, *notes)
        if not each:
            return Fitted(course.network(piece, plan), notes)
        own = counted(piece, plan, each)
        notes = (*notes, told(own, piece.cost(plan), piece.float_cost, each))
        return Fitted(course.network(piece, plan), notes, own if self.counts == "gates" else None)

    def _line(self, position: int, site: Site) -> LayerPlan:
        """The line of a layer at the widest that a file holds, with which its gates start."""
        act: int | None = WIDEST
        if not site.multiplies:
            act = None
        elif is_image(position, site) and self.image != "gate":
            act = self.image
        return LayerPlan(site.name, (Term(Dense(), self._grid(self._widest(site))),), act)

    def _widest(self, site: Site) -> int:
        """The width with which gates start, and at which a stored weight, which has none, stays."""
        return WIDEST if site.runs else min(WIDEST, max(self.widths))

    def _grid(self, bits: int) -> Grid:
        """The grid of weights at a width."""
        kind = self.two if bits == 2 else "signed"
        return Grid.of(bits, kind, 0 if self.scales == "channel" else None)

    def _require(self, piece: Workpiece, budget: Budget, lines: list[LayerPlan]) -> None:
        """Raise BudgetError if the smallest widths break the budget."""
        stored = [b for b in self.widths if b <= WIDEST]
        rows = []
        for k, line in enumerate(lines):
            fixed = self.image != "gate" and is_image(k, piece.survey[line.name])
            site = piece.survey[line.name]
            acts = [line.act] if line.act is None or fixed else stored
            plans = [
                LayerPlan(line.name, (Term(Dense(), self._grid(b)),), a)
                for b, a in itertools.product(stored if site.runs else [self._widest(site)], acts)
            ]
            rows.append((site, plans))
        piece.expect(p for _, plans in rows for p in plans)
        table = [[Option(p, piece.layer_cost(site, p)) for p in plans] for site, plans in rows]
        require_feasible(table, budget, piece)
