"""The demo network under tighter and tighter budgets: where accuracy begins to go.

    python benchmarks/digits.py

What `rabbet compress --budget ...` does without a network, at the default quality. Accuracy is that
of the written file, loaded again, on the 450 held-out images.
"""

import argparse
import tempfile
from functools import partial
from pathlib import Path

from records import Records, Table, Values, add_options

import rabbet
from rabbet import demo

BUDGETS = ("bytes <= 10%", "bytes <= 6%", "bytes <= 5.2%", "bytes <= 5%")


def measured(budget: str, jobs: rabbet.Jobs) -> Values:
    """The figures of one budget."""
    network, test = demo.model(), demo.test()
    result = rabbet.compress(network, budget, demo.calibration(), jobs=jobs)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "digits.safetensors"
        size = result.save(path)
        accuracy = rabbet.accuracy(rabbet.load(path, network), test)
    whole = rabbet.accuracy(network, test)
    return {
        "file bytes": size,
        "times smaller": result.float_cost.bytes / size,
        "bits": result.cost.bits,
        "float": whole,
        "accuracy": accuracy,
        "drop": whole - accuracy,
    }


def main() -> None:
    """Measure, print and store a row for each budget."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser)
    args = parser.parse_args()
    columns = {"budget": "", "file bytes": ",", "times smaller": ".1f", "bits": ".2f"}
    columns |= dict.fromkeys(("float", "accuracy", "drop"), ".2f")
    table = Table(Records("digits", args), "budgets", columns, "scikit-learn's digits")
    jobs = rabbet.Jobs()
    for budget in BUDGETS:
        table.row({"budget": budget}, partial(measured, budget, jobs))


if __name__ == "__main__":
    main()
