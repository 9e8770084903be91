"""Budgets: limits that all hold at once, and the quantities that they can name.

A limit is exact: shares are fractions, amounts whole numbers, and there is no tolerance.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

from rabbet.core.cost import Cost
from rabbet.core.plan import quoted
from rabbet.errors import BudgetError


@dataclass(frozen=True, slots=True)
class Quantity:
    """One quantity that a budget can limit.

    amount: its whole-number measure in a cost. limit: the largest amount that a stated absolute
    value allows. units: factor of each unit that may follow a number. show: an amount as text,
    given the number of weights.
    """

    amount: Callable[[Cost], int]
    limit: Callable[[Fraction, Cost], Fraction]
    units: dict[str, int]
    show: Callable[[float, int], str] = lambda amount, _: f"{amount:,.0f}"


_DECIMAL = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BYTES = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
}
METRICS: dict[str, Quantity] = {
    "bytes": Quantity(lambda c: c.bytes, lambda value, _: value, _BYTES),
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
    "onnx": Quantity(lambda c: c.onnx, lambda value, _: value, _BYTES),
    "openvino": Quantity(lambda c: c.openvino, lambda value, _: value, _BYTES),
}
FILES = ("onnx", "openvino")
"""Bytes of a file that is written for a runtime, by its target."""
MEASURED = ("latency", *FILES)
"""What is only known where a budget asks for it, and zero elsewhere."""
_LIMIT = re.compile(
    r"([a-z]+)\s*(<=|≤|<|==?)\s*([0-9]{1,3}(?:,[0-9]{3})+|[0-9][0-9_]*\.?[0-9]*|\.[0-9]+)\s*(%|[a-z]*)",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Limit:
    """One clause of a budget, exactly as written.

    share: the value is a share of the float32 network's.
    """

    metric: str
    value: Fraction
    share: bool
    text: str

    @property
    def unit(self) -> str:
        """What is counted, in words."""
        return f"bytes of the {self.metric} file" if self.metric in FILES else self.metric

    def amount(self, whole: Cost) -> int:
        """The largest amount allowed, given the float32 network's cost."""
        metric = METRICS[self.metric]
        return math.floor(
            self.value * metric.amount(whole) if self.share else metric.limit(self.value, whole)
        )

    def broken_by(self, cost: Cost, whole: Cost) -> bool:
        """Whether a cost is over this limit; raises BudgetError for what was not measured."""
        amount = METRICS[self.metric].amount
        if self.metric in MEASURED and not amount(whole):
            what = "the bytes of an exported file" if self.metric in FILES else "a latency"
            raise BudgetError(
                f"{self.text!r} needs {what}, which is measured by `compress` and `plan` only"
            )
        return amount(cost) > self.amount(whole)


@dataclass(frozen=True, slots=True)
class Budget:
    """Limits that all hold at once, such as `bytes <= 10%` or `bytes <= 120 kB, bops <= 0.5%`."""

    limits: tuple[Limit, ...]

    @classmethod
    def parse(cls, text: "str | Budget") -> "Budget":
        """Read clauses `metric <= number unit`, separated by commas.

        `<` and `=` mean the same, and a number of bytes alone (`10 MB`) is one of `bytes`.
        Metrics and units: bytes (B, kB, MB, GB, KiB, MiB, GiB, %), macs and bops (k, M, G, T, %),
        bits (mean bits of the codes per weight, %), bpw (the same, with scales and zero points, %),
        latency (us, ms, s, %), onnx and openvino (bytes of the file that is exported for that
        target, as for bytes; % is a share of the same float32 bytes). `%` is a share of the float32
        network. Raises BudgetError for anything else.
        """
        if isinstance(text, Budget):
            return text
        if not isinstance(text, str):
            raise BudgetError(
                f"a budget is text such as 'bytes <= 10%', found {type(text).__name__}"
            )
        limits = tuple(_clause(part.strip()) for part in re.split(r",(?!\d)", text))
        names = [limit.metric for limit in limits]
        twice = next((n for n in names if names.count(n) > 1), None)
        if twice is not None:
            raise BudgetError(f"{text!r} limits {twice} twice; keep the tighter limit")
        return cls(limits)

    def __str__(self) -> str:
        return ", ".join(limit.text for limit in self.limits)

    def shipped(self, target: str | None) -> "Budget":
        """The same where bytes are those of the file for a target; None: of the native file.

        Raises BudgetError for a target whose bytes no budget can limit.
        """
        if target in (None, "safetensors") or all(x.metric != "bytes" for x in self.limits):
            return self
        if target not in FILES:
            raise BudgetError(
                f"bytes of a file for {target!r} are no budget; there are safetensors, "
                f"{', '.join(FILES)}"
            )
        return Budget.parse(
            ", ".join(
                re.sub("^bytes", target, x.text, flags=re.IGNORECASE)
                if x.metric == "bytes"
                else x.text
                for x in self.limits
            )
        )

    @property
    def metrics(self) -> tuple[str, ...]:
        """What it limits."""
        return tuple(limit.metric for limit in self.limits)

    @property
    def files(self) -> tuple[str, ...]:
        """The targets whose files it limits."""
        return tuple(limit.metric for limit in self.limits if limit.metric in FILES)

    def check(self, cost: Cost, whole: Cost) -> None:
        """Raise BudgetError if a cost is over a limit; there is no tolerance."""
        for limit in self.limits:
            if limit.broken_by(cost, whole):
                metric = METRICS[limit.metric]
                amount, allowed = metric.amount(cost), limit.amount(whole)
                raise BudgetError(
                    f"{limit.text!r} allows {metric.show(allowed, whole.weights)} {limit.unit}, "
                    f"the network has {metric.show(amount, whole.weights)}"
                )


def _clause(text: str) -> Limit:
    m = _LIMIT.fullmatch(text)
    alone = None if m else _LIMIT.fullmatch(f"bytes <= {text}")
    if alone is not None and alone[4].lower() in METRICS["bytes"].units.keys() - {""}:
        return _clause(f"bytes <= {text}")
    if m is not None and m[2] in ("<", "=", "=="):
        return _clause(f"{m[1]} <= {text[m.start(3) :]}")
    if m is None:
        raise BudgetError(
            f"{text!r} is not a budget; write metric <= number unit, such as 'bytes <= 120 kB'"
        )
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


def heaviest(costs: dict[str, Cost], metric: str, count: int = 3) -> str:
    """The layers that cost most, in words: what stands in the way of a budget."""
    quantity = METRICS[metric]
    ranked = sorted(costs.items(), key=lambda item: -quantity.amount(item[1]))[:count]
    return ", ".join(
        f"{quoted(name)} {quantity.show(quantity.amount(c), c.weights)}" for name, c in ranked
    )
