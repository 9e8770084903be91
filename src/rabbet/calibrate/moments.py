"""The second moment of the inputs of each layer, from passes over the user's batches."""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from rabbet.calibrate.inside import Products, recurrent
from rabbet.core.survey import Survey, windows
from rabbet.data.batches import Batch
from rabbet.data.examples import Axes
from rabbet.data.task import Task
from rabbet.errors import DataError
from rabbet.files import scratch
from rabbet.jobs import Progress, silent
from rabbet.layers import Site
from rabbet.layers.linear import Linear
from rabbet.model.hooks import Hook, hooked
from rabbet.solve.shrinking import shrunk

ROWS = 2**17  # most rows that one second moment is averaged over
ENTRIES = 2**23  # rows times columns, beyond which more rows cost more than they tell
EXAMPLES = 4096  # from which rows are drawn, about: more only take longer
INSIDE = 4096  # columns of a stored weight up to which what it meets is measured
WINDOW = 2**26  # entries of the moments that one pass over the batches sums, in double
FEW = 16  # rows for each column: of fewer, correlations are only believed as they foretell
KEPT = 2**28  # entries that memory keeps; what is beyond lies in a temporary folder


class Moments(Mapping[str, Tensor]):
    """Second moments [groups, n, n] by site. What memory has no room for is read when asked for.

    room: entries that memory keeps; None: KEPT.
    """

    def __init__(self, room: int | None = None) -> None:
        self._near: dict[str, Tensor] = {}
        self._far: dict[str, tuple[Path, torch.device]] = {}
        self._room = KEPT if room is None else room
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def add(self, name: str, moment: Tensor) -> None:
        """Keep the moment of a site."""
        if moment.numel() <= self._room:
            self._room -= moment.numel()
            self._near[name] = moment
            return
        self._folder = self._folder or tempfile.TemporaryDirectory(prefix="rabbet-")
        path = scratch(Path(self._folder.name), save({"": moment.cpu()}))
        self._far[name] = path, moment.device

    def __getitem__(self, name: str) -> Tensor:
        if name in self._near:
            return self._near[name]
        path, home = self._far[name]
        return load_file(path)[""].to(home)

    def __contains__(self, name: object) -> bool:
        return name in self._near or name in self._far

    def __iter__(self) -> Iterator[str]:
        yield from self._near
        yield from self._far

    def __len__(self) -> int:
        return len(self._near) + len(self._far)


