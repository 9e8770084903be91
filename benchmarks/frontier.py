"""Accuracy against size: real networks compressed by `Joint` at several mean bits per weight.

    # ResNet-20 and -56 at 4, 3, 2 and 1.5 bits
    python benchmarks/frontier.py
    python benchmarks/frontier.py --nets mobilenet --budgets "bits <= 8" "bits <= 4"
    # their weights come with packages: see pretrained.py
    python benchmarks/frontier.py --nets mobilenet_v2 efficientnet_lite0 --tiers fast

Weights: every conv and linear, first and last included. The mean counts codes; scales and the rest
are in the bytes. Inputs of every layer have 8 bits. Calibration: the first 1,600 images of `train`
without labels (ImageNet, of which no training images are at hand: see `imagenet`). Accuracy: the
written file, loaded again, on the test images; the drop is in points against float on the same
images. ONNX: the exported file in onnxruntime, on the same images. Seconds: from the call to the
network; candidates are solved once and shared by the budgets (the first row of a network pays).
"""

import argparse
import functools
import itertools
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import pretrained
import torch
from common import machine, reader
from records import Records, Table, Values, add_options
from torch import Tensor, nn

import rabbet
from rabbet.methods import QUALITY

Labelled = list[tuple[Tensor, Tensor]]


def cifar(depth: int) -> tuple[nn.Module, list[Tensor], Labelled]:
    """A network, its calibration batches, and the 5,000 test images."""
    load, nets = reader("load"), reader("nets")
    images, _ = load.cifar10("train", 1600)
    return (
        nets.cifar_resnet(depth),
        list(torch.from_numpy(images).split(100)),
        _labelled(*(torch.from_numpy(a) for a in load.cifar10("test"))),
    )


def imagenet(
    model: nn.Module, inputs: Callable[[Tensor], Tensor] = lambda x: x
) -> tuple[nn.Module, list[Tensor], Labelled]:
    """A network on ImageNet: there are 650 validation images and no training ones.

    150 of them calibrate, without labels, and the other 500 measure: no image does both. `inputs`
    makes what the network wants of images in [-1, 1].
    """
    images, labels = (torch.from_numpy(a) for a in reader("load").imagenet_val())
    images, (use, keep) = inputs(images), drawn()
    return model, list(images[use].split(25)), _labelled(images[keep], labels[keep], 50)


def drawn() -> tuple[Tensor, Tensor]:
    """Which of the 650 images calibrate, and which measure."""
    order = torch.randperm(650, generator=torch.Generator().manual_seed(0))
    return order[:150], order[150:]


def _labelled(images: Tensor, labels: Tensor, size: int = 250) -> Labelled:
    return list(zip(images.split(size), labels.split(size), strict=True))


NETS: dict[str, Callable[[], tuple[nn.Module, list[Tensor], Labelled]]] = {
    "resnet20": lambda: cifar(20),
    "resnet56": lambda: cifar(56),
    "mobilenet": lambda: imagenet(reader("nets").mobilenet_v1()),
    "mobilenet_v2": lambda: imagenet(pretrained.mobilenet_v2(), pretrained.standardised),
    "efficientnet_lite0": lambda: imagenet(pretrained.efficientnet_lite0(), pretrained.centred),
}


TABLE = ("bits <= 4", "bits <= 3", "bits <= 2", "bits <= 1.5", "bpw <= 2",
         "macs <= 70%, bytes <= 13%",
         "macs <= 50%, bytes <= 13%", "macs <= 35%, bytes <= 9%")  # fmt: skip
COLUMNS = {
    "network": "", "budget": "", "tier": "", "rank": "", "bits/weight": ".3f", "with scales": ".3f",
    "file bytes": ",", "% of float32 parameters": ".2f", "% MACs": ".1f", "% BOPs": ".3f",
    "accuracy": ".2f", "drop": ".2f", "seconds": ".0f", "ONNX bytes": ",", "ONNX accuracy": ".2f",
}  # fmt: skip
CIFAR = (
    "CIFAR-10: 1,600 training images without labels to calibrate, the first 5,000 test images to "
    "measure"
)
IMAGENET = (
    "ImageNet: 150 of 650 validation images without labels to calibrate, the other 500 to measure"
)
DATA = {name: CIFAR if name.startswith("resnet") else IMAGENET for name in NETS}


