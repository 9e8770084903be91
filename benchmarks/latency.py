r"""How fast exported files are in onnxruntime and OpenVINO, against float and other tools' exports.

    # ResNet-20, ResNet-18, MobileNet v1, MiniLM
    python benchmarks/latency.py
    # their weights come with packages: see pretrained.py
    python benchmarks/latency.py --nets mobilenet_v2 efficientnet_lite0
    python benchmarks/latency.py --nets minilm --threads 1
    python benchmarks/latency.py --nets resnet20 resnet18 --predict \
        --grids 8c tucker@45 lowrank@45 cp@45
    python benchmarks/latency.py --nets resnet18 --grids 8c tucker@45 lowrank@45 cp@45 tucker@25

All files of a network are timed in turn in one run, one example at a time after warm-up, on all
cores unless told otherwise: medians, 95th percentiles, and the ratio to float onnxruntime. Peers:
onnxruntime's static quantiser (QDQ, per channel, uint8 activations, int8 weights, after its own
pre-processing), its dynamic one for transformers, NNCF's post-training int8 through OpenVINO with
the precision pinned to float32, torch.compile. rabbet's weights are rounded to nearest here:
rounding changes accuracy, not speed.
"""

import argparse
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pretrained
import torch
from common import machine, reader
from records import Group, Records, Table, Values, add_options, told
from shapes import resnet18 as shape_of_resnet18
from torch import Tensor, nn

import rabbet
from rabbet.calibrate.ranges import calibrate_ranges
from rabbet.choose.latency import Stopwatch
from rabbet.core.layout import factor_shapes
from rabbet.core.plan import LayerPlan, Term
from rabbet.data.batches import tensors
from rabbet.data.task import Task
from rabbet.export.base import Parcel
from rabbet.export.onnx.write import write_float, write_onnx, write_openvino
from rabbet.forms import Dense
from rabbet.grids.grid import Grid, Quantised
from rabbet.layers import Site
from rabbet.model.build import build
from rabbet.runtime.bench import cpu, plain_int8
from rabbet.runtime.session import KERNELS, kernels
from rabbet.workpiece import Workpiece

COLUMNS = {
    "network": "", "input": "", "what": "", "median ms": ".3f", "p95 ms": ".3f",
    "against float": ".2f", "against dense int8": ".2f", "% MACs": ".1f", "file bytes": ",",
    "integer kernels": "",
}  # fmt: skip
PREDICTED = {
    "network": "", "weights": "", "ms predicted": ".3f", "ms measured": ".3f",
    "% of the measured, too much": "+.0f",
}  # fmt: skip
DATA = {
    "resnet20": "CIFAR-10 training images to calibrate",
    "resnet56": "CIFAR-10 training images to calibrate",
    "resnet18": "noise: random weights and images, for speed alone",
    "mobilenet": "ImageNet validation images to calibrate",
    "mobilenet_v2": "ImageNet validation images to calibrate",
    "efficientnet_lite0": "ImageNet validation images to calibrate",
    "minilm": "random tokens",
}
Run = Callable[[], Any]
Make = Callable[[Any], Run]


SHARES: dict[str, float] = {}  # in per cent of the MACs, by what the weights are


@dataclass(frozen=True)
class Case:
    """A network, batches to calibrate on, and the batches of one example that are timed."""

    model: nn.Module
    data: list[Any]
    timed: dict[str, Any]


def images(model: nn.Module, data: list[Tensor]) -> Case:
    """A case that is timed on one image."""
    return Case(model, data, {"1 image": data[0][:1]})


def cifar(depth: int) -> Case:
    """A CIFAR-10 ResNet, calibrated on training images."""
    pixels, _ = reader("load").cifar10("train", 128)
    return images(reader("nets").cifar_resnet(depth), list(torch.from_numpy(pixels).split(32)))


def resnet18() -> Case:
    """ResNet-18 at ImageNet's size, calibrated on noise: only its speed means anything."""
    torch.manual_seed(0)
    return images(shape_of_resnet18(), [torch.randn(4, 3, 224, 224) for _ in range(8)])


