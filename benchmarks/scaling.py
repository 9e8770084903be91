r"""How time and memory grow with the size of a layer and of a network.

    # the two smallest rows of each kind; without --only the largest take hours and 20 GB
    python benchmarks/scaling.py --only "linear, 512" "linear, 1024" "conv, 64" "conv, 128"
    python benchmarks/scaling.py --resume       # what is not there yet

Each row is a process of its own on one thread. Processor and wall seconds are those of the call,
from the network in memory to the compressed one. Peak memory is that of the process, network and
data included, above what it had after its imports. "fast" and "default" are those qualities; "bits
only" is fast without adapters and without factors; "one pass" is what the others are held against:
the inputs measured and every layer rounded once, to 4 bits a row with error feedback (GPTQ).
Networks but ResNet-56 have random weights and data, so nothing is said of accuracy. Seed 0.

At the end: how many times longer the next size takes, the power of the size that this is, and how
many times the memory, for all rows of this commit.
"""

import argparse
import functools
import json
import math
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import shapes
import torch
from common import machine
from frontier import cifar
from records import Records, Table, Values, add_options, spread
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

import rabbet
from rabbet import Jobs, Joint, Task
from rabbet.grids.grid import Grid
from rabbet.jobs import one_thread
from rabbet.methods import QUALITY
from rabbet.solve.metric import Metric
from rabbet.solve.rounding import feedback, start
from rabbet.workpiece import Workpiece

BUDGET = "bits <= 2"
ONE = "one pass"
METHODS: dict[str, Joint] = {
    "fast": QUALITY["fast"],
    "default": QUALITY["default"],
    "bits only": replace(QUALITY["fast"], rank=False),
}
COLUMNS = {
    "network": "", "size": "", "method": "", "layers": ",", "weights": ",",
    "processor seconds": ".2f", "wall seconds": ".2f", "peak MiB": ",.0f",
}  # fmt: skip
GROWTH = {
    "network": "", "method": "", "from": "", "to": "", "times the processor seconds": ".2f",
    "power of the size": ".2f", "times the memory": ".2f",
}  # fmt: skip
NOISE = "noise: random weights and inputs, for time and memory alone"
CIFAR = "CIFAR-10: 1,600 training images without labels"


# Networks with their data


