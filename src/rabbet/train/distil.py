"""Distillation of transformers: hidden states and attention probabilities as well as outputs.

They are recorded from outside, in any stack of blocks. Hidden states are the input of the first
block and the output of each; attention is caught where torch computes it, in a fused call or in a
softmax over [batch, heads, query, key].
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
from rabbet.train.losses import answer_error, attention_divergence, contrast, hidden_error


@dataclass(frozen=True)
class Recording:
    """What was recorded of one forward pass.

    hidden: hidden states [batch, places, width], before the first block and after each. attention:
    probabilities [batch, heads, query, key]. outputs: of the network.
    """

    hidden: Sequence[Tensor]
    attention: Sequence[Tensor]
    outputs: Sequence[Tensor]


def find_blocks(model: nn.Module, survey: Survey) -> list[str]:
    """The names of a network's blocks, in order.

    They are the entries of the `ModuleList` or `Sequential` in it that holds the most layers of the
    survey; if none holds any, the children of the network, if it is a `Sequential` itself. Raises
    ModelError unless there are at least two blocks, or one that runs several times.
    """
    lists = {n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList | nn.Sequential)}
    inside = {n: [s for s in survey if s.runs and n and s.name.startswith(f"{n}.")] for n in lists}
    counts = {n: len(inside[n]) for n, m in lists.items() if len(m) > 1}
    if not any(counts.values()) and "" not in counts:
        # A block that runs several times, such as ALBERT's.
        counts = {
            n: len(sites)
            for n, sites in inside.items()
            if len(sites) > 1 and all(s.calls > 1 for s in sites)
        }
    best = max(counts, key=lambda n: counts[n], default="")
    if not counts or (best and not counts[best]):
        raise ModelError(
            "no stack of blocks is found to teach one by one; "
            "name them: Distillation(blocks=('layer.0', 'layer.1'))"
        )
    return [f"{best}.{name}".lstrip(".") for name, _ in model.get_submodule(best).named_children()]


class Recorder:
    """Runs a network and records hidden states, attention and outputs.

    blocks: names of the blocks, in order. Raises ModelError for a name that the network does not
    have.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[str]) -> None:
        named = dict(model.named_modules())
        missing = next((b for b in blocks if b not in named), None)
        if missing is not None:
            raise ModelError(f"there is no block {missing!r} in this network")
        self.blocks = [named[b] for b in blocks]

    def __call__(self, run: Any) -> Recording:
        """Record `run()`, which runs the network and returns its output."""
        hidden: list[Tensor] = []
        before = [(block, _record_input(hidden)) for block in self.blocks[:1]]
        after = [(block, _record_output(hidden)) for block in self.blocks]
        with hooked(after, before), _unfused(), _Attention() as attention:
            result = outputs(run())
        return Recording(hidden, attention.maps, result)


