"""A whole network on the grids of a plan, without any training."""

from collections.abc import Callable, Sequence

from torch import nn

from rabbet.calibrate.ranges import calibrate_ranges
from rabbet.core.plan import Plan
from rabbet.jobs import Job, Tensors
from rabbet.layers import Site
from rabbet.model.build import build
from rabbet.model.compressed import Numbers
from rabbet.reconstruct.candidates import Terms, read_numbers, solve_site
from rabbet.reconstruct.sequential import correct_in_order
from rabbet.workpiece import Workpiece

# Seconds of a job of any size, and those for each entry of the menu, of the weight, and of a row of
# it (benchmarks/scaling.py).
SMALL, PACE = 0.05, 1e-9
FORETOLD = 0.1  # as long as solving takes foretelling, about


def solved(piece: Workpiece, plan: Plan) -> tuple[nn.Module, str]:
    """The network on the plan's grids without any training.

    Layers are solved one by one, inputs calibrated, and layers then solved again in order, if that
    helps; a note says which. Each line of the plan is solved on its own: the same plan gives the
    same numbers, whether it was chosen here or written by hand.
    """
    numbers = solve_lines(piece, "solving the plan", plan)
    student = build(piece.model, plan, piece.survey, numbers)
    calibrate_ranges(student, piece.task, piece.seed, progress=piece.jobs.progress)
    return student, correct_in_order(student, piece)


def solve_lines(piece: Workpiece, stage: str, plan: Plan) -> dict[str, Numbers]:
    """Each line of a plan solved for itself; one that was solved before is not solved again."""
    menus = [(line.name, (line.terms,)) for line in plan]
    results = solve_menus(piece, stage, menus)
    return {
        name: read_numbers(result, menu, 0)
        for (name, menu), result in zip(menus, results, strict=True)
    }


Menus = Sequence[tuple[str, tuple[Terms, ...]]]
"""Names of layers, and what may become of each; a layer may come more than once."""


def solve_menus(piece: Workpiece, stage: str, menus: Menus) -> list[Tensors]:
    """Every entry of the menus solved, one job for each menu."""
    return on_menus(solve_site, piece, stage, menus)


def on_menus(
    job: Callable[..., Tensors], piece: Workpiece, stage: str, menus: Menus, share: float = 1.0
) -> list[Tensors]:
    """What a job (`solve_site` or `predict_site`) makes of each menu of a layer.

    share: of the time that solving takes, which it may take.
    """
    sites = piece.survey
    jobs: list[Job] = [
        (job, piece.problem(sites[name]), {"site": sites[name], "menu": menu})
        for name, menu in menus
    ]
    seconds = [share * expected_seconds(piece.survey[name], len(menu)) for name, menu in menus]
    return piece.jobs.run(stage, jobs, seconds)


def expected_seconds(site: Site, entries: int) -> float:
    """How long a layer's menu may take on one core: right within a few times, see PACE."""
    return SMALL + PACE * site.numel * site.columns * entries
