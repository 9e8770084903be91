"""The central value: what becomes of every layer. A plan holds every decision and no tensor.

One line per layer: its name, the terms that sum to its weight, and the bits of its input.

    conv1     dense@4c | act@8
    layer1.0  dense@3c + lowrank[6]@8c | act@8
    query     tt[20]@4                 | act@8
    value     tt[20:24x32:32x24]@4     | act@8
    fc        dense@tc
    head      dense[0-5,9]@4c + dense[6-8]@2hc | act@8

The rank of a tensor train may be followed by how inputs and outputs are read as digits, if that is
not the usual way. A dense term may cover some outputs only, counted from 0.

A layer without a line is not compressed. `#` starts a comment. A name that contains spaces, or is
empty (the network is one layer), stands in double quotes.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from rabbet.errors import PlanError
from rabbet.forms import FORMS, Form
from rabbet.grids.grid import Grid

WIDEST = 200  # of the column of names: one long name must not widen every line
_TERM = re.compile(r"([a-z]+)(?:\[([0-9:x,-]+)\])?@(\w+)")
_LINE = re.compile(r'("(?:[^"\\]|\\.)*"|[^\s"]\S*)\s+(.*)')
_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"')
_INSIDE = re.compile(r"\[([^\]]*)\]")
_RUN = re.compile(r"\b([0-9]{1,6})-([0-9]{1,6})\b")
_PLAIN = re.compile(r'[^\s"#]+')


@dataclass(frozen=True, slots=True)
class Term:
    """One part of a weight: a form and the grid of its factors."""

    form: Form
    grid: Grid

    @classmethod
    def parse(cls, text: str) -> "Term":
        """Read `dense@4c` or `lowrank[6]@8c`; raises PlanError for anything else."""
        text = text.strip()
        match = _TERM.fullmatch(text)
        if match is None:
            raise PlanError(
                f"{text!r} is not a term; write form@grid or form[rank]@grid, such as dense@4c"
            )
        name, inside, grid = match.groups()
        if name not in FORMS:
            raise PlanError(f"unknown form {name!r} in {text!r}; there are {', '.join(FORMS)}")
        try:
            form = FORMS[name].read(inside)
        except PlanError as e:
            raise PlanError(f"{text!r}: {e}") from None
        return cls(form, Grid.parse(grid))

    def __str__(self) -> str:
        return f"{self.form}@{self.grid}"


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """What becomes of one layer: its terms, and the bits of its input (None: not quantised)."""

    name: str
    terms: tuple[Term, ...]
    act: int | None = None

    @classmethod
    def parse(cls, line: str) -> "LayerPlan":
        """Read one line; raises PlanError, quoting the line."""
        m = _LINE.fullmatch(line.strip())
        if m is None:
            raise PlanError(
                f"{line.strip()!r} is not a line of a plan; write: name  form@grid | act@8"
            )
        name, rest = m.groups()
        terms, bar, act = rest.partition("|")
        try:
            bits = _parse_act(act.strip()) if bar else None
            plain = json.loads(name) if name.startswith('"') else name
            return cls(plain, tuple(Term.parse(t) for t in terms.split("+")), bits)
        except (PlanError, ValueError) as e:
            raise PlanError(f"{line.strip()!r}: {e}") from None

    def __str__(self) -> str:
        return f"{quoted(self.name)} {self.body}"

    @property
    def body(self) -> str:
        """The line without its name."""
        act = "" if self.act is None else f" | act@{self.act}"
        return " + ".join(map(str, self.terms)) + act


@dataclass(frozen=True, slots=True)
class Plan:
    """Layer plans in the order in which the layers run; compared by value."""

    layers: tuple[LayerPlan, ...] = ()

    _index: dict[str, LayerPlan] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        index: dict[str, LayerPlan] = {}
        for layer in self.layers:
            if layer.name in index:
                raise PlanError(f"the plan has two lines for {quoted(layer.name)}; keep one")
            index[layer.name] = layer
        object.__setattr__(self, "_index", index)

    @classmethod
    def parse(cls, text: str) -> "Plan":
        """Read a plan; raises PlanError naming the line that cannot be read."""
        return cls(tuple(map(LayerPlan.parse, _lines(text))))

    def __str__(self) -> str:
        width = min(max((len(quoted(layer.name)) for layer in self.layers), default=0), WIDEST)
        return "\n".join(f"{quoted(layer.name):<{width}}  {layer.body}" for layer in self.layers)

    @property
    def compact(self) -> str:
        """The same text without alignment, as the file stores it."""
        return "\n".join(map(str, self.layers))

    def __iter__(self) -> Iterator[LayerPlan]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, name: str) -> LayerPlan:
        layer = self.get(name)
        if layer is None:
            raise PlanError(f"the plan has no line for {quoted(name)}")
        return layer

    def get(self, name: str) -> LayerPlan | None:
        """The line of a layer, or None if the layer is not compressed."""
        return self._index.get(name)

    def with_layer(self, layer: LayerPlan) -> "Plan":
        """The same plan with a layer's line replaced, or added if it had none."""
        if self.get(layer.name) is None:
            return replace(self, layers=(*self.layers, layer))
        return replace(
            self, layers=tuple(layer if old.name == layer.name else old for old in self.layers)
        )


def quoted(name: str) -> str:
    """A layer's name as a plan writes it."""
    return name if _PLAIN.fullmatch(name) else json.dumps(name)


def outputs_named(text: str) -> int:
    """How many outputs the terms of a plan name, counted from its text and not listed.

    `0-999999` takes 8 bytes and a million numbers: of a text that nobody vouches for they are
    counted before it is read.
    """
    lines = (match for line in _lines(text) if (match := _LINE.fullmatch(line)))
    inside = (part for line in lines for part in _INSIDE.findall(line[2]))
    runs = (run for part in inside for run in _RUN.findall(part))
    return sum(max(int(last) - int(first) + 1, 0) for first, last in runs)


def _lines(text: str) -> Iterator[str]:
    """The lines that say something, without comments."""
    for raw in text.splitlines():
        line = raw.strip()
        if line and not line.startswith("#"):
            yield _uncommented(line)


def _uncommented(line: str) -> str:
    m = _QUOTED.match(line)
    name = m[0] if m else ""
    return name + re.sub(r"\s#.*$", "", line[len(name) :])


def _parse_act(text: str) -> int:
    m = re.fullmatch(r"act@([2-8])", text)
    if m is None:
        raise PlanError(f"{text!r} is not an input width; write act@2 to act@8")
    return int(m[1])
