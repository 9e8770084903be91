"""Tensor trains: chains of small cores for a matrix whose axes are each read as several digits.

A matrix [m, n] of rank r is a product of two halves, [m, r] and [r, n]; each half is a chain of
cores that starts at the middle. Core j of a half is [b, a, c]: a is the size of its digit, b the
bond towards the middle and c the outward one; the outermost has c = 1. Digits are listed from the
middle outwards, the innermost varying slowest.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rabbet.solve.varpro import minimised
from rabbet.solve.whiten import principal

RIDGES = (1e-9, 1e-7, 1e-5, 1e-3)  # shares of a diagonal's mean; the least that does is taken


def bonds(sizes: Sequence[int], rank: int, most: int | None) -> list[int]:
    """Bonds of a half, from the middle (the rank) outwards (1).

    None is larger than `most`, nor larger than can be used.
    """
    ranks = [rank]
    for k in range(1, len(sizes)):
        whole = min(ranks[-1] * sizes[k - 1], math.prod(sizes[k:]))
        ranks.append(whole if most is None else min(most, whole))
    return [*ranks, 1]


def half(cores: Sequence[Tensor]) -> Tensor:
    """What a chain stands for, [r, a_1 * ... * a_d].

    Contracted from the outside inwards, which takes two thirds of the MACs of the other order for
    768 as 8 x 8 x 12 at rank 20.
    """
    product = cores[-1]
    for core in cores[-2::-1]:
        bond = core.shape[-1]
        product = core.reshape(-1, bond) @ product.reshape(bond, -1)
    return product.reshape(len(cores[0]), -1)


def tt_svd(matrix: Tensor, sizes: Sequence[int], ranks: Sequence[int]) -> list[Tensor]:
    """The cores of a half [r, n] by truncated SVDs from the outside inwards.

    TT-SVD, Oseledets 2011, algorithm 1.
    """
    cores: list[Tensor] = []
    rest = matrix
    for size, inner, outer in zip(sizes[:0:-1], ranks[-2:0:-1], ranks[:1:-1], strict=True):
        u, s, v = torch.linalg.svd(rest.reshape(-1, size * outer).double(), full_matrices=False)
        cores.append(v[:inner].view(inner, size, outer).to(matrix.dtype))
        rest = (u[:, :inner] * s[:inner]).to(matrix.dtype)
    cores.append(rest.reshape(ranks[0], sizes[0], ranks[1]))
    return cores[::-1]


def halves(
    matrix: Tensor,
    sizes: tuple[Sequence[int], Sequence[int]],
    ranks: tuple[Sequence[int], Sequence[int]],
    second: Tensor | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Cores of the left half [r, m] and the right half [r, n] of a matrix [m, n].

    Their product is near the matrix in `tr(D H D^T)`, H = second [n, n]. The middle is split by the
    SVD whitened by H, and the right half becomes a chain. The left half is the least-squares
    solution for that chain, and becomes a chain in turn, in the metric of that problem.
    """
    rank = ranks[0][0]
    exact = matrix.double()
    metric = None if second is None else second.double()
    right = tt_svd(principal(exact, metric, rank).mT @ exact, sizes[1], ranks[1])
    rows = half(right)
    seen = rows if metric is None else rows @ metric
    gram = seen @ rows.mT
    # gram = C C^T: an error E of the left half weighs |C^T E|.
    root = _root(gram)
    # C^T times the solution, [r, m].
    best = torch.linalg.solve_triangular(root, seen @ exact.mT, upper=False)
    left = tt_svd(best, sizes[0], ranks[0])
    inner = torch.linalg.solve_triangular(root.mT, left[0].flatten(1), upper=True)
    left[0] = inner.view_as(left[0])
    return [c.to(matrix.dtype) for c in left], [c.to(matrix.dtype) for c in right]


def _root(gram: Tensor) -> Tensor:
    """The Cholesky factor of a Gram matrix, the least of RIDGES that serves added to its diagonal.

    It may be singular: inputs behind a LayerNorm add up to nothing, and second moments that were
    summed in single precision may then be a little less than nothing. Raises what torch does for a
    matrix that is no Gram matrix.
    """
    share = gram.diagonal().mean().clamp_min(1e-30)
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    result: Tensor
    for least in RIDGES[:-1]:
        result, failed = torch.linalg.cholesky_ex(gram + least * share * eye)
        if not failed:
            return result
    result = torch.linalg.cholesky(gram + RIDGES[-1] * share * eye)
    return result


def refine(
    cores: Sequence[Tensor], loss: Callable[[Sequence[Tensor]], Tensor], evaluations: int
) -> list[Tensor]:
    """All cores refined at once by L-BFGS, then scaled to one standard deviation."""
    return evened(minimised(evened(cores), loss, evaluations))


def evened(cores: Sequence[Tensor]) -> list[Tensor]:
    """The same product from cores of equal standard deviation.

    They then learn, and are rounded, equally well.
    """
    sizes = [c.square().mean().clamp_min(1e-30).sqrt() for c in cores]
    mean = torch.stack(sizes).log().mean().exp()
    return [c * (mean / size) for c, size in zip(cores, sizes, strict=True)]
