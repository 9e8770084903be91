"""Linears, and linears that store their transpose."""

import functools
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rabbet.layers.base import LayerKind, Site

_PLAIN = {*vars(nn.Linear(1, 1)), "_is_hf_initialized"}  # a mark of transformers


@functools.cache
def _same(kind: Any) -> bool:
    """Whether the own forward of a subclass does what a linear does, on small ones."""
    for bias in (True, False):
        small: Any = kind.__new__(kind)
        nn.Linear.__init__(small, 5, 3, bias)
        small.eval()
        for shape in ((4, 5), (2, 4, 5), (5,)):
            x = torch.linspace(-1, 1, math.prod(shape)).cos().view(shape)
            try:
                with torch.no_grad():
                    found = small(x)
            except Exception:
                return False
            wanted = F.linear(x, small.weight, small.bias)
            if not isinstance(found, Tensor) or found.shape != wanted.shape:
                return False
            if not torch.allclose(found, wanted, atol=1e-5):
                return False
    return True


@dataclass(frozen=True)
class Linear(LayerKind):
    """[..., in] -> [..., out]."""

    name: str = "linear"
    shares_table: ClassVar[bool] = True

    def fits(self, module: nn.Module) -> bool:
        """See `LayerKind.fits`; a forward that was written anew counts if it does the same."""
        if not isinstance(module, nn.Linear):
            return False
        kind: Any = type(module)
        plain = vars(module).keys() <= _PLAIN  # so that its class alone says what it does
        return type(module).forward is nn.Linear.forward or (plain and _same(kind))

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
