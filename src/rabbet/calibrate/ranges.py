"""One pass over the user's batches: the range of each quantised activation."""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from rabbet.calibrate.moments import run_through
from rabbet.data.task import Task
from rabbet.grids.grid import Grid
from rabbet.jobs import Progress, silent
from rabbet.layers import Site
from rabbet.model.compressed import ActQuant, Compressed, compressed_layers
from rabbet.model.hooks import hooked

TINY = 1e-30  # a range below which no scale is a normal number of float32
VALUES = 2**16  # activations that a range is chosen from
# shares of the extremes that are tried: from far, and on each side of the best
COARSE, FINE = 20, 5


class Sample:
    """A random sample of the values that pass, and their extremes.

    At most `per_call` values of each tensor are kept.
    """

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
        if len(flat) > self.per_call:
            chosen = torch.randint(len(flat), (self.per_call,), generator=self.generator)
            flat = flat[chosen.to(flat.device)]
        else:
            flat = flat.clone()  # what follows may work in place
        self.kept.append(flat.float().cpu())

    def range(self, grid: Grid) -> tuple[Tensor, Tensor]:
        """Scale and zero point of least squared error among shrunken versions of the extremes.

        Shares of 0.1 to 1 are tried from far, then finer ones around the best.
        """
        if self.high - self.low < TINY:
            return torch.ones(1), torch.zeros(1)
        values = torch.cat(self.kept)

        def at(share: float) -> tuple[Tensor, Tensor]:
            scale = torch.tensor([(self.high - self.low) * share / grid.high])
            return scale, (-self.low * share / scale).round().clamp(0, grid.high)

        def error(share: float) -> float:
            scale, zero = at(share)
            rounded = grid.values(grid.codes(values, scale, zero), scale, zero)
            return float(rounded.sub_(values).square_().mean())

        step = 0.9 / COARSE
        best = min((1 - step * k for k in range(COARSE + 1)), key=error)
        near = (best + step * k / (FINE + 1) for k in range(-FINE, FINE + 1))
        return at(min((share for share in near if 0.1 <= share <= 1), key=error))


def calibrate_ranges(
    model: nn.Module, task: Task, seed: int = 0, limit: int = 512, progress: Progress = silent
) -> None:
    """Choose scale and zero point of every activation quantiser of a compressed network, in place.

    One pass with activations in float over about `limit` examples; ranges minimise the squared
    error.
    """
    acts = [m for m in model.modules() if isinstance(m, ActQuant)]
    _calibrate(model, acts, task, seed, limit, progress)


def range_ends(
    model: nn.Module, task: Task, widths: Iterable[int], seed: int = 0
) -> dict[str, dict[int, tuple[float, float]]]:
    """The ends of each input's range, as `calibrate_ranges` chooses them, by layer and bits.

    The quantisers of the model are left at the last of the widths.
    """
    layers = compressed_layers(model)
    ends: dict[str, dict[int, tuple[float, float]]] = {name: {} for name in layers}
    for bits in sorted(widths):
        for layer in layers.values():
            for act in layer.quantisers:
                act.grid = Grid.of(bits, "unsigned")
        calibrate_ranges(model, task, seed)
        for name, layer in layers.items():
            for act in layer.quantisers:
                scale, zero = float(act.scale), float(act.zero)
                ends[name][bits] = -zero * scale, (act.grid.high - zero) * scale
    return ends


def input_ranges(  # noqa: PLR0913 (those behind the star are options)
    model: nn.Module,
    sites: Sequence[Site],
    task: Task,
    widths: Iterable[int],
    *,
    seed: int = 0,
    progress: Progress = silent,
    limit: int = 512,
) -> dict[str, dict[int, ActQuant]]:
    """Quantisers of the inputs of a float network's layers, by site and bits.

    One pass over about `limit` examples; see `calibrate_ranges`.
    """
    batches = task.read()
    sizes = list(itertools.accumulate(map(task.examples.count, batches)))
    count = next((k + 1 for k, total in enumerate(sizes) if total >= limit), len(sizes))
    generator = torch.Generator().manual_seed(seed)
    samples = {site.name: Sample(-(-VALUES // count), generator) for site in sites}

    def seen(sample: Sample) -> Callable[..., None]:
        return lambda _, args, __: sample(args[0])

    hooks = [
        (model.get_submodule(name), seen(samples[site.name]))
        for site in sites
        for name in site.heads or (site.name,)
    ]
    with hooked(before=hooks):
        run_through(model, task, batches[:count], progress, "measuring ranges")
    result: dict[str, dict[int, ActQuant]] = {}
    for site in sites:
        home = site.weight(model).device
        result[site.name] = {}
        for bits in widths:
            act = ActQuant(bits)
            act.set_range(*samples[site.name].range(act.grid))
            result[site.name][bits] = act.to(home)
    return result


def calibrate_inner(model: nn.Module, task: Task, seed: int = 0, limit: int = 512) -> None:
    """Choose only the ranges of tensors between factors, in place, after the factors have changed.

    Meanwhile the layers' own inputs stay quantised.
    """
    acts = [act for layer in compressed_layers(model).values() for act in layer.quantisers[1:]]
    _calibrate(model, acts, task, seed, limit, silent)


def calibrate_between(layer: Compressed, x: Tensor, seed: int = 0) -> None:
    """Choose the ranges of the tensors between the factors of one layer, in place.

    x: a batch of the layer's input, quantised or not.
    """
    samples = {
        act: Sample(VALUES, torch.Generator().manual_seed(seed)) for act in layer.quantisers[1:]
    }
    if samples:
        _observed(samples, lambda: layer.forward(x))


def _calibrate(
    model: nn.Module,
    acts: Sequence[ActQuant],
    task: Task,
    seed: int,
    limit: int,
    progress: Progress,
) -> None:
    if not acts:
        return
    sizes = list(itertools.accumulate(map(task.examples.count, task.read())))
    count = next((k + 1 for k, total in enumerate(sizes) if total >= limit), len(sizes))
    generator = torch.Generator().manual_seed(seed)
    samples = {act: Sample(-(-VALUES // count), generator) for act in acts}
    _observed(
        samples, lambda: run_through(model, task, task.read()[:count], progress, "measuring ranges")
    )


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
