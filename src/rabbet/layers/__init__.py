"""The kinds of layer whose weights can be compressed, and weights outside of them.

A new kind is a file here and a line in KINDS.
"""

from torch import nn

from rabbet.layers.base import LayerKind, Site
from rabbet.layers.conv import Conv
from rabbet.layers.conv_transpose import ConvTranspose
from rabbet.layers.embedding import Embedding
from rabbet.layers.linear import Linear, TransposedLinear
from rabbet.layers.stored import Stored

KINDS: dict[str, LayerKind] = {
    kind.name: kind
    for kind in (
        *(Conv(space) for space in (2, 1, 3)),
        *(ConvTranspose(space) for space in (2, 1, 3)),
        Linear(),
        TransposedLinear(),
        Embedding(),
        Stored(),
    )
}
"""By the name that files and surveys call them."""


def kind_of(module: nn.Module) -> LayerKind | None:
    """The kind of a layer, or None if it is of none."""
    return next((kind for kind in KINDS.values() if kind.fits(module)), None)


def looks_up(module: nn.Module) -> bool:
    """Whether a layer is a table that is looked up."""
    kind = kind_of(module)
    return kind is not None and kind.looks_up


def shares_table(module: nn.Module) -> bool:
    """Whether a layer may have the table of a look-up as its weight."""
    kind = kind_of(module)
    return kind is not None and kind.shares_table


__all__ = ["KINDS", "LayerKind", "Site", "kind_of", "looks_up", "shares_table"]
