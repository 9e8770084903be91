"""Networks whose answers are pictures: how far these are from those that are wanted."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from rabbet.data.batches import describe, outputs, suited
from rabbet.data.state import clean_pass
from rabbet.data.task import call, evaluating
from rabbet.data.text import require_whole
from rabbet.errors import DataError


@dataclass(frozen=True)
class PSNR:
    """The peak signal-to-noise ratio of a network's pictures in dB, the mean over pictures.

    `10 log10(peak² / mean squared error)` of each, after its values are cut to [0, peak]. pairs:
    batches of (inputs, wanted pictures [n, channels, height, width]). border: pixels at each edge
    that do not count.
    """

    pairs: tuple[tuple[Tensor, Tensor], ...]
    peak: float = 1.0
    border: int = 0

    quantity: ClassVar[str] = "PSNR"

    @classmethod
    def of(cls, pairs: Iterable[tuple[Tensor, Tensor]], peak: float = 1.0, border: int = 0) -> Self:
        """Of any iterable, which is read once; raises DataError for what are no such pairs."""
        if not isinstance(peak, int | float) or not 0 < peak < math.inf:
            raise DataError(
                f"peak is the largest value of a pixel, such as 1 or 255; found {peak!r}"
            )
        require_whole("border", border, 0, "how many pixels at each edge do not count")
        kept = list[tuple[Tensor, Tensor]]()
        for pair in pairs:
            two = isinstance(pair, tuple | list) and len(pair) == 2
            if not two or not isinstance(pair[1], Tensor) or pair[1].ndim != 4:
                raise DataError(
                    "a PSNR needs batches of (inputs, wanted pictures [n, channels, height, "
                    f"width]), found {describe(pair)}"
                )
            kept.append((pair[0], pair[1]))
        if not kept:
            raise DataError("no pictures to measure a PSNR on")
        return cls(tuple(kept), float(peak), border)

    def __call__(self, model: nn.Module) -> float:
        """Of a network, in eval mode; raises DataError for answers of another shape."""
        each = self.each(model)
        return sum(each) / len(each)

    def each(self, model: nn.Module) -> list[float]:
        """Of every picture; one without any error counts as one whose error is float32's."""
        found = list[float]()
        with evaluating(model), torch.no_grad():
            for given, wanted in self.pairs:
                with clean_pass(model, given):
                    made = outputs(call(model, suited(given, model)))[0].cpu()
                if made.shape != wanted.shape or min(wanted.shape[2:]) <= 2 * self.border:
                    raise DataError(
                        f"pictures {list(wanted.shape)} are wanted, with a border of {self.border} "
                        f"left out; the network made {list(made.shape)}"
                    )
                apart = made.double().clamp(0, self.peak) - wanted.cpu().double()
                edge = self.border
                inner = apart[:, :, edge : apart.shape[2] - edge, edge : apart.shape[3] - edge]
                error = inner.square().mean((1, 2, 3)).clamp_min((2**-24 * self.peak) ** 2)
                found += (10 * torch.log10(self.peak**2 / error)).tolist()
        return found
