"""A whole network on the grids of a plan, without any training."""

from collections.abc import Mapping

from torch import nn

from rabbet.calibrate.ranges import calibrate_ranges
from rabbet.core.plan import Plan
from rabbet.jobs import Job, Tensors
from rabbet.model.build import build
from rabbet.reconstruct.candidates import Terms, read_numbers, solve_site
from rabbet.reconstruct.sequential import correct_in_order
from rabbet.workpiece import Workpiece


def solved(piece: Workpiece, plan: Plan) -> tuple[nn.Module, str]:
    """The network on the plan's grids without any training.

    Layers are solved one by one, inputs calibrated, and layers then solved again in order, if that
    helps; a note says which. Each line of the plan is solved on its own: the same plan gives the
    same numbers, whether it was chosen here or written by hand.
    """
    menus = {line.name: (line.terms,) for line in plan}
    results = solve_menus(piece, "solving the plan", menus)
    numbers = {n: read_numbers(results[n], menus[n], 0) for n in menus}
    student = build(piece.model, plan, piece.survey, numbers)
    calibrate_ranges(student, piece.task, piece.seed, progress=piece.jobs.progress)
    return student, correct_in_order(student, piece)


def solve_menus(
    piece: Workpiece, stage: str, menus: Mapping[str, tuple[Terms, ...]], prune: bool = False
) -> dict[str, Tensors]:
    """Every entry of the menus solved, one job per layer."""
    moments = piece.moments()
    jobs: list[Job] = []
    for name, menu in menus.items():
        site = piece.survey[name]
        given = {"weight": piece.weight(site)}
        if name in moments:
            given["second"] = moments[name]
        jobs.append((solve_site, given, {"site": site, "menu": menu, "prune": prune}))
    return dict(zip(menus, piece.jobs.run(stage, jobs), strict=True))
