"""The plan of least harm, although few candidates are solved.

The errors of all candidates are foretold; the integer program chooses; what it chose is solved, its
harm measured, and it chooses again, until every line of its choice stands on what was measured. A
candidate that was foretold too well is found out so, and one that was foretold badly lets what is
learnt of its layer correct it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rabbet.choose.program import Table, allocate
from rabbet.choose.sensitivity import output_errors
from rabbet.core.budget import Budget
from rabbet.core.plan import Plan
from rabbet.reconstruct.candidates import Terms, canonical, read_numbers
from rabbet.reconstruct.network import FORETOLD, on_menus, solve_menus
from rabbet.reconstruct.prediction import predict_site
from rabbet.workpiece import Workpiece

ROUGH = 1e-3  # gap of the program's answers while most of what it chooses is not measured
HOPE = 0.5  # share of its likely harm that an option counts with until it is measured


def search(piece: Workpiece, table: Table, budget: Budget) -> Plan:
    """The plan that the program chooses, each of its lines solved and measured.

    table: the options of each layer of the survey, all of which count. Raises what `allocate` does.
    """
    layers, gap = foretold(piece, table), ROUGH
    while True:
        piece.jobs.progress("choosing", 0, 1)
        plan = allocate([layer.scores() for layer in layers], table, budget, piece, gap)
        piece.jobs.progress("choosing", 1, 1)
        lines = [layer.lines.index(line.terms) for layer, line in zip(layers, plan, strict=True)]
        chosen = list(zip(layers, lines, strict=True))
        if _solve(piece, chosen) or _measure(piece, layers):
            continue
        if not gap:
            return plan
        gap = 0.0


@dataclass
class Layer:
    """What is known of the options of one layer.

    foretold: errors in the metric; solved: those that were found; harms: what the solved ones do to
    the network's output. ratio: harm of one unit of error, as far as noise like that of rounding
    tells.
    """

    name: str
    lines: list[Terms]
    foretold: list[float]
    ratio: float
    solved: dict[int, float] = field(default_factory=dict)
    changes: dict[int, Tensor] = field(default_factory=dict)
    harms: dict[int, float] = field(default_factory=dict)

    def scores(self) -> list[float]:
        """The harm of each option, measured or the least that may be hoped for.

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

    def _least_ratio(self, k: int, errors: Sequence[float]) -> float:
        like = self._like(k, self.harms, errors, self.ratio)
        return min(like, self.ratio or like)

    def _like(
        self, k: int, known: dict[int, float], rough: Sequence[float], without: float
    ) -> float:
        """What is known over what was thought of the option that is most like option k.

        It is of the same forms, and of the nearest size.
        """
        kind = [t.form.name for t in self.lines[k]]
        alike = [j for j in known if [t.form.name for t in self.lines[j]] == kind and rough[j] > 0]
        if not alike or rough[k] <= 0:
            return without
        near = min(alike, key=lambda j: abs(math.log(rough[j] / rough[k])))
        return known[near] / rough[near]


def foretold(piece: Workpiece, table: Table) -> list[Layer]:
    """Errors of all options, and the harm of noise in each layer."""
    menus = [(row[0].plan.name, tuple(option.plan.terms for option in row)) for row in table]
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
    missing = [(layer, k) for layer, k in chosen if k not in layer.solved]
    if not missing:
        return False
    menus = [(layer.name, (layer.lines[k],)) for layer, k in missing]
    results = solve_menus(piece, "solving layers", menus)
    for (layer, k), (_, menu), result in zip(missing, menus, results, strict=True):
        site = piece.survey[layer.name]
        layer.solved[k] = float(result["0.error"])
        found = canonical(site, menu[0], read_numbers(result, menu, 0))
        layer.changes[k] = found - piece.weight(site)
    return True


def _measure(piece: Workpiece, layers: Sequence[Layer]) -> bool:
    """Measure the harm of the options that were solved since the last time; whether any were."""
    changes = {x.name: torch.stack(list(x.changes.values())) for x in layers if x.changes}
    if not changes:
        return False
    harms = output_errors(piece, changes)
    for layer in layers:
        if layer.changes:
            layer.harms |= dict(zip(layer.changes, harms[layer.name].tolist(), strict=True))
            layer.changes.clear()
    return True
