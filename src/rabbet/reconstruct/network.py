"""A whole network on the grids of a plan, without any training."""

from collections.abc import Mapping

from torch import nn

from rabbet.calibrate.ranges import calibrate_ranges
from rabbet.core.plan import Plan
from rabbet.jobs import Job, Tensors
from rabbet.layers import Site
from rabbet.model.build import build
from rabbet.reconstruct.candidates import Terms, read_numbers, solve_site
from rabbet.reconstruct.sequential import correct_in_order
from rabbet.workpiece import Workpiece

# Seconds of a job of any size, and those for each entry of the menu, of the weight, and of a row of
# it (benchmarks/scaling.py).
SMALL, PACE = 0.05, 4e-9


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


def expected_seconds(site: Site, entries: int) -> float:
    """How long a layer's menu may take on one core: right within a few times, see PACE."""
    return SMALL + PACE * site.numel * site.columns * entries


def solve_menus(
    piece: Workpiece, stage: str, menus: Mapping[str, tuple[Terms, ...]], prune: bool = False
) -> dict[str, Tensors]:
    """Every entry of the menus solved, one job per layer."""
    seconds = [expected_seconds(piece.survey[name], len(menu)) for name, menu in menus.items()]
    moments = piece.moments()
    jobs: list[Job] = []
    for name, menu in menus.items():
        site = piece.survey[name]
        given = {"weight": piece.weight(site)}
        if name in moments:
            given["second"] = moments[name]
        jobs.append((solve_site, given, {"site": site, "menu": menu, "prune": prune}))
    return dict(zip(menus, piece.jobs.run(stage, jobs, seconds), strict=True))
