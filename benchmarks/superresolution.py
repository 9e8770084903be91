r"""Super-resolution at few bits: what a network for larger pictures loses in dB, and its file.

    npm pack @upscalerjs/esrgan-slim@1.0.0 && tar xzf upscalerjs-esrgan-slim-1.0.0.tgz
    python benchmarks/superresolution.py --folder package --resume

ESRGAN-slim of that package (MIT), 13 convs, 222 to 234 thousand parameters, read from its files of
TensorFlow.js: twice and four times as large. Pictures are those of ImageNet's validation at hand,
made smaller by the factor with Pillow's bicubic filter, the middle 192 x 192 of each. The first 64
of 650 calibrate, without the large ones; PSNR is the mean over the last 200, of values cut to
[0, 1], against the pictures before they were made smaller, without 4 pixels at each edge. "To
float" is the PSNR against what the float network makes. The exported file runs in onnxruntime, on
integer kernels; where these saturate, no weight is given more than 7 bits (`widest`). The drop's
error is that of the mean over pictures, of the difference picture by picture. Seed 0.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from common import DATA, machine
from PIL import Image
from records import Records, Table, Values, add_options
from torch import Tensor, nn

import rabbet
from rabbet.runtime.bench import EXACT, cpu
from rabbet.tasks import PSNR, super_resolution

SIZE, EDGE = 192, 4
WIDEST = None if cpu()["instructions"] in EXACT else 7
LEARN, TEST = range(64), range(450, 650)
COLUMNS = {
    "network": "", "budget": "", "quality": "", "widest": "",
    "PSNR": ".2f", "drop": ".3f", "error": ".3f", "to float": ".1f", "bytes": ",",
    "% of float32": ".2f", "ONNX bytes": ",",
    "ONNX drop": ".3f", "ONNX error": ".3f", "seconds of processor": ",.0f",
}  # fmt: skip


class Network(nn.Module):
    """A network of Keras' functional kind, of a folder that TensorFlow.js reads."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        described = json.loads((folder / "model.json").read_text())
        config = described["modelTopology"]["model_config"]["config"]
        self.steps = [
            (each["class_name"], each["name"], [x[0] for x in (each["inbound_nodes"] or [[]])[0]])
            for each in config["layers"]
        ]
        self.last = config["output_layers"][0][0]
        self.times = next(
            each["config"]["size"][0]
            for each in config["layers"]
            if each["class_name"] == "UpSampling2D"
        )
        weights = _weights(folder, described["weightsManifest"])
        self.convs = nn.ModuleDict()
        for name in [name for kind, name, _ in self.steps if kind == "Conv2D"]:
            kernel = weights[f"{name}/kernel"].permute(3, 2, 0, 1)
            conv = nn.Conv2d(kernel.shape[1], kernel.shape[0], kernel.shape[2], padding="same")
            conv.load_state_dict({"weight": kernel, "bias": weights[f"{name}/bias"]})
            self.convs[name] = conv

    def forward(self, x: Tensor) -> Tensor:
        """Pictures [n, 3, height, width] in [0, 1], as many times as large."""
        found: dict[str, Tensor] = {}
        for kind, name, sources in self.steps:
            given = [found[source] for source in sources]
            if kind == "InputLayer":
                found[name] = x
            elif kind == "Conv2D":
                found[name] = self.convs[name](given[0])
            elif kind == "Activation":
                found[name] = F.relu(given[0])
            elif kind == "Concatenate":
                found[name] = torch.cat(given, 1)
            elif kind == "Add":
                found[name] = given[0] + given[1]
            elif kind == "UpSampling2D":
                found[name] = F.interpolate(given[0], scale_factor=float(self.times))
            else:
                raise SystemExit(f"{name} is a {kind}, which is not read here")
        return found[self.last]


def _weights(folder: Path, manifest: list[dict[str, Any]]) -> dict[str, Tensor]:
    """The tensors of a folder by name."""
    found: dict[str, Tensor] = {}
    for group in manifest:
        content = b"".join((folder / path).read_bytes() for path in group["paths"])
        values, at = np.frombuffer(content, "<f4"), 0
        for each in group["weights"]:
            count = int(np.prod(each["shape"]))
            found[each["name"]] = torch.tensor(values[at : at + count]).reshape(each["shape"])
            at += count
    return found


