"""What a plan costs, and the budgets that it is held against.

Bytes are those of the whole native file, header included. MACs are multiply-accumulates of the layers in the survey,
per example. A bit operation (BOP) is a MAC times the bits of the weight times the bits of the input (Bayesian Bits,
arXiv 2005.07093); a float counts 32 bits. Bits are the mean bits of the codes per weight, every weight counted.
Latency is that of the exported file for a batch of one, predicted from layers that were timed on this machine
(`rabbet.latency`); it is zero where nobody measured.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction

from rabbet.errors import BudgetError
from rabbet.forms import Contracted
from rabbet.layout import BETWEEN, FINISHED, Rest, file_bytes, layer_lengths, line_bytes, term_lengths
from rabbet.plan import LayerPlan, Plan, quoted
from rabbet.site import Site
from rabbet.survey import Survey

FLOAT_BITS = 32
SCALE_BITS = 16


@dataclass(frozen=True, slots=True)
class Cost:
    """What a layer or a network costs, in whole numbers.

    bytes: of the file. macs, bops: per example. code_bits, scale_bits: of all weight codes, and of their scales.
    weights: entries of all weights. time: nanoseconds of one example, zero if it was not measured.
    """

    bytes: int = 0
    macs: int = 0
    bops: int = 0
    code_bits: int = 0
    weights: int = 0
    time: int = 0
    scale_bits: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(*(getattr(self, f) + getattr(other, f) for f in Cost.__dataclass_fields__))

    @property
    def bits(self) -> float:
        """Mean bits of the codes per weight."""
        return self.code_bits / self.weights if self.weights else 0.0


@dataclass(frozen=True, slots=True)
class Quantity:
    """One quantity that a budget can limit.

    amount: its whole-number measure in a cost. limit: the largest amount that a stated absolute value allows.
    units: factor of each unit that may follow a number. show: an amount in words, given the number of weights.
    """

    amount: Callable[[Cost], int]
    limit: Callable[[Fraction, Cost], Fraction]
    units: dict[str, int]
    show: Callable[[float, int], str] = lambda amount, _: f"{amount:,.0f}"


_DECIMAL = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
METRICS: dict[str, Quantity] = {
    "bytes": Quantity(
        lambda c: c.bytes,
        lambda value, _: value,
        {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30},
    ),
    "macs": Quantity(lambda c: c.macs, lambda value, _: value, _DECIMAL),
    "bops": Quantity(lambda c: c.bops, lambda value, _: value, _DECIMAL),
    "bits": Quantity(
        lambda c: c.code_bits,
        lambda value, cost: value * cost.weights,
        {"": 1},
        lambda amount, weights: f"{amount / weights:.3f}",
    ),
    "bpw": Quantity(
        lambda c: c.code_bits + c.scale_bits,
        lambda value, cost: value * cost.weights,
        {"": 1},
        lambda amount, weights: f"{amount / weights:.3f}",
    ),
    "latency": Quantity(
        lambda c: c.time,
        lambda value, _: value,
        {"us": 10**3, "ms": 10**6, "s": 10**9},
        lambda amount, _: f"{amount / 1e6:.3f} ms",
    ),
}
_LIMIT = re.compile(
    r"([a-z]+)\s*(<=|≤)\s*([0-9]{1,3}(?:,[0-9]{3})+|[0-9][0-9_]*\.?[0-9]*|\.[0-9]+)\s*(%|[a-z]*)", re.IGNORECASE
)


@dataclass(frozen=True, slots=True)
class Limit:
    """One clause of a budget, exactly as written. share: the value is a share of the float32 network's."""

    metric: str
    value: Fraction
    share: bool
    text: str

    def amount(self, whole: Cost) -> int:
        """The largest amount allowed, given the float32 network's cost."""
        metric = METRICS[self.metric]
        return math.floor(self.value * metric.amount(whole) if self.share else metric.limit(self.value, whole))

    def broken_by(self, cost: Cost, whole: Cost) -> bool:
        """Whether a cost is over this limit; raises BudgetError for a latency that nobody measured."""
        if self.metric == "latency" and not whole.time:
            raise BudgetError(f"{self.text!r} needs a latency, which is measured by `compress` and `plan` only")
        return METRICS[self.metric].amount(cost) > self.amount(whole)


