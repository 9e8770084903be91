"""One pass over the user's batches: the second moment of each site's inputs, and the range of each activation."""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rabbet.engine import Progress, silent
from rabbet.errors import DataError
from rabbet.grid import Grid
from rabbet.layer import ActQuant, Compressed, compressed_layers
from rabbet.site import KINDS, Site, patches
from rabbet.survey import Survey
from rabbet.task import Batch, Task, examples

ROWS = 2**17  # most rows that one second moment is averaged over
ENTRIES = 2**24  # rows times columns, beyond which more rows cost more than they tell
EXAMPLES = 4096  # from which rows are drawn, about: more only take longer
VALUES = 2**16  # activations that a range is chosen from


@dataclass
class _Moment:
    """The running mean of x x^T over patches, [groups, n, n], summed in double."""

    site: Site
    places: int
    generator: torch.Generator
    total: Tensor | None = None
    rows: int = 0

    def __call__(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        found = patches(self.site, args[0].detach().float(), self.places, self.generator)
        if not torch.isfinite(found).all():
            raise DataError(
                f"the inputs of {self.site.name or 'the network'} hold NaN or infinite values; check the batches"
            )
        part = (found.mT @ found).double()
        self.total = part if self.total is None else self.total + part
        self.rows += found.shape[1]

    @property
    def mean(self) -> Tensor:
        assert self.total is not None
        return (self.total / self.rows).float().cpu()


def second_moments(
    model: nn.Module, survey: Survey, task: Task, seed: int = 0, progress: Progress = silent
) -> dict[str, Tensor]:
    """Mean of patch patch^T for the inputs of every site that has some, [groups, n, n] on the CPU.

    Patches are im2col columns of convs and feature vectors of linears; at most 2^17 of them, and fewer where they are
    wide (2^24 entries, but 8 for each column), drawn evenly from all batches, or from every so-manieth where there are
    8,192 examples or more, so that about 4,096 remain. Memory is one batch and the moments.
    A table without heads has none; one with heads those of their inputs, and as much again for being looked up.
    Raises DataError, naming the site, for inputs that are not finite.
    """
    batches = task.read()
    batches = batches[:: max(1, sum(map(examples, batches)) // EXAMPLES)]
    count = sum(map(examples, batches))
    moments: dict[str, _Moment] = {}
    hooks = []
    for site in survey:
        if not site.multiplies:
            continue
        met = site.head if site.heads else site
        rows = min(ROWS, max(ENTRIES // site.columns, 8 * site.columns))
        places = max(1, -(-rows // (count * met.calls)))
        moments[site.name] = _Moment(met, places, torch.Generator().manual_seed(seed))
        layers = [model.get_submodule(name) for name in site.heads or (site.name,)]
        hooks += [layer.register_forward_pre_hook(moments[site.name]) for layer in layers]
    try:
        _pass(model, task, batches, progress, "measuring inputs")
    finally:
        for hook in hooks:
            hook.remove()
    found = {name: moment.mean for name, moment in moments.items() if moment.rows}
    for site in survey:
        if site.heads and site.name in found:
            table = KINDS[site.kind].weight(model.get_submodule(site.name)).detach().cpu().float()
            found[site.name] = _twofold(table, found[site.name])
    return found


def _twofold(table: Tensor, second: Tensor) -> Tensor:
    """The metric of a table that is looked up and multiplied with: the relative errors of both, added."""
    share = ((table @ second[0]) * table).sum() / table.square().sum().clamp_min(1e-30)
    return second + share * torch.eye(len(second[0]))


def _pass(model: nn.Module, task: Task, batches: Sequence[Batch], progress: Progress, stage: str) -> None:
    with torch.no_grad():
        for k, batch in enumerate(batches):
            task.run(model, batch)
            progress(stage, k + 1, len(batches))


class Sample:
    """A random sample of the values that pass, at most `per_call` of each tensor, and their extremes."""

    def __init__(self, per_call: int, generator: torch.Generator) -> None:
        self.per_call, self.generator = per_call, generator
        self.low = self.high = 0.0  # zero always lies in the range: padding must be exact
        self.kept: list[Tensor] = []

    def __call__(self, x: Tensor) -> None:
        """Look at a tensor of any shape."""
        flat = x.detach().reshape(-1)
        if not len(flat):  # an expert that no place was sent to
            return
        self.low, self.high = min(self.low, float(flat.min())), max(self.high, float(flat.max()))
        chosen = torch.randint(len(flat), (min(self.per_call, len(flat)),), generator=self.generator)
        self.kept.append(flat[chosen.to(flat.device)].float().cpu())

    def range(self, grid: Grid, steps: int = 100) -> tuple[Tensor, Tensor]:
        """Scale and zero point of least squared error among shrunken versions of the extremes."""
        best, least = (torch.ones(1), torch.zeros(1)), torch.inf
        if self.high == self.low:
            return best
        values = torch.cat(self.kept)
        for k in range(steps):
            share = 1 - k / steps * 0.9
            scale = torch.tensor([(self.high - self.low) * share / grid.high])
            zero = (-self.low * share / scale).round().clamp(0, grid.high)
            error = float((grid.values(grid.codes(values, scale, zero), scale, zero) - values).square().mean())
            if error < least:
                best, least = (scale, zero), error
        return best


def calibrate_ranges(
    model: nn.Module, task: Task, seed: int = 0, limit: int = 512, progress: Progress = silent
) -> None:
    """Choose scale and zero point of every activation quantiser of a compressed network, in place.

    One pass with activations in float over about `limit` examples; ranges minimise the squared error.
    """
    acts = [m for m in model.modules() if isinstance(m, ActQuant)]
    _calibrate(model, acts, task, seed, limit, progress)


def range_ends(
    model: nn.Module, task: Task, widths: Iterable[int], seed: int = 0
) -> dict[str, dict[int, tuple[float, float]]]:
    """The ends of each input's range as `calibrate_ranges` finds them at several widths, by layer and bits.

    The quantisers of the model are left at the last of the widths.
    """
    layers = compressed_layers(model)
    found: dict[str, dict[int, tuple[float, float]]] = {name: {} for name in layers}
    for bits in sorted(widths):
        for layer in layers.values():
            for act in layer.quantisers:
                act.grid = Grid(bits, "unsigned")
        calibrate_ranges(model, task, seed)
        for name, layer in layers.items():
            for act in layer.quantisers:
                scale, zero = float(act.scale), float(act.zero)
                found[name][bits] = -zero * scale, (act.grid.high - zero) * scale
    return found


def calibrate_inner(model: nn.Module, task: Task, seed: int = 0, limit: int = 512) -> None:
    """The same for the tensors between factors only, for factors that have changed; inputs stay quantised."""
    acts = [act for layer in compressed_layers(model).values() for act in layer.quantisers[1:]]
    _calibrate(model, acts, task, seed, limit, silent)


def calibrate_between(layer: Compressed, x: Tensor, seed: int = 0) -> None:
    """The tensors between the factors of one layer, for a batch of its quantised or unquantised input."""
    samples = {act: Sample(VALUES, torch.Generator().manual_seed(seed)) for act in layer.quantisers[1:]}
    if samples:
        _observed(samples, lambda: layer.forward(x))


def _calibrate(
    model: nn.Module, acts: Sequence[ActQuant], task: Task, seed: int, limit: int, progress: Progress
) -> None:
    if not acts:
        return
    sizes = list(itertools.accumulate(map(examples, task.read())))
    count = next((k + 1 for k, total in enumerate(sizes) if total >= limit), len(sizes))
    generator = torch.Generator().manual_seed(seed)
    samples = {act: Sample(-(-VALUES // count), generator) for act in acts}
    _observed(samples, lambda: _pass(model, task, task.read()[:count], progress, "measuring ranges"))


def _observed(samples: Mapping[ActQuant, Sample], run: Callable[[], object]) -> None:
    """Show each quantiser's inputs to its sample while something runs, then set the ranges."""
    try:
        for act, sample in samples.items():
            act.observer = sample
        run()
    finally:
        for act in samples:
            act.observer = None
    for act, sample in samples.items():
        act.set_range(*(t.to(act.scale.device) for t in sample.range(act.grid)))
