"""What a form is."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch.nn.functional as F
from torch import Tensor

from rabbet.forms.modes import Modes
from rabbet.layers.site import Site

Between = Callable[[int, Tensor], Tensor]
"""What happens to the tensor between contraction i and the next: `Compressed` quantises it there."""


@dataclass(frozen=True)
class Aim:
    """What else a decomposition may know; forms that are solved in closed form need none of it.

    noise: relative squared error that rounding will make of a factor: terms that cancel one another
    are kept so small that it does not matter more than it must. start: factors of a problem alike,
    to go on from. steps: how often the error may be evaluated.
    """

    noise: float = 0.0
    start: tuple[Tensor, ...] | None = None
    steps: int = 60


PLAIN = Aim()


class Form(Protocol):
    """How a weight is written as factors; knows nothing of grids and budgets.

    Factors are listed in the order in which `apply` contracts the input with them. The first axis
    of the first factor is the rank, if there is one: `plan_of` reads it there. Unless the form is
    `Contracted`, the last factor is [out, rank]: solvers solve it for what the others became, and
    `sequence` puts the gain of a channel there.
    """

    @property
    def ranked(self) -> bool:
        """Whether the form has a rank."""
        ...

    @property
    def gaps(self) -> int:
        """Tensors of activations between the contractions: one less than those."""
        ...

    def full_rank(self, site: Site) -> int:
        """The rank from which any weight of this site is written exactly; 0 if the form does not fit the site."""
        ...

    def shapes(self, site: Site, rank: int | None) -> tuple[tuple[int, ...], ...]:
        """Shape of each factor."""
        ...

    def macs(self, site: Site, rank: int | None) -> tuple[int, ...]:
        """Multiply-accumulates per example of each contraction with the input."""
        ...

    def decompose(
        self, site: Site, weight: Tensor, rank: int | None, second: Tensor | None, aim: Aim = PLAIN
    ) -> tuple[Tensor, ...]:
        """Factors of a canonical weight, of least error in the metric of its inputs (None: plain)."""
        ...

    def contract(self, site: Site, factors: Sequence[Tensor]) -> Tensor:
        """The canonical weight that factors stand for."""
        ...

    def apply(
        self,
        site: Site,
        x: Tensor,
        factors: Sequence[Tensor],
        between: Between,
        bias: Tensor | None,
    ) -> Tensor:
        """The layer, one contraction after the other, the weight never rebuilt."""
        ...


@runtime_checkable
class Contracted(Form, Protocol):
    """A form whose factors are put together, input or not, before they meet the input: a chain of small cores."""

    @property
    def modes(self) -> Modes | None:
        """How the axes of the weight are read as digits; None: chosen from the shape."""
        ...

    def finished(
        self, site: Site, factors: Sequence[Tensor]
    ) -> tuple[str, Modes | None, tuple[Tensor, ...]]:
        """What a runtime is given in place of the cores: the name of a form, its modes, and its factors."""
        ...


def pointwise(site: Site, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Mix channels: weight [out, in] at every place of x, [batch, in, *places] of a conv or [..., in]."""
    if not site.stride:
        return F.linear(x, weight, bias)
    mix = F.conv1d if len(site.stride) == 1 else F.conv2d
    result: Tensor = mix(x, weight.view(*weight.shape, *[1] * len(site.stride)), bias)
    return result