@contextlib.contextmanager
def _unfused() -> Iterator[None]:
    """Keep torch from its fused transformer layer, one call that runs no submodules."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _record_input(hidden: list[Tensor]) -> Any:
    def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
        # If the first block runs again, as a shared one does, its input was recorded as an output.
        if not hidden:
            hidden.extend(_hidden_state([args, kwargs]))

    return hook


def _record_output(hidden: list[Tensor]) -> Any:
    def hook(_: nn.Module, __: Any, out: Any) -> None:
        hidden.extend(_hidden_state(out))

    return hook


def _hidden_state(value: Any) -> list[Tensor]:
    """The first floating tensor of an input or output, if any: indices are not a hidden state."""
    return floating(value)[:1]


class _Attention(TorchFunctionMode):
    """Collects attention probabilities, [batch, heads, query, key], as they are computed."""

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
        """The call that `nn.MultiheadAttention` makes, with the weights of each head recorded."""
        if not kwargs.get("need_weights", True):
            return self._from_fused(args, kwargs)
        out, each = F.multi_head_attention_forward(
            *args, **(kwargs | {"average_attn_weights": False})
        )
        assert each is not None
        self.maps.append(each)
        return out, each.mean(1) if kwargs.get("average_attn_weights", True) else each

    def _from_fused(self, args: Any, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        """The same call without weights; it computes them in a fused call that no mode sees.

        The module is not asked for its weights, because it would then compute differently: a query
        whose keys are all masked would give NaN.
        """
        fused = F.scaled_dot_product_attention

        def recorded(*args: Any, **kwargs: Any) -> Tensor:
            self.maps.append(_probabilities(dict(zip(ARGUMENTS, args, strict=False)) | kwargs))
            return fused(*args, **kwargs)

        F.scaled_dot_product_attention = recorded
        try:
            return F.multi_head_attention_forward(*args, **kwargs)
        finally:
            F.scaled_dot_product_attention = fused


ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")


def _probabilities(arguments: dict[str, Any]) -> Tensor:
    """The attention probabilities of a fused call, which it does not return, from its arguments."""
    query, key, mask = arguments["query"], arguments["key"], arguments.get("attn_mask")
    if arguments.get("enable_gqa") and key.shape[-3] != query.shape[-3]:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
    scale = arguments.get("scale")
    if scale is None:
        scale = 1 / math.sqrt(query.shape[-1])
    scores: Tensor = query @ key.transpose(-1, -2) * scale
    if arguments.get("is_causal"):
        ones = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device)
        scores = scores.masked_fill(~ones.tril(), -math.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    # A query whose keys are all masked, such as padding on the left, would give NaN.
    masked = scores.isneginf().all(-1, keepdim=True)
    return scores.masked_fill(masked, 0).softmax(-1)


@dataclass(frozen=True)
class Stage:
    """Which part of a network is taught at the moment."""

    depth: int | None = None
    """Hidden states and attention of this many blocks; None: all."""
    top: bool = False
    """Whether blocks are counted from the top, not from the bottom."""
    outputs: bool = True
    """Whether the outputs are taught, too."""

    def chosen(self, pairs: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        """The pairs of the blocks that are taught; pairs: one for each block, in order."""
        if self.depth is None:
            return pairs
        return pairs[-self.depth :] if self.top else pairs[: self.depth]


WHOLE = Stage()  # everything at once


@dataclass(frozen=True)
class Distillation:
    """What a compressed network learns from the float one, and the weight of each part."""

    hidden: float = 1.0
    """Weight of the hidden states: mean squared error plus 1 - cosine (arXiv 2306.01076)."""
    attention: float = 1.0
    """Weight of the divergence (KL) of attention probabilities (arXiv 2306.01076)."""
    outputs: float = 1.0
    """Weight of the outputs: divergence (KL) of scores, relative squared error of numbers."""
    labels: float = 1.0
    """Weight of the task's own loss, if it has one."""
    contrast: float = 0.0
    """Weight of telling the examples of a batch apart by the hidden states of both networks
    (InfoNCE, arXiv 1807.03748; to distil by it, arXiv 1910.10699)."""
    scores: bool | None = None
    """Whether outputs are scores of classes over their last axis; None: as `Task.outputs` says."""
    blocks: tuple[str, ...] = ()
    """Names of the modules whose outputs are the hidden states; if empty, they are looked for."""
    memory: int = 2**31
    """Bytes for recordings of the float network; what does not fit is computed in every epoch."""

    def __post_init__(self) -> None:
        check_fields(self)
        check_least(self, 0, "hidden", "attention", "outputs", "labels", "contrast", "memory")

    def loss(
        self, ours: Recording, theirs: Recording, mask: Tensor | None, stage: Stage = WHOLE
    ) -> Tensor:
        """The distance of two passes over the same batch, a scalar; labels do not enter here.

        mask: [batch, places], 1 for real places.
        """
        total = ours.outputs[0].new_zeros(())
        pairs = stage.chosen(list(zip(ours.hidden, theirs.hidden, strict=True)))
        if self.hidden and pairs:
            errors = [hidden_error(a, b, mask) for a, b in pairs]
            total = total + self.hidden * torch.stack(errors).mean()
        if self.contrast and pairs:
            errors = [contrast(a, b, mask) for a, b in pairs]
            total = total + self.contrast * torch.stack(errors).mean()
        maps = stage.chosen(list(zip(ours.attention, theirs.attention, strict=True)))
        if self.attention and maps:
            errors = [attention_divergence(a, b, mask) for a, b in maps]
            total = total + self.attention * torch.stack(errors).mean()
        if stage.outputs:
            for a, b in zip(ours.outputs, theirs.outputs, strict=True):
                if not a.ndim:  # a loss that the network returns beside its scores
                    continue
                total = total + self.outputs * answer_error(a, b, mask, bool(self.scores))
        return total


def mask_of(batch: Batch, decodes: bool = False) -> Tensor | None:
    """The `attention_mask` of a batch, or of a mapping in it, [batch, places]; None if it has none.

    decodes: take `decoder_attention_mask`, for a network whose outputs belong to the places of a
    second sequence.
    """
    if isinstance(batch, tuple | list):
        masks = (mask_of(part, decodes) for part in batch)
        return next((mask for mask in masks if mask is not None), None)
    if not isinstance(batch, Mapping):
        return None
    mask = batch.get("decoder_attention_mask" if decodes else "attention_mask")
    return mask if isinstance(mask, Tensor) and mask.ndim == 2 else None


@dataclass
class Teacher:
    """Recordings of a float network on numbered batches, each made once if memory allows.

    most: bytes that may be kept; what does not fit is computed each time.
    """

    recorder: Recorder
    most: int = 2**31
    kept: dict[int, Recording] = field(default_factory=dict)
    used: int = 0

    def record(self, number: int, run: Any) -> Recording:
        """The recording of a batch by its number; `run()` runs the network on it."""
        if number in self.kept:
            return self.kept[number]
        with torch.no_grad():
            recording = self.recorder(run)
        parts = (*recording.hidden, *recording.attention, *recording.outputs)
        size = sum(t.numel() * t.element_size() for t in parts)
        if self.used + size <= self.most:
            self.kept[number] = recording
            self.used += size
        return recording
