"""Torch's own attention as four linears that are called, and so can be compressed.

`nn.MultiheadAttention` holds the projections of queries, keys and values as one parameter and reads
the weight of the one behind them, so nothing can be put in the place of any.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rabbet.model.inspect import opens
from rabbet.model.surgery import copied, leave_fast_path, replace_module


def open_attention(model: nn.Module) -> nn.Module:
    """A copy in which every `nn.MultiheadAttention` is four linears, `q_proj`, `k_proj`, `v_proj` and `out_proj`.

    It computes the same, but that torch's encoder puts zeros where a mask has padding and the copy
    does not. Give the copy to `compress`, and to `load` later. Attention with `add_bias_kv` or
    `add_zero_attn`, with hooks or parametrisations, and subclasses stay as they are. Raises
    ModelError for a model that cannot be copied.
    """
    result = copied(model)
    leave_fast_path(result)
    opened: dict[nn.Module, Attention] = {}
    linears: Linears = {}
    for name, module in list(result.named_modules(remove_duplicate=False)):
        if opens(module):
            if module not in opened:
                opened[module] = Attention(module, linears)
            result = replace_module(result, name, opened[module])
    return result


Linears = dict[tuple[int, int, int], nn.Linear]
"""What has been made of a parameter, by its place in memory, that of its bias, and which part of both it is."""


class Attention(nn.Module):
    """What `nn.MultiheadAttention` computes, its arguments and results, from linears that are called."""

    in_proj_bias, _qkv_same_embed_dim = (
        None,
        False,
    )  # so torch's encoder knows that it has no fused weight to read

    def __init__(self, source: nn.MultiheadAttention, linears: Linears) -> None:
        super().__init__()
        self.embed_dim, self.num_heads, self.head_dim = (
            source.embed_dim,
            source.num_heads,
            source.head_dim,
        )
        self.kdim, self.vdim = source.kdim, source.vdim
        self.dropout, self.batch_first = source.dropout, source.batch_first
        separate = (source.q_proj_weight, source.k_proj_weight, source.v_proj_weight)
        packed = source.in_proj_weight
        self.q_proj, self.k_proj, self.v_proj = (
            _linear(
                separate[k] if packed is None else packed,
                source.in_proj_bias,
                (k, packed is not None),
                linears,
            )
            for k in range(3)
        )
        self.out_proj = source.out_proj
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
            self._split(x, alone)
            for x in (self.q_proj(query), self.k_proj(key), self.v_proj(value))
        )  # [batch, heads, places, width of a head]
        causal = (
            is_causal and key_padding_mask is None and not need_weights
        )  # as torch, which trusts the hint then
        mask = None if causal else self._mask(attn_mask, key_padding_mask, q, k)
        dropped = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = q * self.head_dim**-0.5 @ k.mT
            weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropped)
            mixed = weights @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, mask, dropped, causal)
        mixed = mixed.transpose(1, 2).flatten(2)
        found = self.out_proj(
            mixed[0] if alone else mixed if self.batch_first else mixed.transpose(0, 1)
        )
        if weights is None:
            return found, None
        weights = weights.mean(1) if average_attn_weights else weights
        return found, weights[0] if alone else weights

    def _split(self, x: Tensor, alone: bool) -> Tensor:
        """Heads apart, the batch in front."""
        x = x[None] if alone else x if self.batch_first else x.transpose(0, 1)
        return x.view(*x.shape[:-1], self.num_heads, self.head_dim).transpose(1, 2)

    def _mask(
        self, attention: Tensor | None, padding: Tensor | None, q: Tensor, k: Tensor
    ) -> Tensor | None:
        """What is added to the scores [batch, heads, queries, keys], in a shape that fits them."""
        found, (batch, heads, queries, _), keys = [], q.shape, k.shape[2]
        if attention is not None:
            if attention.shape not in ((queries, keys), (batch * heads, queries, keys)):
                raise ValueError(
                    f"attn_mask has shape {[*attention.shape]}, of {queries} queries and {keys} keys"
                )
            found.append(
                _added(
                    attention if attention.ndim == 2 else attention.unflatten(0, (-1, heads)),
                    q.dtype,
                )
            )
        if padding is not None:
            if padding.shape[-1] != keys or padding.numel() != batch * keys:
                raise ValueError(
                    f"key_padding_mask has shape {[*padding.shape]}, for {batch} examples of {keys} keys"
                )
            found.append(_added(padding, q.dtype).view(-1, 1, 1, keys))
        return None if not found else found[0] if len(found) == 1 else found[0] + found[1]


def _linear(
    weight: nn.Parameter, bias: nn.Parameter | None, part: tuple[int, bool], linears: Linears
) -> nn.Linear:
    """A linear of one third of these, if the weight is packed as the bias is; the same one for the same parameters."""
    third, packed = part
    key = (id(weight), id(bias), third)
    if key not in linears:
        rows, offset = (
            (weight.chunk(3)[third] if packed else weight),
            None if bias is None else bias.chunk(3)[third],
        )
        made = nn.utils.skip_init(
            nn.Linear,
            rows.shape[1],
            len(rows),
            bias is not None,
            device=weight.device,
            dtype=weight.dtype,
        )
        made.weight = nn.Parameter(rows.detach().clone(), weight.requires_grad)
        if bias is not None and offset is not None:
            made.bias = nn.Parameter(offset.detach().clone(), bias.requires_grad)
        linears[key] = made
    return linears[key]


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as numbers to add."""
    if mask.is_floating_point():
        return mask
    if mask.dtype != torch.bool:
        raise TypeError(f"a mask is of bool or of floating numbers; found {mask.dtype}")
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf"))
