"""Networks of well-known shapes in plain torch, with random weights."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Basic(nn.Module):
    """Two 3x3 convs and a shortcut, projected if shapes differ (He et al. 2016, option B)."""

    widening = 1

    def __init__(self, cin: int, cout: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(cin, cout, 3, stride, 1, bias=False), nn.BatchNorm2d(cout)
        self.conv2, self.bn2 = nn.Conv2d(cout, cout, 3, 1, 1, bias=False), nn.BatchNorm2d(cout)
        self.short = shortcut(cin, cout, stride)

    def forward(self, x: Tensor) -> Tensor:
        """[b, cin, h, w] -> [b, cout, h / stride, w / stride]."""
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.short(x))


class Bottleneck(nn.Module):
    """A 3x3 conv between two 1x1 convs, the last four times as wide, and a shortcut."""

    widening = 4

    def __init__(self, cin: int, cout: int, stride: int) -> None:
        super().__init__()
        mid = cout // self.widening
        self.conv1, self.bn1 = nn.Conv2d(cin, mid, 1, bias=False), nn.BatchNorm2d(mid)
        self.conv2, self.bn2 = nn.Conv2d(mid, mid, 3, stride, 1, bias=False), nn.BatchNorm2d(mid)
        self.conv3, self.bn3 = nn.Conv2d(mid, cout, 1, bias=False), nn.BatchNorm2d(cout)
        self.short = shortcut(cin, cout, stride)

    def forward(self, x: Tensor) -> Tensor:
        """[b, cin, h, w] -> [b, cout, h / stride, w / stride]."""
        y = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        return F.relu(self.bn3(self.conv3(y)) + self.short(x))


def shortcut(cin: int, cout: int, stride: int) -> nn.Module:
    """What is added to a block: its input, projected if shapes differ."""
    if (cin, stride) == (cout, 1):
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(cin, cout, 1, stride, bias=False), nn.BatchNorm2d(cout))


class ResNet(nn.Module):
    """For 224 x 224 images and 1,000 classes (He et al. 2016); depths: blocks of each stage."""

    def __init__(self, block: type[Basic | Bottleneck], depths: tuple[int, ...]) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)
        self.pool = nn.MaxPool2d(3, 2, 1)
        blocks, cin = [], 64
        for stage, depth in enumerate(depths):
            cout = block.widening * 64 * 2**stage
            for k in range(depth):
                blocks.append(block(cin, cout, 2 if stage and not k else 1))
                cin = cout
        self.blocks, self.fc = nn.Sequential(*blocks), nn.Linear(cin, 1000)

    def forward(self, x: Tensor) -> Tensor:
        """[b, 3, 224, 224] -> [b, 1000]."""
        x = self.blocks(self.pool(F.relu(self.norm(self.stem(x)))))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


def resnet18() -> nn.Module:
    """ResNet-18, 11.7 million weights."""
    return ResNet(Basic, (2, 2, 2, 2)).eval()


def resnet50() -> nn.Module:
    """ResNet-50, 25.6 million weights."""
    return ResNet(Bottleneck, (3, 4, 6, 3)).eval()


class Inverted(nn.Module):
    """Widen, a depthwise conv, narrow again; the input is added where shapes agree."""

    def __init__(
        self, cin: int, cout: int, stride: int, widening: int, size: int = 3, like: str = "torch"
    ) -> None:
        super().__init__()
        mid = cin * widening
        wide = [normed(cin, mid, 1, like=like)] if widening > 1 else []
        deep = normed(mid, mid, size, stride, mid, like)
        self.layers = nn.Sequential(*wide, deep, *normed(mid, cout, 1, like=like)[:-1])
        self.same = (cin, stride) == (cout, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[b, cin, h, w] -> [b, cout, h / stride, w / stride]."""
        y = self.layers(x)
        return x + y if self.same else y


def normed(
    cin: int, cout: int, size: int, stride: int = 1, groups: int = 1, like: str = "torch"
) -> nn.Sequential:
    """A conv with its BatchNorm and ReLU6.

    like: "torch", or "tensorflow", which pads before the first pixel no more than after the last.
    """
    pad, eps = size // 2, 1e-5 if like == "torch" else 1e-3
    before = []
    if like == "tensorflow" and stride > 1:
        ends = ((size - stride) // 2, (size - stride + 1) // 2)
        before, pad = [nn.ZeroPad2d((*ends, *ends))], 0
    conv = nn.Conv2d(cin, cout, size, stride, pad, groups=groups, bias=False)
    return nn.Sequential(*before, conv, nn.BatchNorm2d(cout, eps), nn.ReLU6())


def mobilenet_v2() -> nn.Module:
    """MobileNetV2 (arXiv 1801.04381, table 2), 3.5 million weights."""
    stages = ((1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 32, 3, 2, 3), (6, 64, 4, 2, 3),
              (6, 96, 3, 1, 3), (6, 160, 3, 2, 3), (6, 320, 1, 1, 3))  # fmt: skip
    return _mobile(stages, "torch")


def efficientnet_lite0() -> nn.Module:
    """EfficientNet-Lite0, 4.7 million weights: B0 (arXiv 1905.11946, table 1) with ReLU6.

    It has no squeeze-and-excitation, and is padded and normed as TensorFlow does it.
    """
    stages = ((1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 40, 2, 2, 5), (6, 80, 3, 2, 3),
              (6, 112, 3, 1, 5), (6, 192, 4, 2, 5), (6, 320, 1, 1, 3))  # fmt: skip
    return _mobile(stages, "tensorflow")


def _mobile(stages: tuple[tuple[int, int, int, int, int], ...], like: str) -> nn.Module:
    """Inverted blocks; a stage: widening, channels, depth, stride, size of its kernels."""
    layers: list[nn.Module] = [normed(3, 32, 3, 2, like=like)]
    cin = 32
    for widening, cout, depth, stride, size in stages:
        for k in range(depth):
            layers.append(Inverted(cin, cout, 1 if k else stride, widening, size, like))
            cin = cout
    pool = (nn.AdaptiveAvgPool2d(1), nn.Flatten())
    last = normed(cin, 1280, 1, like=like)
    return nn.Sequential(*layers, last, *pool, nn.Linear(1280, 1000)).eval()


class Attending(nn.Module):
    """A block of a vision transformer: attention, then a perceptron, each behind its norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[b, t, width] -> the same."""
        parts = self.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1))  # [b, t, 3, heads, d]
        met = F.scaled_dot_product_attention(*parts.permute(2, 0, 3, 1, 4))  # [b, heads, t, d]
        x = x + self.out(met.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class ViT(nn.Module):
    """ViT-B/16 (arXiv 2010.11929), 86 million weights."""

    def __init__(self, width: int = 768, heads: int = 12, depth: int = 12) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 16, 16)
        self.first = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.places = nn.Parameter(torch.randn(1, 197, width) * 0.02)
        self.blocks = nn.Sequential(*(Attending(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 1000)

    def forward(self, x: Tensor) -> Tensor:
        """[b, 3, 224, 224] -> [b, 1000]."""
        x = self.patches(x).flatten(2).mT  # [b, 196, width]
        x = torch.cat([self.first.expand(len(x), -1, -1), x], 1) + self.places
        return self.head(self.norm(self.blocks(x))[:, 0])


def vit() -> nn.Module:
    """ViT-B/16."""
    return ViT().eval()


class Small(nn.Module):
    """Many small linears in a row, each added to what it is given."""

    def __init__(self, depth: int, width: int = 32) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        """[b, width] -> the same."""
        for layer in self.layers:
            x = x + F.relu(layer(x)) / len(self.layers) ** 0.5
        return x
