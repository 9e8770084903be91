r"""Every architecture of the zoo, compressed, written, read, exported and run.

    python benchmarks/architectures.py --only "GRU denoiser" "transformers Mixtral"
    python benchmarks/architectures.py --resume --method "bits only"

Random weights at small sizes, `bytes <= 15%`, quality "fast" ("bits only": without adapters and
factors, several times as fast). Each in a process of its own on one thread, with limits of time and
memory. Left: of the float32 bytes, what no line of the plan covers. Output: relative error of the
outputs against float; of random weights it says only that nothing is broken. The file read back
must answer to the bit; the ONNX file is compared with the compressed network in onnxruntime, and,
where OpenVINO is installed, in OpenVINO. Such files round more to 8 bits than the network in torch,
the outputs of convs above all, and integer sums differ from float ones in the last place, which
turns codes. What that may come to in a network is told beside it: "8 bits", the error of the
outputs when every weight and every input of a layer is rounded to 8 bits and no more, and "float",
that of the compressed network in float32 against itself in float64. Kernels: layers whose weights
onnxruntime multiplies as integers, of those with quantised inputs. A row that stops says where and
why. What a package that is not installed would bring is left out. Seed 0.
"""

import argparse
import contextlib
import copy
import functools
import importlib.util
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import machine
from records import Records, Table, Values, add_options, spread
from torch import Tensor, nn
from zoo import ZOO

import rabbet
from rabbet import Jobs, Joint, Task
from rabbet.core.plan import Plan, Term
from rabbet.data.batches import floating, relative_error
from rabbet.methods import QUALITY

BUDGET = "bytes <= 15%"
METHODS: dict[str, Joint] = {
    "fast": QUALITY["fast"],
    "bits only": replace(QUALITY["fast"], rank=False),
}
BYTE = Term.parse("dense@8c")
PACKAGES = {
    "timm": "timm", "torchvision": "torchvision", "transformers": "transformers",
    "smp": "segmentation_models_pytorch", "diffusers": "diffusers", "yolov5n": "ultralytics",
    "yolov8n": "ultralytics", "yolo11n": "ultralytics",
}  # fmt: skip
COLUMNS = {
    "architecture": "", "method": "", "layers": ",", "stored": ",", "float bytes": ",",
    "left %": ".2f", "bytes %": ".2f", "output error %": ".2f", "read back": "",
    "ONNX bytes": ",", "ONNX error %": ".3f", "kernels": "", "OpenVINO error %": ".3f",
    "8 bits %": ".3f", "float %": ".3f",
    "seconds": ".0f", "peak MiB": ",.0f", "stopped": "",
}  # fmt: skip
NOISE = "noise: random weights and inputs"


def answered(model: nn.Module, task: Task) -> list[Tensor]:
    """What a network answers to the first batch."""
    with torch.no_grad():
        return floating(task.run(model, task.read()[0]))


