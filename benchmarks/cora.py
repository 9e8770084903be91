"""CoRa on CIFAR-10 ResNets: searched against even ranks, adapters against bits, cost and latency.

    python benchmarks/cora.py [--nets resnet20 resnet56]
        [--parts ranks figures step reconstruction latency]

1,600 training images, labels only where the paper's search takes them; accuracy of the written file
on 5,000 test images, the drop in points against float on the same. Budgets are mean bits of the
codes: 5 % of the parameters as 8-bit adapters are 0.4 bits. `paper`: the settings of the paper and
its released code. `ours`: the defaults of `rabbet.CoRa`. Iterations: of the search and of the
tuning, batches of 64 (paper: 32).
"""

import argparse
import contextlib
import itertools
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.nn.functional as F
from common import head, machine, reader, row
from frontier import cifar
from reconstruction import reconstruct

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

PAPER = CoRa(
    base="clipped",
    svd="plain",
    linears=False,
    ranking=Ranking(250, 32, 4, 0.0, 0.9, "hinge", 0.01, 1.0, "labels", "batch"),
)
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
        self.model, self.data, self.test = cifar(int(name.removeprefix("resnet")))
        _, labels = reader("load").cifar10("train", 1600)
        batches = list(zip(self.data, torch.from_numpy(labels).split(100), strict=True))
        self.task = Task(
            batches, forward=lambda m, b: m(b[0]), loss=lambda out, b: F.cross_entropy(out, b[1])
        )
        self.whole = rabbet.accuracy(self.model, self.test)
        more, _ = reader("load").cifar10("train", HELD, first=5000)
        self.held = list(torch.from_numpy(more).split(250))

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


def ranks(bench: Bench, seeds: int, shares: list[float], settings: list[str]) -> None:
    """Searched ranks against even ones at the same budget."""
    for label in settings:
        method = SETTINGS[label]
        for bits, share in itertools.product((3, 4), shares):
            budget = f"bits <= {bits + 8 * share / 100:.2f}"
            cells = []
            for kind in ("gradient", "heuristic"):
                chosen = replace(method, bits=bits, ranks=kind)
                runs = [bench.drop(chosen, budget, seed) for seed in range(seeds)]
                cells += _spread([r[0] for r in runs], 2) + _spread(
                    [bench.apart(r[1].model) for r in runs], 5
                )
            row(bench.name, label, bits, f"{share:.0f} %", *cells)


