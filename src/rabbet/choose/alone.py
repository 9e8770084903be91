"""Layers alone, as the whole of a network: what a runtime's time and a file's bytes are told by."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from rabbet.core.layout import factor_shapes
from rabbet.core.plan import LayerPlan
from rabbet.grids.grid import Grid, Quantised
from rabbet.layers import Site
from rabbet.model.compressed import Compressed, Head, store
from rabbet.model.hooks import hooked
from rabbet.workpiece import Workpiece


def inputs(piece: Workpiece) -> dict[str, torch.Size]:
    """The shape of the input of each site that multiplies, for one example."""
    shapes: dict[str, torch.Size] = {}

    def seen(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...], __: dict[str, Any]) -> None:
            shapes.setdefault(name, args[0].shape)

        return hook

    multiplying = [s for s in piece.survey if s.multiplies]
    hooks = [(piece.model.get_submodule(runner(s)), seen(s.name)) for s in multiplying]
    with torch.no_grad(), hooked(before=hooks):
        piece.task.run(piece.model, piece.task.examples.first(piece.task.read()[0]))
    return shapes


def runner(site: Site) -> str:
    """Which layer multiplies with the weight; all heads of a table do so alike."""
    return site.heads[0] if site.heads else site.name


def chance() -> torch.Generator:
    """A generator of our own: the one that all code shares is the user's."""
    return torch.Generator().manual_seed(0)


def random_layer(site: Site, line: LayerPlan) -> Compressed:
    """A layer with any numbers."""
    generator = chance()
    terms = [
        [_any(shape, t.grid, generator) for shape in factor_shapes(site, t)] for t in line.terms
    ]
    # torch's exporter leaves out a bias of zeros
    layer = Compressed(site, line, terms, torch.ones(site.shape[0]) if site.bias else None)
    for act in layer.quantisers:
        act.set_range(torch.tensor(1 / 255), torch.tensor(0.0))
    return layer


def _any(shape: tuple[int, ...], grid: Grid, generator: torch.Generator) -> Quantised:
    codes = torch.randint(grid.low, grid.high + 1, shape, generator=generator).float()
    scale = torch.full(grid.scale_shape(shape), 1 / 64)
    return Quantised(grid, codes, scale, torch.zeros_like(scale) if grid.scales.zeros else None)


def stand_in(site: Site) -> str:
    """A name as long as the layer's: names lie in a file, too."""
    return "n" * max(1, len(site.name))


class Alone(nn.Module):
    """A layer as a network: a table with the heads that share it, a stored weight in a sum.

    It takes what the layer does: [..., in] or images; indices, then the input of the heads; for a
    stored weight numbers, [n].
    """

    def __init__(self, site: Site, line: LayerPlan) -> None:
        super().__init__()
        self.heads = tuple(f"head{k}" for k in range(len(site.heads)))
        name = stand_in(site)
        self.site = replace(site, name=name, tied=(), norm=None, heads=self.heads)
        layer = random_layer(self.site, line)
        if not site.runs:
            self.register_parameter(name, nn.Parameter(torch.zeros(site.shape), False))
            store(self, layer)
            return
        self.add_module(name, layer)
        for head in self.heads:
            self.add_module(head, Head(layer, None))

    def forward(self, x: Tensor, *more: Tensor) -> tuple[Tensor, ...]:
        """The layer's output, then those of its heads."""
        layer = getattr(self, self.site.name)
        if not self.site.runs:
            return (x[:, None, None] + layer,)
        return (layer(x), *(getattr(self, head)(*more) for head in self.heads))

    def batch(self, given: torch.Size | None) -> tuple[Tensor, ...]:
        """Two examples of what it takes; given: the shape of one, of what the weight multiplies."""
        multiplied = (
            () if given is None else (torch.cat([torch.rand(given, generator=chance())] * 2),)
        )
        if not self.site.runs:
            return (torch.zeros(2),)
        ids = (torch.zeros(2, 3, dtype=torch.long),) if self.site.looks_up else ()
        return (*ids, *multiplied)