def imagenet(model: nn.Module, inputs: Callable[[Tensor], Tensor] = lambda x: x) -> Case:
    """A network on images [n, 3, h, w] in [-1, 1]; `inputs` makes what it wants of them."""
    pixels, _ = reader("load").imagenet_val(limit=64)
    return images(model, list(inputs(torch.from_numpy(pixels)).split(16)))


def minilm() -> Case:
    """A six-layer BERT encoder on random tokens."""
    g = torch.Generator().manual_seed(0)

    def batch(count: int, length: int) -> dict[str, Tensor]:
        ids = torch.randint(1000, 30000, (count, length), generator=g)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    timed = {f"{n} tokens": batch(1, n) for n in (32, 128)}
    return Case(reader("nets").minilm(), [batch(4, n) for n in (16, 24, 32)], timed)


NETS: dict[str, Callable[[], Case]] = {
    "resnet20": lambda: cifar(20),
    "resnet56": lambda: cifar(56),
    "resnet18": resnet18,
    "mobilenet": lambda: imagenet(reader("nets").mobilenet_v1()),
    "mobilenet_v2": lambda: imagenet(pretrained.mobilenet_v2(), pretrained.standardised),
    "efficientnet_lite0": lambda: imagenet(pretrained.efficientnet_lite0(), pretrained.centred),
    "minilm": minilm,
}


def uniform(case: Case, kind: str) -> tuple[Workpiece, rabbet.Plan, nn.Module]:
    """A network with every weight on one grid, or in one form, and every input in 8 bits."""
    piece = Workpiece.of(case.model, Task.of(case.data), rabbet.Jobs())
    lines = (LayerPlan(s.name, (term(s, kind),), 8 if s.multiplies else None) for s in piece.survey)
    plan = rabbet.Plan(tuple(lines))
    student = build(piece.model, plan, piece.survey, numbers(piece, plan) if "@" in kind else None)
    calibrate_ranges(student, piece.task)
    return piece, plan, student


def export(case: Case, kind: str, folder: Path) -> dict[str, Path]:
    """Such a network, written for both runtimes."""
    piece, plan, student = uniform(case, kind)
    parcel = Parcel(student, plan, piece.survey, piece.rest(plan), piece.task)
    paths = {"onnx": folder / f"{kind}.onnx", "openvino": folder / f"{kind}.openvino.onnx"}
    for note in (
        *write_onnx(parcel, paths["onnx"]).notes,
        *write_openvino(parcel, paths["openvino"]).notes,
    ):
        print(note, file=sys.stderr)
    SHARES[kind] = 100 * piece.cost(plan).macs / piece.float_cost.macs
    return paths


def term(site: Site, kind: str) -> Term:
    """The term of a layer: `8c` is dense on that grid.

    `cp@45`: kernels as `Joint` would offer them at 45 % of their MACs, in 8 bits; the first layer
    and kernels of one place stay dense.
    """
    form, _, share = kind.partition("@")
    if share and math.prod(site.shape[2:]) > 1 and site.shape[1] > 3:
        offered = rabbet.Joint(
            grids=("8c",), adapters=(), forms=(form,), shares=(float(share) / 100,)
        ).menu(site)
        return offered[-1][0]
    return Term(Dense(), Grid.parse("8c" if share else kind))


def numbers(piece: Workpiece, plan: rabbet.Plan) -> dict[str, list[list[Quantised]]]:
    """Normal factors that keep the scale of activations: speed does not depend on them."""
    generator = torch.Generator().manual_seed(0)

    def drawn(shape: tuple[int, ...], grid: Grid) -> Quantised:
        gain = math.sqrt(2 / max(1, math.prod(shape[1:])))
        return Quantised.nearest(gain * torch.randn(shape, generator=generator), grid)

    return {
        line.name: [
            [drawn(s, t.grid) for s in factor_shapes(piece.survey[line.name], t)]
            for t in line.terms
        ]
        for line in plan
    }


def onnxruntime_run(path: Path, batch: Any, threads: int) -> Run:
    """A run in onnxruntime: one call from Python, with arrays that are prepared beforehand."""
    session = rabbet.Session(path, threads)
    feed = session.feed(batch)
    return lambda: session.run(feed)


