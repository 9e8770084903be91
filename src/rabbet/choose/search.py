"""A plan of about the least harm, although few candidates are solved.

The errors of all candidates are foretold; the integer program chooses; what it chose is solved, its
harm measured, and it chooses again, until every line of its choice stands on what was measured. A
candidate that was foretold too well is found out so, and one that was foretold badly lets what is
learnt of its layer correct it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor

from rabbet.choose.program import Allocator, Table
from rabbet.choose.sensitivity import input_errors, output_errors
from rabbet.core.budget import Budget
from rabbet.core.plan import Plan
from rabbet.reconstruct.candidates import Terms, canonical, read_numbers
from rabbet.reconstruct.network import FORETOLD, on_menus, solve_menus
from rabbet.reconstruct.prediction import predict_site
from rabbet.workpiece import Workpiece

# Share of its likely harm that an option counts with until it is measured. On ResNet-20 one option
# in thirty did less, all of them CP.
HOPE = 0.7
RELAXED = 25  # budgets, of many, that the relaxation is asked about
NEAR = 0.1  # of a layer's own harm: what may be chosen soon is solved with what is chosen


@dataclass
class Chooser:
    """What is known of all options: nothing at first, more with every budget asked about."""

    piece: Workpiece
    allocator: Allocator

    @cached_property
    def inputs(self) -> dict[str, dict[int, float]]:
        """What each width of each input does to the network's output, alone, by site and bits.

        Empty where no site has a choice.
        """
        table = self.allocator.table
        widths = [{o.plan.act for o in row if o.plan.act is not None} for row in table]
        if all(len(each) < 2 for each in widths):
            return {}
        return input_errors(self.piece, sorted(set[int]().union(*widths)))

    @cached_property
    def layers(self) -> list["Layer"]:
        """What is known of the options of each layer."""
        return foretold(self.piece, self.allocator.table)

    def plans(self, budgets: Sequence[Budget]) -> list[Plan]:
        """The plan for each budget, each line of it solved and measured.

        First the relaxation of the program, which answers fast, says what is worth solving; what
        the program itself chooses then is rarely anything else. Raises what `Allocator.plan` does.
        """
        some = budgets[:: -(-len(budgets) // RELAXED)]
        while self._learn(self._near(some)):
            pass
        while True:
            plans = self._chosen(budgets)
            if not self._learn([pair for plan in plans for pair in self._options(plan)]):
                return plans

    def harm(self, plan: Plan) -> float:
        """What the lines of a plan do to the network's output, as far as it is known, in all."""
        weights = math.fsum(layer.scores()[k] for layer, k in self._options(plan))
        acts = (self.inputs.get(line.name, {}).get(line.act or 0, 0.0) for line in plan)
        return weights + math.fsum(acts)

    def _chosen(self, budgets: Sequence[Budget]) -> list[Plan]:
        scores = self._scores()
        plans = list[Plan]()
        for budget in budgets:
            self.piece.jobs.progress("choosing", len(plans), len(budgets))
            plans.append(self.allocator.plan(scores, budget))
        self.piece.jobs.progress("choosing", len(plans), len(budgets))
        return plans

    def _options(self, plan: Plan) -> list[tuple["Layer", int]]:
        pairs = zip(self.layers, plan, strict=True)
        return [(layer, layer.lines.index(line.terms)) for layer, line in pairs]

    def _scores(self) -> list[list[float]]:
        """The harm of every option: of its weight, and of its input where there is a choice."""
        scores = []
        for layer, row in zip(self.layers, self.allocator.table, strict=True):
            weights = dict(zip(layer.lines, layer.scores(), strict=True))
            acts = self.inputs.get(layer.name, {})
            scores.append([weights[o.plan.terms] + acts.get(o.plan.act or 0, 0.0) for o in row])
        return scores

    def _learn(self, options: Sequence[tuple["Layer", int]]) -> bool:
        """Solve those options that are not, or else measure all that was; whether there were any.

        Measuring runs the network forth and back, so it waits until nothing is left to solve.
        """
        return _solve(self.piece, options) or _measure(self.piece, self.layers)

    def _near(self, budgets: Sequence[Budget]) -> list[tuple["Layer", int]]:
        """The options that the relaxation takes, and those that it might as well."""
        scores = self._scores()
        near = list[tuple[Layer, int]]()
        for budget in budgets:
            excess = self.allocator.excess(scores, budget)
            if excess is None:
                continue
            for layer, options, row, own in zip(
                self.layers, self.allocator.table, excess, scores, strict=True
            ):
                most = NEAR * own[min(range(len(row)), key=row.__getitem__)]
                near += [
                    (layer, layer.lines.index(option.plan.terms))
                    for option, more in zip(options, row, strict=True)
                    if more <= most
                ]
        return near


