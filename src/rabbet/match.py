"""Statistics matching: each channel's mean and deviation before the activation, made those of the float network.

Layers are corrected in the order in which they run, so each sees inputs that are corrected already; the gain goes into
the scales and the shift into the bias, and nothing is added to the network. Unlike re-estimated batch-norm statistics
this harms no network that is healthy.
"""

import torch
from torch import Tensor, nn

from rabbet.grid import stored
from rabbet.layer import Compressed, compressed_layers
from rabbet.workpiece import Workpiece

GAIN = (0.67, 1.5)  # a larger correction says that the layer is lost, not that it is scaled


def match_statistics(student: nn.Module, piece: Workpiece, limit: int = 320) -> None:
    """Correct every layer of a compressed network in place, in one pass over about `limit` examples.

    Only layers that run once and have a scale for each output channel in every term are corrected.
    """
    batch = piece.task.gathered(limit)
    layers = compressed_layers(student)
    sites = [s for s in piece.survey if s.name in layers and s.calls == 1 and _adjustable(layers[s.name])]
    wanted: dict[str, tuple[Tensor, Tensor]] = {}

    def measure(name: str, axis: int) -> object:
        def seen(_: nn.Module, __: object, out: Tensor) -> None:
            wanted[name] = _statistics(out, axis)

        return seen

    def correct(name: str, axis: int) -> object:
        def seen(layer: Compressed, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
            _adjust(layer, _statistics(out, axis), wanted[name])
            return layer.forward(args[0])

        return seen

    for model, make in ((piece.model, measure), (student, correct)):
        axes = [(s.name, 1 if s.stride else -1) for s in sites]
        hooks = [model.get_submodule(n).register_forward_hook(make(n, axis)) for n, axis in axes]  # type: ignore[arg-type]
        try:
            with torch.no_grad():
                piece.task.run(model, batch)
        finally:
            for hook in hooks:
                hook.remove()


def _adjustable(layer: Compressed) -> bool:
    last = [factors[-1].grid for factors in layer.factors]
    return layer.site.kind != "embedding" and all(grid.axis == 0 for grid in last)


def _statistics(out: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    flat = out.movedim(axis, 0).flatten(1)
    return flat.mean(1), flat.std(1) if flat.shape[1] > 1 else torch.zeros_like(flat[:, 0])


def _adjust(layer: Compressed, found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> None:
    """Gain into the last factor of every term (its first axis is the output), shift into the bias."""
    (mean, spread), (goal, deviation) = found, wanted
    gain = torch.where(spread > 1e-8, deviation / spread.clamp_min(1e-8), 1.0).clamp(*GAIN)
    for factors in layer.factors:
        last = factors[-1]
        last.scale.copy_(stored(last.scale * gain))
    if layer.bias is not None:
        layer.bias.data = goal - (mean - layer.bias) * gain
