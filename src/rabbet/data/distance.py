"""How far a network is from the float one, and whether that is nearer than before for certain."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rabbet.data.answers import Kind

ALONE = 0.1  # share by which a distance must fall where one part of the examples judges alone


@dataclass(frozen=True, slots=True)
class Distance:
    """How far outputs are from the float network's: `Answers.divergence` and `Answers.error`.

    Both for each part of the examples, [parts]. kinds: of the outputs. declared: whether the user
    said so.
    """

    divergences: Tensor
    errors: Tensor
    kinds: tuple[Kind, ...]
    declared: bool

    @property
    def divergence(self) -> float:
        """The mean over the parts."""
        return float(self.divergences.mean())

    @property
    def error(self) -> float:
        """The mean over the parts."""
        return float(self.errors.mean())

    def __add__(self, other: "Distance") -> "Distance":
        """The distance on the parts of both."""
        return replace(
            self,
            divergences=torch.cat([self.divergences, other.divergences]),
            errors=torch.cat([self.errors, other.errors]),
        )

    def is_below(self, other: "Distance", deviations: float = 1.0) -> bool:
        """Whether this is nearer for certain: by so many standard errors of the difference.

        Outputs that are only told to be scores must not be further as values, but for chance. A
        single part tells no standard error: in both, ALONE of the distance stands for it.
        """
        return self._is_nearer(other, deviations) and (self.declared or not self._errs_more(other))

    def _is_nearer(self, other: "Distance", deviations: float = 1.0) -> bool:
        """Whether the divergence is less for certain."""
        gains = other.divergences - self.divergences
        return float(gains.mean()) > deviations * _doubt(gains, other.divergence)

    def _errs_more(self, other: "Distance") -> bool:
        """Whether the outputs are further as values for certain."""
        losses = self.errors.double() - other.errors  # in float32 a mean of large ones overflows
        return not float(losses.mean()) <= _doubt(losses, other.error)  # and if either is NaN

    def since(self, before: "Distance") -> str:
        """Both divergences in words."""
        return f"{before.divergence:.4g} -> {self.divergence:.4g}"

    def refused(self, before: "Distance") -> str:
        """Why this does not count as nearer, in words."""
        if self._is_nearer(before):  # so that it is the error of values
            told = ", ".join(self.kinds)
            return (
                f"outputs are told to be {told}; as such, held-back ones are nearer "
                f"({self.since(before)}), but further as values ({before.error:.4g} -> "
                f"{self.error:.4g}); if that is what they are, say so: {_declared(self.kinds)}"
            )
        return f"no sure gain on held-back examples ({self.since(before)})"


def _declared(kinds: Sequence[str]) -> str:
    """How a user says what outputs are."""
    if len(kinds) == 1:
        return f'Task(batches, outputs="{kinds[0]}"), or --outputs {kinds[0]}'
    return f"Task(batches, outputs={json.dumps(list(kinds))})"


def _doubt(differences: Tensor, size: float) -> float:
    """The standard error of the mean of differences [parts] in something of a size."""
    if len(differences) < 2:
        return ALONE * size
    return float(differences.std()) / math.sqrt(len(differences))
