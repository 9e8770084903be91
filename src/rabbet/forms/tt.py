"""Tensor train: a low-rank layer whose two factors are chains of cores (arXiv 2306.01076).

The weight as a matrix [out, in] is `P^T R`, with R [rank, in] made of cores over digits of the
input and P [rank, out] of cores over digits of the output. Cores do not depend on the input: they
are contracted first, and the layer is then a `lowrank` one. Digits are those of the paper, 12x8x8
and 8x8x12 for 768: the outermost are the largest.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rabbet.forms.base import PLAIN, Aim, Between, Form
from rabbet.forms.lowrank import LowRank
from rabbet.forms.modes import Chain, balanced, check
from rabbet.layers import Site
from rabbet.solve.tensor_train import bonds, half, halves, refine

DIGITS = 3  # of each axis: six cores, as in the paper


@dataclass(frozen=True)
class TT(Chain):
    """Cores of the input side, then of the output side, from the middle outwards.

    Each is [bond, digit, bond]. modes: digits of input and output, the most significant first;
    None: three each, chosen from the shape. The bond between the two innermost cores is the rank;
    no other is larger, unless the rank is full.
    """

    name: ClassVar[str] = "tt"

    @property
    def flat(self) -> LowRank:
        """What the contracted halves are."""
        return LowRank(self.rank)

    def full_rank(self, site: Site) -> int:
        """As for `lowrank`; raises PlanError for modes that do not multiply to the layer's size."""
        if self.modes is not None:
            check(self.modes, (site.columns, site.shape[0]), ("inputs", "outputs"))
        return self.flat.full_rank(site)

    def sizes(self, site: Site) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Digits of input and output from the middle outwards.

        The innermost digit of the input is its least significant one.
        """
        ins, outs = self.modes or (
            balanced(site.columns, DIGITS),
            balanced(site.shape[0], DIGITS)[::-1],
        )
        return ins[::-1], outs

    def _bonds(self, site: Site) -> tuple[list[int], list[int]]:
        most = None if self.rank == self.full_rank(site) else self.rank
        ins, outs = self.sizes(site)
        return bonds(ins, self.rank, most), bonds(outs, self.rank, most)

    def shapes(self, site: Site) -> tuple[tuple[int, ...], ...]:
        """Cores of the input from the middle outwards, then of the output."""
        shapes: list[tuple[int, ...]] = []
        for digits, ranks in zip(self.sizes(site), self._bonds(site), strict=True):
            shapes += list(zip(ranks[:-1], digits, ranks[1:], strict=True))
        return tuple(shapes)

    def macs(self, site: Site) -> tuple[int, ...]:
        """Of the two contracted halves; contracting the cores does not depend on the input."""
        return self.flat.macs(site)

    def decompose(
        self, site: Site, weight: Tensor, second: Tensor | None, aim: Aim = PLAIN
    ) -> tuple[Tensor, ...]:
        """TT-SVD, then all cores at once by L-BFGS.

        L-BFGS starts from the TT-SVD, plain or in the metric, that errs less in the metric.
        """
        matrix, metric = weight.flatten(1), None if second is None else second[0]
        ins, outs = self.sizes(site)
        right, left = self._bonds(site)
        # Columns in the order of the digits from the middle outwards.
        turned = self._turned(site, matrix)
        order = self._turned(site, torch.arange(site.columns, device=weight.device)[None])[0]
        aimed = None if metric is None else metric[order][:, order]
        power = ((turned if aimed is None else turned @ aimed) * turned).sum().clamp_min(1e-30)
        wanted = turned if aimed is None else turned @ aimed

        def loss(cores: Sequence[Tensor]) -> Tensor:
            r, p = half(cores[: len(ins)]), half(cores[len(ins) :])
            gram = (r if aimed is None else r @ aimed) @ r.mT
            error: Tensor = 1 + ((gram * (p @ p.mT)).sum() - 2 * ((p @ wanted) * r).sum()) / power
            return error

        starts = []
        for used in (None, aimed) if aimed is not None else (None,):
            outer, inner = halves(turned, (outs, ins), (left, right), used)
            starts.append([*inner, *outer])
        if aim.start is not None:
            starts.append(list(aim.start))
        best = min(starts, key=lambda cores: float(loss(cores)))
        return tuple(refine(best, loss, 0 if self.rank == self.full_rank(site) else aim.steps))

    def _turned(self, site: Site, rows: Tensor) -> Tensor:
        """Columns of [n, in], reordered into that of the digits from the middle outwards."""
        ins = self.sizes(site)[0]
        axes = range(len(ins), 0, -1)
        return rows.view(len(rows), *ins[::-1]).permute(0, *axes).reshape(len(rows), -1)

    def flat_factors(self, site: Site, factors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The `lowrank` factors that the cores stand for.

        R [rank, in, *kernel] and P^T [out, rank].
        """
        ins = self.sizes(site)[0]
        right = half(factors[: len(ins)])
        axes = range(len(ins), 0, -1)
        right = right.view(len(right), *ins).permute(0, *axes).reshape(len(right), *site.shape[1:])
        return right, half(factors[len(ins) :]).mT

    def for_runtime(self, site: Site, factors: Sequence[Tensor]) -> tuple[Form, tuple[Tensor, ...]]:
        """`lowrank`."""
        return self.flat, self.flat_factors(site, factors)

    def contract(self, site: Site, factors: Sequence[Tensor]) -> Tensor:
        """The weight."""
        return self.flat.contract(site, self.flat_factors(site, factors))

    def apply(
        self,
        site: Site,
        x: Tensor,
        factors: Sequence[Tensor],
        between: Between,
        bias: Tensor | None,
    ) -> Tensor:
        """The two halves, one after the other."""
        return self.flat.apply(site, x, self.flat_factors(site, factors), between, bias)
