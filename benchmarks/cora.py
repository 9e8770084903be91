"""CoRa on CIFAR-10 ResNets: searched against even ranks, adapters against bits, cost and latency.

    python benchmarks/cora.py [--nets resnet20 resnet56]
        [--parts ranks figures step reconstruction latency]
    python benchmarks/cora.py --nets mobilenet_v2 --parts figures step           # see pretrained.py

1,600 training images, labels only where the paper's search takes them; accuracy of the written file
on 5,000 test images, the drop in points against float on the same (ImageNet: 150 and 500 of its
validation images, none of which is left for `ranks`). Budgets are mean bits of the
codes: 5 % of the parameters as 8-bit adapters are 0.4 bits. `paper`: the settings of the paper and
its released code. `ours`: the defaults of `rabbet.CoRa`. Iterations: of the search and of the
tuning, batches of 64 (paper: 32).
"""

import argparse
import contextlib
import functools
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import pretrained
import torch
import torch.nn.functional as F
from common import machine, reader
from frontier import CIFAR, DATA, NETS, drawn
from reconstruction import reconstruct
from records import Records, Table, Values, add_options, told
from torch import Tensor

import rabbet
from rabbet import CoRa, Joint, Task
from rabbet.core.plan import LayerPlan
from rabbet.data.answers import scores_divergence
from rabbet.methods import Method
from rabbet.methods.base import Fitted
from rabbet.methods.cora.search import Ranking
from rabbet.runtime.bench import time_files
from rabbet.train.tuning import Tuning
from rabbet.workpiece import Workpiece

PAPER = CoRa.paper()
OURS = CoRa()
UNTUNED = CoRa(tuning=Tuning(steps=0))
SETTINGS = {"ours": UNTUNED, "paper": PAPER}
HELD = 2000
CASES = {"3/8": (3, 8, None, 0.05), "4/4": (4, 4, 8, 0.05), "3/3": (3, 3, 8, 0.05)}
PARTS = ("ranks", "figures", "step", "reconstruction", "latency")


class Bench:
    """One network with its data, and how a method is measured on it."""

    def __init__(self, name: str, jobs: rabbet.Jobs) -> None:
        self.name, self.jobs = name, jobs
        self.model, self.data, self.test = NETS[name]()
        labels = _labels(name).split(len(self.data[0]))
        self.task = Task(
            list(zip(self.data, labels, strict=True)),
            forward=lambda m, b: m(b[0]),
            loss=lambda out, b: F.cross_entropy(out, b[1]),
        )

    @functools.cached_property
    def whole(self) -> float:
        """Accuracy in float."""
        return rabbet.accuracy(self.model, self.test)

    @functools.cached_property
    def held(self) -> list[Tensor]:
        """Other training images of CIFAR-10."""
        images, _ = reader("load").cifar10("train", HELD, first=5000)
        return list(torch.from_numpy(images).split(250))

    def drop(
        self, method: Method, budget: str, seed: int = 0
    ) -> tuple[float, rabbet.Result, float]:
        """Points lost by the written file, the result, and seconds."""
        start = time.perf_counter()
        result = rabbet.compress(self.model, budget, self.task, method, seed=seed, jobs=self.jobs)
        seconds = time.perf_counter() - start
        with tempfile.TemporaryDirectory() as folder:
            result.save(Path(folder) / "small.safetensors")
            accuracy = rabbet.accuracy(
                rabbet.load(Path(folder) / "small.safetensors", self.model), self.test
            )
        return self.whole - accuracy, result, seconds

    def apart(self, student: torch.nn.Module) -> float:
        """Divergence from the float network on held-back training images: finer than accuracy."""
        with torch.no_grad():
            each = [float(scores_divergence(student(x), self.model(x))) for x in self.held]
        return statistics.mean(each)


def _labels(name: str) -> Tensor:
    """Labels of the images that calibrate."""
    load = reader("load")
    if DATA[name] == CIFAR:
        return torch.from_numpy(load.cifar10("train", 1600)[1])
    return torch.from_numpy(load.imagenet_val()[1])[drawn()[0]]


