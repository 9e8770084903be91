"""`EmbeddingBag` as a table that is looked up, and what is then added over each bag.

The fused module only reads its weight, so it could be rounded and no more; a table can be any of
the forms that tables have, and runtimes without the fused operation run it.
"""

from collections.abc import Callable
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from rabbet.model.inspect import has_hooks
from rabbet.model.surgery import replace_module


def bags_opened(model: nn.Module, wanted: Callable[[str], bool] = lambda _: True) -> nn.Module:
    """Make bags of the wanted names open, in place; a new module is returned for the root."""
    known: dict[nn.Module, Bag] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if _opens(module) and (module in known or wanted(name)):
            if module not in known:
                known[module] = Bag(module)
            model = replace_module(model, name, known[module])
    return model


def _opens(module: nn.Module) -> TypeGuard[nn.EmbeddingBag]:
    """Whether this is torch's own bag of embeddings, which leaves its table as it is."""
    plain = type(module) is nn.EmbeddingBag and module.max_norm is None
    return plain and not (is_parametrized(module) or has_hooks(module) or "forward" in vars(module))


class Bag(nn.Module):
    """`nn.EmbeddingBag`, with its arguments and results, from a table that is called."""

    def __init__(self, source: nn.EmbeddingBag) -> None:
        super().__init__()
        rows, columns = source.weight.shape
        self.words = nn.utils.skip_init(nn.Embedding, rows, columns, source.padding_idx)
        self.words.weight = source.weight
        self.mode, self.padding_idx = source.mode, source.padding_idx
        self.include_last_offset = source.include_last_offset
        self.train(source.training)

    def forward(
        self,
        input: Tensor,  # noqa: A002 (torch's own name)
        offsets: Tensor | None = None,
        per_sample_weights: Tensor | None = None,
    ) -> Tensor:
        """As `nn.EmbeddingBag.forward`.

        Indices are [bags, entries], or [entries] with the place where each bag begins; the result
        is [bags, columns].
        """
        rows = self.words(input)
        padding = -1 if self.padding_idx is None else self.padding_idx
        kept = (input != padding).unsqueeze(-1)
        if per_sample_weights is not None:
            rows = rows * per_sample_weights.unsqueeze(-1)
        if input.ndim == 2:
            total, count = rows.where(kept, 0.0).sum(1), kept.to(rows.dtype).sum(1)
            return self._pooled(total, count, lambda: self._least(rows, kept).amax(1))
        if offsets is None:
            raise ValueError("offsets have to be given with indices of one axis")
        starts = offsets[:-1] if self.include_last_offset else offsets  # the last is the end
        # where bags begin, counted up, is the bag of each entry, from 1
        begun = rows.new_zeros(len(input) + 1, dtype=torch.int64)
        begun = begun.scatter_add(0, starts.long(), torch.ones_like(starts, dtype=torch.int64))
        bag = (begun.cumsum(0)[:-1] - 1).unsqueeze(-1)
        empty = rows.new_zeros(len(starts), rows.shape[-1])
        places = bag.expand_as(rows)
        total = empty.scatter_add(0, places, rows.where(kept, 0.0))
        count = empty[:, :1].scatter_add(0, bag, kept.to(rows.dtype))
        return self._pooled(
            total,
            count,
            lambda: (empty - torch.inf).scatter_reduce(0, places, self._least(rows, kept), "amax"),
        )

    @staticmethod
    def _least(rows: Tensor, kept: Tensor) -> Tensor:
        """Rows that are not kept below all others."""
        return rows.where(kept, -torch.inf)

    def _pooled(self, total: Tensor, count: Tensor, largest: Callable[[], Tensor]) -> Tensor:
        if self.mode == "mean":
            return total / count.clamp(min=1)
        return total if self.mode == "sum" else largest().masked_fill(count == 0, 0.0)
