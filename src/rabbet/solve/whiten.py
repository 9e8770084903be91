"""Low-rank approximation in the metric of a layer's inputs."""

import torch
from torch import Tensor


def leading(matrix: Tensor, rank: int, second: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Balanced factors (left [..., m, rank], right [..., rank, n]) with `left @ right` nearest to matrix [..., m, n].

    Nearest in `tr(D H D^T)` with H = second [n, n], the inputs' full second moment (None: plain). The exact minimiser
    of the expected output error is the SVD whitened by H^(1/2) (QERA, arXiv 2410.06040, theorem 1); its left singular
    vectors are eigenvectors of `M H M^T` and its right factor is `U^T M`, so H is never inverted nor decomposed.
    """
    left = principal(matrix, second)[..., :rank]
    right = left.mT @ matrix
    norms = right.norm(dim=-1).clamp_min(1e-20).sqrt()
    return left * norms.unsqueeze(-2), right / norms.unsqueeze(-1)


def principal(matrix: Tensor, second: Tensor | None = None) -> Tensor:
    """All left singular vectors [..., m, m] of matrix [..., m, n] whitened by `second`, the largest first."""
    weighted = matrix if second is None else matrix @ second
    _, vectors = torch.linalg.eigh((weighted @ matrix.mT).double())
    result: Tensor = vectors.flip(-1).to(matrix.dtype)  # eigh sorts upwards
    return result