def ranks(bench: Bench, table: Table, args: argparse.Namespace) -> None:
    """Searched ranks against even ones at the same budget."""

    def measured(method: CoRa, budget: str) -> Values:
        values: Values = {}
        for kind, name in (("gradient", "searched"), ("heuristic", "even")):
            runs = [
                bench.drop(replace(method, ranks=kind), budget, seed) for seed in range(args.seeds)
            ]
            values |= _spread(f"{name}, drop", [r[0] for r in runs])
            apart = [1000 * bench.apart(r[1].model) for r in runs]
            values |= _spread(f"{name}, divergence", apart)
        return values

    for label in args.settings:
        for bits, share in itertools.product((3, 4), args.shares):
            table.row(
                {"network": bench.name, "settings": label, "bits": bits, "adapters, %": share},
                functools.partial(
                    measured,
                    replace(SETTINGS[label], bits=bits),
                    f"bits <= {bits + 8 * share / 100:.2f}",
                ),
            )


def _spread(name: str, values: list[float]) -> Values:
    """Mean and deviation over seeds."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {name: statistics.mean(values), f"{name} +-": deviation}


def figures(bench: Bench, table: Table, args: argparse.Namespace) -> None:
    """Accuracy at 3 bits with adapters, at low bits, and with the same bytes spent otherwise."""
    for label in args.cases:
        bits, act, ends, share = CASES[label]
        case = {"bits": bits, "act": act, "ends": ends}
        ours, paper = (replace(_shortened(m, args), **case) for m in (OURS, PAPER))
        budget = f"bits <= {_bare_bits(bench, ours) + 8 * share:.3f}"
        row = functools.partial(_figure, bench, table, {"case": label} | args.own)
        first = row("CoRa, ours", ours, lambda budget=budget: budget)
        row("CoRa, the paper's settings", paper, lambda budget=budget: budget)
        same = functools.cache(functools.partial(_bytes, bench, ours, budget, first))
        tuning = replace(ours.tuning, steps=ours.tuning.steps + ours.ranking.steps)
        joint = Joint(act=act, tuning=tuning)
        row("Joint, same bytes", _ended(joint, ends), same)
        only = replace(joint, rank=False)
        row("bits only, same bytes", _ended(only, ends), same)


def _shortened(method: CoRa, args: argparse.Namespace) -> CoRa:
    """The method with as many iterations as the options say."""
    ranking, tuning = method.ranking, method.tuning
    if args.search is not None:
        ranking = replace(ranking, steps=args.search)
    if args.tuning is not None:
        tuning = replace(tuning, steps=args.tuning)
    return replace(method, ranking=ranking, tuning=tuning)


def _bytes(bench: Bench, method: CoRa, budget: str, found: Values | None) -> str:
    """The bytes that a row has found as a budget; without the row, those of the method's plan."""
    if found:
        return f"bytes <= {found['file bytes']}"
    plan = rabbet.plan(bench.model, budget, bench.task, method, jobs=bench.jobs)
    return f"bytes <= {rabbet.price(bench.model, plan, bench.data).bytes}"


class _Ended:
    """`Joint` with the inputs of the first and the last layer on other bits, as for CoRa here."""

    def __init__(self, joint: Joint, ends: int) -> None:
        self.joint, self.ends = joint, ends

    def plan(self, piece: Workpiece, budget: rabbet.Budget) -> rabbet.Plan:
        chosen = self.joint.plan(piece, budget)
        names = [line.name for line in chosen]
        lines = (
            replace(x, act=self.ends) if x.name in (names[0], names[-1]) else x for x in chosen
        )
        return rabbet.Plan(tuple(lines))

    def fit(self, piece: Workpiece, plan: rabbet.Plan) -> Fitted:
        return self.joint.fit(piece, plan)


def _ended(joint: Joint, ends: int | None) -> Method:
    return joint if ends is None else _Ended(joint, ends)


def _bare_bits(bench: Bench, method: CoRa) -> float:
    """Mean bits without adapters."""
    plan = rabbet.plan(bench.model, "bits <= 32", bench.task, replace(method, ranks="heuristic"))
    bare = (LayerPlan(x.name, x.terms[:1], x.act) for x in plan)
    return rabbet.price(bench.model, rabbet.Plan(tuple(bare)), bench.data).bits


