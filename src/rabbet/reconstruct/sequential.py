"""The layers solved again in the order in which they run, each for the inputs it will really meet.

Candidates are solved for the float network's inputs, so that all layers can be solved at once.
Behind layers that are quantised already the inputs are others: x' for x. The best weight for them
is not W but the least-squares solution of `W' x' = W x`, and rounding it in the second moment of x'
lets each layer make good what those before it broke.

Then each channel's mean and deviation are made those of the float network (`matching`).

Both are estimates from a few examples. So each goes only as far as two halves of the examples agree
on it, and in the end others judge whether the network has become better at all.
"""

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rabbet.calibrate.moments import few_rows
from rabbet.calibrate.ranges import calibrate_between
from rabbet.core.survey import windows
from rabbet.data.answers import UnlikeError
from rabbet.data.augment import PARTS, judging_parts
from rabbet.data.batches import Batch
from rabbet.data.distance import Distance
from rabbet.data.examples import Axes
from rabbet.errors import RabbetError
from rabbet.layers import Site
from rabbet.model.compressed import Compressed, compressed_layers, layers_kept
from rabbet.model.hooks import Hook, hooked
from rabbet.reconstruct.candidates import solve_menu
from rabbet.reconstruct.matching import Halves, Statistics, gained, in_halves, matcher
from rabbet.solve.metric import DAMPING, LEAST, Metric
from rabbet.solve.shrinking import shrunk
from rabbet.workpiece import UNABLE, Workpiece

GAIN = (0.67, 1.5)  # a larger correction says that the layer is lost, not that it is scaled
WINDOW = 2**27  # floats that the float network's inputs of layers in one window may take
AT_ONCE = 2**25  # floats of the largest input of a layer: several of its size are held at once
WINDOWS = 4  # in which layers are solved, each in a pass of its own over both networks
PATCHES = 2**23  # entries of the patches of one layer
STEPS = 40  # evaluations of the error of a factorised layer, which begins at its factors
RIDGES = (DAMPING, 0.1, 1.0, 10.0)  # shares of the mean diagonal
ROWS = 256  # of each group, that a ridge is chosen by
HELD = 0.125  # share of the examples that are held back to judge
JUDGES = 256  # examples that are enough to judge by
QUARTER = 4  # one part of so many judges first
CLEAR = 4.0  # standard errors that leave no doubt: of 4 parts, one time in 70 by chance
BETWEEN = 128  # examples that choose the ranges between the factors of a layer


@dataclass(frozen=True)
class _Met:
    """The input of a layer of the float network, and the statistics of its outputs."""

    given: Tensor
    outputs: Statistics | None


def correct_in_order(student: nn.Module, piece: Workpiece, limit: int = 512) -> str:
    """Run `solve_in_order`, and undo it unless held-back examples get better for certain.

    With few examples, or where little is lost, corrections fit what is special to the examples that
    they were computed from, so others judge them: their gain must be larger than its standard
    error. A quarter of the judges will do where they leave no doubt. Returns a note if the
    corrections were undone, else "".
    """
    axes = piece.task.examples
    train, held = axes.hold_back(piece.task.read(), HELD)
    if not train:
        return "layers not solved again in order: too few examples to hold one back"
    layers = compressed_layers(student)
    sites = [s for s in piece.survey if s.name in layers and s.calls == 1 and not s.looks_up]
    batch, unused = axes.gathered(train, min(limit, affordable(sites)))
    judges = judging_parts(_first_batches([*held, *unused], axes), axes, piece.seed)
    few, others = _few(judges)
    put_back = layers_kept(student)
    try:
        start = piece.distance(student, few)
        with torch.no_grad():
            piece.task.run(piece.model, batch)
    except UnlikeError as e:
        return f"layers not solved again in order: {e}"
    except RabbetError:
        raise
    except Exception as e:  # the forward is the user's: it may not take such parts of the batches
        return f"layers not solved again in order: {UNABLE} ({type(e).__name__})"
    solve_in_order(student, piece, batch)
    try:
        start, end = _judged(student, piece, start, (few, others), put_back)
    except UnlikeError as e:  # whether shapes differ may show only now
        put_back()
        return f"solving layers again in order undone: {e}"
    except RabbetError:
        raise
    except Exception as e:  # the forward may not take parts of another size either
        put_back()
        return f"solving layers again in order undone: {UNABLE} ({type(e).__name__})"
    if end.is_below(start):
        return ""
    put_back()
    if torch.equal(start.divergences, end.divergences):
        return ""  # nothing was to be corrected
    return f"solving layers again in order undone: {end.refused(start)}"