def apart(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The largest relative error of the outputs, in per cent."""
    each = (relative_error(a, b) for a, b in zip(ours, theirs, strict=True))
    return 100 * max(each, default=0.0)


def measured(name: str, method: str) -> Values:
    """The values of one row, in a process that does nothing else."""
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    begun, values, stage = time.perf_counter(), dict[str, Any](), "making it"
    try:
        model, batches = ZOO[name]()
        task = Task.of(batches)
        stage = "compress"
        jobs = Jobs(progress=lambda *_: None)
        result = rabbet.compress(model, BUDGET, task, METHODS[method], jobs=jobs)
        values |= of_result(result)
        ours, wanted = answered(result.model, task), answered(model, task)
        values["output error %"] = apart(ours, wanted)
        values |= doubts(result, model, task)
        with tempfile.TemporaryDirectory() as folder:
            stage = "save and load"
            path = Path(folder) / "small.safetensors"
            result.save(path)
            again = answered(rabbet.load(path, model), task)
            same = all(torch.equal(a, b) for a, b in zip(again, ours, strict=True))
            values["read back"] = "same" if same else "other"
            for target, column in (("onnx", "ONNX"), ("openvino", "OpenVINO")):
                stage = target
                written = result.export(Path(folder) / f"{target}.onnx", target)
                values[f"{column} error %"] = None if written.error is None else 100 * written.error
                if target == "onnx":
                    values["ONNX bytes"] = written.bytes
                    floats = [note for note in written.notes if "runs in float" in note]
                    acts = sum(line.act is not None for line in result.plan)
                    values["kernels"] = f"{acts - len(floats)} of {acts}"
                    values["notes"] = "; ".join((*result.notes, *written.notes))
    except Exception as e:
        values["stopped"] = f"{stage}: {type(e).__name__}: {' '.join(str(e).split())[:300]}"
    values["seconds"] = time.perf_counter() - begun
    values["peak MiB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return values


def doubts(result: rabbet.Result, model: nn.Module, task: Task) -> Values:
    """What 8 bits do to the network, and the last place of a sum to the compressed one."""
    lines = [replace(line, terms=(BYTE,)) for line in result.plan]
    jobs = Jobs(progress=lambda *_: None)
    eight = rabbet.fit(model, Plan(tuple(lines)), task, METHODS["bits only"], jobs=jobs)
    values = {"8 bits %": apart(answered(eight.model, task), answered(model, task))}
    with contextlib.suppress(Exception):  # some networks make float32 themselves
        exact = answered(copy.deepcopy(result.model).double(), task)
        values["float %"] = apart(answered(result.model, task), exact)
    return values


def of_result(result: rabbet.Result) -> Values:
    """What a result says of a network."""
    survey, whole = result.survey, result.float_cost.bytes
    left = sorted(survey.left, key=lambda x: -x.bytes)
    return {
        "layers": sum(site.runs for site in survey),
        "stored": sum(not site.runs for site in survey),
        "float bytes": whole,
        "left %": 100 * sum(x.bytes for x in left) / whole,
        "bytes %": 100 * result.cost.bytes / whole,
        "left": "; ".join(f"{x.name} {x.bytes}: {x.reason}" for x in left[:3]),
    }


def in_a_process(row: Values, seconds: int, memory: int) -> Values:
    """`measured`, in a fresh process on one thread, stopped where it takes too much."""
    command = [sys.executable, __file__, "--measure", json.dumps(row)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    limit = functools.partial(resource.setrlimit, resource.RLIMIT_AS, (memory * 2**30,) * 2)
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment,
            timeout=seconds, preexec_fn=limit, check=False,
        )  # fmt: skip
        values: Values = json.loads(done.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        values = {"stopped": f"not done after {seconds} seconds", "seconds": seconds}
    except (IndexError, ValueError):
        values = {"stopped": f"the process died ({done.returncode})"}
    return values


def there(name: str) -> bool:
    """Whether the package that brings an architecture is installed."""
    package = PACKAGES.get(name.partition(" ")[0])
    return package is None or importlib.util.find_spec(package) is not None


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--method", choices=METHODS, default="fast")
    parser.add_argument("--limit", type=int, default=900, help="seconds for each")
    parser.add_argument("--memory", type=int, default=12, help="GiB for each")
    parser.add_argument("--measure", type=json.loads, help=argparse.SUPPRESS)
    add_options(parser, jobs=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.measure is not None:
        print(json.dumps(measured(args.measure["architecture"], args.measure["method"])))
        return
    spread(args)
    print(f"seed 0; {machine()}")
    packages = ("timm", "torchvision", "transformers", "diffusers", "onnxruntime", "openvino")
    records = Records("architectures", args, packages=packages)
    table = Table(records, "compressed", COLUMNS, NOISE)
    for name in filter(there, ZOO):
        row = {"architecture": name, "method": args.method}
        table.row(row, functools.partial(in_a_process, row, args.limit, args.memory))


if __name__ == "__main__":
    main()
