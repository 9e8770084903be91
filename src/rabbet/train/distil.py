"""What a float transformer shows a compressed one besides its outputs: hidden states and attention probabilities.

Any stack of blocks is looked into from outside: hidden states are what goes into the first block
and comes out of each, attention is seen where torch computes it, in a fused call or as a softmax
over [batch, heads, query, key].
"""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from rabbet.core.survey import Survey
from rabbet.data.batches import Batch, floating, outputs
from rabbet.errors import ModelError
from rabbet.model.hooks import hooked


@dataclass(frozen=True)
class Shown:
    """One pass: hidden states [batch, places, width] before the first block and after each; attention; outputs."""

    hidden: Sequence[Tensor]
    attention: Sequence[Tensor]
    outputs: Sequence[Tensor]


def stack(model: nn.Module, survey: Survey) -> list[str]:
    """The blocks of a network: the list or chain inside it that holds the most layers of the survey, or itself.

    Raises ModelError if there is none of at least two blocks, or of one that runs several times.
    """
    lists = {n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList | nn.Sequential)}
    inside = {n: [s for s in survey if n and s.name.startswith(f"{n}.")] for n in lists}
    counts = {n: len(inside[n]) for n, m in lists.items() if len(m) > 1}
    if (
        not any(counts.values()) and "" not in counts
    ):  # one block that runs several times, as ALBERT's
        counts = {
            n: len(found)
            for n, found in inside.items()
            if len(found) > 1 and all(s.calls > 1 for s in found)
        }
    best = max(counts, key=lambda n: counts[n], default="")
    if not counts or (best and not counts[best]):
        raise ModelError(
            "no stack of blocks is found to teach one by one; name them: blocks=('layer.0', 'layer.1')"
        )
    return [f"{best}.{name}".lstrip(".") for name, _ in model.get_submodule(best).named_children()]


class Look:
    """Runs a network and keeps what its blocks show."""

    def __init__(self, model: nn.Module, blocks: Sequence[str]) -> None:
        named = dict(model.named_modules())
        missing = next((b for b in blocks if b not in named), None)
        if missing is not None:
            raise ModelError(f"there is no block {missing!r} in this network")
        self.blocks = [named[b] for b in blocks]

    def __call__(self, run: Any) -> Shown:
        """What `run()` shows; it returns the network's output."""
        hidden: list[Tensor] = []
        before = [(block, _first(hidden)) for block in self.blocks[:1]]
        after = [(block, _after(hidden)) for block in self.blocks]
        with hooked(after, before), _unfused(), _Attention() as attention:
            answers = outputs(run())
        return Shown(hidden, attention.maps, answers)