@dataclass
class Layer:
    """What is known of the options of one layer.

    foretold: errors in the metric; solved: those that were found; harms: what the solved ones do to
    the network's output; changes: of the weight, by solved ones that were not measured yet. ratio:
    harm of one unit of error, as far as noise like that of rounding tells.
    """

    name: str
    lines: list[Terms]
    foretold: list[float]
    ratio: float
    solved: dict[int, float] = field(default_factory=dict)
    changes: dict[int, Tensor] = field(default_factory=dict)
    harms: dict[int, float] = field(default_factory=dict)

    def scores(self) -> list[float]:
        """The harm of each option, measured, or a share of what is likely.

        A unit of error does what it did in the option that is most like this one, or what noise
        does, whichever is less: either may be more by chance.
        """
        errors = [
            self.solved.get(k, told * self._like(k, self.solved, self.foretold, 1.0))
            for k, told in enumerate(self.foretold)
        ]
        return [
            self.harms.get(k, HOPE * error * self._least_ratio(k, errors))
            for k, error in enumerate(errors)
        ]

    def _kind(self, k: int) -> tuple[str, ...]:
        return tuple(term.form.name for term in self.lines[k])

    def _least_ratio(self, k: int, errors: Sequence[float]) -> float:
        like = self._like(k, self.harms, errors, self.ratio)
        return min(like, self.ratio or like)

    def _like(
        self, k: int, known: dict[int, float], rough: Sequence[float], without: float
    ) -> float:
        """What is known over what was thought of the option that is most like option k.

        It is of the same forms, and of the nearest size.
        """
        alike = [j for j in known if self._kind(j) == self._kind(k) and rough[j] > 0]
        if not alike or rough[k] <= 0:
            return without
        near = min(alike, key=lambda j: abs(math.log(rough[j] / rough[k])))
        return known[near] / rough[near]


def foretold(piece: Workpiece, table: Table) -> list[Layer]:
    """Errors of all options, and the harm of noise in each layer."""
    menus = [
        (row[0].plan.name, tuple(dict.fromkeys(option.plan.terms for option in row)))
        for row in table
    ]
    results = on_menus(predict_site, piece, "predicting", menus, FORETOLD)
    noises = {name: r["noise"][None] for (name, _), r in zip(menus, results, strict=True)}
    harms = output_errors(piece, noises)
    layers = []
    for (name, menu), result in zip(menus, results, strict=True):
        error = float(result["noise.error"])
        ratio = float(harms[name]) / error if error > 0 else 0.0
        layers.append(Layer(name, list(menu), result["errors"].tolist(), ratio))
    return layers


def _solve(piece: Workpiece, chosen: Sequence[tuple[Layer, int]]) -> bool:
    """Solve the chosen options that are not solved yet; whether there were any."""
    missing = list({(x.name, k): (x, k) for x, k in chosen if k not in x.solved}.values())
    if not missing:
        return False
    missing.sort(key=lambda pair: pair[0].name)  # options of one layer one after the other
    menus = [(layer.name, (layer.lines[k],)) for layer, k in missing]
    results = solve_menus(piece, "solving layers", menus)
    for (layer, k), (_, menu), result in zip(missing, menus, results, strict=True):
        site = piece.survey[layer.name]
        layer.solved[k] = float(result["0.error"])
        found = canonical(site, menu[0], read_numbers(result, menu, 0))
        layer.changes[k] = (found - piece.weight(site)).bfloat16()  # there are many
    return True


def _measure(piece: Workpiece, layers: Sequence[Layer]) -> bool:
    """Measure the harm of the options that were solved since the last time; whether any were."""
    changes = {x.name: list(x.changes.values()) for x in layers if x.changes}
    if not changes:
        return False
    harms = output_errors(piece, changes)
    for layer in layers:
        if layer.changes:
            layer.harms |= dict(zip(layer.changes, harms[layer.name].tolist(), strict=True))
            layer.changes.clear()
    return True