def _judged(
    student: nn.Module,
    piece: Workpiece,
    start: Distance,
    judges: tuple[list[list[Batch]], list[list[Batch]]],
    put_back: Callable[[], None],
) -> tuple[Distance, Distance]:
    """The distances before and after the corrections, which the student holds.

    start: on the first judges, before; the others are asked only where the first leave a doubt.
    put_back: undoes the corrections.
    """
    few, others = judges
    end = piece.distance(student, few)
    if not others or end.is_below(start, CLEAR) or start.is_below(end, CLEAR):
        return start, end
    end += piece.distance(student, others)
    correct_again = layers_kept(student)
    put_back()
    start += piece.distance(student, others)
    correct_again()
    return start, end


def _few(judges: list[list[Batch]]) -> tuple[list[list[Batch]], list[list[Batch]]]:
    """A quarter of the parts that judge, spread over them, and the rest; all if they are few."""
    if len(judges) < PARTS:
        return judges, []
    rest = [part for k, part in enumerate(judges) if k % QUARTER]
    return judges[::QUARTER], rest


def _first_batches(batches: Sequence[Batch], axes: Axes) -> list[Batch]:
    """The first batches, of examples enough to judge by."""
    sizes = list(itertools.accumulate(map(axes.count, batches)))
    return list(batches[: next((k + 1 for k, size in enumerate(sizes) if size >= JUDGES), None)])


def solve_in_order(student: nn.Module, piece: Workpiece, batch: Batch) -> None:
    """Solve and correct every layer of a compressed network in place, in their order.

    What the float network's layers are given is kept for a window of them at a time. Layers that
    run more than once and tables stay as they are; statistics are matched where every term has a
    scale for each output channel. Chains run as one layer meanwhile, which is far faster: what lies
    between their factors is not rounded then.
    """
    layers = compressed_layers(student)
    sites = [s for s in piece.survey if s.name in layers and s.calls == 1 and not s.looks_up]
    stage, count = "solving in order", itertools.count(1)

    def told(*_: Any) -> None:
        piece.jobs.progress(stage, min(next(count), len(sites)), len(sites))

    piece.jobs.progress(stage, 0, len(sites))
    most = WINDOW // piece.task.examples.count(batch)
    for window in windows(sites, _inputs, most):
        before, after = _hooks(piece, layers, window, batch)
        before += [(layer, told) for layer, _ in before]
        with torch.no_grad(), _put_together(layers), hooked(before=before, after=after):
            piece.task.run(student, batch)
    piece.jobs.progress(stage, len(sites), len(sites))


@contextlib.contextmanager
def _put_together(layers: Mapping[str, Compressed]) -> Iterator[None]:
    """Layers run whole for a while, whatever they are factorised into."""
    try:
        for layer in layers.values():
            layer.whole = True
        yield
    finally:
        for layer in layers.values():
            layer.whole = False


def _hooks(
    piece: Workpiece, layers: Mapping[str, Compressed], sites: Sequence[Site], batch: Batch
) -> tuple[list[Hook], list[Hook]]:
    """What solves these layers before they run, and what matches their statistics behind that."""
    axes = piece.task.examples
    halves: Halves = functools.partial(axes.halves, count=axes.count(batch))
    met = _meet(piece, sites, batch, halves)
    solvers: list[Hook] = []
    matchers: list[Hook] = []
    for site in sites:
        if site.name not in met:
            continue  # other examples may be sent another way
        layer, seen = layers[site.name], met[site.name]
        few = few_rows(site, axes.count(batch))
        solvers.append((layer, _solver(piece, site, seen.given, halves, few)))
        if gained(layer) and seen.outputs is not None:
            matchers.append((layer, matcher(seen.outputs, GAIN, seen.given.shape, halves)))
    return solvers, matchers