@contextlib.contextmanager
def _unfused() -> Iterator[None]:
    """Keeps torch from its fused layer: one call hides what is looked for."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _first(hidden: list[Tensor]) -> Any:
    def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
        if (
            not hidden
        ):  # a block that runs again, as one that layers share, goes on from what it came to
            hidden.extend(_main([args, kwargs]))

    return hook


def _after(hidden: list[Tensor]) -> Any:
    def hook(_: nn.Module, __: Any, out: Any) -> None:
        hidden.extend(_main(out))

    return hook


def _main(value: Any) -> list[Tensor]:
    """The first tensor of what passes; indices, which an embedding is given, are no hidden state."""
    return floating(value)[:1]


class _Attention(TorchFunctionMode):
    """Collects attention probabilities, [batch, heads, query, key], in the order in which they are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.maps: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:
            return self._from_module(args, kwargs)
        result = func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            self.maps.append(_probabilities(dict(zip(ARGUMENTS, args, strict=False)) | kwargs))
        elif func in (F.softmax, torch.softmax, Tensor.softmax) and result.ndim == 4:
            self.maps.append(result)
        return result

    def _from_module(self, args: Any, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        """What `nn.MultiheadAttention` computes; asked for its weights, those of each head."""
        if not kwargs.get("need_weights", True):
            return self._from_fused(args, kwargs)
        out, each = F.multi_head_attention_forward(
            *args, **(kwargs | {"average_attn_weights": False})
        )
        assert each is not None
        self.maps.append(each)
        return out, each.mean(1) if kwargs.get("average_attn_weights", True) else each

    def _from_fused(self, args: Any, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        """The same where it keeps its weights to itself, in a call that no mode sees from here.

        Asked for them it would compute otherwise: places that may look at nothing would not be
        numbers.
        """
        fused = F.scaled_dot_product_attention

        def watched(*given: Any, **named: Any) -> Tensor:
            self.maps.append(_probabilities(dict(zip(ARGUMENTS, given, strict=False)) | named))
            return fused(*given, **named)

        F.scaled_dot_product_attention = watched
        try:
            return F.multi_head_attention_forward(*args, **kwargs)
        finally:
            F.scaled_dot_product_attention = fused


ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")


def _probabilities(given: dict[str, Any]) -> Tensor:
    """What a fused attention call keeps to itself; given: its arguments by name."""
    query, key, mask = given["query"], given["key"], given.get("attn_mask")
    if given.get("enable_gqa") and key.shape[-3] != query.shape[-3]:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
    scale = given.get("scale")
    scores: Tensor = (
        query @ key.transpose(-1, -2) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    )
    if given.get("is_causal"):
        ones = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device)
        scores = scores.masked_fill(~ones.tril(), -math.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    alone = scores.isneginf().all(
        -1, keepdim=True
    )  # a place that may look at nothing, such as padding on the left
    return scores.masked_fill(alone, 0).softmax(-1)


@dataclass(frozen=True)
class Lesson:
    """What of a network is compared, and how much each counts.

    depth: hidden states of so many blocks, from the bottom or, if `top`, from the top; None: all.
    answers: whether the outputs count. scores: outputs are scores of classes over their last axis;
    else they are compared as numbers.
    """

    depth: int | None = None
    top: bool = False
    answers: bool = True
    scores: bool = True
    hidden: float = 1.0
    attention: float = 1.0
    weight: float = 1.0

    def loss(self, ours: Shown, theirs: Shown, mask: Tensor | None) -> Tensor:
        """The distance of two passes over the same batch, a scalar; mask: [batch, places], 1 for real places.

        Hidden states: mean squared error plus 1 - cosine; attention and scores: divergence of the
        distributions.
        """
        total = ours.outputs[0].new_zeros(())
        pairs = self._chosen(list(zip(ours.hidden, theirs.hidden, strict=True)))
        if self.hidden and pairs:
            apart = [_apart(a, b, mask) for a, b in pairs]
            total = total + self.hidden * torch.stack(apart).mean()
        looks = self._chosen(list(zip(ours.attention, theirs.attention, strict=True)))
        if self.attention and looks:
            total = (
                total
                + self.attention * torch.stack([_diverged(a, b, mask) for a, b in looks]).mean()
            )
        if self.answers:
            for a, b in zip(ours.outputs, theirs.outputs, strict=True):
                if not a.ndim:  # a loss that the network returns beside its scores
                    continue
                total = total + self.weight * (
                    _kl(a, b, mask) if self.scores else _error(a, b, mask)
                )
        return total

    def _chosen(self, pairs: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        if self.depth is None:
            return pairs
        return pairs[-self.depth :] if self.top else pairs[: self.depth]


def mask_of(batch: Batch, decodes: bool = False) -> Tensor | None:
    """The `attention_mask` of a batch, or of a mapping in it, [batch, places]; None if it has none.

    decodes: of a network whose places are those of a second sequence: `decoder_attention_mask`.
    """
    if isinstance(batch, tuple | list):
        return next((m for m in (mask_of(part, decodes) for part in batch) if m is not None), None)
    found = (
        batch.get("decoder_attention_mask" if decodes else "attention_mask")
        if isinstance(batch, Mapping)
        else None
    )
    return found if isinstance(found, Tensor) and found.ndim == 2 else None


def _real(x: Tensor, mask: Tensor | None) -> Tensor:
    """Rows [n, width] of the places that count; a tensor without places has only its batch.

    Of two axes the second is the width, even where there happen to be as many classes as places.
    """
    if x.ndim < 2:
        return x.reshape(-1, 1)
    if mask is None or x.ndim < 3 or x.shape[:2] != mask.shape:
        return x.flatten(0, -2)
    return x[mask.bool()]


def _apart(ours: Tensor, theirs: Tensor, mask: Tensor | None) -> Tensor:
    a, b = _real(ours, mask), _real(theirs, mask)
    return F.mse_loss(a, b) + (1 - F.cosine_similarity(a, b, -1)).mean()


def _error(ours: Tensor, theirs: Tensor, mask: Tensor | None) -> Tensor:
    a, b = _real(ours, mask), _real(theirs, mask)
    return (a - b).square().mean() / b.square().mean().clamp_min(1e-12)


def _kl(ours: Tensor, theirs: Tensor, mask: Tensor | None) -> Tensor:
    if ours.ndim < 2 or ours.shape[-1] == 1:  # one number an example or a place
        return _error(ours, theirs, mask)
    a, b = _real(ours, mask), _real(theirs, mask)
    return F.kl_div(a.log_softmax(-1), b.log_softmax(-1), log_target=True, reduction="batchmean")


def _diverged(ours: Tensor, theirs: Tensor, mask: Tensor | None) -> Tensor:
    """Mean divergence of attention [batch, heads, query, key] over the queries that count."""
    each = (
        (theirs * ((theirs + 1e-8).log() - (ours + 1e-8).log())).sum(-1).mean(1)
    )  # [batch, query]
    return each.mean() if mask is None or each.shape != mask.shape else each[mask.bool()].mean()


@dataclass
class Teacher:
    """What a float network shows of each of a list of batches, computed once as far as memory allows.

    most: bytes that may be kept; what does not fit is computed each time.
    """

    look: Look
    most: int = 2**31
    kept: dict[int, Shown] = field(default_factory=dict)
    used: int = 0

    def show(self, place: int, run: Any) -> Shown:
        """Batch number `place`, which `run()` runs."""
        if place in self.kept:
            return self.kept[place]
        with torch.no_grad():
            found = self.look(run)
        size = sum(
            t.numel() * t.element_size() for t in (*found.hidden, *found.attention, *found.outputs)
        )
        if self.used + size <= self.most:
            self.kept[place] = found
            self.used += size
        return found