@dataclass
class _Moment:
    """The running mean of x x^T over patches, [groups, n, n], summed in double.

    most: rows that are drawn from one call, about. cut: what tells the examples of an input apart
    by halves; of a layer with few rows these are summed apart, to tell how far their mean can be
    believed (`shrunk`).
    """

    site: Site
    most: int
    generator: torch.Generator
    cut: Callable[[Tensor], list[Tensor]] | None = None
    totals: Tensor | None = None
    rows: list[int] = field(default_factory=list)

    def __call__(self, _: nn.Module, args: tuple[Tensor, ...], __: dict[str, Any]) -> None:
        given = args[0].detach().float()
        most = -(-self.most // max(1, len(given)))
        for half, part in enumerate([given] if self.cut is None else self.cut(given)):
            if self.cut is None or part.numel():
                self._take(part, most, half)

    def _take(self, given: Tensor, most: int, half: int) -> None:
        """Sum the patches of some examples."""
        rows = self.site.patches(given, most, self.generator)
        where = f"the inputs of {self.site.name or 'the network'}"
        if not torch.isfinite(rows).all():
            raise DataError(f"{where} hold NaN or infinite values; check the batches")
        part = rows.mT @ rows
        if not torch.isfinite(part).all():
            raise DataError(
                f"{where} reach {float(rows.abs().max()):.3g}, whose squares do not fit float32; "
                "scale the batches down"
            )
        if self.totals is None:
            self.rows = [0] if self.cut is None else [0, 0]
            self.totals = torch.zeros(
                len(self.rows), *part.shape, dtype=torch.float64, device=part.device
            )
        self.totals[half].add_(part)
        self.rows[half] += rows.shape[1]

    def mean(self) -> Tensor:
        """The mean; the sums are let go."""
        assert self.totals is not None
        totals, self.totals = self.totals, None
        if self.cut is None:
            return (totals[0] / self.rows[0]).float()
        return shrunk(totals, self.rows)


def second_moments(
    model: nn.Module, survey: Survey, task: Task, seed: int = 0, progress: Progress = silent
) -> Moments:
    """Mean of patch patch^T for the inputs of every site that has some, [groups, n, n].

    Patches are im2col columns of convs and feature vectors of linears; at most 2^17 of them, and
    fewer where they are wide (2^23 entries, but 8 for each column), drawn evenly from all batches,
    or, of 8,192 examples or more, from every n-th, so that about 4,096 remain.
    Memory is one batch, the moments that one pass sums (2^26 entries in double, or the largest) and
    2^28 entries of those that are known; more passes are made where that is too little for all. A
    stored weight has one where it is seen what it is multiplied with (`inside`). A
    table without heads has none; one with heads those of their inputs, and as much again for being
    looked up. Where there are few rows for a column, correlations are shrunk (`solve.shrinking`).
    Raises DataError, naming the site, for inputs that are not finite.
    """
    batches, size = task.read(), task.examples.count
    batches = batches[:: max(1, sum(map(size, batches)) // EXAMPLES)]
    met = [s for s in survey if s.multiplies or (not s.runs and s.columns <= INSIDE)]
    examples = sum(map(size, batches))

    def entries(site: Site) -> int:
        return (1 + few_rows(site, examples)) * site.groups * site.columns**2

    passes = list(windows(met, entries, WINDOW))
    result, steps = Moments(), len(passes) * len(batches)
    for place, sites in enumerate(passes):

        def told(stage: str, done: int, _: int, before: int = place * len(batches)) -> None:
            progress(stage, before + done, steps)

        for name, moment in _summed(model, sites, task, batches, seed, told).items():
            result.add(name, moment)
    return result


def few_rows(site: Site, examples: int) -> bool:
    """Whether so many examples have too few rows to believe how the inputs of a layer correlate.

    All rows that there are count, whether or not so many are drawn.
    """
    met = site.head if site.heads else site
    return site.runs and examples * met.kernel_positions < FEW * met.columns


@dataclass
class _Halves:
    """Cuts what a layer is given by every second example of a batch, or by whole batches."""

    axes: Axes
    count: int = 0
    turn: int = 0

    def at(self, count: int, turn: int) -> None:
        """What follows is of a batch of so many, the `turn`th."""
        self.count, self.turn = count, turn % 2

    def __call__(self, given: Tensor) -> list[Tensor]:
        """Two parts, of which one may be empty; every second batch begins with the other half."""
        parts = self.axes.halves(given, self.count) or [given, given[:0]]
        return parts[::-1] if self.turn else parts


def _summed(
    model: nn.Module,
    sites: Sequence[Site],
    task: Task,
    batches: Sequence[Batch],
    seed: int,
    progress: Progress,
) -> dict[str, Tensor]:
    """The moments of some sites, in one pass; those that did not run are missing."""
    moments: dict[str, _Moment] = {}
    hooks: list[Hook] = []
    count, cut = task.examples.count, _Halves(task.examples)
    examples = sum(map(count, batches))
    for site in sites:
        met = site.head if site.heads else site
        if not site.runs:  # as far as it is seen, see `inside`
            met = replace(site, kind=Linear())
        rows = min(ROWS, max(ENTRIES // site.columns, 8 * site.columns))
        most = -(-rows // (len(batches) * met.calls))
        own = cut if few_rows(site, examples) else None
        moments[site.name] = _Moment(met, most, torch.Generator().manual_seed(seed), own)
        layers = [model.get_submodule(n) for n in site.heads or (site.name,) if site.runs]
        hooks += [(layer, moments[site.name]) for layer in layers]

    def see(name: str, x: Tensor) -> None:
        if name in moments:
            moments[name](model, (x,), {})

    def told(stage: str, done: int, total: int) -> None:  # between any two batches
        if done < total:
            cut.at(count(batches[done]), done)
        progress(stage, done, total)

    stored = [site for site in sites if not site.runs]
    hooks += recurrent(model, stored, see)
    with hooked(before=hooks), Products(model, stored, see):
        run_through(model, task, batches, told, "measuring inputs")
    seconds = {name: moment.mean() for name, moment in moments.items() if any(moment.rows)}
    for site in sites:
        if site.heads and site.name in seconds:
            table = site.kind.weight(model.get_submodule(site.name)).detach().float()
            seconds[site.name] = twofold(table, seconds[site.name])
    return seconds


def twofold(table: Tensor, second: Tensor) -> Tensor:
    """The metric of a table that is both looked up and multiplied with.

    The relative errors of the two uses are added.
    """
    share = ((table @ second[0]) * table).sum() / table.square().sum().clamp_min(1e-30)
    return second + share * torch.eye(len(second[0]), device=second.device)


def run_through(
    model: nn.Module, task: Task, batches: Sequence[Batch], progress: Progress, stage: str
) -> None:
    """Run a network on every batch, without gradients; `stage` names this to whoever watches."""
    progress(stage, 0, len(batches))
    with torch.no_grad():
        for k, batch in enumerate(batches):
            task.run(model, batch)
            progress(stage, k + 1, len(batches))
