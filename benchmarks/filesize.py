"""A budget on the exported file: what was predicted, what was written, and the native file.

    python benchmarks/filesize.py [--nets digits resnet20 bert heads] [--targets onnx openvino]

Every network is compressed by `Joint` (quality "fast") so that the file for the target takes at
most a share of the float32 network. `predicted` is what the layers alone say of the plan, before
any file of it is written; `written` is the length of the file. `resnet20` needs the data folder.
"""

import argparse
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import reader
from records import Records, Table, Values, add_options
from torch import Tensor, nn

import rabbet
from rabbet import demo
from rabbet._bench import opened

COLUMNS = {
    "network": "",
    "target": "",
    "budget": "",
    "float32 bytes": ",",
    "allowed": ",",
    "predicted": ",",
    "written": ",",
    "% of float32": ".2f",
    "native": ",",
    "native, %": ".2f",
}
Made = tuple[nn.Module, list[Any]]


class Heads(nn.Module):
    """Convs with two outputs: a map and scores."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 48, 3, 2, 1), nn.ReLU()
        )
        self.map, self.scores = nn.Conv2d(48, 8, 1), nn.Linear(48, 10)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """A map [n, 8, h, w] and scores [n, 10] of images [n, 3, 2 h, 2 w]."""
        y = self.body(x)
        return self.map(y), self.scores(y.mean((2, 3)))


def _digits() -> Made:
    return demo.model(), list(demo.calibration())


def _resnet20() -> Made:
    images, _ = reader("load").cifar10("train", 128)
    return reader("nets").cifar_resnet(20), list(torch.from_numpy(images).split(64))


def _bert() -> Made:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(vocab_size=1000, hidden_size=64, num_hidden_layers=2,
                        num_attention_heads=2, intermediate_size=128,
                        max_position_embeddings=64)  # fmt: skip
    ids = [torch.randint(1000, (8, n)) for n in (12, 20)]
    batches = [{"input_ids": i, "attention_mask": torch.ones_like(i)} for i in ids]
    return BertModel(config).eval(), batches


def _heads() -> Made:
    torch.manual_seed(0)
    return Heads().eval(), [torch.rand(16, 3, 16, 16) for _ in range(2)]


NETS: dict[str, tuple[Callable[[], Made], str, str]] = {
    "digits": (_digits, "15%", "digits of scikit-learn"),
    "resnet20": (_resnet20, "10%", "CIFAR-10"),
    "bert": (_bert, "20%", "random tokens"),
    "heads": (_heads, "25%", "random images"),
}
"""What makes a network with its batches, the share that its file may take, and the data."""


def measure(name: str, target: str) -> Values:
    """One network under its budget."""
    model, batches = NETS[name][0]()
    jobs, task = rabbet.Jobs(), rabbet.Task(batches)
    budget = f"{target} <= {NETS[name][1]}"
    result = rabbet.compress(model, budget, task, quality="fast", jobs=jobs)
    assert result.budget is not None
    piece = opened(model, result.budget.metrics, task)
    predicted = piece.gauges[target].network(result.plan)
    with tempfile.TemporaryDirectory() as folder:
        written = result.export(Path(folder) / "small.onnx", target).bytes
    whole = result.float_cost
    return {
        "float32 bytes": whole.bytes,
        "allowed": result.budget.limits[0].amount(whole),
        "predicted": predicted,
        "written": written,
        "% of float32": 100 * written / whole.bytes,
        "native": result.cost.bytes,
        "native, %": 100 * result.cost.bytes / whole.bytes,
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS))
    parser.add_argument("--targets", nargs="+", default=["onnx", "openvino"])
    add_options(parser)
    args = parser.parse_args()
    records = Records("filesize", args, packages=("onnx", "onnxruntime", "onnxscript", "openvino"))
    for name in args.nets:
        table = Table(records, "filesize", COLUMNS, NETS[name][2])
        for target in args.targets:
            settings = {"network": name, "target": target, "budget": NETS[name][1]}
            table.row(settings, partial(measure, name, target))


if __name__ == "__main__":
    main()