def _figure(
    bench: Bench, table: Table, case: Values, label: str, method: Method, budget: Callable[[], str]
) -> Values | None:
    """A row; the budget is asked for only if it is measured."""

    def measured() -> Values:
        drop, result, seconds = bench.drop(method, budget())
        return {
            "mean bits": result.cost.bits,
            "file bytes": result.cost.bytes,
            "% BOPs": 100 * result.cost.bops / result.float_cost.bops,
            "drop": drop,
            "seconds": seconds,
        }

    return table.row({"network": bench.name} | case | {"method": label}, measured)


def step(bench: Bench) -> Values:
    """The cost of an iteration of the search, against a forward and backward pass in float."""
    x = bench.data[0][:64]
    for p in bench.model.parameters():
        p.requires_grad_(True)
    with torch.no_grad():
        goal = bench.model(x)
    times: dict[str, list[float]] = {"plain": [], "search": []}
    marks: list[float] = []

    def seen(stage: str, done: int, total: int) -> None:
        if stage == "searching ranks":
            marks.append(time.perf_counter())

    for _ in range(3):
        for _ in range(8):
            start = time.perf_counter()
            scores_divergence(bench.model(x), goal).backward()
            times["plain"].append(time.perf_counter() - start)
        marks.clear()
        rabbet.plan(bench.model, "bits <= 3.4", bench.data, CoRa(bits=3, ranking=Ranking(steps=9)),
                    jobs=rabbet.Jobs(progress=seen))  # fmt: skip
        times["search"] += [b - a for a, b in itertools.pairwise(marks)]
    plain, search = (1e3 * statistics.median(times[k]) for k in ("plain", "search"))
    return {
        "ms forward and backward": plain,
        "ms an iteration of the search": search,
        "ratio": search / plain,
    }


def reconstruction(bench: Bench, table: Table, args: argparse.Namespace) -> None:
    """Learned rounding of blocks, at no more bits than the bytes of the adapters would buy."""

    def rounded(bits: int, count: int) -> Values:
        start = time.perf_counter()
        student, total = reconstruct(bench.model, bench.data, bits, 8, count)
        seconds = time.perf_counter() - start
        drop = bench.whole - rabbet.accuracy(student, bench.test)
        return {"iterations": total, "drop": drop, "seconds": seconds}

    def adapted(bits: int, method: CoRa) -> Values:
        drop, _, seconds = bench.drop(replace(method, bits=bits), f"bits <= {bits + 0.4}")
        total = method.ranking.steps + method.tuning.steps
        return {"iterations": total, "drop": drop, "seconds": seconds}

    methods = {"CoRa, adapters of 5 %, not tuned": UNTUNED, "CoRa, adapters of 5 %": OURS}
    for bits in (3, 4):
        shared = {"network": bench.name, "bits": bits}
        for count in args.iterations:
            settings = shared | {"method": "reconstruction", "iterations a block": count}
            table.row(settings, functools.partial(rounded, bits, count))
        for label, method in methods.items():
            settings = shared | {"method": label, "iterations a block": None}
            table.row(settings, functools.partial(adapted, bits, method))


def latency(bench: Bench) -> Values:
    """The exported network with its adapters against the same without."""
    plan = rabbet.plan(bench.model, "bits <= 3.4", bench.data, CoRa(bits=3), jobs=bench.jobs)
    bare = rabbet.Plan(tuple(LayerPlan(x.name, x.terms[:1], x.act) for x in plan))
    method = Joint(tuning=Tuning(steps=0))
    with tempfile.TemporaryDirectory() as folder:
        files, notes = {}, ()
        for name, chosen in (("with", plan), ("without", bare)):
            files[name] = Path(folder) / f"{name}.onnx"
            written = rabbet.fit(bench.model, chosen, bench.data, method, jobs=bench.jobs).export(
                files[name]
            )
            notes = (*notes, *written.notes)
        timings = time_files(files, bench.data[0][:1], runs=300)
    slow, fast = timings["with"].median, timings["without"].median
    count = sum(len(x.terms) > 1 for x in plan)
    return {
        "layers with adapters": f"{count} of {len(plan)}",
        "ms with": slow,
        "ms without": fast,
        "ratio": slow / fast,
        "not on integer kernels": "; ".join(notes),
    }


