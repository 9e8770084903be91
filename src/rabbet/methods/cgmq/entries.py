"""A gate for each entry of a weight, the finest that the paper has (arXiv 2409.20138).

The paper counts bit operations entry by entry: the width of the entry times that of the input,
times how often the entry is used. No file holds a width for each entry; a layer is stored at the
widest of its own. `Entries` counts the one or the other.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rabbet.core.cost import Cost, layer_cost
from rabbet.core.plan import Plan
from rabbet.layers import Site
from rabbet.methods.cgmq.gates import Gates, Levels
from rabbet.methods.cgmq.layer import GatedLayer
from rabbet.train.nested import NestedWeight
from rabbet.train.qat import WIDEST
from rabbet.workpiece import Workpiece


@dataclass
class Entries(Gates):
    """Gates of the entries of all weights, then of all inputs that have one.

    stored: whether a layer costs what its widest entry does, as in a file; else each entry costs
    what its own width does. Other costs than bit operations are those of the stored layer.
    """

    stored: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._levels = torch.full((len(self),), len(self.widths) - 1)
        self._storable = sum(bits <= WIDEST for bits in self.widths) - 1

    @property
    def levels(self) -> Tensor:  # type: ignore[override]
        """The position of each gate's width among the widths, [gates]."""
        return self._levels

    @property
    def names(self) -> tuple[str, ...]:
        """The layers, whose entries are shown together, and then the inputs."""
        return tuple(s.layer.site.name + " input" * s.is_input for s in self.spans)

    @property
    def shown(self) -> tuple[list[float], list[float]]:
        """The mean gate and the mean width of each weight, and those of each input."""
        bits = torch.tensor(self.widths).double()[self._levels]
        return tuple([float(x[s.index].mean()) for s in self.spans] for x in (self.values, bits))  # type: ignore[return-value]

    def set_levels(self, levels: Levels) -> None:
        """See `Gates.set_levels`."""
        self._levels = torch.as_tensor(levels).clone()
        table = torch.tensor(self.widths)
        for span in self.spans:
            bits = table[self._levels[span.index]]
            if isinstance(span.target, NestedWeight):
                span.target.each.copy_(bits.view_as(span.target.each))
            else:
                span.target.bits = bits.tolist()

    def _counts(self, levels: Levels) -> list[list[int]]:
        """See `Gates._counts`."""
        levels, most = torch.as_tensor(levels), len(self.widths)
        return [levels[s.index].bincount(minlength=most).tolist() for s in self.spans]

    def _layer_cost(self, layer: GatedLayer, counts: Sequence[int], act: int) -> Cost:
        """See `Gates._layer_cost`."""
        used = {bits: n for bits, n in zip(self.widths, counts, strict=True) if n}
        wide = layer_cost(layer.site, layer.line([max(used)], act))
        return wide if self.stored else replace(wide, bops=shared(layer.site, wide.bops, used))

    def land(self, kind: int) -> None:
        """Bring the widths under the budget, and move the gates along.

        Where each entry counts, those are lowered that harm least for what they save, as few as
        will do; then entries that still fit are raised. Where layers count, all the widest entries
        of a layer are lowered together, of the layer in which that harms least for what it saves;
        what is left stays, for an entry that is raised is no better stored.
        """
        levels = self._levels.clone()
        if self.excess(levels) > 0:  # wider than 8 bits costs nothing, but is not stored either
            levels.clamp_(max=self._storable)
        while self.excess(levels) > 0 and bool(levels.any()):
            if self.stored:
                self._lower_layer(levels, self._worth(kind, levels))
                continue
            harm = (self._worth(kind, levels) / self._savings(levels)).masked_fill(
                levels == 0, torch.inf
            )
            order = harm.argsort(stable=True)[: int((levels > 0).sum())]
            self._shift_first(levels, order, -1, lambda x: self.excess(x) <= 0)
        weights = torch.tensor([not self.spans[k].is_input for k in self._owners])
        while not self.stored:
            worth = self._worth(kind, levels)
            free = weights & (levels < self._storable)
            order = worth.masked_fill(~free, -1).argsort(descending=True, stable=True)
            before = levels.clone()
            order = order[: int(free.sum())]
            self._shift_first(levels, order, 1, lambda x: self.excess(x) > 0, inside=True)
            if torch.equal(before, levels):
                break
        self.move_to(levels)

    def _shift_first(
        self,
        levels: Tensor,
        order: Tensor,
        by: int,
        enough: Callable[[Tensor], bool],
        *,
        inside: bool = False,
    ) -> None:
        """Shift the fewest first gates of an order for which `enough` holds, or all; in place.

        inside: one fewer, so that it does not hold yet.
        """

        def shifted(count: int) -> Tensor:
            moved = levels.clone()
            moved[order[:count]] += by
            return moved

        low, high = 0, len(order)  # not enough, or none; enough, or all
        if inside and not enough(shifted(high)):
            low = high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if enough(shifted(middle)) else (middle, high)
        levels.copy_(shifted(low if inside else high))

    def _lower_layer(self, levels: Tensor, worth: Tensor) -> None:
        """Lower the widest gates of the weight or input where that harms least; in place."""
        now, best = self.excess(levels), (torch.inf, levels)
        for span in self.spans:
            own = levels[span.index]
            if top := int(own.max()):
                lower = levels.clone()
                lower[span.index] = own.clamp(max=top - 1)
                saved = max(now - self.excess(lower), 1e-12)
                harm = float(worth[span.index][own == top].sum()) / saved
                best = min(best, (harm, lower), key=lambda pair: pair[0])
        levels.copy_(best[1])


def shared(site: Site, bops: int, used: Mapping[int, int]) -> int:
    """Of the bit operations of a layer at its widest, those of entries at widths of their own.

    Each entry is used as often as any other. used: how many entries there are of each width; of
    more than 8 bits they count as 8, at which they are stored.
    """
    bits = sum(min(b, WIDEST) * n for b, n in used.items())
    return -(-bops * bits // (site.numel * min(max(used), WIDEST)))


def counted(piece: Workpiece, plan: Plan, each: Mapping[str, Tensor]) -> Cost:
    """What a plan costs if every entry of a weight costs what its own width does.

    each: the widths of the entries, by the names of the layers.
    """
    cost = piece.cost(plan)
    for name, widths in each.items():
        site = piece.survey[name]
        bits, numbers = widths.clamp(max=WIDEST).long().unique(return_counts=True)
        used = dict(zip(bits.tolist(), numbers.tolist(), strict=True))
        stored = layer_cost(site, plan[name]).bops
        cost = replace(cost, bops=cost.bops - stored + shared(site, stored, used))
    return cost


def told(own: Cost, stored: Cost, whole: Cost, each: Mapping[str, Tensor]) -> str:
    """Both costs in words, and how many entries have which width."""
    bits = torch.cat([x.flatten() for x in each.values()]).clamp(max=WIDEST).long()
    shares = [(b, 100 * float((bits == b).double().mean())) for b in bits.unique().tolist()]
    return (
        f"gates of entries count {own.bops:,} bops ({100 * own.bops / whole.bops:.4f} % of "
        f"float32), each at its own width ({', '.join(f'{s:.1f} % {b} bits' for b, s in shares)}); "
        f"stored at the widest of each layer there are {stored.bops:,} "
        f"({100 * stored.bops / whole.bops:.4f} %)"
    )