@dataclass(frozen=True, slots=True)
class Budget:
    """Limits that all hold at once, such as `bytes <= 10%` or `bytes <= 120 kB, bops <= 0.5%`."""

    limits: tuple[Limit, ...]

    @classmethod
    def parse(cls, text: "str | Budget") -> "Budget":
        """Read clauses `metric <= number unit`, separated by commas.

        Metrics and units: bytes (B, kB, MB, GB, KiB, MiB, GiB, %), macs and bops (k, M, G, T, %), bits (mean bits of
        the codes per weight, %), bpw (the same, scales included, %), latency (us, ms, s, %). `%` is a share of the
        float32 network. Raises BudgetError for anything else.
        """
        if isinstance(text, Budget):
            return text
        if not isinstance(text, str):
            raise BudgetError(f"a budget is text such as 'bytes <= 10%', found {type(text).__name__}")
        limits = tuple(_clause(part.strip()) for part in re.split(r",(?!\d)", text))
        names = [limit.metric for limit in limits]
        twice = next((n for n in names if names.count(n) > 1), None)
        if twice is not None:
            raise BudgetError(f"{text!r} limits {twice} twice; keep the tighter limit")
        return cls(limits)

    def __str__(self) -> str:
        return ", ".join(limit.text for limit in self.limits)

    def check(self, cost: Cost, whole: Cost) -> None:
        """Raise BudgetError if a cost is over a limit; there is no tolerance."""
        for limit in self.limits:
            if limit.broken_by(cost, whole):
                metric = METRICS[limit.metric]
                found, allowed = metric.amount(cost), limit.amount(whole)
                raise BudgetError(
                    f"{limit.text!r} allows {metric.show(allowed, whole.weights)} {limit.metric}, "
                    f"the network has {metric.show(found, whole.weights)}"
                )


def _clause(text: str) -> Limit:
    m = _LIMIT.fullmatch(text)
    if m is None:
        raise BudgetError(f"{text!r} is not a budget; write metric <= number unit, such as 'bytes <= 120 kB'")
    name, _, number, unit = m.groups()
    name, unit = name.lower(), unit.lower()
    if name not in METRICS:
        raise BudgetError(f"unknown quantity {name!r} in {text!r}; there are {', '.join(METRICS)}")
    value = Fraction(re.sub("[_,]", "", number))
    if value <= 0:
        raise BudgetError(f"{text!r}: a budget must be larger than zero")
    if unit == "%":
        return Limit(name, value / 100, True, text)
    if unit not in METRICS[name].units:
        known = ", ".join(u for u in [*METRICS[name].units, "%"] if u)
        raise BudgetError(f"unknown unit {unit!r} in {text!r}; {name} takes {known}")
    return Limit(name, value * METRICS[name].units[unit], False, text)


def layer_cost(site: Site, layer: LayerPlan) -> Cost:
    """What one compressed layer costs: its numbers and its line of the plan, and its arithmetic."""
    macs = bops = code_bits = scale_bits = 0
    act = layer.act or FLOAT_BITS
    for term in layer.terms:
        first, *later = term.how.macs(site, term.rank)
        macs += first + sum(later)
        # cores are put together once, and what they make runs on 8 bits
        bits = FINISHED if isinstance(term.how, Contracted) else term.grid.bits
        bops += bits * (first * act + sum(later) * (FLOAT_BITS if layer.act is None else BETWEEN))
        lengths = term_lengths(site, term)
        code_bits += 8 * lengths.codes
        scale_bits += SCALE_BITS * lengths.scales
    size = layer_lengths(site, layer).bytes + line_bytes(layer)
    return Cost(size, macs, bops, code_bits, site.numel, scale_bits=scale_bits)


def float_cost(survey: Survey) -> Cost:
    """The float32 network: bytes of every stored tensor, MACs, BOPs at 32 x 32 bits."""
    macs = sum(s.macs for s in survey)
    return Cost(survey.float_bytes, macs, macs * FLOAT_BITS**2, survey.weights * FLOAT_BITS, survey.weights)


def kept_cost(site: Site) -> Cost:
    """The arithmetic of a site that stays as it is; its bytes are among the rest's."""
    return Cost(0, site.macs, site.macs * FLOAT_BITS**2, site.numel * FLOAT_BITS, site.numel)


def plan_cost(survey: Survey, plan: Plan, rest: tuple[Rest, ...]) -> Cost:
    """What the network costs under a plan; `bytes` is the exact length of its native file."""
    total = Cost()
    for site in survey:
        layer = plan.get(site.name)
        total += kept_cost(site) if layer is None else layer_cost(site, layer)
    return replace(total, bytes=file_bytes(survey, plan, rest))


def heaviest(costs: dict[str, Cost], metric: str, count: int = 3) -> str:
    """The layers that weigh most, in words: what holds a budget up."""
    quantity = METRICS[metric]
    ranked = sorted(costs.items(), key=lambda item: -quantity.amount(item[1]))[:count]
    return ", ".join(f"{quoted(name)} {quantity.show(quantity.amount(c), c.weights)}" for name, c in ranked)