def affordable(sites: Sequence[Site]) -> int:
    """Examples whose inputs of all layers fit into the memory of all windows, and the largest."""
    each = [*map(_inputs, sites), 1]
    return max(1, min(WINDOWS * WINDOW // sum(each), AT_ONCE // max(each)))


def _inputs(site: Site) -> int:
    """Floats that a layer is given for one example."""
    return site.inputs * site.shape[1] * site.groups


def _meet(piece: Workpiece, sites: Sequence[Site], batch: Any, halves: Halves) -> dict[str, _Met]:
    met: dict[str, _Met] = {}

    def seen(site: Site) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            met[site.name] = _Met(
                args[0].detach().float().clone(), in_halves(out.float(), site, halves)
            )

        return hook

    with (
        torch.no_grad(),
        hooked((piece.model.get_submodule(site.name), seen(site)) for site in sites),
    ):
        piece.task.run(piece.model, batch)
    return met


def _solver(
    piece: Workpiece, site: Site, wanted: Tensor, halves: Halves, few: bool
) -> Callable[..., None]:
    """What solves a layer before it runs; few: whether its rows are too few to be believed."""

    def hook(layer: Compressed, args: tuple[Tensor, ...], _: dict[str, Any]) -> None:
        met = args[0].float()
        if met.shape != wanted.shape or not len(wanted):
            return  # an expert that is shown other places, or none
        given = layer.quantisers[0](met) if layer.quantisers else met
        target = site.matrix(piece.weight(site))
        seconds, crosses, rows = _moments(site, given, wanted, piece.seed, halves)
        second, step = _step(target, (seconds, crosses))
        if step is not None:
            if few and len(rows) == 2:
                sums = [k * mean for k, mean in zip(rows, seconds, strict=True)]
                second = shrunk(torch.stack(sums), rows)
            aim = (target + step).reshape(site.shape)
            held = [[f.numbers for f in factors] for factors in layer.factors]
            metric = Metric(second)
            numbers = solve_menu(site, aim, [layer.plan.terms], metric, [held], STEPS)[0]
            for factors, solved in zip(layer.factors, numbers, strict=True):
                for factor, q in zip(factors, solved, strict=True):
                    factor.take(q)
        layer.whole = False
        calibrate_between(layer, met[:BETWEEN], piece.seed)
        layer.whole = True

    return hook


def _moments(
    site: Site, given: Tensor, wanted: Tensor, seed: int, halves: Halves
) -> tuple[Tensor, Tensor, list[int]]:
    """Means of x' x'^T and of x x'^T over the same places, [halves, groups, n, n]; how many.

    The halves are every second example; there is one half where these cannot be told.
    """
    rows = max(PATCHES // site.columns, 8 * site.columns)
    places = max(1, -(-rows // len(given)))
    seconds, crosses, counts = [], [], []
    for pair in zip(halves(given) or [given], halves(wanted) or [wanted], strict=True):
        ours, theirs = (site.patches(x, places, torch.Generator().manual_seed(seed)) for x in pair)
        seconds.append((ours.mT @ ours) / ours.shape[1])
        crosses.append((theirs.mT @ ours) / ours.shape[1])
        counts.append(ours.shape[1])
    return torch.stack(seconds), torch.stack(crosses), counts


def _step(target: Tensor, moments: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor | None]:
    """The second moment of x', and the step from W that the inputs x' ask for.

    The step is `W (E[x x'^T] - E[x' x'^T]) (E[x' x'^T] + ridge)^-1`, which with the least ridge
    gives the least-squares solution of `W' x' = W x`. The ridge is the one whose step from either
    half of the examples brings most on the other half: the fewer the independent rows, the more it
    holds back. None if no step brings anything there.
    """
    seconds, crosses = moments
    second, pull = seconds.mean(0), target @ (crosses.mean(0) - seconds.mean(0))
    if len(seconds) < 2:
        return second, None
    # [halves, groups, rows, n]
    pulls = target[:, :: -(-target.shape[1] // ROWS)] @ (crosses - seconds)

    def brought(share: float) -> float:
        """By how much the squared error of either half falls with the step of the other."""
        steps = _solve(seconds, pulls, share).flip(0)
        return float((steps * (2 * pulls - steps @ seconds)).double().sum())

    best = max(RIDGES, key=brought)
    if brought(best) <= 0:
        return second, None
    return second, _solve(second.double(), pull.double(), best).float()


def _solve(second: Tensor, pull: Tensor, share: float) -> Tensor:
    """`pull (second + ridge)^-1`, [..., rows, n]; ridge: a share of the mean diagonal."""
    diagonal = second.diagonal(dim1=-2, dim2=-1)
    mean = diagonal.mean(-1, keepdim=True)
    ridge = torch.where(mean > LEAST, share * mean, 1.0)
    damped = second + torch.diag_embed(ridge.expand_as(diagonal))
    return torch.cholesky_solve(pull.mT, torch.linalg.cholesky(damped)).mT
