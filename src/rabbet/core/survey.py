"""What is known of a network: its layers, and what is left alone and why.

Values only; `model.inspect` collects them.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from rabbet.errors import FileError, PlanError, near
from rabbet.layers import Site
from rabbet.layers.files import is_count, is_text, site_from_json, site_to_json


@dataclass(frozen=True, slots=True)
class Left:
    """A layer or tensor that is not compressed: why, and the bytes that it takes in any file."""

    name: str
    reason: str
    bytes: int


def windows(sites: Sequence[Site], size: Callable[[Site], int], limit: int) -> Iterator[list[Site]]:
    """The sites in order, as many at a time as stay within a limit, but always one."""
    window: list[Site] = []
    for site in sites:
        if window and sum(map(size, window)) + size(site) > limit:
            yield window
            window = []
        window.append(site)
    if window:
        yield window


def shapes(example: Sequence[tuple[int, ...]]) -> str:
    """The shapes of an example's tensors in words, equal ones once, of many only the first."""
    each = [str(list(shape)) for shape in dict.fromkeys(example)]
    return " and ".join(each if len(each) < 3 else (each[0], f"{len(each) - 1} more"))


@dataclass(frozen=True, slots=True)
class Survey:
    """The sites of a network in the order in which they run, and what is left alone.

    notes: what else is to be known of the network, in words. example: the shape of each tensor of
    one example of the batch that the network ran on, which MACs and places depend on. Both are no
    part of a file, and empty for a survey that was read from one.
    """

    sites: tuple[Site, ...]
    left: tuple[Left, ...]
    float_bytes: int
    notes: tuple[str, ...] = field(default=(), compare=False)
    example: tuple[tuple[int, ...], ...] = field(default=(), compare=False)
    _index: dict[str, Site] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_index", {site.name: site for site in self.sites})

    def __iter__(self) -> Iterator[Site]:
        return iter(self.sites)

    def __contains__(self, name: object) -> bool:
        return name in self._index

    def __getitem__(self, name: str) -> Site:
        site = self._index.get(name)
        if site is None:
            raise PlanError(
                f"{name!r} is not a layer that can be compressed here{near(name, self._index)}; "
                "see the survey for those that are"
            )
        return site

    def __str__(self) -> str:
        """A line for every layer, of what the MACs are, what is left alone and why, the notes."""
        rows = [
            (s.name, s.kind.name, "x".join(map(str, s.shape)), f"{s.macs:,} MACs")
            for s in self.sites
        ]
        widths = [max((len(row[k]) for row in rows), default=0) for k in range(3)]
        lines = ["  ".join(map(str.ljust, row, [*widths, 0])) for row in rows]
        left = [f"left alone: {x.name} ({x.bytes:,} bytes): {x.reason}" for x in self.left]
        return "\n".join([*lines, self.counted("MACs"), *left, *self.notes])

    def counted(self, quantities: str) -> str:
        """Of which example these quantities are, in a line of at most about 80 signs."""
        if not self.example:
            return f"{quantities}: of one example, as in the first batch it was compressed with"
        return f"{quantities}: of one example as in the first batch, {shapes(self.example)}"

    @property
    def weights(self) -> int:
        """Entries of all weights that can be compressed."""
        return sum(s.numel for s in self.sites)

    def to_json(self) -> str:
        """The facts that a file needs to be read again."""
        facts = {"float_bytes": self.float_bytes, "sites": [site_to_json(s) for s in self.sites]}
        if self.left:
            facts["left"] = [[left.name, left.reason, left.bytes] for left in self.left]
        return json.dumps(facts, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> "Survey":
        """The inverse of `to_json`; raises FileError for text that is not a survey's."""
        try:
            facts = json.loads(text)
            sites = tuple(map(site_from_json, facts["sites"]))
            left = tuple(Left(n, r, b) for n, r, b in facts.get("left", ()))
            survey = cls(sites, left, facts["float_bytes"])
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
            raise FileError(f"the survey in the header cannot be read: {str(e)[:200]}") from None
        if not is_count(survey.float_bytes, 1) or not all(
            is_text(x.name) and is_text(x.reason) and is_count(x.bytes, 0) for x in left
        ):
            raise FileError("the survey in the header says bytes or reasons that nothing has")
        names = [name for site in sites for name in (*site.names, *site.heads)]
        if len(set(names)) < len(names):
            raise FileError("the survey in the header describes a layer twice")
        return survey
