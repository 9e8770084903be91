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
from rabbet.errors import ModelError, check_fields, check_least
from rabbet.model.hooks import hooked
from rabbet.train.losses import answer_error, attention_divergence, hidden_error


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
            n: len(sites)
            for n, sites in inside.items()
            if len(sites) > 1 and all(s.calls > 1 for s in sites)
        }
    best = max(counts, key=lambda n: counts[n], default="")
    if not counts or (best and not counts[best]):
        raise ModelError(
            "no stack of blocks is found to teach one by one; name them: Distillation(blocks=('layer.0', 'layer.1'))"
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
class Stage:
    """Which part of a network is taught for the present."""

    depth: int | None = None
    """Hidden states and attention of this many blocks; None: all."""
    top: bool = False
    """Whether blocks are counted from the top, not from the bottom."""
    outputs: bool = True
    """Whether the outputs are taught, too."""

    def chosen(self, pairs: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        """Those of the blocks that are taught; pairs: one of each block, in order."""
        if self.depth is None:
            return pairs
        return pairs[-self.depth :] if self.top else pairs[: self.depth]


WHOLE = Stage()  # everything at once


@dataclass(frozen=True)
class Distillation:
    """What a compressed network learns from the float one, and what each part counts."""

    hidden: float = 1.0
    """Weight of the hidden states: mean squared error plus 1 - cosine (arXiv 2306.01076)."""
    attention: float = 1.0
    """Weight of the divergence (KL) of attention probabilities (arXiv 2306.01076)."""
    outputs: float = 1.0
    """Weight of the outputs: divergence (KL) of scores, relative squared error of numbers."""
    labels: float = 1.0
    """Weight of the task's own loss, where the task has one."""
    scores: bool = True
    """Outputs are scores of classes over their last axis; False: they are numbers."""
    blocks: tuple[str, ...] = ()
    """Names of the modules whose outputs are the hidden states; none given: the network's stack."""
    memory: int = 2**31
    """Bytes that may hold what the float network shows; the rest is computed in every epoch."""

    def __post_init__(self) -> None:
        check_fields(self)
        check_least(self, 0, "hidden", "attention", "outputs", "labels", "memory")

    def loss(self, ours: Shown, theirs: Shown, mask: Tensor | None, stage: Stage = WHOLE) -> Tensor:
        """The distance of two passes over the same batch, a scalar, without that of labels.

        mask: [batch, places], 1 for real places.
        """
        total = ours.outputs[0].new_zeros(())
        pairs = stage.chosen(list(zip(ours.hidden, theirs.hidden, strict=True)))
        if self.hidden and pairs:
            errors = [hidden_error(a, b, mask) for a, b in pairs]
            total = total + self.hidden * torch.stack(errors).mean()
        looks = stage.chosen(list(zip(ours.attention, theirs.attention, strict=True)))
        if self.attention and looks:
            errors = [attention_divergence(a, b, mask) for a, b in looks]
            total = total + self.attention * torch.stack(errors).mean()
        if stage.outputs:
            for a, b in zip(ours.outputs, theirs.outputs, strict=True):
                if not a.ndim:  # a loss that the network returns beside its scores
                    continue
                total = total + self.outputs * answer_error(a, b, mask, self.scores)
        return total


def mask_of(batch: Batch, decodes: bool = False) -> Tensor | None:
    """The `attention_mask` of a batch, or of a mapping in it, [batch, places]; None if it has none.

    decodes: of a network whose places are those of a second sequence: `decoder_attention_mask`.
    """
    if isinstance(batch, tuple | list):
        return next((m for m in (mask_of(part, decodes) for part in batch) if m is not None), None)
    if not isinstance(batch, Mapping):
        return None
    mask = batch.get("decoder_attention_mask" if decodes else "attention_mask")
    return mask if isinstance(mask, Tensor) and mask.ndim == 2 else None


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
            shown = self.look(run)
        size = sum(
            t.numel() * t.element_size() for t in (*shown.hidden, *shown.attention, *shown.outputs)
        )
        if self.used + size <= self.most:
            self.kept[place] = shown
            self.used += size
        return shown
