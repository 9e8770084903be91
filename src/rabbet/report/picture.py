"""Pictures of a method's search; they need matplotlib (`pip install rabbet[report]`)."""

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from rabbet.errors import FileError, PlanError
from rabbet.files import path_of, write_whole
from rabbet.methods.cgmq.gates import Gating
from rabbet.methods.cora.search import Search, butterworth
from rabbet.train.qat import WIDEST


def draw_search(search: Search, path: str | Path, layer: str | None = None) -> None:
    """Write a picture of a rank search; the suffix of the path (.svg, .png, .pdf) is the format.

    Above: the cut-off of every layer over the iterations, and the loss. Below: the singular values
    of one layer (default: the one with the highest final cut-off), and the share of each that
    passes the soft threshold. Raises ImportError without matplotlib, PlanError for a layer that was
    not searched, FileError for a path that cannot be written.
    """
    name = max(search.ranks, key=lambda n: search.ranks[n]) if layer is None else layer
    if name not in search.names:
        raise PlanError(f"{name!r} was not searched; there are {', '.join(search.names)}")
    figure = _figure()
    above, below = figure.subplots(2, 1)
    _draw_iterations(above, search)
    _draw_threshold(below, search, name)
    _save(figure, path)


def draw_gates(gating: Gating, path: str | Path) -> None:
    """Write a picture of a search by gates, with one column per epoch.

    The suffix of the path is the format. Above: the bits of every tensor, and its gate. Below: the
    share of the budget that was used, and the loss on held-back examples. Raises ImportError
    without matplotlib, FileError for a path that cannot be written.
    """
    figure = _figure()
    above, below = figure.subplots(2, 1, height_ratios=(2, 1))
    image = above.imshow(
        gating.widths.T.clamp(max=WIDEST).numpy(), aspect="auto", interpolation="nearest"
    )
    figure.colorbar(image, ax=above, label="bits")
    # If each output of a layer has a gate, only the first is labelled.
    ticks = {
        k: n.removesuffix("[0]")
        for k, n in enumerate(gating.names)
        if not n.endswith("]") or n.endswith("[0]")
    }
    above.set_yticks(list(ticks), list(ticks.values()), fontsize=5)
    for k, gates in enumerate(gating.gates.T.tolist()):
        # Each gate is drawn in its own row, its full range scaled to the height of the row.
        above.plot(
            [k + 0.5 - g / float(gating.gates.max() + 0.5) for g in gates],
            color="white",
            linewidth=0.6,
        )
    above.set(xlabel="epoch")
    below.plot((100 * gating.shares).numpy(), color="grey")
    below.set(xlabel="epoch", ylabel="% of the budget")
    loss = below.twinx()
    loss.plot(gating.losses.numpy(), color="black", linestyle=":")
    loss.set(ylabel="held-back loss (dotted)")
    _save(figure, path)


def draw_sweep(
    lines: Mapping[str, Sequence[tuple[float, float]]],
    label: str,
    whole: float | None,
    path: str | Path,
) -> None:
    """Write a picture of measures over costs, a line for each label; whole: that of the network.

    Raises as `draw_gates` does.
    """
    figure = _figure()
    axes = figure.subplots()
    for name, points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), marker=".", label=name)
    if whole is not None and math.isfinite(whole):
        axes.axhline(whole, color="grey", linestyle=":", label="float")
    axes.set(xlabel=label, ylabel="measure", xscale="log")
    if any(lines):
        axes.legend()
    _save(figure, path)


def require_picture(path: str | Path) -> None:
    """Raise FileError, before any work, for a picture that could not be drawn."""
    try:
        kinds = _figure().canvas.get_supported_filetypes()
    except ImportError as e:
        raise FileError(str(e)) from None
    if Path(path).suffix.removeprefix(".") not in kinds:
        raise FileError(f"{path} must end in what kind of picture it is: .{', .'.join(kinds)}")


def _save(figure: Any, path: str | Path) -> None:
    path = path_of(path)
    kind = path.suffix.removeprefix(".")
    if not kind:
        raise FileError(f"{path} must end in what kind of picture it is, such as .svg or .png")
    content = io.BytesIO()
    try:
        figure.savefig(content, format=kind)
    except ValueError as e:
        raise FileError(f"cannot write the picture {path}: {e}") from None
    write_whole(path, [content.getvalue()])


def _figure() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as e:
        raise ImportError("pictures are drawn with matplotlib: pip install rabbet[report]") from e
    return Figure(figsize=(8, 8), layout="constrained")


def _draw_iterations(axes: Any, search: Search) -> None:
    axes.plot(search.cutoffs.numpy(), linewidth=1)
    axes.set(xlabel="iteration", ylabel="cut-off of each layer (rank)")
    loss = axes.twinx()
    loss.plot(search.losses.numpy(), color="black", linewidth=1, linestyle=":")
    loss.set(ylabel="loss of the batch (dotted)")


def _draw_threshold(axes: Any, search: Search, name: str) -> None:
    values, cutoff = search.values[search.names.index(name)], torch.tensor(search.ranks[name])
    axes.bar(range(1, len(values) + 1), values.numpy(), color="lightgrey")
    axes.set(xlabel=f"{name}: singular value", ylabel="size (bars)")
    share = axes.twinx()
    gain = butterworth(cutoff, len(values), search.order, search.offset)
    share.plot(range(1, len(values) + 1), gain.square().numpy(), color="black")
    share.axvline(float(cutoff) + 0.5, color="black", linestyle=":")
    share.set(ylabel="share let through (line)", ylim=(0, 1.05))
