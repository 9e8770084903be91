"""Linears, and linears that store their transpose."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rabbet.layers.base import LayerKind, Site

SAME = {"FalconLinear"}
"""Linears of transformers whose forward is written anew, and does what torch's does."""


@dataclass(frozen=True)
class Linear(LayerKind):
    """[..., in] -> [..., out]."""

    name: str = "linear"
    shares_table: ClassVar[bool] = True

    def fits(self, module: nn.Module) -> bool:
        """See `LayerKind.fits`; some that are written anew are known to do the same."""
        kind = type(module)
        known = kind.__name__ in SAME and kind.__module__.startswith("transformers.")
        return isinstance(module, nn.Linear) and (known or kind.forward is nn.Linear.forward)

    def foldable(self, module: nn.Module, output: Tensor) -> bool:
        """On [n, places, features] BatchNorm1d works on another axis than the linear."""
        return output.ndim == 2

    def run(self, site: Site, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The product."""
        return F.linear(x, weight, bias)

    def patches(
        self, site: Site, x: Tensor, places: int | None, generator: torch.Generator
    ) -> Tensor:
        """The feature vectors, or a random choice of `places` per example if there are more."""
        rows = x.reshape(-1, x.shape[-1])
        if places is None or len(rows) <= places * x.shape[0]:
            return rows[None]
        chosen = torch.randperm(len(rows), generator=generator)[: places * x.shape[0]]
        return rows[chosen.to(x.device)][None]


@dataclass(frozen=True)
class TransposedLinear(Linear):
    """transformers' Conv1D: a linear whose module stores [in, out]."""

    name: str = "transposed linear"
    shares_table: ClassVar[bool] = False

    def fits(self, module: nn.Module) -> bool:
        """By name and by what it holds: transformers is not a dependency."""
        kind = type(module)
        return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"

    def weight(self, module: nn.Module) -> Tensor:
        """[in, out] -> [out, in]."""
        return super().weight(module).T

    def native(self, weight: Tensor, groups: int = 1) -> Tensor:
        """[out, in] -> [in, out]."""
        return weight.T

    def foldable(self, module: nn.Module, output: Tensor) -> bool:
        """No: no known network has a BatchNorm behind one."""
        return False
