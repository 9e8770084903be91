"""A whole network on the grids of a plan, without any training."""

from collections.abc import Mapping

from torch import nn

from rabbet.calibrate.ranges import calibrate_ranges
from rabbet.core.plan import Plan
from rabbet.jobs import Job, Tensors
from rabbet.model.build import build
from rabbet.reconstruct.candidates import Terms, read_numbers, solve_site
from rabbet.reconstruct.sequential import solve_in_order
from rabbet.workpiece import Workpiece


def solved(piece: Workpiece, plan: Plan) -> nn.Module:
    """The network on the plan's grids without any training: layers solved, inputs calibrated, then solved in order.

    Each line is solved for itself: the same plan gives the same numbers, chosen here or made by
    hand.
    """
    menus = {line.name: (line.terms,) for line in plan}
    results = solve_menus(piece, "solving the plan", menus)
    student = build(
        piece.model, plan, piece.survey, {n: read_numbers(results[n], menus[n], 0) for n in menus}
    )
    calibrate_ranges(student, piece.task, piece.seed, progress=piece.jobs.progress)
    solve_in_order(student, piece)
    return student


def solve_menus(
    piece: Workpiece, stage: str, menus: Mapping[str, tuple[Terms, ...]], prune: bool = False
) -> dict[str, Tensors]:
    """Every entry of the menus, a job a layer."""
    moments = piece.moments()
    jobs: list[Job] = []
    for name, menu in menus.items():
        site = piece.survey[name]
        given = {"weight": piece.weight(site)} | (
            {"second": moments[name]} if name in moments else {}
        )
        jobs.append((solve_site, given, {"site": site, "menu": menu, "prune": prune}))
    return dict(zip(menus, piece.jobs.run(stage, jobs), strict=True))
