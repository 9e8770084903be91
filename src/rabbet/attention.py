"""Torch's own attention as four linears that are called, and so can be compressed.

`nn.MultiheadAttention` holds the projections of queries, keys and values as one parameter and reads the weight of the
one behind them, so nothing can be put in the place of any.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rabbet.fold import copied, leave_fast_path, replace_module
from rabbet.survey import opens


def open_attention(model: nn.Module) -> nn.Module:
    """A copy in which every `nn.MultiheadAttention` is four linears, `q_proj`, `k_proj`, `v_proj` and `out_proj`.

    It computes the same, but that torch's encoder puts zeros where a mask has padding and the copy does not. Give the
    copy to `compress`, and to `load` later. Attention with `add_bias_kv` or `add_zero_attn`, with hooks or
    parametrisations, and subclasses stay as they are. Raises ModelError for a model that cannot be copied.
    """
    result = copied(model)
    leave_fast_path(result)
    opened: dict[nn.Module, Attention] = {}
    for name, module in list(result.named_modules(remove_duplicate=False)):
        if opens(module):
            if module not in opened:
                opened[module] = Attention(module)
            result = replace_module(result, name, opened[module])
    return result


class Attention(nn.Module):
    """What `nn.MultiheadAttention` computes, its arguments and results, from linears that are called."""

    in_proj_bias = None  # by this torch's encoder knows that there is no fused weight to read

    def __init__(self, source: nn.MultiheadAttention) -> None:
        super().__init__()
        self.embed_dim, self.num_heads, self.head_dim = source.embed_dim, source.num_heads, source.head_dim
        self.kdim, self.vdim = source.kdim, source.vdim
        self.dropout, self.batch_first = source.dropout, source.batch_first
        separate = (source.q_proj_weight, source.k_proj_weight, source.v_proj_weight)
        packed = source.in_proj_weight
        weights = separate if packed is None else packed.chunk(3)
        biases = (None,) * 3 if source.in_proj_bias is None else source.in_proj_bias.chunk(3)
        self.q_proj, self.k_proj, self.v_proj = (_linear(w, b) for w, b in zip(weights, biases, strict=True))
        self.out_proj = _linear(source.out_proj.weight, source.out_proj.bias)
        self.train(source.training)

    def forward(  # noqa: PLR0913, PLR0917 (the arguments of torch's)
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As `nn.MultiheadAttention.forward`: [places, width] with a batch axis before or, if so built, behind places.

        Masks are True, or negative numbers to be added, where a place may not be looked at.
        """
        if is_causal and attn_mask is None:
            raise ValueError("is_causal is a hint about attn_mask, which has to be given with it")
        alone = query.ndim == 2
        q, k, v = (
            self._split(x, alone) for x in (self.q_proj(query), self.k_proj(key), self.v_proj(value))
        )  # [batch, heads, places, width of a head]
        mask = self._mask(attn_mask, key_padding_mask, q.dtype)
        dropped = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = q * self.head_dim**-0.5 @ k.mT
            weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropped)
            mixed = weights @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, mask, dropped)
        mixed = mixed.transpose(1, 2).flatten(2)
        found = self.out_proj(mixed[0] if alone else mixed if self.batch_first else mixed.transpose(0, 1))
        if weights is None:
            return found, None
        weights = weights.mean(1) if average_attn_weights else weights
        return found, weights[0] if alone else weights

    def _split(self, x: Tensor, alone: bool) -> Tensor:
        """Heads apart, the batch in front."""
        x = x[None] if alone else x if self.batch_first else x.transpose(0, 1)
        return x.view(*x.shape[:-1], self.num_heads, self.head_dim).transpose(1, 2)

    def _mask(self, attention: Tensor | None, padding: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """What is added to the scores [batch, heads, queries, keys], in a shape that fits them."""
        found = []
        if attention is not None:  # [queries, keys], or [batch * heads, queries, keys]
            attention = _added(attention, dtype)
            found.append(attention if attention.ndim == 2 else attention.unflatten(0, (-1, self.num_heads)))
        if padding is not None:  # [batch, keys], or [keys]
            found.append(_added(padding, dtype).view(-1, 1, 1, padding.shape[-1]))
        return None if not found else found[0] if len(found) == 1 else found[0] + found[1]


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear with copies of these."""
    outputs, inputs = weight.shape
    made = nn.Linear(inputs, outputs, bias is not None, weight.device, weight.dtype)
    with torch.no_grad():
        made.weight.copy_(weight)
        if bias is not None:
            made.bias.copy_(bias)
    return made.requires_grad_(weight.requires_grad)


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as numbers to add."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf"))