def _spread(values: list[float], digits: int) -> list[str]:
    """Mean and deviation over seeds."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return [f"{statistics.mean(values):.{digits}f}", f"{deviation:.{digits}f}"]


def figures(bench: Bench, chosen: list[str]) -> None:
    """Accuracy at 3 bits with adapters, at low bits, and with the same bytes spent otherwise."""
    for label in chosen:
        bits, act, ends, share = CASES[label]
        ours = replace(OURS, bits=bits, act=act, ends=ends)
        bare = _bare_bits(bench, ours)
        drop, result, seconds = bench.drop(ours, f"bits <= {bare + 8 * share:.3f}")
        size = result.cost.bytes
        _figure(bench, label, "CoRa, ours", drop, result, seconds)
        paper = replace(PAPER, bits=bits, act=act, ends=ends)
        _figure(bench, label, "CoRa, paper", *bench.drop(paper, f"bits <= {bare + 8 * share:.3f}"))
        same = f"bytes <= {size}"
        tuning = replace(ours.tuning, steps=ours.tuning.steps + ours.ranking.steps)
        joint = _ended(Joint(act=act, tuning=tuning), ends)
        _figure(bench, label, "Joint, same bytes", *bench.drop(joint, same))
        only = _ended(Joint(adapters=(), forms=(), act=act, tuning=tuning), ends)
        _figure(bench, label, "bits only, same bytes", *bench.drop(only, same))


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
    bench: Bench, label: str, method: str, drop: float, result: rabbet.Result, seconds: float
) -> None:
    cost, base = result.cost, result.float_cost
    bops = f"{100 * cost.bops / base.bops:.3f}"
    row(
        bench.name,
        label,
        method,
        f"{cost.bits:.3f}",
        f"{cost.bytes:,}",
        bops,
        f"{drop:.2f}",
        f"{seconds:.0f}",
    )


def step(bench: Bench) -> None:
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
    row(bench.name, f"{plain:.0f}", f"{search:.0f}", f"{search / plain:.2f}")


def reconstruction(bench: Bench, iterations: list[int]) -> None:
    """Learned rounding of blocks, at no more bits than the bytes of the adapters would buy."""
    for bits in (3, 4):
        for count in iterations:
            start = time.perf_counter()
            student, total = reconstruct(bench.model, bench.data, bits, 8, count)
            seconds = time.perf_counter() - start
            drop = bench.whole - rabbet.accuracy(student, bench.test)
            row(
                bench.name,
                bits,
                f"reconstruction, {count:,} a block",
                f"{total:,}",
                f"{drop:.2f}",
                f"{seconds:.0f}",
            )
        for label, method in (("CoRa, 5 %, untuned", UNTUNED), ("CoRa, 5 %", OURS)):
            drop, _, seconds = bench.drop(replace(method, bits=bits), f"bits <= {bits + 0.4}")
            total = method.ranking.steps + method.tuning.steps
            row(bench.name, bits, label, total, f"{drop:.2f}", f"{seconds:.0f}")


def latency(bench: Bench) -> None:
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
    row(
        bench.name,
        f"{count} of {len(plan)}",
        f"{slow:.3f}",
        f"{fast:.3f}",
        f"{slow / fast:.2f}",
        "; ".join(notes),
    )


HEADS: dict[str, tuple[str, ...]] = {
    "ranks": (
        "network",
        "settings",
        "bits",
        "adapters",
        "searched: drop",
        "+-",
        "divergence",
        "+-",
        "even: drop",
        "+-",
        "divergence",
        "+-",
    ),
    "figures": (
        "network",
        "bits, weights/inputs",
        "method",
        "mean bits",
        "file bytes",
        "% BOPs",
        "drop",
        "seconds",
    ),
    "step": ("network", "ms forward and backward", "ms an iteration of the search", "ratio"),
    "reconstruction": ("network", "bits", "method", "iterations", "drop", "seconds"),
    "latency": (
        "network",
        "layers with adapters",
        "ms with",
        "ms without",
        "ratio",
        "not on integer kernels",
    ),
}


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--nets", nargs="+", choices=("resnet20", "resnet56"), default=["resnet20", "resnet56"]
    )
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
    parser.add_argument(
        "--iterations", nargs="+", type=int, default=[2000], help="a block, of reconstruction"
    )
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--picture", type=Path, help="where to draw a search at 3 bits and 5 %%")
    args = parser.parse_args()
    print(f"{machine()}")
    parallel = (
        ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) if args.jobs > 1 else None
    )
    with parallel or contextlib.nullcontext():
        benches = [Bench(name, rabbet.Jobs(parallel)) for name in args.nets]
        for part in args.parts:
            print(f"\n{part}\n")
            head(*HEADS[part])
            for bench in benches:
                _run(part, bench, args)
        if args.picture:
            _draw(benches[0], args.picture)


def _run(part: str, bench: Bench, args: argparse.Namespace) -> None:
    if part == "ranks":
        ranks(bench, args.seeds, args.shares, args.settings)
    elif part == "reconstruction":
        reconstruction(bench, args.iterations)
    elif part == "figures":
        figures(bench, args.cases)
    else:
        {"step": step, "latency": latency}[part](bench)


def _draw(bench: Bench, path: Path) -> None:
    from rabbet.report import draw_search

    piece = Workpiece.of(bench.model, bench.task, bench.jobs)
    draw_search(CoRa(bits=3).search(piece, rabbet.Budget.parse("bits <= 3.4")), path)


if __name__ == "__main__":
    main()