def pictures(numbers: range, times: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Pictures by their numbers, small and as they were, [1, 3, height, width] in [0, 1]."""
    names = [line.split(",")[0] for line in (DATA / "imagenet/val.csv").read_text().split()]
    for k in numbers:
        whole = Image.open(DATA / "imagenet" / "val" / names[k]).convert("RGB")
        left, top = (whole.width - SIZE) // 2, (whole.height - SIZE) // 2
        sharp = whole.crop((left, top, left + SIZE, top + SIZE))
        small = sharp.resize((SIZE // times, SIZE // times), Image.Resampling.BICUBIC)
        yield _tensor(small), _tensor(sharp)


def _tensor(picture: Image.Image) -> Tensor:
    return torch.tensor(np.asarray(picture)).permute(2, 0, 1)[None].float() / 255


class Bench:
    """One network with its pictures."""

    def __init__(self, folder: Path) -> None:
        self.network = Network(folder).eval()
        self.small = torch.cat([small for small, _ in pictures(LEARN, self.network.times)])
        self.judge = PSNR.of(pictures(TEST, self.network.times), border=EDGE)
        self.before = torch.tensor(self.judge.each(self.network))
        with torch.no_grad():
            made = [(x, self.network(x).clamp(0, 1)) for x, _ in self.judge.pairs]
        self.near = PSNR.of(made, border=EDGE)

    def whole(self) -> Values:
        """The row of the float network."""
        size = 4 * sum(p.numel() for p in self.network.parameters())
        return {"PSNR": float(self.before.mean()), "bytes": size, "% of float32": 100.0}

    def row(self, budget: str, quality: str) -> Values:
        """The row of a budget: of the native file and of the exported one."""
        task = super_resolution(list(self.small.split(8)))
        start = time.process_time()
        method = rabbet.Joint(widest=WIDEST)
        result = rabbet.compress(self.network, budget, task, method, quality=quality)
        seconds = time.process_time() - start
        with tempfile.TemporaryDirectory() as place:
            path = Path(place) / "small.onnx"
            size = result.export(path).bytes
            exported = self.lost(rabbet.Session(path, threads=1))
        native = self.lost(result.model)
        return {
            "PSNR": float(self.before.mean()) - native[0],
            "drop": native[0],
            "error": native[1],
            "to float": self.near(result.model),
            "bytes": result.cost.bytes,
            "% of float32": 100 * result.cost.bytes / result.float_cost.bytes,
            "ONNX bytes": size,
            "ONNX drop": exported[0],
            "ONNX error": exported[1],
            "seconds of processor": seconds,
        }

    def lost(self, network: nn.Module) -> tuple[float, float]:
        """The mean drop in dB over the pictures, and its standard error."""
        apart = self.before - torch.tensor(self.judge.each(network))
        return float(apart.mean()), float(apart.std()) / len(apart) ** 0.5


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="the package, unpacked")
    parser.add_argument("--times", nargs="+", type=int, choices=(2, 3, 4, 8), default=[2, 4])
    parser.add_argument("--budgets", nargs="+", default=["bits <= 8", "bits <= 4", "bits <= 3"])
    parser.add_argument("--qualities", nargs="+", default=["fast", "default"])
    add_options(parser)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"seed 0; {machine()}")
    records = Records("superresolution", args, ("onnx", "onnxruntime"))
    table = Table(records, "superresolution", COLUMNS, "ImageNet's validation pictures, see above")
    for times in args.times:
        bench = Bench(args.folder / "models" / f"x{times}")
        named = {"network": f"ESRGAN-slim x{times}"}
        table.row({**named, "budget": "float32", "quality": None, "widest": None}, bench.whole)
        for budget in args.budgets:
            for quality in args.qualities:
                settings = {**named, "budget": budget, "quality": quality, "widest": WIDEST}
                table.row(settings, lambda b=budget, q=quality, n=bench: n.row(b, q))


if __name__ == "__main__":
    main()
