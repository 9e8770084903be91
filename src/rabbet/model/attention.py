"""Torch's own attention as four linears that are called, and so can be compressed.

`nn.MultiheadAttention` holds the projections of queries, keys and values as one parameter and only
reads the weight of its output projection, so none of the four can be replaced.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rabbet.model.inspect import opens
from rabbet.model.surgery import copied, leave_fast_path, replace_module


def open_attention(model: nn.Module) -> nn.Module:
    """A copy in which every `nn.MultiheadAttention` is four linears.

    They are `q_proj`, `k_proj`, `v_proj` and `out_proj`. The copy computes the same, except that
    torch's encoder writes zeros where a mask has padding and the copy does not. `compress` and
    `load` do this by themselves. Attention with `add_bias_kv` or `add_zero_attn`, with hooks or
    parametrisations, and subclasses are left alone. Raises ModelError for a model that cannot be
    copied.
    """
    result = copied(model)
    leave_fast_path(result)
    return opened(result)


def opened(model: nn.Module, wanted: Callable[[str], bool] = lambda _: True) -> nn.Module:
    """A copy of a network in which attention of the wanted names is open; itself if none is."""
    if not any(opens(m) and wanted(name) for name, m in model.named_modules()):
        return model
    result = copied(model)
    leave_fast_path(result)
    known: dict[nn.Module, Attention] = {}
    linears: Linears = {}
    for name, module in list(result.named_modules(remove_duplicate=False)):
        if opens(module) and (module in known or wanted(name)):
            if module not in known:
                known[module] = Attention(module, linears)
            result = replace_module(result, name, known[module])
    return result


Linears = dict[tuple[int, int, int], nn.Linear]
"""Linears by the ids of the weight and the bias that they were copied from, and by third."""


class Attention(nn.Module):
    """`nn.MultiheadAttention`, with its arguments and results, from linears that are called."""

    # These tell torch's encoder that there is no fused weight to read.
    in_proj_bias, _qkv_same_embed_dim = None, False

    def __init__(self, source: nn.MultiheadAttention, linears: Linears) -> None:
        super().__init__()
        self.embed_dim, self.num_heads = source.embed_dim, source.num_heads
        self.head_dim = source.head_dim
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
        """As `nn.MultiheadAttention.forward`.

        Inputs are [places, width], with a batch axis, if any, in front for `batch_first` and behind
        places otherwise. Masks are True, or negative numbers to be added, where a place may not be
        attended to.
        """
        if is_causal and attn_mask is None:
            raise ValueError("is_causal is a hint about attn_mask, which has to be given with it")
        alone = query.ndim == 2
        # [batch, heads, places, width of a head]
        q, k, v = (
            self._split(x, alone)
            for x in (self.q_proj(query), self.k_proj(key), self.v_proj(value))
        )
        # As in torch, which trusts the hint in this case.
        causal = is_causal and key_padding_mask is None and not need_weights
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
        if alone:
            mixed = mixed[0]
        elif not self.batch_first:
            mixed = mixed.transpose(0, 1)
        output = self.out_proj(mixed)
        if weights is None:
            return output, None
        weights = weights.mean(1) if average_attn_weights else weights
        return output, weights[0] if alone else weights

    def _split(self, x: Tensor, alone: bool) -> Tensor:
        """[batch, heads, places, width of a head] from a projection."""
        x = x[None] if alone else x if self.batch_first else x.transpose(0, 1)
        return x.view(*x.shape[:-1], self.num_heads, self.head_dim).transpose(1, 2)

    def _mask(
        self, attention: Tensor | None, padding: Tensor | None, q: Tensor, k: Tensor
    ) -> Tensor | None:
        """What is added to the scores [batch, heads, queries, keys], in a shape that broadcasts."""
        masks, (batch, heads, queries, _), keys = [], q.shape, k.shape[2]
        if attention is not None:
            if attention.shape not in ((queries, keys), (batch * heads, queries, keys)):
                raise ValueError(
                    f"attn_mask has shape {[*attention.shape]}, "
                    f"of {queries} queries and {keys} keys"
                )
            by_head = attention if attention.ndim == 2 else attention.unflatten(0, (-1, heads))
            masks.append(_added(by_head, q.dtype))
        if padding is not None:
            if padding.shape[-1] != keys or padding.numel() != batch * keys:
                raise ValueError(
                    f"key_padding_mask has shape {[*padding.shape]}, "
                    f"for {batch} examples of {keys} keys"
                )
            masks.append(_added(padding, q.dtype).view(-1, 1, 1, keys))
        return None if not masks else masks[0] if len(masks) == 1 else masks[0] + masks[1]


def _linear(
    weight: nn.Parameter, bias: nn.Parameter | None, part: tuple[int, bool], linears: Linears
) -> nn.Linear:
    """The linear of a third of a bias, which is always packed, and of a weight, if that is packed.

    The same linear is returned for the same parameters. part: which third, and whether the weight
    is packed.
    """
    third, packed = part
    key = (id(weight), id(bias), third)
    if key not in linears:
        rows = weight.chunk(3)[third] if packed else weight
        linear = nn.utils.skip_init(
            nn.Linear,
            rows.shape[1],
            len(rows),
            bias is not None,
            device=weight.device,
            dtype=weight.dtype,
        )
        linear.weight = nn.Parameter(rows.detach().clone(), weight.requires_grad)
        if bias is not None:
            offset = bias.chunk(3)[third]
            linear.bias = nn.Parameter(offset.detach().clone(), bias.requires_grad)
        linears[key] = linear
    return linears[key]


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as numbers to be added to scores."""
    if mask.is_floating_point():
        return mask
    if mask.dtype != torch.bool:
        raise TypeError(f"a mask is of bool or of floating numbers; found {mask.dtype}")
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf"))
