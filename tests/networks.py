"""Small random networks: one of every kind that users bring, and strategies that draw others."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

import rabbet


@dataclass(frozen=True)
class Case:
    """A network in eval mode with batches that it takes."""

    model: nn.Module
    batches: list[Any]


def rand(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers that depend on nothing but the seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def settled(model: nn.Module, seed: int = 0) -> nn.Module:
    """The network with parameters and batch-norm statistics drawn by the seed, in eval mode."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for m in model.modules():
            for p in m.parameters(recurse=False):
                fan = p[0].numel() if p.ndim > 1 else 16
                p.copy_(torch.randn(p.shape, generator=g) / fan**0.5)
            if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None:
                m.running_mean.copy_(torch.randn(m.running_mean.shape, generator=g) * 0.3)
                m.running_var.copy_(torch.rand(m.running_var.shape, generator=g) + 0.5)
                if m.weight is not None:
                    m.weight.copy_(torch.rand(m.weight.shape, generator=g) + 0.5)
            if isinstance(m, nn.LayerNorm):
                m.weight.copy_(torch.rand(m.weight.shape, generator=g) + 0.5)
    return model.eval()


def images(channels: int = 3, size: int = 8, count: int = 6, batches: int = 2) -> list[Tensor]:
    return [rand(count, channels, size, size, seed=100 + k) for k in range(batches)]


def tokens(vocabulary: int = 20, length: int = 7, count: int = 6, batches: int = 2) -> list[Tensor]:
    g = torch.Generator().manual_seed(5)
    return [torch.randint(vocabulary, (count, length), generator=g) for _ in range(batches)]


class Residual(nn.Module):
    """Two convs with batch norms and a shortcut; in-place ReLUs."""

    def __init__(self, width: int, out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.short = (
            nn.Identity() if (width, stride) == (out, 1) else nn.Conv2d(width, out, 1, stride)
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + self.short(x))


class Twice(nn.Module):
    """A linear with two names that runs twice, one that never runs, an unfoldable batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 12)
        self.norm = nn.BatchNorm1d(12)
        self.body = nn.Linear(12, 12)
        self.again = self.body
        self.spare = nn.Linear(12, 4)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        y = self.norm(y) + y  # the output of `stem` is used twice
        return self.head(F.relu(self.again(F.relu(self.body(y)))))


class Tokens(nn.Module):
    """Embedding, transformer layer, conv over time, mean, head: takes tokens [n, t]."""

    def __init__(self, vocabulary: int = 20, width: int = 16) -> None:
        super().__init__()
        self.table = nn.Embedding(vocabulary, width)
        self.layer = nn.TransformerEncoderLayer(width, 2, 24, dropout=0.1, batch_first=True)
        self.conv = nn.Conv1d(width, width, 3, padding=1)
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(self.table(x))
        y = F.gelu(self.conv(y.mT)).mT  # [n, t, width]
        return self.head(y.mean(1))


class Attention(nn.Module):
    """MultiheadAttention, whose own weights cannot be swapped, between linears that can."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 12)
        self.attention = nn.MultiheadAttention(12, 3, batch_first=True)
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        return self.head(self.attention(y, y, y, need_weights=False)[0])


class Blocks(nn.Module):
    """A language model of two equal blocks whose head shares its table: takes tokens [n, t]."""

    def __init__(self, vocabulary: int = 20, width: int = 16) -> None:
        super().__init__()
        self.table = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 2, 24, dropout=0.1, batch_first=True)
            for _ in range(2)
        )
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        y = self.table(x)
        for block in self.blocks:
            y = block(y)
        return self.head(y)


class TiedTable(nn.Module):
    """A language model whose head shares its table."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 12)
        self.body = nn.Linear(12, 12)
        self.head = nn.Linear(12, 20, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.body(self.table(x))))


class OneTable(nn.Module):
    """An encoder, a decoder and a head that share one table; the first of its names never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.encode, self.decode = (nn.Embedding(20, 12) for _ in range(3))
        self.body, self.head = nn.Linear(12, 12), nn.Linear(12, 20, bias=False)
        self.encode.weight = self.decode.weight = self.head.weight = self.shared.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.body(self.encode(x))) + self.decode(x.flip(1)))


