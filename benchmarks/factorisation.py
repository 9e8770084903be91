"""The paper's method on whole networks, and the questions it left open: a row per `ADMM` setting.

    python benchmarks/factorisation.py [--nets resnet20 resnet56] [--rates 2 3] [--quick]
    python benchmarks/factorisation.py --tables forms widths --nets resnet20 --jobs 1

Every conv with a kernel of more than one place, except the first and those in groups, is factorised
at one rate; factors have 4 bits, the rest and all inputs 8. 1,600 unlabelled training images;
accuracy of the written file on 5,000 test images (ImageNet: 150 and 500 of its validation images).
`EPC, to nearest` is the same pipeline without ADMM; `Joint` is rabbet's own method, untuned, under
the bytes and MACs that the paper's run took.

`forms`: CP, Tucker-2 and tensor trains of the same number of parameters by every solver; errors are
relative, of the kernels as they were trained, in the mean. `widths`: one width for all factors
against widths that the program chooses under the bytes of that. `menus`: `Joint`, untuned, with
tensor trains among its forms and without. Seconds on as many processes as
`--jobs` says. Seed 0.

MobileNets have no such kernel: their convs are depthwise or of one place. What the settings are
about does not arise there, but for the statistics of BatchNorms.
"""

import argparse
import contextlib
import functools
import itertools
import math
import multiprocessing
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pretrained
from common import machine
from frontier import DATA, NETS
from records import Records, Table, Values, add_options
from torch import nn

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
    "Tucker-2": {"form": "tucker"},
    "8 bits": {"bits": 8},
    "BatchNorms left alone": {"norms": 0},
}
QUICK = ("the paper", "EPC, to nearest")
DENSE = ("the paper", "BatchNorms left alone")
FORMS = {"CP": "cp", "Tucker-2": "tucker", "tensor train": "tt"}
SOLVERS = {"ADMM": "admm", "feedback": "feedback", "nearest": "nearest"}
UNIFORM, WIDTHS = 4, (3, 4, 5, 6)
LOOSE = "bytes <= 100%"  # the method fixes bits and ranks


COLUMNS = {
    "network": "", "rate": "", "setting": "", "file bytes": ",", "% MACs": ".1f", "% BOPs": ".3f",
    "accuracy": ".2f", "drop": ".2f", "seconds": ".0f", "notes": "",
}  # fmt: skip


FORM_COLUMNS = {
    "network": "", "rate": "", "form": "", "solver": "", "parameters": ",", "error in float": ".3f",
    "error": ".3f", "file bytes": ",", "% MACs": ".1f", "accuracy": ".2f", "drop": ".2f",
    "seconds": ".0f",
}  # fmt: skip
WIDTH_COLUMNS = {
    "network": "", "rate": "", "form": "", "bits": "", "file bytes": ",", "kernels by bits": "",
    "error": ".3f", "accuracy": ".2f", "drop": ".2f", "seconds": ".0f",
}  # fmt: skip
BUDGETS = ("bits <= 2", "macs <= 50%, bytes <= 13%")
MENU_COLUMNS = {
    "network": "", "budget": "", "forms": "", "layers by form": "", "file bytes": ",",
    "% MACs": ".1f", "accuracy": ".2f", "drop": ".2f", "seconds": ".0f",
}  # fmt: skip


@dataclass
class Bench:
    """A network with its data, and what measures methods on it."""

    model: nn.Module
    data: Any
    test: Any
    whole: Callable[[], float]
    jobs: rabbet.Jobs

    @classmethod
    def of(cls, name: str, jobs: rabbet.Jobs) -> "Bench":
        """The network of a name; whole: its accuracy in float."""
        model, data, test = NETS[name]()
        whole = functools.cache(lambda: rabbet.accuracy(model, test))
        return cls(model, data, test, whole, jobs)

    @property
    def kernels(self) -> bool:
        """Whether the method factorises any."""
        plan = rabbet.plan(self.model, LOOSE, self.data, ADMM())
        return any(line.terms[0].form.rank for line in plan)

    def fitted(self, budget: str, method: rabbet.methods.Method) -> Values:
        """The values of a row."""
        start = time.perf_counter()
        result = rabbet.compress(self.model, budget, self.data, method, jobs=self.jobs)
        seconds = time.perf_counter() - start
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "small.safetensors"
            size = result.save(path)
            accuracy = rabbet.accuracy(rabbet.load(path, self.model), self.test)
        cost, base = result.cost, result.float_cost
        return {
            "file bytes": size,
            "% MACs": 100 * cost.macs / base.macs,
            "% BOPs": 100 * cost.bops / base.bops,
            "accuracy": accuracy,
            "drop": self.whole() - accuracy,
            "seconds": seconds,
            "notes": "; ".join(result.notes),
            "macs": cost.macs,
            "layers by form": _counted(line.terms[0].form.name for line in result.plan),
            **_of_kernels(result),
        }


