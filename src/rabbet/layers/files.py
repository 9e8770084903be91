"""How the facts of a layer are stored in a file."""

import json
from typing import Any

from rabbet.errors import FileError
from rabbet.layers import KINDS, LayerKind, Site

FACTS = (
    "stride",
    "pads",
    "padding_mode",
    "dilation",
    "groups",
    "bias",
    "calls",
    "tied",
    "norm",
    "heads",
    "head_positions",
    "output_padding",
)

MOST = 2**53  # beyond this, readers that know only floating point lose count
MOST_AXES = 8  # of a weight: no kind has more
LONGEST = 200  # signs of a fact that a message shows


def _usual(kind: LayerKind, shape: list[int]) -> dict[str, Any]:
    """The usual facts of a kind: most layers have a bias and run once."""
    others = {"bias": True, "calls": 1, "tied": (), "norm": None, "heads": (), "head_positions": 0}
    return others | kind.usual(shape)


def site_to_json(site: Site) -> list[Any]:
    """Name, kind, shape, positions, inputs, and the facts that are not the usual ones.

    Every file holds them, so the usual values are left out.
    """
    usual = _usual(site.kind, list(site.shape))
    other = {k: v for k in FACTS if (v := getattr(site, k)) != usual[k]}
    return [site.name, site.kind.name, list(site.shape), site.positions, site.inputs, other]


def site_from_json(facts: list[Any]) -> Site:
    """The inverse of `site_to_json`; raises FileError for facts that are not a site's."""
    try:
        name, named, shape, positions, inputs, other = facts
        kind = KINDS[named]
        told = {k: tuple(v) if isinstance(v, list) else v for k, v in other.items()}
        site = Site(
            name=name,
            kind=kind,
            shape=tuple(shape),
            positions=positions,
            inputs=inputs,
            **(_usual(kind, shape) | told),
        )
        if _sound(site):
            return site
    except (TypeError, ValueError, KeyError, IndexError, AttributeError):
        pass
    raise FileError(f"{_shown(facts)} does not describe a layer")


def _shown(facts: Any) -> str:
    """The beginning of what was found; the whole of it may be as long as the file."""
    try:
        text = json.dumps(facts)
    except RecursionError:
        return "what nests deeply"
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def is_count(value: object, least: int) -> bool:
    """Whether a value is a whole number from `least`, and no larger than every reader can hold."""
    return type(value) is int and least <= value < MOST


def is_text(value: object) -> bool:
    """Whether a value is a text that can be printed: half a surrogate pair cannot."""
    return type(value) is str and not any("\ud800" <= c <= "\udfff" for c in value)


def _sound(site: Site) -> bool:
    """Whether facts are of the right types and lengths; a network may still contradict them."""
    counts = (
        *site.shape,
        *site.stride,
        *site.dilation,
        site.groups,
        site.positions,
        site.inputs,
        site.calls,
    )
    texts = (
        site.name,
        site.padding_mode,
        *site.tied,
        *site.heads,
        "" if site.norm is None else site.norm,
    )
    least = (*site.pads, *site.output_padding, site.head_positions)
    tuples = (
        site.stride,
        site.dilation,
        site.pads,
        site.output_padding,
        site.tied,
        site.heads,
    )
    return (
        all(is_count(n, 1) for n in counts)
        and all(is_count(n, 0) for n in least)
        and len(site.shape) <= MOST_AXES
        and is_count(site.numel, 1)
        and all(type(t) is tuple for t in tuples)
        and bool(site.heads) == (site.head_positions > 0)
        and (site.looks_up or not site.heads)
        and all(map(is_text, texts))
        and type(site.bias) is bool
        and site.kind.sound(site)
    )
