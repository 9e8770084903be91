"""Inputs of a block's layers behind compressed blocks, and the weights that make up for it.

A layer meets x' where the float network's meets x. The weight that does with x' what W does with x
is, in least squares, `W + W (E x x'^T - E x' x'^T) (E x' x'^T)^-1`; it is rounded in the metric of
x'.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rabbet.jobs import Tensors
from rabbet.layers import Site
from rabbet.methods.blockwise.stack import Call
from rabbet.model.hooks import hooked
from rabbet.reconstruct.candidates import Terms, solve_site

RIDGE = 0.02  # share of the mean square of the inputs that holds the target to the weight
TINY = 1e-12


def solve_drifted(
    weight: Tensor,
    second: Tensor | None = None,
    cross: Tensor | None = None,
    ridge: Tensor | None = None,
    *,
    site: Site,
    menu: Sequence[Terms],
) -> Tensors:
    """See `solve_site`, for inputs x' in place of x: the target does with x' what W does with x.

    second: the mean of x' x'^T, cross: of x x'^T, [groups, n, n]; ridge: what is added to the
    diagonal of the first, [groups, n], to hold the target to the weight; None: nothing is known.
    """
    if second is None or cross is None or ridge is None:
        return solve_site(weight, None, site=site, menu=menu)
    damped = (second + torch.diag_embed(ridge)).double()
    rows = site.matrix(weight).double()
    moved = torch.linalg.solve(damped, (rows @ (cross - second).double()).mT).mT
    target = (rows + moved).float().reshape(weight.shape)
    return solve_site(target, second, site=site, menu=menu)


class Drift:
    """Sums x' x'^T and x x'^T over what the sites of a block are given in both networks.

    words: in the batch that runs; what is given to a site that meets only some is no pair.
    """

    def __init__(self) -> None:
        self.float: dict[str, list[Tensor]] = {}
        self._seen: list[tuple[Tensor, Tensor | None, str]] = []
        self.words = 0
        self.same: dict[str, str] = {}
        self.sums: dict[str, tuple[Tensor, Tensor]] = {}
        self.rows: dict[str, int] = {}

    def watch(self, site: Site) -> Any:
        """A hook that keeps what the float network's layer is given, until `forget`."""

        def seen(_: nn.Module, args: tuple[Tensor, ...], __: dict[str, Any]) -> None:
            self.float.setdefault(site.name, []).append(args[0].detach())

        return seen

    def add(self, site: Site) -> Any:
        """A hook that adds what the layer is given behind compressed blocks."""

        def seen(_: nn.Module, args: tuple[Tensor, ...], __: dict[str, Any]) -> None:
            calls = self.float.get(site.name, [])
            ours, theirs = args[0], calls.pop(0) if calls else None
            for one, other, name in self._seen:
                if one is ours and other is theirs:
                    self.same[site.name] = name
                    return
            self._seen.append((ours, theirs, site.name))
            none = torch.Generator()
            x = site.patches(ours.detach().float(), None, none)
            second = cross = x.mT @ x
            # an expert may be sent other words than in the float network: no drift is known
            whole = x.shape[1] == self.words
            if whole and theirs is not None and theirs.shape == ours.shape:
                cross = site.patches(theirs.float(), None, none).mT @ x
            if site.name in self.sums:
                held = self.sums[site.name]
                held[0].add_(second)
                held[1].add_(cross)
            else:
                self.sums[site.name] = second.double(), cross.double().clone()
            self.rows[site.name] = self.rows.get(site.name, 0) + x.shape[1]

        return seen

    def forget(self) -> None:
        """Let go of the inputs of a batch."""
        self.float.clear()
        self._seen.clear()

    def take(self, other: "Drift") -> None:
        """Take in what was summed over other batches."""
        for name, sums in other.sums.items():
            held = self.sums.get(name)
            self.sums[name] = sums if held is None else (held[0] + sums[0], held[1] + sums[1])
            self.rows[name] = other.rows[name] + self.rows.get(name, 0)
        self.same |= other.same

    def of(self, name: str) -> Tensors:
        """The means of x' x'^T and of x x'^T of a site, and a ridge, as `solve_drifted` takes them.

        Nothing for a site that never ran, such as an expert that no word was sent to.
        """
        name = self.same.get(name, name)
        if name not in self.sums:
            return {}
        second, cross = self.sums[name]
        mean = (second / self.rows[name]).diagonal(dim1=1, dim2=2).mean(1).clamp_min(TINY).float()
        return {
            "ridge": RIDGE * mean[:, None].repeat(1, second.shape[1]),
            "second": (second / self.rows[name]).float(),
            "cross": (cross / self.rows[name]).float(),
        }


@torch.no_grad()
def drifted(
    shared: tuple[nn.Module, Sequence[tuple[Site, str]]],
    part: Sequence[tuple[Tensor, Tensor, Call]],
) -> tuple[list[Tensor], Drift]:
    """The hidden states behind a float block, and how the inputs of its sites have drifted.

    part: hidden states before the block, of the float network and of the compressed one.
    """
    block, sites = shared
    places, drift, outs = [(s, block.get_submodule(n)) for s, n in sites], Drift(), []
    for theirs, ours, call in part:
        drift.words = theirs[..., 0].numel()
        with hooked(before=[(m, drift.watch(s)) for s, m in places]):
            outs.append(call(block, theirs))
        with hooked(before=[(m, drift.add(s)) for s, m in places]):
            call(block, ours)
        drift.forget()
    return outs, drift


@torch.no_grad()
def behind(block: nn.Module, part: Sequence[tuple[Tensor, Call]]) -> list[Tensor]:
    """The hidden states behind a block."""
    return [call(block, hidden) for hidden, call in part]
