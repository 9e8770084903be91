"""What the tests of exports share: networks as users export them, and a quick way to compress."""

import itertools

import networks
import torch
import torch.nn.functional as F
from networks import Case, images, rand, settled
from torch import Tensor, nn
from transformers import BertConfig, BertModel

import rabbet
from rabbet.calibrate.ranges import calibrate_ranges
from rabbet.core.plan import Term, quoted
from rabbet.data.task import Task
from rabbet.export.base import Parcel
from rabbet.forms.dense import runs
from rabbet.model.build import build
from rabbet.workpiece import Workpiece


class Shortcut(nn.Module):
    """The parameter-free shortcut of CIFAR ResNets: every other pixel, channels zero-padded."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(8, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16)
        self.conv2, self.bn2 = nn.Conv2d(16, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4)))


class Pad(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x, (0, 1, 0, 1))


class Gated(nn.Module):
    """Squeeze-and-excitation, SiLU, and a concatenation of two branches that read one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
        self.down, self.up = nn.Conv2d(12, 4, 1), nn.Conv2d(4, 12, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([F.silu(self.left(x)), F.relu(self.right(x))], 1)
        return y * torch.sigmoid(self.up(F.relu(self.down(F.adaptive_avg_pool2d(y, 1)))))


class Heads(nn.Module):
    """Two outputs, one of them a conv's."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.map, self.label = (
            nn.Conv2d(3, 8, 3, padding=1),
            nn.Conv2d(8, 2, 1),
            nn.Linear(8, 3),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = F.gelu(self.body(x))
        return self.map(y), self.label(y.mean((2, 3)))


def _bert() -> Case:
    config = BertConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                        intermediate_size=32, max_position_embeddings=24)  # fmt: skip
    g = torch.Generator().manual_seed(0)
    ids = [torch.randint(40, (3, n), generator=g) for n in (6, 9, 11)]
    batches = [{"input_ids": i, "attention_mask": torch.ones_like(i)} for i in ids]
    return Case(settled(BertModel(config)), batches)


def _net(*layers: nn.Module, size: int = 8) -> Case:
    return Case(settled(nn.Sequential(*layers)), images(size=size))


def _mobile() -> Case:
    conv = [Pad(), nn.Conv2d(3, 8, 3, 2, bias=False), nn.BatchNorm2d(8), nn.ReLU6()]
    for stride in (1, 2):
        pad, border = ([Pad()], 0) if stride == 2 else ([], 1)
        conv += [
            *pad,
            nn.Conv2d(8, 8, 3, stride, border, groups=8, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU6(),
        ]
        conv += [nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6()]
    return _net(*conv, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5), size=16)


def _imagenet() -> Case:
    stem = [
        nn.Conv2d(3, 8, 7, 2, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
    ]
    body = [networks.Residual(8, 8), networks.Residual(8, 12, 2)]
    return _net(*stem, *body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5), size=16)


def _cifar() -> Case:
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)]
    return _net(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), Shortcut(), *head)


CASES = {name: lambda name=name: networks.network(name) for name in networks.NETWORKS} | {
    "cifar resnet": _cifar,
    "mobilenet": _mobile,
    "imagenet resnet": _imagenet,
    "gated": lambda: _net(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), Gated(), nn.Conv2d(12, 4, 3)),
    "heads": lambda: Case(settled(Heads()), images()),
    "bert": _bert,
    "vectors": lambda: Case(
        settled(nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 16), nn.GELU(),
                              nn.Linear(16, 4))),
        [rand(8, 12, seed=k) for k in range(2)],
    ),
}  # fmt: skip

GRIDS = tuple(
    f"dense@{grid}"
    for grid in "8c 4c 3c 2hc 5c 6c 7c tc 1c 2c 4 8 u8 3hc".split()  # noqa: SIM905
)


def parcel(case: Case, terms: tuple[str, ...] = GRIDS, act: str = "act@8") -> Parcel:
    """A network rounded to nearest, with calibrated input ranges.

    Layers take the given terms in turn, where these fit. `even` and `odd` in a term stand for the
    even and odd outputs of the layer.
    """
    piece = Workpiece.of(case.model, Task.of(case.batches), rabbet.Jobs())
    lines = []
    for site, pattern in zip(piece.survey, itertools.cycle(terms), strict=False):
        outs = range(site.shape[0])
        text = pattern.replace("even", runs(outs[::2])).replace("odd", runs(outs[1::2]))
        asked = [Term.parse(t) for t in text.split(" + ")]
        fits = all((t.form.rank or 1) <= t.form.full_rank(site) for t in asked)
        tail = "" if not site.multiplies or not act else f" | {act}"
        lines.append(f"{quoted(site.name)} {text if fits else 'dense@8c'}{tail}")
    plan = rabbet.Plan.parse("\n".join(lines))
    student = build(piece.model, plan, piece.survey)
    calibrate_ranges(student, piece.task)
    return Parcel(student, plan, piece.survey, piece.rest(plan), piece.task)
