"""CP in the metric of a layer's inputs, as a problem that the solvers for plain tensors take.

Given all else, the metric H [in * k, in * k] couples the columns of one factor, except those of the
last factor A. A single column has no such coupling: so here every column of B [in, R] and of C
[k, R] is a factor of its own, one row [1, in] or [1, k], with the Gram matrix `|a|^2 C^T H C` or
`|a|^2 B^T H B`. `als`, `epc`, `admm` and `alternate` run on these unchanged; variable projection
(`varpro`) reaches lower errors of float factors in less time, and is what `Joint` uses.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from rabbet.grids.grid import Grid, Quantised
from rabbet.solve.als import (
    Factors,
    Problem,
    Sides,
    balanced,
    khatri_rao,
    random_start,
    sensitivity,
    svd_start,
    weights,
)
from rabbet.solve.gram import Gram


class MetricCP(Problem):
    """A kernel X [out, in, k] in the metric H [in * k, in * k].

    Errors are relative, the root of `tr(D H D^T) / tr(X H X^T)`. Factors are a tuple of A [out, R],
    R rows [1, in] and R rows [1, k]: see `split` and `joined`. The sensitivity is the plain one.
    """

    def __init__(self, tensor: Tensor, second: Tensor) -> None:
        super().__init__(tensor)
        self.second = second.double()
        self.power = float(((self.flat @ self.second) * self.flat).sum())
        self._factors: Factors = ()
        self._left = self._seen = self.flat

    @staticmethod
    def split(a: Tensor, b: Tensor, c: Tensor) -> Factors:
        """The tuple from A [out, R], B [in, R] and C [k, R]."""
        return (a, *b.mT.split(1), *c.mT.split(1))

    @staticmethod
    def joined(factors: Factors) -> tuple[Tensor, Tensor, Tensor]:
        """The inverse of `split`."""
        rank = len(factors) // 2
        return factors[0], torch.cat(factors[1 : 1 + rank]).mT, torch.cat(factors[1 + rank :]).mT

    @staticmethod
    def grids(rank: int, bits: int) -> list[Grid]:
        """A grid for each: a scale per row of A, per column of B and of C."""
        return [Grid.of(bits, axis=0)] * (1 + 2 * rank)

    def sides(self, factors: Factors, mode: int) -> Sides:
        """The problem of A, or of one column of B or C."""
        self._follow(factors)
        rank = len(factors) // 2
        if mode == 0:
            rows = self._rows(factors)
            seen = rows @ self.second
            return Gram(seen @ rows.mT), self.flat @ seen.mT, self.power
        r = (mode - 1) % rank
        a, b, c = factors[0][:, r], factors[1 + r][0], factors[1 + rank + r][0]
        metric = self.second.view(*self.shape[1:], *self.shape[1:])
        if mode <= rank:
            gram = torch.einsum("k,ikjl,l->ij", c, metric, c)
        else:
            gram = torch.einsum("i,ikjl,j->kl", b, metric, b)
        gram = gram * a.square().sum()
        # Minus half the gradient with respect to the term, [in, k].
        pull = (a @ self._seen).view(*self.shape[1:])
        here = pull @ c if mode <= rank else b @ pull
        now = factors[mode]
        right = here[None] + now @ gram
        whole = float((self._seen * self._left).sum())
        return Gram(gram), right, whole - float(((now @ gram - 2 * right) * now).sum())

    def random(self, rank: int, seed: int) -> Factors:
        """See `random_start`."""
        return self.split(*random_start(self.shape, rank, seed, self.flat.device))

    def leading(self, rank: int, seed: int) -> Factors:
        """See `svd_start`: of the tensor, whatever the inputs."""
        return self.split(*svd_start(self.flat.view(self.shape), rank, seed))

    def balanced(self, factors: Factors) -> Factors:
        """Norms shared evenly by a, b and c of each term."""
        return self.split(*balanced(self.joined(factors)))

    def sensitivity(self, factors: Factors) -> float:
        """The sensitivity of the weight, whatever the inputs."""
        return sensitivity(self.joined(factors))

    def weights(self, factors: Factors, mode: int) -> Tensor:
        """The same for every entry of a column."""
        rank = len(factors) // 2
        each = weights(self.joined(factors), (mode + rank - 1) // rank)
        return each if mode == 0 else each[(mode - 1) % rank].expand(factors[mode].shape[1])

    def _rows(self, factors: Factors) -> Tensor:
        _, b, c = self.joined(factors)
        return khatri_rao((b, c)).mT

    def _follow(self, factors: Factors) -> None:
        """Bring D = X - A (B khatri-rao C)^T and D H, both [out, in * k], up to date.

        If a single column changed, only its term is exchanged.
        """
        changed = [
            k for k, (f, g) in enumerate(zip(factors, self._factors, strict=False)) if f is not g
        ]
        rank = len(factors) // 2
        if len(self._factors) != len(factors) or len(changed) > 1 or changed == [0]:
            self._left = self.flat - factors[0] @ self._rows(factors)
            self._seen = self._left @ self.second
        elif changed:
            r = (changed[0] - 1) % rank
            step = _term(self._factors, r, rank) - _term(factors, r, rank)
            self._left = self._left + torch.outer(factors[0][:, r], step)
            self._seen = self._seen + torch.outer(factors[0][:, r], step @ self.second)
        self._factors = factors


def _term(factors: Factors, r: int, rank: int) -> Tensor:
    return torch.outer(factors[1 + r][0], factors[1 + rank + r][0]).flatten()


def joined(held: Sequence[Quantised]) -> tuple[Quantised, Quantised, Quantised]:
    """A [out, R], B [R, in] and C [R, k] from rounded factors as the solvers return them.

    Each has a scale per row.
    """
    a, *small = held
    rank = len(small) // 2
    b, c = (
        Quantised(
            part[0].grid, torch.cat([q.codes for q in part]), torch.cat([q.scale for q in part])
        )
        for part in (small[:rank], small[rank:])
    )
    return a, b, c