def _of_kernels(result: rabbet.Result) -> Values:
    """Parameters, bits and mean errors of the kernels that ADMM factorised."""
    found = re.search(r"mean relative error (\S+), (\S+) in float", " ".join(result.notes))
    if found is None:
        return {}
    lines = [line for line in result.plan if line.terms[0].form.alternates]
    shapes = [line.terms[0].form.shapes(result.survey[line.name]) for line in lines]
    bits = [line.terms[0].grid.bits for line in lines]
    return {
        "parameters": sum(math.prod(shape) for each in shapes for shape in each),
        "kernels by bits": ", ".join(f"{bits.count(b)} at {b}" for b in sorted(set(bits))),
        "error": float(found[1]),
        "error in float": float(found[2]),
    }


def _counted(values: Iterable[object]) -> str:
    """How often each value comes."""
    return ", ".join(f"{count} x {value}" for value, count in Counter(values).items())


def settings(name: str, bench: Bench, args: argparse.Namespace, records: Records) -> None:
    """The paper and its open questions."""
    table = Table(records, "settings", COLUMNS, DATA[name])

    def as_large(rate: float, paper: Values | None) -> Values:
        if paper is None:  # `--only` left it out
            plan = rabbet.plan(bench.model, LOOSE, bench.data, ADMM(rate=rate))
            cost = rabbet.price(bench.model, plan, bench.data)
            paper = {"file bytes": cost.bytes, "macs": cost.macs}
        budget = f"bytes <= {paper['file bytes']}, macs <= {paper['macs']}"
        return bench.fitted(budget, QUALITY["fast"])

    for rate in args.rates:
        found = {}
        labels = QUICK if args.quick else tuple(SETTINGS)
        for label, given in SETTINGS.items():
            if label in (labels if bench.kernels else DENSE):
                row = {"network": name, "rate": rate, "setting": label}
                measured = partial(bench.fitted, LOOSE, ADMM(rate=rate, **given))
                found[label] = table.row(row, measured)
        row = {"network": name, "rate": rate, "setting": "Joint"}
        table.row(row, partial(as_large, rate, found["the paper"]))


def forms(name: str, bench: Bench, args: argparse.Namespace, records: Records) -> None:
    """Each form by each solver, from its usual start."""
    table = Table(records, "forms", FORM_COLUMNS, DATA[name])
    for rate in args.rates:
        for form, solver in itertools.product(FORMS, SOLVERS):
            row = {"network": name, "rate": rate, "form": form, "solver": solver}
            method = ADMM(rate=rate, form=FORMS[form], solver=SOLVERS[solver])
            table.row(row, partial(bench.fitted, LOOSE, method))


def widths(name: str, bench: Bench, args: argparse.Namespace, records: Records) -> None:
    """One width for all kernels, and widths of the program's in the same bytes."""
    table = Table(records, "widths", WIDTH_COLUMNS, DATA[name])

    def chosen(rate: float, form: str) -> Values:
        alike = rabbet.plan(bench.model, LOOSE, bench.data, ADMM(UNIFORM, rate, form=form))
        size = rabbet.price(bench.model, alike, bench.data).bytes
        return bench.fitted(f"bytes <= {size}", ADMM(WIDTHS, rate, form=form))

    for rate in args.rates:
        for label, form in FORMS.items():
            row = {"network": name, "rate": rate, "form": label}
            uniform = partial(bench.fitted, LOOSE, ADMM(UNIFORM, rate, form=form))
            table.row(row | {"bits": f"{UNIFORM}, by hand"}, uniform)
            several = f"{', '.join(map(str, WIDTHS))}, by the program"
            table.row(row | {"bits": several}, partial(chosen, rate, form))


def menus(name: str, bench: Bench, _: argparse.Namespace, records: Records) -> None:
    """`Joint`, untuned, with the forms of its default and with tensor trains as well."""
    table, usual = Table(records, "menus", MENU_COLUMNS, DATA[name]), QUALITY["fast"]
    for budget in BUDGETS:
        for offered in (usual.forms, (*usual.forms, "ttconv")):
            row = {"network": name, "budget": budget, "forms": ", ".join(offered)}
            table.row(row, partial(bench.fitted, budget, replace(usual, forms=offered)))


TABLES = {"settings": settings, "forms": forms, "widths": widths, "menus": menus}


@contextlib.contextmanager
def processes(count: int) -> Iterator[rabbet.Jobs]:
    """What runs jobs on so many processes, or in this one."""
    if count == 1:
        yield rabbet.Jobs()
        return
    with ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn")) as executor:
        yield rabbet.Jobs(executor)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nets", nargs="+", choices=NETS, default=["resnet20", "resnet56"])
    parser.add_argument("--rates", nargs="+", type=float, default=[2.0])
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=["settings"])
    parser.add_argument("--jobs", type=int, default=2, help="processes that solve layers")
    parser.add_argument(
        "--quick", action="store_true", help="only with and without ADMM, and Joint"
    )
    add_options(parser)
    args = parser.parse_args()
    print(f"seed 0; {machine()}")
    records = Records("factorisation", args, packages=tuple(pretrained.PACKAGES))
    with processes(args.jobs) as jobs:
        for name in args.nets:
            bench = Bench.of(name, jobs)
            for table in args.tables:
                TABLES[table](name, bench, args, records)


if __name__ == "__main__":
    main()
