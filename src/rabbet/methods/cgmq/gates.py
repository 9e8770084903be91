"""Layers whose bit-widths are decided by gates while they train (CGMQ, arXiv 2409.20138).

A gate is a number; the width of its tensor is a step function of it. Gates get no gradient: they
move down while the network costs more than its budget and up while it costs less, each as fast as
its tensor can afford. What is handed on is always a state whose cost was counted.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rabbet.core.budget import METRICS, Budget
from rabbet.core.cost import Cost, layer_cost
from rabbet.core.plan import Plan
from rabbet.methods.cgmq.layer import GatedLayer
from rabbet.train.qat import FLOAT, WIDEST, GatedRange, GatedWeight

MARGIN = 0.05  # by which a gate must pass a step before its width follows: hysteresis
TURNS = 4  # a gate that went back and forth so often stays where it is
TOGETHER = 64  # where there are more gates, so manieth of them go down in one step of landing
LEAST, MOST = 0.1, 10.0  # ends of a direction whose mean is 1: every gate moves, none jumps


@dataclass(frozen=True)
class Gating:
    """What a search by gates saw at the end of every epoch, and the plan that it ended with.

    names: of the tensors, weights first. gates, widths: [epochs, tensors], widths in bits. shares:
    of the tightest limit of the budget that was used. losses: of held-back examples.
    """

    plan: Plan
    names: tuple[str, ...]
    gates: Tensor
    widths: Tensor
    shares: Tensor
    losses: Tensor


@dataclass(frozen=True)
class _Span:
    """Gates that belong together: those of one weight, or the one of an input."""

    layer: GatedLayer
    moved: GatedWeight | GatedRange
    first: int
    count: int

    @property
    def inner(self) -> bool:
        """Whether it is that of an input."""
        return isinstance(self.moved, GatedRange)

    @property
    def place(self) -> slice:
        return slice(self.first, self.first + self.count)


@dataclass
class Gates:
    """The gates of all weights, then of all inputs that have one, and what decides how fast each moves.

    A weight has one gate, or one for each output (`GatedWeight.bits`).

    values: between 0.5 and the number of widths + 0.5; the k-th width lies between k and k + 1,
    counted from zero.
    """

    layers: Sequence[GatedLayer]
    widths: tuple[int, ...]
    budget: Budget
    whole: Cost
    fixed: Cost

    def __post_init__(self) -> None:
        self.spans: list[_Span] = []
        for layer in self.layers:
            self.spans.append(_Span(layer, layer.weight, len(self), len(layer.weight.bits)))
        for layer in self.layers:
            if layer.given is not None and layer.given.moves:
                self.spans.append(_Span(layer, layer.given, len(self), 1))
        self._owners = [place for place, span in enumerate(self.spans) for _ in range(span.count)]
        self.values = torch.full((len(self),), len(self.widths) + 0.5, dtype=torch.float64)
        self.slopes = torch.zeros_like(
            self.values
        )  # mean |gradient| of each tensor, a running mean
        self.sizes = torch.ones_like(self.values)  # mean |value| by the range
        # what the loss rises by with one tensor at one width, all others in float
        self.sensitivity = self.values.new_zeros(len(self.values), len(self.widths))
        self.last = torch.zeros_like(self.values)  # the way that each went last: -1, 0, 1
        self.turns = torch.zeros_like(self.values)  # how often it went back
        self._prices: dict[tuple[object, ...], Cost] = {}

    def __len__(self) -> int:
        """How many gates there are."""
        return self.spans[-1].place.stop if self.spans else 0

    @property
    def levels(self) -> list[int]:
        """The place of each gate's width among the widths."""
        return [self.widths.index(bits) for span in self.spans for bits in span.moved.bits]

    @property
    def names(self) -> tuple[str, ...]:
        """Of the gates: the layer's name, with the output if each has one, and `input` for what the layer is given."""
        names: list[str] = []
        for span in self.spans:
            name = span.layer.site.name
            alone = [f"{name} input" if span.inner else name]
            names += alone if span.count == 1 else [f"{name}[{k}]" for k in range(span.count)]
        return tuple(names)

    def set_levels(self, levels: Sequence[int]) -> None:
        """Give every tensor its width, or widths; the gates are left as they are."""
        for span in self.spans:
            span.moved.bits = [self.widths[level] for level in levels[span.place]]

    def follow(self) -> None:
        """Widths as the gates say, where a gate has passed a step by the margin; counts those that go back."""
        levels = self.levels
        for k, (value, level) in enumerate(zip(self.values.tolist(), levels, strict=True)):
            if level - MARGIN <= value < level + 1 + MARGIN:
                continue
            levels[k] = min(len(self.widths) - 1, max(0, int(value)))
            way = float((levels[k] > level) - (levels[k] < level))
            self.turns[k] += way * float(self.last[k]) < 0
            self.last[k] = way or float(self.last[k])
        self.set_levels(levels)

    def excess(self, levels: Sequence[int] | None = None) -> float:
        """By how much the tightest limit is broken, as a share of it; negative within."""
        return self._over(self._counts(self.levels if levels is None else levels))

    def _counts(self, levels: Sequence[int]) -> list[list[int]]:
        """How many gates of each span stand at each level: all that a cost depends on."""
        places = range(len(self.widths))
        return [
            [own.count(k) for k in places] for own in (list(levels[s.place]) for s in self.spans)
        ]

    def _over(self, counts: Sequence[Sequence[int]]) -> float:
        cost = self._priced(counts)
        shares = []
        for limit in self.budget.limits:
            allowed = limit.amount(self.whole)
            shares.append((METRICS[limit.metric].amount(cost) - allowed) / max(allowed, 1))
        return max(shares)

    def _priced(self, counts: Sequence[Sequence[int]]) -> Cost:
        """What the network costs, in whole numbers; the bytes without what no layer holds."""
        inputs = {
            s.layer.site.name: self.widths[own.index(1)]
            for s, own in zip(self.spans, counts, strict=True)
            if s.inner
        }
        total = self.fixed
        for span, own in zip(self.spans, counts, strict=True):
            if not span.inner:
                act = inputs.get(span.layer.site.name, span.layer.act)
                total = total + self._price(span.layer, own, act)
        return total

    def _price(self, layer: GatedLayer, counts: Sequence[int], act: int) -> Cost:
        """Of a layer; which outputs have which width matters only for the text of the plan, and is not looked at."""
        key = (layer.site.name, *counts, min(act, WIDEST))
        if key not in self._prices:
            bits = [b for b, count in zip(self.widths, counts, strict=True) for _ in range(count)]
            self._prices[key] = layer_cost(layer.site, layer.line(bits, act))
        return self._prices[key]

    def measured(self) -> None:
        """Take the gradients of the last step, and the sizes of the tensors, into the running means."""
        for span in self.spans:
            place, slope = span.place, span.moved.slope
            if slope is not None:
                self.slopes[place] = (
                    0.9 * self.slopes[place]
                    + 0.1 * slope.abs().reshape(span.count, -1).mean(1).cpu()
                )
            if isinstance(span.moved, GatedWeight):
                sizes = span.moved.size.reshape(span.count, -1)
                self.sizes[place] = sizes.mean(1).double().cpu()

    def directions(self, kind: int) -> Tensor:
        """How fast each gate moves down while the budget is broken, and up (the inverse) while it is kept; mean 1.

        1: by the gradient; 2: by gradient and size; 3: by the sensitivity for what a level less
        would save.
        """
        worth = self._worth(kind, self.levels)
        if kind == 3:
            worth = worth / self._savings(self.levels)
        return (worth / worth.mean().clamp_min(1e-30)).clamp(1 / MOST, 1 / LEAST)

    def _worth(self, kind: int, levels: Sequence[int]) -> Tensor:
        """What the lowest level that each tensor holds is worth, in units of their mean."""
        if kind == 3:
            lower = torch.tensor(levels)[:, None]
            below = self.sensitivity.gather(1, (lower - 1).clamp_min(0))
            worth = (below - self.sensitivity.gather(1, lower))[:, 0].clamp_min(0)
            # outputs share a sensitivity as their squared gradients are
            for span in (s for s in self.spans if s.count > 1):
                share = self.slopes[span.place].square() + 1e-30
                worth[span.place] *= share / share.mean()
        else:
            worth = self.slopes / self.slopes.mean().clamp_min(1e-30)
            worth = worth + self.sizes / self.sizes.mean() if kind == 2 else worth
            # the error of a grid grows fourfold a bit; the scale of the loss does not matter
            worth = worth * torch.tensor(
                [4.0 ** -min(self.widths[max(x - 1, 0)], WIDEST) for x in levels]
            )
        return worth / worth.mean().clamp_min(1e-30) + 1e-6

    def move(self, kind: int, rate: float, over: bool) -> None:
        """Move every gate that is free; over: whether the budget was broken when the epoch began."""
        worth = self.directions(kind)
        speed = -1 / worth if over else worth
        free = (self.turns < TURNS).double()
        top = len(self.widths) + 0.5
        self.values = (self.values + free * rate * speed / speed.abs().mean()).clamp(0.5, top)

    def land(self, kind: int) -> None:
        """Lower widths until the budget is kept, what costs least for what it saves first; gates go along.

        Then what still fits is raised, the dearest first. The budget was found feasible at the
        smallest widths, so this ends.
        """
        levels = self.levels
        counts = self._counts(levels)
        while self._over(counts) > 0 and any(levels):
            dear = (self._worth(kind, levels) / self._savings(levels)).tolist()
            order = sorted((k for k, level in enumerate(levels) if level > 0), key=dear.__getitem__)
            for k in order[: max(1, len(order) // TOGETHER)]:
                self._shift(levels, counts, k, -1)
        before: list[int] = []
        while levels != before:
            before = list(levels)
            full = set()  # a gate of the same span at the same level would not fit either
            for k in self._worth(kind, levels).argsort(descending=True).tolist():
                alike = (self._owners[k], levels[k])
                if levels[k] + 1 == len(self.widths) or alike in full:
                    continue
                self._shift(levels, counts, k, 1)
                if self._over(counts) > 0:
                    self._shift(levels, counts, k, -1)
                    full.add(alike)
        self.move_to(levels)

    def move_to(self, levels: Sequence[int]) -> None:
        """Give every tensor its width; gates of those that change go along."""
        for k, (old, new) in enumerate(zip(self.levels, levels, strict=True)):
            if new != old:
                self.values[k] = new + 0.5
        self.set_levels(levels)

    def harms(self) -> dict[str, tuple[dict[int, float], dict[int, float]]]:
        """By layer, how much each width that a file holds harms, of its weight and of its input.

        Fewer bits never harm less: where a measurement says so, it is noise. An input without a
        gate has one width.
        """
        held = [j for j, bits in enumerate(self.widths) if bits <= WIDEST]
        harms = {x.site.name: ({x.weight.bits[0]: 0.0}, {x.act: 0.0}) for x in self.layers}
        for span in self.spans:
            rising = self.sensitivity[span.first].flip(0).cummax(0).values.flip(0)
            own = {self.widths[j]: float(rising[j]) * span.count for j in held}
            weight, given = harms[span.layer.site.name]
            harms[span.layer.site.name] = (weight, own) if span.inner else (own, given)
        return harms

    def levels_of(self, plan: Plan) -> list[int]:
        """The levels of a plan of these layers, one width a weight."""
        lines = [
            (span, plan[span.layer.site.name]) for span in self.spans for _ in range(span.count)
        ]
        bits = [
            (line.act or WIDEST) if span.inner else line.terms[0].grid.bits for span, line in lines
        ]
        return [self.widths.index(b) for b in bits]

    def _shift(self, levels: list[int], counts: list[list[int]], k: int, way: int) -> None:
        """Move a gate by a level, and count it there."""
        own = counts[self._owners[k]]
        own[levels[k]] -= 1
        levels[k] += way
        own[levels[k]] += 1

    def _savings(self, levels: Sequence[int]) -> Tensor:
        """What a level less of each gate saves, as a share of the tightest limit; next to nothing if it has none."""
        counts = self._counts(levels)
        now = self._over(counts)
        savings = torch.zeros(len(self), dtype=torch.float64)
        for span, own in zip(self.spans, counts, strict=True):
            saved = [0.0] * len(own)  # outputs of one layer at one level save the same
            for level in (k for k in range(1, len(own)) if own[k]):
                own[level], own[level - 1] = own[level] - 1, own[level - 1] + 1
                saved[level] = now - self._over(counts)
                own[level], own[level - 1] = own[level] + 1, own[level - 1] - 1
            by_level = torch.tensor(saved, dtype=torch.float64)
            savings[span.place] = by_level[list(levels[span.place])]
        return savings.clamp_min(1e-9)

    def probe(
        self, loss: Callable[[], float], rounded: Callable[[GatedLayer], Mapping[int, Tensor]]
    ) -> Iterator[int]:
        """Measure the loss with every tensor alone on every width; yields the number of each that is done.

        All others are in float: beside errors of their own a small one could be anything. rounded:
        a layer's weight by width, as it is to be judged. The outputs of a layer are measured
        together, and share the sensitivity.
        """
        moved = [part for x in self.layers for part in (x.weight, x.given) if part is not None]
        before = [part.bits for part in moved]
        for part in moved:
            part.bits = [FLOAT]
        base = loss()
        for done, span in enumerate(self.spans, 1):
            weight = span.layer.weight
            weight.substitutes = {} if span.inner else rounded(span.layer)
            for j, width in enumerate(self.widths):
                span.moved.bits = [width]
                harm = loss() - base if width <= WIDEST else 0
                self.sensitivity[span.place, j] = harm / span.count
            span.moved.bits, weight.substitutes = [FLOAT], {}
            yield done
        for part, bits in zip(moved, before, strict=True):
            part.bits = bits

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps of the gates."""
        kept = {n: getattr(self, n) for n in STATE}
        return kept | {"levels": torch.tensor(self.levels)}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state`."""
        for name in STATE:
            setattr(self, name, state[name].clone())
        self.set_levels(state["levels"].tolist())


STATE = ("values", "slopes", "sizes", "sensitivity", "last", "turns")
