"""Second moments of few rows: sizes are known well, correlations are not."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rabbet.solve.metric import Metric

FEW = (0.0, 0.1, 0.3, 1.0, 3.0, 10.0)  # how much correlations may shrink
COLUMNS = 512  # of an input, by which that is judged


def shrunk(halves: Tensor, rows: Sequence[int]) -> Tensor:
    """The mean [groups, n, n] of x x^T, correlations shrunk as far as that helps on unseen rows.

    halves: sums over rows x of other examples, [2, groups, n, n]; rows: how many, in each.

    A few rows tell sizes well, but directions that none of them took look as if errors there were
    free, and error feedback pushes errors into just these. Correlations err as n / rows, and are
    divided by `1 + c n / rows`, with the c of which rounding in the metric of one half errs least
    in the other.
    """
    whole = (halves.sum(0) / sum(rows)).float()
    if not all(rows):
        return whole  # nothing to judge by
    n = whole.shape[2]
    some = torch.arange(n, device=whole.device)[:: -(-n // COLUMNS)]
    means = [(h[:, some][:, :, some] / k).float() for h, k in zip(halves, rows, strict=True)]

    def erred(few: float) -> float:
        pairs = zip(means, rows, means[::-1], strict=True)
        return sum(
            float(Metric(_less_alike(mine, few * len(some) / k)).fed_back(other).sum())
            for mine, k, other in pairs
        )

    return _less_alike(whole, min(FEW, key=erred) * n / sum(rows))


def _less_alike(second: Tensor, share: float) -> Tensor:
    """Second moments with their sizes as they are and correlations divided by `1 + share`."""
    found = second / (1 + share)
    found.diagonal(dim1=1, dim2=2).copy_(second.diagonal(dim1=1, dim2=2))
    return found
