"""The paper's method on whole networks, and the questions it left open: a row per `ADMM` setting.

    python benchmarks/factorisation.py [--nets resnet20 resnet56] [--rates 2 3] [--quick]

Every conv with a kernel of more than one place, except the first, is factorised at one rate;
factors have 4 bits, the rest and all inputs 8. 1,600 unlabelled training images; accuracy of the
written file on 5,000 test images. `EPC, to nearest` is the same pipeline without ADMM; `Joint` is
rabbet's own method, untuned, under the bytes and MACs that the paper's run took. Seconds on two
processes. Seed 0.
"""

import argparse
import multiprocessing
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from common import head, machine, row
from frontier import NETS

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
}
QUICK = ("the paper", "EPC, to nearest")


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
    args = parser.parse_args()
    print(f"seed 0; {machine()}\n")
    head(
        "network",
        "rate",
        "setting",
        "file bytes",
        "% MACs",
        "% BOPs",
        "accuracy",
        "drop",
        "seconds",
        "what was done",
    )
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as executor:
        for name in args.nets:
            model, data, test = NETS[name]()
            whole = rabbet.accuracy(model, test)

            def measure(
                rate: float, label: str, budget: str, method: rabbet.methods.Method
            ) -> rabbet.Result:
                start = time.perf_counter()
                result = rabbet.compress(
                    model,  # noqa: B023
                    budget,
                    data,  # noqa: B023
                    method,
                    jobs=rabbet.Jobs(executor),
                )
                seconds = time.perf_counter() - start
                with tempfile.TemporaryDirectory() as folder:
                    path = Path(folder) / "small.safetensors"
                    size = result.save(path)
                    accuracy = rabbet.accuracy(rabbet.load(path, model), test)  # noqa: B023
                cost, base = result.cost, result.float_cost
                work = f"{100 * cost.macs / base.macs:.1f}", f"{100 * cost.bops / base.bops:.3f}"
                quality = (
                    f"{accuracy:.2f}",
                    f"{whole - accuracy:.2f}",  # noqa: B023
                    f"{seconds:.0f}",
                )
                row(
                    name,  # noqa: B023
                    rate,
                    label,
                    f"{size:,}",
                    *work,
                    *quality,
                    "; ".join(result.notes),
                )
                return result

            for rate in args.rates:
                for label, settings in SETTINGS.items():
                    if args.quick and label not in QUICK:
                        continue
                    result = measure(rate, label, "bytes <= 100%", ADMM(rate=rate, **settings))
                    if label == "the paper":
                        budget = f"bytes <= {result.cost.bytes}, macs <= {result.cost.macs}"
                measure(rate, "Joint", budget, QUALITY["fast"])


if __name__ == "__main__":
    main()