def openvino_run(path: Path, batch: Any, threads: int) -> Run:
    """A run in OpenVINO, pinned to float32: by default, some processors run "float" in bfloat16."""
    import openvino

    settings = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    settings |= {"INFERENCE_NUM_THREADS": threads} if threads else {}
    compiled = openvino.Core().compile_model(path, "CPU", settings)
    request = compiled.create_infer_request()
    names = [i.get_any_name() for i in compiled.inputs]
    feed = dict(zip(names, (t.numpy() for t in tensors(batch)), strict=True))
    return lambda: request.infer(feed)


def torch_run(case: Case, batch: Any) -> Run:
    """A run of torch.compile with its default settings."""
    compiled, task = torch.compile(case.model), Task.of([batch])

    def run() -> None:
        with torch.no_grad():
            task.forward(compiled, batch)

    run()  # compiles
    return run


def nncf_file(case: Case, path: Path, folder: Path) -> Path:
    """NNCF's post-training int8 of the float network, on the same batches."""
    import nncf
    import openvino

    session, axes = rabbet.Session(path, 1), Task.of(case.data).examples
    data = nncf.Dataset([session.feed(axes.first(batch)) for batch in case.data])
    target = folder / "nncf.xml"
    openvino.save_model(
        nncf.quantize(openvino.Core().read_model(path), data), target, compress_to_fp16=False
    )
    return target


def dynamic_int8(path: Path, folder: Path) -> Path:
    """Onnxruntime's dynamic quantiser, which it recommends for transformers."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    target = folder / "dynamic.onnx"
    quantize_dynamic(path, target, weight_type=QuantType.QInt8, per_channel=True)
    return target


def entries(
    name: str, case: Case, grids: list[str], threads: int, folder: Path
) -> dict[str, tuple[Path | None, Make]]:
    """What is timed: by label, the file if there is one, and how to make a run on a batch."""
    whole = folder / "float.onnx"
    write_float(case.model, Task.of(case.data), whole)
    older = folder / "older.onnx"  # onnxruntime's quantisers do not know the attention of opset 23
    write_float(case.model, Task.of(case.data), older, 21)
    runtime, vino = (
        partial(onnxruntime_run, threads=threads),
        partial(openvino_run, threads=threads),
    )
    makers: dict[str, tuple[Callable[[], Path | None], Callable[..., Run]]] = {
        "float onnxruntime": (lambda: whole, runtime)
    }
    files = {grid: export(case, grid, folder) for grid in grids}
    for grid, paths in files.items():
        makers[f"rabbet {grid} onnxruntime"] = (partial(paths.get, "onnx"), runtime)
    makers["onnxruntime static int8"] = (lambda: plain_int8(older, case.data, folder), runtime)
    if name == "minilm":
        makers["onnxruntime dynamic int8"] = (lambda: dynamic_int8(older, folder), runtime)
    makers["float OpenVINO"] = (lambda: whole, vino)
    for grid, paths in files.items():
        makers[f"rabbet {grid} OpenVINO"] = (partial(paths.get, "openvino"), vino)
    makers["NNCF int8 OpenVINO"] = (lambda: nncf_file(case, whole, folder), vino)
    makers["float torch.compile"] = (lambda: None, lambda _, batch: torch_run(case, batch))
    usable: dict[str, tuple[Path | None, Make]] = {}
    for label, (file, run) in makers.items():
        try:
            path = file()
            run(path, next(iter(case.timed.values())))()
            usable[label] = path, partial(run, path)
        # another tool may raise anything; a missing or failing one is reported
        except Exception as e:
            print(
                f"{label}: left out: {type(e).__name__}: {' '.join(str(e).split())[:300]}",
                file=sys.stderr,
            )
    return usable


def timed(runs: dict[str, Run], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of every run: in turn, a few at a time, the order rotated by one each round."""
    times: dict[str, list[float]] = {label: [] for label in runs}
    for run in runs.values():
        for _ in range(5):
            run()
    labels = list(runs)
    for k in range(rounds):
        for label in labels[k % len(labels) :] + labels[: k % len(labels)]:
            runs[label]()  # brings the caches back
            for _ in range(3):
                start = time.perf_counter()
                runs[label]()
                times[label].append(1e3 * (time.perf_counter() - start))
    return times


