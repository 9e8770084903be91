"""Inputs of a block's layers behind compressed blocks, and the weights that make up for it.

A layer meets x' where the float network's meets x. The weight that does with x' what W does with x
is, in least squares, `W + M` with `M = W (E x x'^T - E x' x'^T) (E x' x'^T + ridge)^-1`; it is
rounded in the metric of x'. From few words M fits what is special to them. So it is found on one
half of the batches with several ridges, and judged on the other by what it does to the error,
`tr(M S M^T) + 2 tr(M (S - C^T) W^T)` with `S = E x' x'^T` and `C = E x x'^T`: the ridge of the
least error over both halves is taken, or none at all.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rabbet.jobs import Tensors
from rabbet.layers import Site
from rabbet.methods.blockwise.gathering import level
from rabbet.methods.blockwise.stack import Call
from rabbet.model.hooks import hooked
from rabbet.reconstruct.candidates import Terms, solve_site

RIDGES = (0.02, 0.1, 0.5, 2.0, 10.0)  # shares of the mean square of the inputs
TINY = 1e-12


def solve_drifted(  # noqa: PLR0913 (all that is known of a layer's inputs)
    weight: Tensor,
    second: Tensor | None = None,
    cross: Tensor | None = None,
    ridge: Tensor | None = None,
    second_half: Tensor | None = None,
    cross_half: Tensor | None = None,
    *,
    site: Site,
    menu: Sequence[Terms],
) -> Tensors:
    """See `solve_site`, for inputs x' in place of x: the target does with x' what W does with x.

    second: the mean of x' x'^T, cross: of x x'^T, [groups, n, n]; second_half, cross_half: what one
    half of the batches adds to them; ridge: what a share of 1 adds to the diagonal of `second`,
    [groups, n]. None: nothing is known, and the target is the weight.
    """
    given = (second, cross, ridge, second_half, cross_half)
    if second is None or any(t is None for t in given):
        return solve_site(weight, second, site=site, menu=menu)
    assert cross is not None
    assert ridge is not None
    assert second_half is not None
    assert cross_half is not None
    rows = site.matrix(weight).double()
    whole = second.double(), cross.double()
    one = second_half.double(), cross_half.double()
    other = whole[0] - one[0], whole[1] - one[1]
    least, best = 0.0, None
    for share in RIDGES:
        held = share * ridge.double()
        gain = _judged(rows, _moved(rows, one, held / 2), other)
        gain += _judged(rows, _moved(rows, other, held / 2), one)
        if gain < least:
            least, best = gain, held
    target = weight
    if best is not None:
        target = (rows + _moved(rows, whole, best)).float().reshape(weight.shape)
    return solve_site(target, second, site=site, menu=menu)


Moments = tuple[Tensor, Tensor]
"""The means of x' x'^T and of x x'^T, [groups, n, n]."""


def _moved(rows: Tensor, moments: Moments, ridge: Tensor) -> Tensor:
    """What is to be added to a weight [groups, rows, n]."""
    second, cross = moments
    damped = second + torch.diag_embed(ridge)
    moved: Tensor = torch.linalg.solve(damped, (rows @ (cross - second)).mT).mT
    return moved


def _judged(rows: Tensor, moved: Tensor, moments: Moments) -> float:
    """By how much the error of the outputs grows, on other words."""
    second, cross = moments
    return float(((moved @ second) * moved).sum() + 2 * (moved * (rows @ (second - cross))).sum())


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
        self.halves: dict[str, tuple[Tensor, Tensor]] = {}
        self.half_rows: dict[str, int] = {}
        self.even = True

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
            # an expert may be sent other words than in the float network: no drift is known
            whole = x.shape[1] == self.words
            wanted = x
            if whole and theirs is not None and theirs.shape == ours.shape:
                wanted = site.patches(theirs.float(), None, none)
            weight = level(x, wanted)
            even = x * weight
            second = even.mT @ even
            cross = second if wanted is x else (wanted * weight).mT @ even
            _add(self.sums, site.name, (second, cross))
            self.rows[site.name] = self.rows.get(site.name, 0) + x.shape[1]
            if self.even:
                _add(self.halves, site.name, (second, cross))
                self.half_rows[site.name] = self.half_rows.get(site.name, 0) + x.shape[1]

        return seen

    def forget(self) -> None:
        """Let go of the inputs of a batch; every second one is of the half."""
        self.even = not self.even
        self.float.clear()
        self._seen.clear()

    def take(self, other: "Drift") -> None:
        """Take in what was summed over other batches."""
        for name, sums in other.sums.items():
            _add(self.sums, name, sums)
            self.rows[name] = other.rows[name] + self.rows.get(name, 0)
        for name, sums in other.halves.items():
            _add(self.halves, name, sums)
            self.half_rows[name] = other.half_rows[name] + self.half_rows.get(name, 0)
        self.same |= other.same

    def of(self, name: str) -> Tensors:
        """The means of x' x'^T and of x x'^T of a site, and a ridge, as `solve_drifted` takes them.

        Nothing for a site that never ran, such as an expert that no word was sent to.
        """
        name = self.same.get(name, name)
        if name not in self.sums:
            return {}
        second, cross = (t / self.rows[name] for t in self.sums[name])
        mean = second.diagonal(dim1=1, dim2=2).mean(1).clamp_min(TINY).float()
        found = {
            "ridge": mean[:, None].repeat(1, second.shape[1]),
            "second": second.float(),
            "cross": cross.float(),
        }
        count = self.half_rows.get(name, 0)
        if 0 < count < self.rows[name]:
            half = [(t / self.rows[name]).float() for t in self.halves[name]]
            found |= {"second_half": half[0], "cross_half": half[1]}
        return found


def _add(sums: dict[str, Moments], name: str, more: Moments) -> None:
    held = sums.get(name)
    new = tuple(t.double() for t in more)
    sums[name] = (new[0], new[1]) if held is None else (held[0] + new[0], held[1] + new[1])


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