def measure(name: str, args: argparse.Namespace, records: Records, jobs: rabbet.Jobs) -> None:
    """The rows of one network."""
    model, data, test = NETS[name]()
    whole = functools.cache(lambda: rabbet.accuracy(model, test))
    parameters = 4 * sum(p.numel() for p in model.parameters())
    table = Table(records, "compressed", COLUMNS, DATA[name], args.seed)
    table.row(
        {"network": name, "budget": "float32", "tier": None, "rank": None},
        lambda: {
            "bits/weight": 32, "with scales": 32, "file bytes": parameters,
            "% of float32 parameters": 100, "% MACs": 100, "% BOPs": 100, "accuracy": whole(),
        },
    )  # fmt: skip

    def compressed(budget: str, tier: str, rank: str) -> Values:
        start = time.perf_counter()
        method = QUALITY[tier]
        chosen = method if rank == "on" else replace(method, rank=False)
        task = rabbet.Task(data, outputs="scores")
        result = rabbet.compress(model, budget, task, chosen, seed=args.seed, jobs=jobs)
        seconds = time.perf_counter() - start
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "small.safetensors"
            size = result.save(path)
            accuracy = rabbet.accuracy(rabbet.load(path, model), test)
            exported = result.export(Path(folder) / "small.onnx")
            ran = rabbet.accuracy(rabbet.Session(Path(folder) / "small.onnx"), test)
        cost, base, notes = result.cost, result.float_cost, (*result.notes, *exported.notes)
        undone = any(note.startswith("tuning undone") for note in notes)
        return {
            "bits/weight": cost.bits,
            "with scales": (cost.code_bits + cost.scale_bits) / cost.weights,
            "file bytes": size,
            "% of float32 parameters": 100 * size / parameters,
            "% MACs": 100 * cost.macs / base.macs,
            "% BOPs": 100 * cost.bops / base.bops,
            "accuracy": accuracy,
            "drop": whole() - accuracy,
            "seconds": seconds,
            "ONNX bytes": exported.bytes,
            "ONNX accuracy": ran,
            "tuning": "undone" if undone else None,
            "notes": "; ".join(notes),
            "layers": _layers(result),
        }

    for budget, tier, rank in itertools.product(args.budgets, args.tiers, args.ranks):
        settings = {"network": name, "budget": budget, "tier": tier, "rank": rank}
        table.row(settings, functools.partial(compressed, budget, tier, rank))


def _layers(result: rabbet.Result) -> str:
    return " ".join(
        line.body.partition(" |")[0].replace("dense@", "").replace(" ", "") for line in result.plan
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nets", nargs="+", choices=NETS, default=["resnet20", "resnet56"])
    parser.add_argument("--budgets", nargs="+", default=TABLE)
    parser.add_argument("--tiers", nargs="+", choices=list(QUALITY), default=["default"])
    parser.add_argument(
        "--ranks",
        nargs="+",
        choices=["on", "off"],
        default=["on"],
        help="off: dense candidates only",
    )
    parser.add_argument("--jobs", type=int, default=2, help="processes that solve layers")
    parser.add_argument("--seed", type=int, default=0)
    add_options(parser, folder=True)
    args = parser.parse_args()
    print(f"seed {args.seed}; {machine()}")
    records = Records("frontier", args, packages=("onnxruntime", *pretrained.PACKAGES))
    folder = Path(args.resume) if isinstance(args.resume, str) else None
    with ProcessPoolExecutor(
        args.jobs, mp_context=multiprocessing.get_context("spawn")
    ) as executor:
        for name in args.nets:
            measure(name, args, records, rabbet.Jobs(executor, folder=folder))


if __name__ == "__main__":
    main()