def measure(name: str, args: argparse.Namespace, own: Values) -> Group:
    """The rows of one network, all timed in one run."""
    case, found = NETS[name](), []
    with tempfile.TemporaryDirectory() as folder:
        usable = entries(name, case, args.grids, args.threads, Path(folder))
        for label, batch in case.timed.items():
            times = timed({what: make(batch) for what, (_, make) in usable.items()}, args.rounds)
            values = report(times, {what: path for what, (path, _) in usable.items()})
            for what, row in values.items():
                _, _, runtime = what.rpartition(" ")
                weights = what.split()[1] if what.startswith("rabbet ") else None
                if what.startswith("onnxruntime"):
                    runtime = "onnxruntime"
                settings = {"network": name, "input": label, "what": what, "weights": weights}
                share = SHARES.get(str(weights))
                found.append((settings | {"runtime": runtime} | own, row | {"% MACs": share}))
    return found


def predict(name: str, kind: str) -> Values:
    """The predicted time that a latency budget limits, beside the time of the real file.

    The prediction is the sum of layers timed alone.
    """
    case = NETS[name]()
    with tempfile.TemporaryDirectory() as cache:
        os.environ["RABBET_CACHE"] = cache  # without earlier timings
        piece, plan, student = uniform(case, kind)
        piece.clock = Stopwatch(piece)
        guess, actual = piece.cost(plan).time, piece.clock.network(student)
        return {
            "ms predicted": guess / 1e6,
            "ms measured": actual / 1e6,
            "% of the measured, too much": 100 * (guess / actual - 1),
        }


def report(times: dict[str, list[float]], files: dict[str, Path | None]) -> dict[str, Values]:
    """For each run: median, 95th percentile, speed-up, bytes, share of integer kernels."""
    base = statistics.median(times["float onnxruntime"])
    dense = {
        r: statistics.median(t)
        for r in ("onnxruntime", "OpenVINO")
        if (t := times.get(f"rabbet 8c {r}"))
    }
    found = {}
    for what, spent in times.items():
        path, median = files[what], statistics.median(spent)
        path = path if path is not None and path.suffix == ".onnx" else None
        ran = list(kernels(path).values()) if path else []
        own = dense.get(what.rpartition(" ")[2])
        found[what] = {
            "median ms": median,
            "p95 ms": float(np.percentile(spent, 95)),
            "against float": base / median,
            "against dense int8": own / median if own and what.startswith("rabbet") else None,
            "file bytes": path.stat().st_size if path else None,
            "integer kernels": f"{sum(k in KERNELS for k in ran)} of {len(ran)}" if path else None,
        }
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--nets", nargs="+", choices=NETS, default=["resnet20", "resnet18", "mobilenet", "minilm"]
    )
    parser.add_argument(
        "--grids",
        nargs="+",
        default=["8c", "4c", "2hc"],
        help="grids of dense weights, or form@share of the MACs",
    )
    parser.add_argument("--threads", type=int, default=0, help="0: all cores")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument(
        "--predict", action="store_true", help="only compare predicted with measured latency"
    )
    add_options(parser)
    args = parser.parse_args()
    facts = "; ".join(f"{k}: {v}" for k, v in cpu().items())
    print(f"{machine()}; {facts}; onnxruntime with {args.threads or 'all'} threads")
    records = Records(
        "latency", args, packages=("onnxruntime", "openvino", "nncf", *pretrained.PACKAGES)
    )
    others = told(parser, args, "threads", "rounds", "grids")
    own = {name: others.get(name) for name in ("threads", "rounds")}
    own["grids"] = " ".join(others["grids"]) if "grids" in others else None  # timed in turn
    for name in args.nets:
        if args.predict:
            table = Table(records, "predicted", PREDICTED, DATA[name])
            for kind in args.grids:
                table.row({"network": name, "weights": kind}, partial(predict, name, kind))
        else:
            table = Table(records, "latency", COLUMNS, DATA[name])
            table.rows({"network": name} | own, partial(measure, name, args, own))


if __name__ == "__main__":
    main()
