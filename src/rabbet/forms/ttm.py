"""Tensor-train matrix: a table whose row indices are read as digits (arXiv 2306.01076).

Entry (v, d) of the table is a product of cores, one for each pair of digits of v and d. The cores
of the more significant and of the less significant half of the digits are contracted first; a row
is then the product of one row of each half.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from rabbet.errors import DataError, PlanError
from rabbet.forms.base import PLAIN, Aim, Between, Form
from rabbet.forms.dense import Dense
from rabbet.forms.modes import Chain, check, covering, exactly
from rabbet.layers import Site
from rabbet.solve.tensor_train import bonds, half, halves, refine

DIGITS = 4  # of a row: four cores, as in the paper


@dataclass(frozen=True)
class TTM(Chain):
    """Cores [bond, rows, columns, bond], from the middle outwards.

    First those of the more significant digits, then those of the less significant. modes: digits of
    rows (their product may exceed the number of rows) and as many of columns, the most significant
    first; None: four, chosen from the shape.
    """

    name: ClassVar[str] = "ttm"

    def full_rank(self, site: Site) -> int:
        """The largest rank between the two halves of a table; 0 for all but tables.

        Raises PlanError for modes that do not fit.
        """
        if not site.looks_up:
            return 0
        if self.modes is not None:
            check(self.modes, site.shape, ("rows", "columns"), covers=True)
            if len(self.modes[0]) != len(self.modes[1]) or len(self.modes[0]) < 2:
                raise PlanError(
                    "a table needs at least two digits, and as many of rows as of columns"
                )
        a, b = (math.prod(r * c for r, c in part) for part in self.sizes(site))
        return min(a, b)

    def _digits(self, site: Site) -> list[tuple[int, int]]:
        rows, columns = self.modes or (
            covering(site.shape[0], DIGITS),
            exactly(site.shape[1], DIGITS)[::-1],
        )
        return list(zip(rows, columns, strict=True))

    def sizes(self, site: Site) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """Digits (of rows, of columns) of both halves, from the middle outwards."""
        digits = self._digits(site)
        middle = len(digits) // 2
        return digits[:middle][::-1], digits[middle:]

    def _bonds(self, site: Site) -> list[list[int]]:
        most = None if self.rank == self.full_rank(site) else self.rank
        return [bonds([r * c for r, c in part], self.rank, most) for part in self.sizes(site)]

    def shapes(self, site: Site) -> tuple[tuple[int, ...], ...]:
        """Cores of the more significant half from the middle outwards, then of the other."""
        shapes: list[tuple[int, ...]] = []
        for digits, ranks in zip(self.sizes(site), self._bonds(site), strict=True):
            shapes += [
                (b, r, c, e) for b, (r, c), e in zip(ranks[:-1], digits, ranks[1:], strict=True)
            ]
        return tuple(shapes)

    def macs(self, site: Site) -> tuple[int, ...]:
        """One product of two rows for each look-up.

        With heads, the heads' own: the table is contracted once for both.
        """
        if site.heads:
            return (site.macs,)
        return (self.rank * site.shape[1] * site.positions,)

    def decompose(
        self, site: Site, weight: Tensor, second: Tensor | None, aim: Aim = PLAIN
    ) -> tuple[Tensor, ...]:
        """TT-SVD of the table, or the given start; then all cores at once by L-BFGS.

        The error counts the real rows only.
        """
        whole = self.rank == self.full_rank(site)
        start = self._cut(site, weight) if aim.start is None or whole else aim.start
        power = _energy(weight, second).clamp_min(1e-30)

        def loss(cores: Sequence[Tensor]) -> Tensor:
            return _energy(self.contract(site, cores) - weight, second) / power

        return tuple(refine(start, loss, 0 if whole else aim.steps))

    def _cut(self, site: Site, weight: Tensor) -> list[Tensor]:
        """TT-SVD of a table, padded with rows of zeros."""
        upper, lower = self.sizes(site)
        ranks = self._bonds(site)
        full = math.prod(r for r, _ in (*upper, *lower))
        padded = torch.cat([weight, weight.new_zeros(full - len(weight), weight.shape[1])])
        # [rows, columns] -> [digits of the upper half outwards, digits of the lower half outwards]
        count = len(upper) + len(lower)
        digits = self._digits(site)
        order = [*range(len(upper) - 1, -1, -1), *range(len(upper), count)]
        axes = [axis for k in order for axis in (k, count + k)]
        turned = padded.view(*[r for r, _ in digits], *[c for _, c in digits]).permute(axes)
        matrix = turned.reshape(math.prod(r * c for r, c in upper), -1)
        sizes = tuple([r * c for r, c in part] for part in (upper, lower))
        a, b = halves(matrix, (sizes[0], sizes[1]), (ranks[0], ranks[1]))
        return [c.reshape(shape) for c, shape in zip([*a, *b], self.shapes(site), strict=True)]

    def tables(self, site: Site, factors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """What the two halves stand for.

        [upper rows, upper columns, rank] and [lower rows, rank, lower columns].
        """
        upper, lower = self.sizes(site)
        a, b = (
            half([c.flatten(1, 2) for c in part]).view(
                len(part[0]), *[n for pair in digits for n in pair]
            )
            for part, digits in ((factors[: len(upper)], upper), (factors[len(upper) :], lower))
        )
        # The innermost digit of the upper half is its least significant one.
        n, m = len(upper), len(lower)
        a = a.permute(*range(2 * n - 1, 0, -2), *range(2 * n, 0, -2), 0)
        b = b.permute(*range(1, 2 * m, 2), 0, *range(2, 2 * m + 1, 2))
        rows, columns = (math.prod(p[k] for p in upper) for k in (0, 1))
        lower_rows = math.prod(p[0] for p in lower)
        return a.reshape(rows, columns, -1), b.reshape(lower_rows, len(factors[0]), -1)

    def for_runtime(self, site: Site, factors: Sequence[Tensor]) -> tuple[Form, tuple[Tensor, ...]]:
        """Two cores; the table itself where heads multiply with it, so that it is stored once.

        By halves a head would take about rank / columns of a half times the MACs: as many at rank
        28 of 768 columns.
        """
        if site.heads:
            return Dense(), (self.contract(site, factors),)
        a, b = self.tables(site, factors)
        cores = (a.permute(2, 0, 1)[..., None], b.transpose(0, 1)[..., None])
        return TTM(len(cores[0]), ((len(a), len(b)), (a.shape[1], b.shape[2]))), cores

    def contract(self, site: Site, factors: Sequence[Tensor]) -> Tensor:
        """The table."""
        a, b = self.tables(site, factors)
        (u, c, rank), (v, _, d) = a.shape, b.shape
        product = a.reshape(u * c, rank) @ b.transpose(0, 1).reshape(rank, v * d)
        table = product.view(u, c, v, d).permute(0, 2, 1, 3).reshape(u * v, c * d)
        return table.narrow(0, 0, site.shape[0])

    def apply(
        self,
        site: Site,
        x: Tensor,
        factors: Sequence[Tensor],
        between: Between,
        bias: Tensor | None,
    ) -> Tensor:
        """Rows of the table for indices of any shape, or the product with a head's inputs.

        Raises DataError for an index outside the table.
        """
        if site.looks_up and not torch.compiler.is_compiling():
            _inside(x, site.shape[0])
        if not site.looks_up or site.heads:
            return site.run(x, self.contract(site, factors), bias)
        a, b = self.tables(site, factors)
        upper = torch.div(x, len(b), rounding_mode="floor")
        # Rows of flat tables: every runtime looks them up as it does those of an embedding.
        left = F.embedding(upper, a.flatten(1)).unflatten(-1, a.shape[1:])
        right = F.embedding(x - upper * len(b), b.flatten(1)).unflatten(-1, b.shape[1:])
        rows: Tensor = left @ right
        return rows.flatten(-2)


def _energy(rows: Tensor, second: Tensor | None) -> Tensor:
    """Sum of squares of rows [n, columns], in the metric [1, columns, columns] if there is one."""
    energy: Tensor = ((rows if second is None else rows @ second[0]) * rows).sum()
    return energy


def _inside(x: Tensor, rows: int) -> None:
    if x.numel() and (int(x.min()) < 0 or int(x.max()) >= rows):
        raise DataError(
            f"an index of {int(x.max())} is asked of a table of {rows} rows; "
            f"indices are 0 to {rows - 1}"
        )
