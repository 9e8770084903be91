"""Layers whose bit-widths are decided by gates while they train (CGMQ, arXiv 2409.20138).

A gate is a number; the width of its tensor is a step function of it. Gates get no gradient: they
move down while the network costs more than its budget and up while it costs less, each at a speed
that depends on how much its tensor matters. A state is kept only after its cost was counted.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rabbet.core.budget import METRICS, Budget
from rabbet.core.cost import Cost, layer_cost
from rabbet.core.history import History
from rabbet.core.plan import Plan
from rabbet.methods.cgmq.layer import GatedLayer
from rabbet.train.qat import FLOAT, WIDEST, GatedRange, GatedWeight

MARGIN = 0.05  # hysteresis: a gate must pass a step by this much before its width changes
TURNS = 4  # a gate that has turned back this often stays where it is
TOGETHER = 64  # landing lowers at least 1/64 of the gates at once, for speed
Levels = Sequence[int] | Tensor  # of each gate, the position of its width among the widths
LEAST, MOST = 0.1, 10.0  # limits of a direction, whose mean is 1: every gate moves, none jumps


@dataclass(frozen=True)
class Gating:
    """The state at the end of every epoch of a search by gates, and its final plan.

    names: of the tensors, weights first. gates, widths: [epochs, tensors], widths in bits. shares:
    [epochs], of the tightest limit of the budget that was used. losses: [epochs], on held-back
    examples. landed: no epoch ended under the budget, so that the last state
    was brought there, which comes once more at the end.
    """

    plan: Plan
    names: tuple[str, ...]
    gates: Tensor
    widths: Tensor
    shares: Tensor
    losses: Tensor
    landed: bool

    @property
    def histories(self) -> tuple[History, ...]:
        """The widths of all tensors, the share of the budget, and the loss, for a report."""
        widths = dict(zip(self.names, map(tuple, self.widths.T.tolist()), strict=True))
        shares, losses = tuple(self.shares.tolist()), tuple(self.losses.tolist())
        stage = "search by gates"
        return (
            History(stage, "epoch", "bits of each weight and input", widths),
            History(stage, "epoch", "share of the budget used", {"": shares}),
            History(stage, "epoch", "loss on held-back examples", {"": losses}),
        )


@dataclass(frozen=True)
class _Span:
    """The gates of one weight, or the gate of one input: a range of consecutive gates.

    target: what the gates set the width of.
    """

    layer: GatedLayer
    target: GatedWeight | GatedRange
    first: int
    count: int

    @property
    def is_input(self) -> bool:
        """Whether it is the gate of an input."""
        return isinstance(self.target, GatedRange)

    @property
    def index(self) -> slice:
        """The positions of its gates among all gates."""
        return slice(self.first, self.first + self.count)


@dataclass
class Gates:
    """The gates of all weights, then of all inputs that have one, and how fast each moves.

    A weight has one gate, or one for each output (`GatedWeight.bits`).

    values: [gates], between 0.5 and the number of widths + 0.5; the k-th width, counted from zero,
    lies between k and k + 1. whole: the cost of the float network. fixed: the part of the cost that
    belongs to none of the layers. fourfold: see `Settings`.
    """

    layers: Sequence[GatedLayer]
    widths: tuple[int, ...]
    budget: Budget
    whole: Cost
    fixed: Cost
    fourfold: bool = True

    def __post_init__(self) -> None:
        self.spans: list[_Span] = []
        for layer in self.layers:
            self.spans.append(_Span(layer, layer.weight, len(self), layer.weight.gates))
        for layer in self.layers:
            if layer.input_range is not None and layer.input_range.moves:
                self.spans.append(_Span(layer, layer.input_range, len(self), 1))
        self._owners = [place for place, span in enumerate(self.spans) for _ in range(span.count)]
        self.values = torch.full((len(self),), len(self.widths) + 0.5, dtype=torch.float64)
        # The running mean of the mean |gradient| of each tensor.
        self.slopes = torch.zeros_like(self.values)
        # The mean |value| of each tensor, relative to its range.
        self.sizes = torch.ones_like(self.values)
        # The rise of the loss with one tensor at one width and all others in float.
        self.sensitivity = self.values.new_zeros(len(self.values), len(self.widths))
        self.last = torch.zeros_like(self.values)  # the last direction of each gate: -1, 0 or 1
        self.turns = torch.zeros_like(self.values)  # how often each gate turned back
        self._layer_costs: dict[tuple[object, ...], Cost] = {}

    def __len__(self) -> int:
        """The number of gates."""
        return self.spans[-1].index.stop if self.spans else 0

    @property
    def levels(self) -> list[int]:
        """The position of each gate's current width among the widths."""
        return [self.widths.index(bits) for span in self.spans for bits in span.target.bits]

    @property
    def shown(self) -> tuple[list[float], list[float]]:
        """The value and the width of what each name stands for, for the history."""
        return self.values.tolist(), [float(self.widths[level]) for level in self.levels]

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the gates: that of the layer, with `[k]` for output k, or ` input`."""
        names: list[str] = []
        for span in self.spans:
            name = span.layer.site.name
            if span.count > 1:
                names += [f"{name}[{k}]" for k in range(span.count)]
            else:
                names.append(f"{name} input" if span.is_input else name)
        return tuple(names)

    def set_levels(self, levels: Levels) -> None:
        """Set the width, or widths, of every tensor; the values of the gates do not change."""
        for span in self.spans:
            own = torch.as_tensor(levels[span.index]).tolist()
            span.target.bits = [self.widths[level] for level in own]

    def update_widths(self) -> None:
        """Set the width of every gate that has passed a step by the margin, and count turns."""
        levels = torch.as_tensor(self.levels)
        exact = levels.double()
        stay = (exact - MARGIN <= self.values) & (self.values < exact + 1 + MARGIN)
        new = torch.where(stay, levels, self.values.long().clamp(0, len(self.widths) - 1))
        direction = (new - levels).sign()
        self.turns += direction * self.last < 0
        self.last = torch.where(direction == 0, self.last, direction.double())
        self.set_levels(new)

    def excess(self, levels: Levels | None = None) -> float:
        """The amount above the tightest limit, as a share of it; negative if all are kept."""
        return self._excess(self._counts(self.levels if levels is None else levels))

    def _counts(self, levels: Levels) -> list[list[int]]:
        """The number of gates of each span at each level; the cost depends on nothing else."""
        counts = []
        for span in self.spans:
            own = torch.as_tensor(levels[span.index]).tolist()
            counts.append([own.count(level) for level in range(len(self.widths))])
        return counts

    def _excess(self, counts: Sequence[Sequence[int]]) -> float:
        """See `excess`."""
        cost = self._cost(counts)
        shares = []
        for limit in self.budget.limits:
            allowed = limit.amount(self.whole)
            shares.append((METRICS[limit.metric].amount(cost) - allowed) / max(allowed, 1))
        return max(shares)

    def _cost(self, counts: Sequence[Sequence[int]]) -> Cost:
        """The cost of the network, in whole numbers."""
        inputs = {
            s.layer.site.name: self.widths[own.index(1)]
            for s, own in zip(self.spans, counts, strict=True)
            if s.is_input
        }
        total = self.fixed
        for span, own in zip(self.spans, counts, strict=True):
            if not span.is_input:
                act = inputs.get(span.layer.site.name, span.layer.act)
                total = total + self._layer_cost(span.layer, own, act)
        return total

    def _layer_cost(self, layer: GatedLayer, counts: Sequence[int], act: int) -> Cost:
        """The cost of a layer with so many gates at each level.

        It does not depend on which of the outputs have which width.
        """
        key = (layer.site.name, *counts, min(act, WIDEST))
        if key not in self._layer_costs:
            bits = [b for b, count in zip(self.widths, counts, strict=True) for _ in range(count)]
            self._layer_costs[key] = layer_cost(layer.site, layer.line(bits, act))
        return self._layer_costs[key]

    def update_statistics(self) -> None:
        """Update the means of gradients, by those of the last step, and the sizes of weights."""
        for span in self.spans:
            own, slope = span.index, span.target.slope
            if slope is not None:
                mean = slope.abs().reshape(span.count, -1).mean(1).cpu()
                self.slopes[own] = 0.9 * self.slopes[own] + 0.1 * mean
            if isinstance(span.target, GatedWeight):
                sizes = span.target.size.reshape(span.count, -1)
                self.sizes[own] = sizes.mean(1).double().cpu()

    def directions(self, kind: int) -> Tensor:
        """How strongly each gate resists moving down, [gates], of mean 1.

        While the budget is kept, gates move up at this speed; while it is broken, they move down at
        its inverse. kind: 1, the gradient; 2, gradient and size; 3, the sensitivity, relative to
        what one level less would save.
        """
        worth = self._worth(kind, self.levels)
        if kind == 3:
            worth = worth / self._savings(self.levels)
        return (worth / worth.mean().clamp_min(1e-30)).clamp(1 / MOST, 1 / LEAST)

    def _worth(self, kind: int, levels: Levels) -> Tensor:
        """How much it would harm to lower each gate by one level, in units of the mean."""
        if kind == 3:
            current = torch.as_tensor(levels)[:, None]
            below = self.sensitivity.gather(1, (current - 1).clamp_min(0))
            worth = (below - self.sensitivity.gather(1, current))[:, 0].clamp_min(0)
            # Outputs were measured together: they share a sensitivity in proportion to their
            # squared gradients.
            for span in (s for s in self.spans if s.count > 1):
                share = self.slopes[span.index].square() + 1e-30
                worth[span.index] *= share / share.mean()
        else:
            worth = self.slopes / self.slopes.mean().clamp_min(1e-30)
            if kind == 2:
                worth = worth + self.sizes / self.sizes.mean()
            if self.fourfold:  # as the squared error of a grid grows with every bit less
                quarters = torch.tensor([4.0 ** -min(bits, WIDEST) for bits in self.widths])
                worth = worth * quarters[(torch.as_tensor(levels) - 1).clamp_min(0)]
        return worth / worth.mean().clamp_min(1e-30) + 1e-6

    def move(self, kind: int, rate: float, over: bool) -> None:
        """Move every gate that has not turned back too often.

        kind: see `directions`. rate: how far a gate of mean speed moves, in widths. over: whether
        the budget was broken when the epoch began.
        """
        worth = self.directions(kind)
        speed = -1 / worth if over else worth
        free = (self.turns < TURNS).double()
        top = len(self.widths) + 0.5
        self.values = (self.values + free * rate * speed / speed.abs().mean()).clamp(0.5, top)

    def land(self, kind: int) -> None:
        """Bring the widths under the budget, and move the gates along.

        Widths are lowered until the budget is kept, those first that harm least for what they save;
        then widths that still fit are raised, those first that help most. The budget is feasible at
        the smallest widths, so this ends.
        """
        levels = self.levels
        counts = self._counts(levels)
        while self._excess(counts) > 0 and any(levels):
            harm = (self._worth(kind, levels) / self._savings(levels)).tolist()
            order = sorted((k for k, level in enumerate(levels) if level > 0), key=harm.__getitem__)
            for k in order[: max(1, len(order) // TOGETHER)]:
                self._shift(levels, counts, k, -1)
        before: list[int] = []
        while levels != before:
            before = list(levels)
            full = set()  # (span, level) whose gates do not fit one level higher
            for k in self._worth(kind, levels).argsort(descending=True).tolist():
                span_level = (self._owners[k], levels[k])
                if levels[k] + 1 == len(self.widths) or span_level in full:
                    continue
                self._shift(levels, counts, k, 1)
                if self._excess(counts) > 0:
                    self._shift(levels, counts, k, -1)
                    full.add(span_level)
        self.move_to(levels)

    def move_to(self, levels: Levels) -> None:
        """Set the width of every tensor, and move the gates of those that change along."""
        new = torch.as_tensor(levels)
        stay = new == torch.as_tensor(self.levels)
        self.values = torch.where(stay, self.values, new + 0.5)
        self.set_levels(new)

    def harm_by_width(self) -> dict[str, tuple[dict[int, float], dict[int, float]]]:
        """For each layer, the harm of each stored width of its weight, and of its input.

        Fewer bits never harm less: a measurement that says so is noise, and is raised. An input
        without a gate has one width, of no harm.
        """
        stored = [j for j, bits in enumerate(self.widths) if bits <= WIDEST]
        harms = {x.site.name: ({x.weight.bits[0]: 0.0}, {x.act: 0.0}) for x in self.layers}
        for span in self.spans:
            rising = self.sensitivity[span.first].flip(0).cummax(0).values.flip(0)
            own = {self.widths[j]: float(rising[j]) * span.count for j in stored}
            of_weight, of_input = harms[span.layer.site.name]
            if span.is_input:
                of_input = own
            else:
                of_weight = own
            harms[span.layer.site.name] = (of_weight, of_input)
        return harms

    def levels_of(self, plan: Plan) -> list[int]:
        """The levels of the gates under a plan of these layers that has one width per weight."""
        levels: list[int] = []
        for span in self.spans:
            line = plan[span.layer.site.name]
            bits = (line.act or WIDEST) if span.is_input else line.terms[0].grid.bits
            levels += [self.widths.index(bits)] * span.count
        return levels

    def _shift(self, levels: list[int], counts: list[list[int]], k: int, by: int) -> None:
        """Move gate k by a number of levels, in `levels` and in `counts`."""
        own = counts[self._owners[k]]
        own[levels[k]] -= 1
        levels[k] += by
        own[levels[k]] += 1

    def _savings(self, levels: Levels) -> Tensor:
        """What one level less of each gate would save, as a share of the tightest limit.

        For a gate at the lowest level it is close to zero.
        """
        counts = self._counts(levels)
        now = self._excess(counts)
        savings = torch.zeros(len(self), dtype=torch.float64)
        for span, own in zip(self.spans, counts, strict=True):
            saved = [0.0] * len(own)  # the same for all outputs of a layer at one level
            for level in (k for k in range(1, len(own)) if own[k]):
                own[level], own[level - 1] = own[level] - 1, own[level - 1] + 1
                saved[level] = now - self._excess(counts)
                own[level], own[level - 1] = own[level] + 1, own[level - 1] - 1
            by_level = torch.tensor(saved, dtype=torch.float64)
            savings[span.index] = by_level[torch.as_tensor(levels[span.index])]
        return savings.clamp_min(1e-9)

    def probe(
        self, loss: Callable[[], float], rounded: Callable[[GatedLayer], Mapping[int, Tensor]]
    ) -> Iterator[int]:
        """Measure the loss with one tensor at a time at every width; yields the number done so far.

        All others are in float: a small effect could not be told from their errors. rounded: from a
        layer to its weight by width, which stands in for the weight rounded to nearest; if it is
        empty, the latter is measured. The outputs of a layer are measured together, and share the
        sensitivity.
        """
        targets = [
            part for x in self.layers for part in (x.weight, x.input_range) if part is not None
        ]
        before = [part.bits for part in targets]
        for part in targets:
            part.bits = [FLOAT]
        base = loss()
        for done, span in enumerate(self.spans, 1):
            weight = span.layer.weight
            weight.substitutes = {} if span.is_input else rounded(span.layer)
            for j, width in enumerate(self.widths):
                span.target.bits = [width]
                harm = loss() - base if width <= WIDEST else 0
                self.sensitivity[span.index, j] = harm / span.count
            span.target.bits, weight.substitutes = [FLOAT], {}
            yield done
        for part, bits in zip(targets, before, strict=True):
            part.bits = bits

    def state(self) -> dict[str, Tensor]:
        """The tensors of a checkpoint."""
        kept = {n: getattr(self, n) for n in STATE}
        return kept | {"levels": torch.as_tensor(self.levels)}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state`."""
        for name in STATE:
            setattr(self, name, state[name].clone())
        self.set_levels(state["levels"])


STATE = ("values", "slopes", "sizes", "sensitivity", "last", "turns")
