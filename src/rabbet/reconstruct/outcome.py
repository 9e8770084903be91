"""How far each compressed layer is from the one it replaces."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rabbet.core.plan import LayerPlan
from rabbet.layers import Site
from rabbet.model.compressed import compressed_layers, stored_weights
from rabbet.model.hooks import Hook, hooked
from rabbet.workpiece import Workpiece


@dataclass(frozen=True)
class LayerOutcome:
    """One layer of a result.

    error: the norm of the difference between the outputs of the compressed and of the float layer,
    both given the float network's inputs, over the norm of the latter; of a stored weight, the same
    of the weight. None for a layer that is left in float, or if it is not known.
    """

    site: Site
    plan: LayerPlan | None
    error: float | None


def layer_errors(student: nn.Module, piece: Workpiece) -> dict[str, float]:
    """The error of each compressed layer, see `LayerOutcome`, on the first batch."""
    sums: dict[str, Tensor] = {}

    def seen(name: str, ours: Tensor, theirs: Tensor) -> None:
        pair = torch.stack([(ours - theirs).double().norm(), theirs.double().norm()]).square().cpu()
        sums[name] = sums.get(name, torch.zeros(2, dtype=torch.float64)) + pair

    def compared(name: str, layer: nn.Module) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
            given = args[0].float() if args[0].is_floating_point() else args[0]
            seen(name, layer(given), out.float())

        return hook

    hooks: list[Hook] = [
        (piece.model.get_submodule(name), compared(name, layer))
        for name, layer in compressed_layers(student).items()
    ]
    with torch.no_grad():
        if hooks:
            with hooked(hooks):
                piece.task.run(piece.model, piece.task.first())
        for name, weight in stored_weights(student).items():
            seen(name, weight.canonical, piece.weight(piece.survey[name]))
    return {name: float((a / b.clamp_min(1e-30)).sqrt()) for name, (a, b) in sums.items()}
