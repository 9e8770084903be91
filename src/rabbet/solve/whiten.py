"""Low-rank approximation in the metric of a layer's inputs."""

import math

import torch
from torch import Tensor

STEPS = 2**12  # into which the spectrum of noise is cut
LARGE = 1024  # rows and columns from which a few leading vectors are iterated to
FEW = 8  # as many times the vectors may be had by then
SPARE = 16  # more vectors than are wanted, which lets those converge faster
ENOUGH = 1e-3  # share of the energy that is left, by which the vectors' own must still grow
TURNS = 16


def leading(matrix: Tensor, rank: int, second: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Balanced factors (left [..., m, rank], right [..., rank, n]) of a matrix M [..., m, n].

    `left @ right` is nearest to M in `tr(D H D^T)` with H = second [n, n], the inputs' full second
    moment (None: plain). The exact minimiser of the expected output error is the SVD whitened by
    H^(1/2) (QERA, arXiv 2410.06040, theorem 1); its left singular vectors are eigenvectors of
    `M H M^T` and its right factor is `U^T M`, so H is never inverted.
    """
    left = principal(matrix, second, rank)
    right = left.mT @ matrix
    norms = right.norm(dim=-1).clamp_min(1e-20).sqrt()
    return left * norms.unsqueeze(-2), right / norms.unsqueeze(-1)


def principal(matrix: Tensor, second: Tensor | None = None, count: int | None = None) -> Tensor:
    """The first `count` left singular vectors, [..., m, count], of a whitened matrix [..., m, n].

    count: None for all. second: the metric that whitens, [n, n]. For a tall matrix the first n come
    from its small side, which is far faster; the others have no singular value.
    """
    m, n = matrix.shape[-2:]
    if count and matrix.ndim == 2 and min(m, n) >= max(LARGE, FEW * count):
        return _iterated(matrix, second, count)
    if count is not None and count <= n < m:
        vectors: Tensor = torch.linalg.svd(_whitened(matrix, second), full_matrices=False).U
    else:
        weighted = matrix if second is None else matrix @ second
        gram = (weighted @ matrix.mT).double()
        vectors = torch.linalg.eigh(gram).eigenvectors.flip(-1)  # eigh sorts upwards
    return vectors[..., :count].to(matrix.dtype)


def _iterated(matrix: Tensor, second: Tensor | None, count: int) -> Tensor:
    """Leading left singular vectors by iteration of a subspace from a random start.

    Halko, Martinsson and Tropp, arXiv 0909.4061, algorithm 4.4. Where singular values lie close
    together the vectors are any that leave as much, but for about a thousandth.
    """
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(matrix.shape[1], count + SPARE, generator=generator).to(matrix)
    seen, held = matrix @ drawn, 0.0
    whole = float(((matrix if second is None else matrix @ second) * matrix).sum())
    for _ in range(TURNS):
        basis = torch.linalg.qr(seen).Q
        back = matrix.mT @ basis
        seen = matrix @ (back if second is None else second @ back)
        values, axes = torch.linalg.eigh((basis.mT @ seen).double())
        before, held = held, float(values[-count:].sum())
        if held - before <= ENOUGH * (whole - held):
            break
    vectors: Tensor = basis @ axes[:, -count:].flip(1).to(basis)
    return vectors


def spectrum(matrix: Tensor, second: Tensor | None) -> Tensor:
    """Squared singular values, [min(m, n)], of a matrix [m, n] whitened by `second` [n, n], if any.

    The largest come first.
    """
    m, n = matrix.shape
    # The Gram matrix of the smaller side.
    if m > n:
        tall = _whitened(matrix, second)
        gram = tall.mT @ tall
    else:
        exact = matrix.double()
        gram = (exact if second is None else exact @ second.double()) @ exact.mT
    values: Tensor = torch.linalg.eigvalsh(gram)
    return values.clamp_min(0).flip(0)


def noise_left(rows: int, columns: int, rank: int) -> float:
    """The share of the energy of white noise that its nearest matrix of a rank leaves, on average.

    The squared singular values of a large matrix of independent entries lie as Marchenko and Pastur
    (1967) found.
    """
    short, long = sorted((rows, columns))
    shape = math.sqrt(short / long)
    low, high = (1 - shape) ** 2, (1 + shape) ** 2
    step = (high - low) / STEPS
    values = torch.arange(STEPS, dtype=torch.float64).add(0.5).mul(step).add(low)
    density = ((high - values) * (values - low)).sqrt() / values
    below = density.cumsum(0) / density.sum() <= 1 - rank / short
    return float((values * density)[below].sum() / (values * density).sum())


def _whitened(matrix: Tensor, second: Tensor | None) -> Tensor:
    """`M H^(1/2)`, up to a rotation of its columns, in double precision."""
    if second is None:
        return matrix.double()
    spread, axes = torch.linalg.eigh(second.double())
    result: Tensor = matrix.double() @ (axes * spread.clamp_min(0).sqrt().unsqueeze(-2))
    return result
