"""The demo network: a small trained ConvNet for scikit-learn's 8x8 digits, with its data.

It is large enough to have one layer of every usual kind (stem, residual block, strided convolution,
linear head), small enough that a tight budget costs accuracy and that it ships inside the package,
and needs no download. `python -m rabbet.demo` trains it again.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rabbet.files import write_whole

__all__ = ["DigitsNet", "calibration", "model", "test", "train"]

WEIGHTS = "demo.safetensors"
SPLIT_SEED = 0
BATCH = 64


class DigitsNet(nn.Module):
    """A ConvNet with batch norm and one residual block: images [n, 1, 8, 8] to logits [n, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _conv(1, 16)
        self.block1 = _conv(16, 16)
        self.block2 = _conv(16, 16)
        self.down = _conv(16, 32, stride=2)
        self.last = _conv(32, 32)
        self.head = nn.Linear(32, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of a batch of images whose pixels lie in [0, 1]."""
        x = F.relu(self.stem(images))  # [n, 16, 8, 8]
        x = F.relu(x + self.block2(F.relu(self.block1(x))))  # [n, 16, 8, 8]
        x = F.relu(self.last(F.relu(self.down(x))))  # [n, 32, 4, 4]
        logits: Tensor = self.head(x.mean(dim=(2, 3)))  # [n, 10]
        return logits


def model() -> DigitsNet:
    """The trained network, in eval mode."""
    net = _initialised(seed=0)
    net.load_state_dict(
        safetensors.torch.load((files("rabbet") / WEIGHTS).read_bytes()), strict=True
    )
    return net.eval()


def calibration() -> list[Tensor]:
    """Unlabelled batches of the train split, each [64, 1, 8, 8].

    The few images that do not fill a batch are left out.
    """
    images, _ = _split(held_out=False)
    return [batch for batch in images.split(BATCH) if len(batch) == BATCH]


def labelled() -> list[tuple[Tensor, Tensor]]:
    """Batches of (images, labels) from the train split, to choose by; the network has seen them."""
    images, labels = _split(held_out=False)
    return list(zip(images.split(BATCH), labels.split(BATCH), strict=True))


def test() -> list[tuple[Tensor, Tensor]]:
    """Batches of (images, labels) from the held-out split.

    Neither `train` nor `calibration` sees them.
    """
    images, labels = _split(held_out=True)
    return list(zip(images.split(BATCH), labels.split(BATCH), strict=True))


def train(epochs: int = 60, seed: int = 0) -> DigitsNet:
    """Train the network from scratch on the train split, and return it in eval mode."""
    images, labels = _split(held_out=False)
    net = _initialised(seed).train()
    draw = torch.Generator().manual_seed(seed)
    # The last, smaller batch is left out: three images make poor batch-norm statistics.
    steps = len(images) // BATCH
    optimiser = torch.optim.AdamW(net.parameters(), lr=4e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs * steps)
    for _ in range(epochs):
        for chosen in torch.randperm(len(images), generator=draw).split(BATCH)[:steps]:
            loss = F.cross_entropy(net(_shifted(images[chosen], draw)), labels[chosen])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    return net.eval()


def _conv(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    # No bias: the batch norm that follows has one.
    conv = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


def _initialised(seed: int) -> DigitsNet:
    # Layers draw their first weights from the global generator: the caller's is put back
    # afterwards.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return DigitsNet()


def _split(held_out: bool) -> tuple[Tensor, Tensor]:
    # Every fourth image of each class is held out, after a shuffle whose random stream numpy has
    # frozen for good: with another split, images that the shipped weights were trained on would
    # count as held out.
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "the demo's images come with scikit-learn: pip install rabbet[demo]"
        ) from error
    digits = load_digits()
    shuffled = np.random.RandomState(SPLIT_SEED).permutation(len(digits.target))
    by_class = shuffled[np.argsort(digits.target[shuffled], kind="stable")]
    chosen = shuffled[np.isin(shuffled, by_class[::4]) == held_out]
    # [n, 1, 8, 8]; pixels are 0..16.
    images = torch.from_numpy(digits.images[chosen]).float().unsqueeze(1) / 16
    return images, torch.from_numpy(digits.target[chosen]).long()


def _shifted(images: Tensor, draw: torch.Generator) -> Tensor:
    # Each image is moved by up to one pixel either way, by cutting 8x8 windows out of a 10x10
    # frame.
    n = len(images)
    down, right = torch.randint(3, (2, n, 1), generator=draw) + torch.arange(8)  # [n, 8] each
    framed = F.pad(images, (1, 1, 1, 1)).squeeze(1)  # [n, 10, 10]
    return framed[torch.arange(n)[:, None, None], down[:, :, None], right[:, None, :]].unsqueeze(1)


def _accuracy(net: DigitsNet) -> float:
    with torch.no_grad():
        hits = [net(images).argmax(1) == labels for images, labels in test()]
    return torch.cat(hits).float().mean().item()


def _rewrite(path: Path) -> None:
    net = train()
    write_whole(path, [safetensors.torch.save(net.state_dict())])
    print(f"{path.name}: {path.stat().st_size} bytes, held-out accuracy {_accuracy(net):.2%}")


if __name__ == "__main__":
    _rewrite(Path(__file__).with_name(WEIGHTS))
