"""Tables whose rows are looked up."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rabbet.layers.base import LayerKind, Site
from rabbet.layers.linear import Linear


@dataclass(frozen=True)
class Embedding(LayerKind):
    """Indices [...] -> rows [..., columns]; linears that share the table are its heads."""

    name: str = "embedding"
    looks_up: ClassVar[bool] = True
    operator: ClassVar[str] = "Gather"

    @property
    def head(self) -> LayerKind:
        """A linear."""
        return Linear()

    def fits(self, module: nn.Module) -> bool:
        """See `LayerKind.fits`."""
        return isinstance(module, nn.Embedding) and type(module).forward is nn.Embedding.forward

    def obstacle(self, module: nn.Module) -> str | None:
        """An embedding that rewrites its table during a look-up."""
        rewrites = isinstance(module, nn.Embedding) and module.max_norm is not None
        return "an embedding with max_norm rewrites its table" if rewrites else None

    def places(self, value: Tensor) -> int:
        """Indices have no axis of features."""
        return value.numel() if not value.is_floating_point() else super().places(value)

    def run(self, site: Site, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The look-up."""
        return F.embedding(x, weight)

    def patches(
        self, site: Site, x: Tensor, places: int | None, generator: torch.Generator
    ) -> Tensor:
        """None: a table meets indices."""
        raise NotImplementedError("a table that is looked up meets no rows")
