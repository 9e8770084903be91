"""The paper's method on whole networks, and the questions it left open: a row per `ADMM` setting.

    python benchmarks/factorisation.py [--nets resnet20 resnet56] [--rates 2 3] [--quick]

Every conv with a kernel of more than one place, except the first and those in groups, is factorised
at one rate; factors have 4 bits, the rest and all inputs 8. 1,600 unlabelled training images;
accuracy of the written file on 5,000 test images (ImageNet: 150 and 500 of its validation images).
`EPC, to nearest` is the same pipeline without ADMM; `Joint` is rabbet's own method, untuned, under
the bytes and MACs that the paper's run took. Seconds on `--jobs` processes. Seed 0.

MobileNets have no such kernel: their convs are depthwise or of one place. What the settings are
about does not arise there, but for the statistics of BatchNorms.
"""

import argparse
import functools
import multiprocessing
import tempfile
import time
from concurrent.futures import Executor, ProcessPoolExecutor
from functools import partial
from pathlib import Path

import pretrained
from common import machine
from frontier import DATA, NETS
from records import Records, Table, Values, add_options

import rabbet
from rabbet import ADMM
from rabbet.methods import QUALITY

SETTINGS: dict[str, dict[str, object]] = {
    "the paper": {},
    "EPC, to nearest": {"solver": "nearest"},
    "EPC with slack": {"slack": None},
    "EPC with slack, to nearest": {"slack": None, "solver": "nearest"},
    "EPC with slack, rounded in turn": {"slack": None, "solver": "feedback"},
    "a scale per channel": {"scales": "channel"},
    "start: ALS": {"start": "als"},
    "start: singular vectors": {"start": "svd"},
    "start: random": {"start": "random"},
    "Tucker-2": {"form": "tucker", "start": "svd"},
    "8 bits": {"bits": 8},
    "BatchNorms left alone": {"norms": 0},
}
QUICK = ("the paper", "EPC, to nearest")
DENSE = ("the paper", "BatchNorms left alone")
LOOSE = "bytes <= 100%"  # the method fixes bits and ranks


COLUMNS = {
    "network": "", "rate": "", "setting": "", "file bytes": ",", "% MACs": ".1f", "% BOPs": ".3f",
    "accuracy": ".2f", "drop": ".2f", "seconds": ".0f", "notes": "",
}  # fmt: skip


def measure(name: str, args: argparse.Namespace, records: Records, executor: Executor) -> None:
    """The rows of one network."""
    model, data, test = NETS[name]()
    whole = functools.cache(lambda: rabbet.accuracy(model, test))
    table = Table(records, "settings", COLUMNS, DATA[name])

    def fitted(budget: str, method: rabbet.methods.Method) -> Values:
        start = time.perf_counter()
        result = rabbet.compress(model, budget, data, method, jobs=rabbet.Jobs(executor))
        seconds = time.perf_counter() - start
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "small.safetensors"
            size = result.save(path)
            accuracy = rabbet.accuracy(rabbet.load(path, model), test)
        cost, base = result.cost, result.float_cost
        return {
            "file bytes": size,
            "% MACs": 100 * cost.macs / base.macs,
            "% BOPs": 100 * cost.bops / base.bops,
            "accuracy": accuracy,
            "drop": whole() - accuracy,
            "seconds": seconds,
            "notes": "; ".join(result.notes),
            "macs": cost.macs,
        }

    def as_large(rate: float, paper: Values | None) -> Values:
        if paper is None:  # `--only` left it out
            plan = rabbet.plan(model, LOOSE, data, ADMM(rate=rate))
            cost = rabbet.price(model, plan, data)
            paper = {"file bytes": cost.bytes, "macs": cost.macs}
        budget = f"bytes <= {paper['file bytes']}, macs <= {paper['macs']}"
        return fitted(budget, QUALITY["fast"])

    for rate in args.rates:
        found = {}
        labels = QUICK if args.quick else tuple(SETTINGS)
        kernels = any(line.terms[0].form.rank for line in rabbet.plan(model, LOOSE, data, ADMM()))
        for label, settings in SETTINGS.items():
            if label in (labels if kernels else DENSE):
                row = {"network": name, "rate": rate, "setting": label}
                measured = partial(fitted, LOOSE, ADMM(rate=rate, **settings))
                found[label] = table.row(row, measured)
        row = {"network": name, "rate": rate, "setting": "Joint"}
        table.row(row, partial(as_large, rate, found["the paper"]))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nets", nargs="+", choices=NETS, default=["resnet20", "resnet56"])
    parser.add_argument("--rates", nargs="+", type=float, default=[2.0])
    parser.add_argument(
        "--quick", action="store_true", help="only with and without ADMM, and Joint"
    )
    parser.add_argument("--jobs", type=int, default=2, help="processes that solve layers")
    add_options(parser)
    args = parser.parse_args()
    print(f"seed 0; {machine()}")
    records = Records("factorisation", args, packages=tuple(pretrained.PACKAGES))
    with ProcessPoolExecutor(
        args.jobs, mp_context=multiprocessing.get_context("spawn")
    ) as executor:
        for name in args.nets:
            measure(name, args, records, executor)


if __name__ == "__main__":
    main()