def linear(size: int) -> tuple[nn.Module, Task]:
    """A linear, and twice as many examples as it has inputs."""
    return nn.Linear(size, size), Task.of(list(torch.randn(8, size // 4, size)))


def conv(size: int) -> tuple[nn.Module, Task]:
    """A 3x3 conv over images of 16 x 16."""
    return nn.Conv2d(size, size, 3, padding=1), Task.of(list(torch.randn(8, 32, size, 16, 16)))


def small(size: int) -> tuple[nn.Module, Task]:
    """So many linears of 32 x 32."""
    return shapes.Small(size).eval(), Task.of(list(torch.randn(8, 64, 32)))


def images(make: Callable[[], nn.Module], count: int, _: None) -> tuple[nn.Module, Task]:
    """A network for images of 224 x 224."""
    return make(), Task.of(list(torch.randn(count, 3, 224, 224).split(16)))


def resnet56(_: None) -> tuple[nn.Module, Task]:
    """The trained network, and images that it was trained on."""
    model, data, _test = cifar(56)
    return model, Task.of(data)


def bert(_: None) -> tuple[nn.Module, Task]:
    """BERT-base with a head of two classes, and 64 sentences of 128 tokens."""

    def batch() -> dict[str, Tensor]:
        ids = torch.randint(1000, 30000, (8, 128))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    model = BertForSequenceClassification(BertConfig()).eval()
    return model, Task([batch() for _ in range(8)], forward=lambda m, b: m(**b).logits)


NETS: dict[str, Callable[[Any], tuple[nn.Module, Task]]] = {
    "linear": linear,
    "conv": conv,
    "small layers": small,
    "resnet56": resnet56,
    "resnet18": functools.partial(images, shapes.resnet18, 64),
    "mobilenet_v2": functools.partial(images, shapes.mobilenet_v2, 150),
    "resnet50": functools.partial(images, shapes.resnet50, 64),
    "vit_b16": functools.partial(images, shapes.vit, 64),
    "bert_base": bert,
}


def settings() -> Iterator[Values]:
    """What the rows are, the shorter ones of a network first."""
    plan: list[tuple[str, tuple[int | None, ...], tuple[str, ...]]] = [
        ("linear", (512, 1024, 2048, 4096), (ONE, "fast")),
        ("conv", (64, 128, 256, 512), (ONE, "bits only")),
        ("small layers", (50, 200, 800), (ONE, "bits only", "fast")),
        ("resnet56", (None,), (ONE, "fast", "default")),
        *((net, (None,), (ONE, "fast")) for net in ("resnet18", "mobilenet_v2", "resnet50")),
        *((net, (None,), (ONE, "fast")) for net in ("vit_b16", "bert_base")),
    ]
    for network, sizes, methods in plan:
        for size in sizes:
            yield from ({"network": network, "size": size, "method": m} for m in methods)


# Measuring one row


@dataclass
class Stages:
    """Processor seconds by stage, as progress is reported."""

    spent: dict[str, float] = field(default_factory=dict)
    last: float = 0.0

    def __call__(self, stage: str, _: int, __: int) -> None:
        """Count what was spent since the last report for this stage."""
        now, name = processor_seconds(), stage.partition(": ")[0]
        self.spent[name] = self.spent.get(name, 0.0) + now - self.last
        self.last = now


def processor_seconds() -> float:
    """Of this process and of those that it has waited for."""
    each = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in each)


def peak() -> float | None:
    """The most memory that this process has held, in MiB; None where the system does not tell.

    `ru_maxrss` would not do: a process begins with that of the one which started it.
    """
    path = Path("/proc/self/status")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((int(x.split()[1]) / 1024 for x in lines if x.startswith("VmHWM:")), None)


def one_pass(piece: Workpiece) -> None:
    """Every layer rounded once, to 4 bits a row, in the metric of its inputs."""
    grid, moments = Grid.parse("4c"), piece.moments()
    with one_thread(), torch.no_grad():
        for site in piece.survey:
            rows = site.matrix(piece.weight(site))
            if site.name in moments:
                metric = Metric(moments[site.name])
                feedback(start(rows, grid, metric), metric)
            else:  # a table, which has no inputs: to nearest
                start(rows, grid, Metric.plain(site.groups, site.columns))
            piece.jobs.progress("rounding", 1, 1)


def measured(network: str, size: int | None, method: str) -> Values:
    """The values of one row, in a process that does nothing else."""
    before = peak()
    torch.manual_seed(0)
    model, task = NETS[network](size)
    stages = Stages(last=processor_seconds())
    spent, begun = stages.last, time.perf_counter()
    if method == ONE:
        piece = Workpiece.of(model, task, Jobs(progress=stages))
        one_pass(piece)
        found = {"layers": len(piece.survey.sites), "weights": sum(s.numel for s in piece.survey)}
    else:
        jobs = Jobs(progress=stages)
        result = rabbet.compress(model, BUDGET, task, METHODS[method], jobs=jobs)
        found = {"layers": len(result.plan), "weights": result.cost.weights}
    seconds, after = time.perf_counter() - begun, peak()
    stages("the rest", 1, 1)
    return found | {
        "processor seconds": processor_seconds() - spent,
        "wall seconds": seconds,
        "peak MiB": None if after is None or before is None else after - before,
        "stages": ", ".join(f"{name} {taken:.1f}" for name, taken in stages.spent.items()),
    }


def in_a_process(row: Values) -> Values:
    """`measured`, in a fresh process on one thread."""
    command = [sys.executable, __file__, "--measure", json.dumps(row)]
    done = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    values: Values = json.loads(done.stdout.splitlines()[-1])
    return values


# What the next size takes


def growth(records: Records) -> Iterator[tuple[Values, Values, str]]:
    """Each stored row against that of the next smaller size, both of this commit."""
    here = records.commit, records.changed
    stored = [
        row["settings"] | row["values"]
        for row in records.read()["rows"]
        if row["table"] == "compressed" and (row["commit"], row["changed"]) == here
    ]
    sized = sorted((row for row in stored if row["size"]), key=lambda row: row["size"])
    last: dict[tuple[str, str], Values] = {}
    for row in sized:
        network, size, method = row["network"], row["size"], row["method"]
        less = last.get((network, method))
        last[network, method] = row
        if less is not None:
            pair = {"network": network, "method": method, "from": less["size"], "to": size}
            times = {name: _times(row, less, name) for name in ("processor seconds", "peak MiB")}
            power = math.log(times["processor seconds"] or 1.0) / math.log(size / less["size"])
            yield (
                pair,
                {
                    "times the processor seconds": times["processor seconds"],
                    "power of the size": power if times["processor seconds"] else None,
                    "times the memory": times["peak MiB"],
                },
                f"{network}, {size}, {method}",
            )


def _times(row: Values, less: Values, name: str) -> float | None:
    return row[name] / less[name] if row[name] and less[name] else None


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--measure", type=json.loads, help=argparse.SUPPRESS)
    add_options(parser, jobs=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.measure is not None:
        print(json.dumps(measured(**args.measure)))
        return
    spread(args)
    print(f"seed 0; {machine()}")
    records = Records("scaling", args, packages=("transformers",))
    noise = Table(records, "compressed", COLUMNS, NOISE)
    real = Table(records, "compressed", COLUMNS, CIFAR)
    for row in settings():
        table = real if row["network"] == "resnet56" else noise
        table.row(row, functools.partial(in_a_process, row))
    table = Table(records, "growth", GROWTH, NOISE)
    for pair, values, label in list(growth(records)):
        table.row(pair, lambda values=values: values, label)


if __name__ == "__main__":
    main()