class ByKeyword(nn.Module):
    """Takes a dict, returns a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = nn.Linear(6, 8), nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, left: Tensor, right: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
        hidden = F.relu(self.left(left) + scale * self.right(right))
        return {"scores": self.head(hidden), "hidden": hidden}


def _stack() -> Case:
    return Case(
        nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
            nn.Conv2d(8, 12, 3, stride=2, padding=1, groups=2),
            nn.BatchNorm2d(12),
            nn.ReLU(inplace=True),
            nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False),
            nn.Hardswish(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(12, 5),
        ),
        images(),
    )


def _residual() -> Case:
    layers = [
        Residual(8, 8),
        Residual(8, 12, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 5),
    ]
    return Case(
        nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), *layers),
        images(),
    )


def _padded() -> Case:
    return Case(
        nn.Sequential(
            nn.Conv2d(3, 6, 4, padding="same"),  # even: one side is padded more than the other
            nn.ReLU(),
            nn.Conv2d(6, 6, 3, padding=2, dilation=2, padding_mode="reflect"),
            nn.ReLU(inplace=True),
            nn.Conv2d(6, 6, (1, 3), padding=(0, 1), padding_mode="circular"),
            nn.ReLU(),
            nn.Conv2d(6, 6, 3, stride=2, padding=1, padding_mode="replicate"),
            nn.Conv2d(6, 4, 2, padding="valid"),
        ),
        images(),
    )


def _single() -> Case:
    return Case(nn.Linear(10, 6), [rand(8, 10)])


def _sequence() -> Case:
    conv = [
        nn.Conv1d(5, 10, 5, padding=2),
        nn.BatchNorm1d(10),
        nn.ReLU(),
        nn.Conv1d(10, 10, 3, 2, 2, 2, groups=5),
    ]
    return Case(
        nn.Sequential(*conv, nn.Flatten(), nn.Linear(50, 3)),
        [rand(5, 5, 9, seed=k) for k in range(2)],
    )


def _upsampled() -> Case:
    """An encoder and a decoder: transposed convs with batch norms, groups and cut borders."""
    layers = [
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 12, 4, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(12),
        nn.ReLU(inplace=True),
        nn.ConvTranspose2d(12, 6, (3, 2), stride=(1, 2), padding=(1, 0), groups=3),
        nn.ReLU(),
        nn.Conv2d(6, 3, 1),
    ]
    return Case(nn.Sequential(*layers), images())


def _volumes() -> Case:
    """Convs and a transposed conv over three axes."""
    layers = [
        nn.Conv3d(2, 6, 3, padding=1, bias=False),
        nn.BatchNorm3d(6),
        nn.ReLU(inplace=True),
        nn.ConvTranspose3d(6, 4, 2, stride=2),
        nn.ReLU(),
        nn.Conv3d(4, 4, (1, 3, 3), stride=2, groups=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4 * 4 * 4 * 4, 3),
    ]
    return Case(nn.Sequential(*layers), [rand(4, 2, 4, 5, 5, seed=100 + k) for k in range(2)])


NETWORKS: dict[str, Callable[[], Case]] = {
    "stack": _stack,
    "residual": _residual,
    "padded": _padded,
    "single": _single,
    "sequence": _sequence,
    "upsampled": _upsampled,
    "volumes": _volumes,
    "twice": lambda: Case(Twice(), [rand(6, 6, seed=k) for k in range(3)]),
    "tokens": lambda: Case(Tokens(), tokens()),
    "blocks": lambda: Case(Blocks(), tokens()),
    "attention": lambda: Case(Attention(), [rand(4, 5, 6, seed=k) for k in range(2)]),
    "opened": lambda: Case(
        rabbet.open_attention(Attention()), [rand(4, 5, 6, seed=k) for k in range(2)]
    ),
    "tied": lambda: Case(TiedTable(), tokens()),
    "tables": lambda: Case(OneTable(), tokens()),
    "keyword": lambda: Case(
        ByKeyword(), [{"left": rand(6, 6), "right": rand(6, 4, seed=1), "scale": 0.5}]
    ),
}


def network(name: str, seed: int = 0) -> Case:
    """One of NETWORKS with the numbers of a seed."""
    case = NETWORKS[name]()
    return Case(settled(case.model, seed), case.batches)


class Chain(nn.Module):
    """Blocks one after the other, then a pooled head; takes what its first block takes."""

    def __init__(self, blocks: list[nn.Module], head: nn.Module) -> None:
        super().__init__()
        self.blocks, self.head = nn.ModuleList(blocks), head

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1) if x.ndim == 3 else x.flatten(2).mean(2))


class OverTime(nn.Module):
    """A conv1d over [n, t, features]."""

    def __init__(self, conv: nn.Conv1d) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x.mT).mT)


def _image_block(draw: st.DrawFn, width: int) -> tuple[nn.Module, int]:
    kind = draw(
        st.sampled_from(
            ["norm", "plain", "grouped", "depthwise", "residual", "strided", "pointwise"]
        )
    )
    out = draw(st.sampled_from([4, 8, 12]))
    if kind == "norm":
        bias = draw(st.booleans())
        conv = nn.Conv2d(width, out, 3, padding=1, bias=bias)
        return nn.Sequential(conv, nn.BatchNorm2d(out), nn.ReLU(inplace=draw(st.booleans()))), out
    if kind == "grouped":
        return nn.Sequential(
            nn.Conv2d(width, out, 3, padding=1, groups=2), nn.BatchNorm2d(out), nn.ReLU()
        ), out
    if kind == "depthwise":
        return nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, groups=width), nn.ReLU6(inplace=True)
        ), width
    if kind == "residual":
        return Residual(width, out, draw(st.sampled_from([1, 2]))), out
    if kind == "strided":
        mode = draw(st.sampled_from(["zeros", "reflect", "circular"]))
        return nn.Conv2d(width, out, 3, stride=2, padding=1, padding_mode=mode), out
    if kind == "pointwise":
        return nn.Sequential(
            nn.Conv2d(width, out, 1, bias=False), nn.BatchNorm2d(out, affine=False), nn.SiLU()
        ), out
    return nn.Sequential(
        nn.Conv2d(width, out, draw(st.sampled_from([1, 3])), padding="same"), nn.ReLU()
    ), out


def _token_block(draw: st.DrawFn, width: int) -> nn.Module:
    kind = draw(st.sampled_from(["mlp", "conv", "grouped", "transformer", "norm"]))
    if kind == "mlp":
        inner = draw(st.sampled_from([8, 20]))
        return nn.Sequential(
            nn.Linear(width, inner, bias=draw(st.booleans())), nn.GELU(), nn.Linear(inner, width)
        )
    if kind == "transformer":
        return nn.TransformerEncoderLayer(
            width, 2, 16, batch_first=True, norm_first=draw(st.booleans())
        )
    if kind == "norm":
        return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width))
    return OverTime(nn.Conv1d(width, width, 3, padding=1, groups=2 if kind == "grouped" else 1))


@st.composite
def image_networks(draw: st.DrawFn) -> Case:
    """ConvNets of one to four blocks on 8x8 images."""
    blocks, width = [], 3
    first = nn.Conv2d(3, 8, 3, padding=1, bias=False)
    blocks.append(nn.Sequential(first, nn.BatchNorm2d(8), nn.ReLU(inplace=True)))
    width = 8
    for _ in range(draw(st.integers(0, 3))):
        block, width = _image_block(draw, width)
        blocks.append(block)
    model = Chain(blocks, nn.Linear(width, draw(st.integers(1, 6))))
    return Case(
        settled(model, draw(st.integers(0, 99))), images(count=draw(st.sampled_from([1, 4])))
    )


@st.composite
def token_networks(draw: st.DrawFn) -> Case:
    """Embedding, then one to three blocks over tokens; the head may be the table."""
    width = draw(st.sampled_from([8, 12]))
    blocks = [
        nn.Embedding(20, width),
        *(_token_block(draw, width) for _ in range(draw(st.integers(1, 3)))),
    ]
    head = nn.Linear(width, draw(st.sampled_from([1, 3, 6, 20])), bias=draw(st.booleans()))
    if head.out_features == 20:
        head.weight = blocks[0].weight
    model = Chain(blocks, head)
    return Case(
        settled(model, draw(st.integers(0, 99))), tokens(count=draw(st.sampled_from([1, 4])))
    )


@st.composite
def flat_networks(draw: st.DrawFn) -> Case:
    """Linears and batch norms on vectors, or a single layer."""
    widths = draw(st.lists(st.sampled_from([3, 8, 17, 24]), min_size=2, max_size=4))
    if len(widths) == 2 and draw(st.booleans()):
        model: nn.Module = nn.Linear(*widths)
    else:
        layers: list[nn.Module] = []
        for a, b in itertools.pairwise(widths):
            layers += [nn.Linear(a, b, bias=draw(st.booleans()))]
            layers += [nn.BatchNorm1d(b)] if draw(st.booleans()) else []
            layers += [nn.ReLU(inplace=draw(st.booleans()))]
        model = nn.Sequential(*layers)
    batches = [rand(draw(st.sampled_from([1, 5])), widths[0], seed=k) for k in range(2)]
    return Case(settled(model, draw(st.integers(0, 99))), batches)


def thinned(cases, keep=3):
    """Every so-many-th case as it is, the others slow."""
    return [
        pytest.param(*_parts(case), marks=() if k % keep == 0 else pytest.mark.slow)
        for k, case in enumerate(cases)
    ]


def _parts(case):
    return case if isinstance(case, tuple) else (case,)


def lasting(notes):
    """Notes but for those about this processor, whose integer kernels may saturate, and lengths."""
    others = ("integer kernels of this processor", "takes any length")
    return tuple(note for note in notes if not any(other in note for other in others))
