"""Pictures of what a method saw; they need matplotlib (`pip install rabbet[report]`)."""

from pathlib import Path
from typing import Any

import torch

from rabbet.errors import FileError, PlanError
from rabbet.search import Search, butterworth


def draw_search(found: Search, path: str | Path, layer: str | None = None) -> None:
    """Write a picture of a rank search; the ending of the path says which kind (.svg, .png, .pdf).

    Above: the cut-off of every layer over the iterations, and the loss. Below: the singular values of one layer
    (default: the one that ends with the highest cut-off), and the share of each that the soft threshold lets through.
    Raises ImportError without matplotlib, PlanError for a layer that was not searched, FileError for a path that
    cannot be written.
    """
    name = max(found.ranks, key=lambda n: found.ranks[n]) if layer is None else layer
    if name not in found.names:
        raise PlanError(f"{name!r} was not searched; there are {', '.join(found.names)}")
    figure = _figure()
    above, below = figure.subplots(2, 1)
    _draw_iterations(above, found)
    _draw_threshold(below, found, name)
    try:
        figure.savefig(path)
    except (OSError, ValueError) as e:
        raise FileError(f"cannot write the picture {path}: {e}") from None


def _figure() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as e:
        raise ImportError("pictures are drawn with matplotlib: pip install rabbet[report]") from e
    return Figure(figsize=(8, 8), layout="constrained")


def _draw_iterations(axes: Any, found: Search) -> None:
    axes.plot(found.cutoffs.numpy(), linewidth=1)
    axes.set(xlabel="iteration", ylabel="cut-off of each layer (rank)")
    loss = axes.twinx()
    loss.plot(found.losses.numpy(), color="black", linewidth=1, linestyle=":")
    loss.set(ylabel="loss of the batch (dotted)")


def _draw_threshold(axes: Any, found: Search, name: str) -> None:
    values, cutoff = found.values[found.names.index(name)], torch.tensor(found.ranks[name])
    axes.bar(range(1, len(values) + 1), values.numpy(), color="lightgrey")
    axes.set(xlabel=f"{name}: singular value", ylabel="size (bars)")
    share = axes.twinx()
    gain = butterworth(cutoff, len(values), found.order, found.offset)
    share.plot(range(1, len(values) + 1), gain.square().numpy(), color="black")
    share.axvline(float(cutoff) + 0.5, color="black", linestyle=":")
    share.set(ylabel="share let through (line)", ylim=(0, 1.05))