COLUMNS: dict[str, dict[str, str]] = {
    "ranks": {
        "network": "", "settings": "", "bits": "", "adapters, %": "g",
        "searched, drop": ".2f", "searched, drop +-": ".2f",
        "searched, divergence": ".2f", "searched, divergence +-": ".2f",
        "even, drop": ".2f", "even, drop +-": ".2f",
        "even, divergence": ".2f", "even, divergence +-": ".2f",
    },
    "figures": {
        "network": "", "case": "", "method": "", "mean bits": ".3f", "file bytes": ",",
        "% BOPs": ".3f", "drop": ".2f", "seconds": ".0f",
    },
    "step": {
        "network": "", "ms forward and backward": ".0f", "ms an iteration of the search": ".0f",
        "ratio": ".2f",
    },
    "reconstruction": {
        "network": "", "bits": "", "method": "", "iterations a block": ",", "iterations": ",",
        "drop": ".2f", "seconds": ".0f",
    },
    "latency": {
        "network": "", "layers with adapters": "", "ms with": ".3f", "ms without": ".3f",
        "ratio": ".2f", "not on integer kernels": "",
    },
}  # fmt: skip


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nets", nargs="+", choices=NETS, default=["resnet20", "resnet56"])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--shares", nargs="+", type=float, default=[2.0, 5.0, 10.0], help="of `ranks`, in percent"
    )
    parser.add_argument(
        "--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="of `ranks`"
    )
    parser.add_argument(
        "--cases",
        nargs="+",
        choices=CASES,
        default=list(CASES),
        help="of `figures`: weights/inputs",
    )
    parser.add_argument("--search", type=int, help="iterations of the search, of `figures`")
    parser.add_argument("--tuning", type=int, help="iterations of the tuning, of `figures`")
    parser.add_argument(
        "--iterations", nargs="+", type=int, default=[2000], help="a block, of reconstruction"
    )
    parser.add_argument("--jobs", type=int, default=2, help="processes that solve layers")
    parser.add_argument("--picture", type=Path, help="where to draw a search at 3 bits and 5 %%")
    add_options(parser)
    args = parser.parse_args()
    args.own = told(parser, args, "search", "tuning")
    if "ranks" in args.parts and any(DATA[name] != CIFAR for name in args.nets):
        parser.error("there are no images of ImageNet left to judge `ranks` by; name other --parts")
    print(f"{machine()}")
    records = Records("cora", args, packages=("onnxruntime", *pretrained.PACKAGES))
    parallel = (
        ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) if args.jobs > 1 else None
    )
    with parallel or contextlib.nullcontext():
        benches = [Bench(name, rabbet.Jobs(parallel)) for name in args.nets]
        for part in args.parts:
            print(f"\n{part}")
            tables = {data: _table(part, records, args.seeds, data) for data in DATA.values()}
            for bench in benches:
                _run(part, bench, tables[DATA[bench.name]], args)
        if args.picture:
            _draw(benches[0], args.picture)


def _table(part: str, records: Records, seeds: int, data: str) -> Table:
    other = "; divergence (in 1/1000) on 2,000 other training images" if part == "ranks" else ""
    seed = list(range(seeds)) if part == "ranks" else 0
    return Table(records, part, COLUMNS[part], data + other, seed)


def _run(part: str, bench: Bench, table: Table, args: argparse.Namespace) -> None:
    if part in ("step", "latency"):
        measure = {"step": step, "latency": latency}[part]
        table.row({"network": bench.name}, functools.partial(measure, bench))
    else:
        {"ranks": ranks, "figures": figures, "reconstruction": reconstruction}[part](
            bench, table, args
        )


def _draw(bench: Bench, path: Path) -> None:
    from rabbet.report import draw_search

    piece = Workpiece.of(bench.model, bench.task, bench.jobs)
    draw_search(CoRa(bits=3).search(piece, rabbet.Budget.parse("bits <= 3.4")), path)


if __name__ == "__main__":
    main()
