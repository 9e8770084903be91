"""Single kernels: quantised CP by every solver, what EPC does, bonds of tensor trains, ALS sweeps.

The sweeps are timed against tensorly's.

    python benchmarks/solver.py
        [--layers resnet20:layer3.1.conv1:134 resnet56:layer3.1.conv1:134 ...]

Errors are relative, ||W - W'|| / ||W||, of the weight as it was trained (no BatchNorm folded in).
Layers named `shape:OUT:RANK` are OUT x OUT x 3 x 3 of normal entries: no trained network of that
size is at hand, so only their seconds mean something. All on the same threads, in turn, in one run.
Seed 0.
"""

import argparse
import functools
import itertools
import math
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import tensorly
import torch
from common import machine, reader
from frontier import CIFAR, NETS
from records import Group, Records, Table, Values, add_options
from tensorly.cp_tensor import CPTensor
from tensorly.decomposition import parafac
from torch import Tensor

from rabbet import Jobs, Task
from rabbet.core.plan import Term
from rabbet.forms import CP, Aim
from rabbet.grids.grid import Grid, Quantised
from rabbet.reconstruct.candidates import solve_menu
from rabbet.solve import quantised_cp
from rabbet.solve.admm import admm
from rabbet.solve.als import CPProblem, Fit, als, random_start, sensitivity, solved, svd_start
from rabbet.solve.cp import start
from rabbet.solve.epc import epc, loosened, predicted
from rabbet.solve.feedback import Rounded, alternate
from rabbet.solve.kernel_train import train_bonds
from rabbet.solve.metric import Metric
from rabbet.solve.metric_cp import MetricCP, joined
from rabbet.solve.tensor_train import tt_svd
from rabbet.workpiece import Workpiece

T = TypeVar("T")
LAYERS = (
    "resnet20:layer3.1.conv1:134",
    "resnet20:layer2.1.conv1:63",
    "resnet56:layer3.1.conv1:134",
    "shape:512:1141",
)
SOLVED = {"layer": "", "bits": "", "solver": "", "relative error": ".4f", "seconds": ".2f"}
CORRECTED = {
    "kernels": "", "bits": "", "error over its bound, largest": ".6f",
    "sensitivity lowered, median": ".1f", "least": ".1f",
    "% between predicted and true error, median": ".1f", "worst": ".1f",
}  # fmt: skip
BONDS = {"network": "", "rate": "", "bonds": "", "mean relative error": ".3f"}
AGAINST = {
    "layer": "", "threads": "", "sweeps": "", "our error": ".5f", "tensorly's error": ".5f",
    "our ms a sweep": ".2f", "tensorly's ms": ".2f", "times faster": ".1f",
}  # fmt: skip


def kernel(text: str) -> tuple[Tensor, int]:
    """A kernel [out, in, 3, 3] and a rank from the text of an option."""
    net, name, rank = text.split(":")
    if net == "shape":
        generator = torch.Generator().manual_seed(0)
        return torch.randn(int(name), int(name), 3, 3, generator=generator), int(rank)
    model = reader("nets").cifar_resnet(int(net.removeprefix("resnet")))
    return model.get_submodule(name).weight.detach(), int(rank)


def timed(run: Callable[[], T]) -> tuple[T, float]:
    """What a call returns, and its seconds."""
    start = time.perf_counter()
    result = run()
    return result, time.perf_counter() - start


def solvers(table: Table, text: str, bits: int) -> None:
    """A row for each way to get quantised factors."""
    weight, rank = kernel(text)
    tensor = weight.flatten(2)
    problem, grids = CPProblem(tensor), [Grid.of(bits)] * 3

    @functools.cache
    def start() -> tuple[Fit, float]:
        return timed(lambda: als(problem, svd_start(tensor, rank)))

    @functools.cache
    def exact() -> Fit:
        return epc(problem, start()[0].factors, start()[0].error)

    @functools.cache
    def loose() -> Fit:
        return loosened(problem, start()[0], grids)

    # each names what it begins with, whose seconds do not count, and what is made of that
    ours: dict[str, tuple[Callable[[], Any], Callable[[Any], float]]] = {
        "ALS, to nearest": (lambda: start()[0], lambda fit: nearest(problem, fit, grids)),
        "ADMM from a random start": (
            lambda: random_start(tensor.shape, rank),
            lambda factors: admm(problem, factors, grids).error,
        ),
        "EPC, to nearest": (exact, lambda fit: nearest(problem, fit, grids)),
        "EPC, ADMM (the paper)": (exact, lambda fit: admm(problem, fit.factors, grids).error),
        "EPC with slack, to nearest": (loose, lambda fit: nearest(problem, fit, grids)),
        "EPC with slack, ADMM": (loose, lambda fit: admm(problem, fit.factors, grids).error),
        "EPC with slack, rounded in turn": (
            loose,
            lambda fit: alternate(problem, fit.factors, grids).error,
        ),
    }
    settings = {"layer": text, "bits": bits}
    if rank >= 500:
        ours = {}
    else:
        table.row(settings | {"solver": "float ALS"}, lambda: _swept(*start()))
    ours["variable projection, rounded in turn"] = (
        lambda: weight,
        lambda w: quantised_cp(w, rank, bits).error,
    )
    ours["the same, a scale per column"] = (
        lambda: weight,
        lambda w: quantised_cp(w, rank, bits, "column").error,
    )
    for name, (begin, end) in ours.items():
        table.row(settings | {"solver": name}, functools.partial(_spent, begin, end))


def _swept(fit: Fit, seconds: float) -> Values:
    return {"relative error": fit.error, "seconds": seconds, "sweeps": fit.steps}


def _spent(begin: Callable[[], Any], end: Callable[[Any], float]) -> Values:
    first = begin()
    error, seconds = timed(lambda: end(first))
    return {"relative error": error, "seconds": seconds}


def nearest(problem: CPProblem, fit: Fit, grids: list[Grid]) -> float:
    """The error of factors rounded to nearest, each on its best scale."""
    held = [
        Quantised.nearest(f.float(), g).values.double()
        for f, g in zip(fit.factors, grids, strict=True)
    ]
    return problem.relative(tuple(held))


def in_metric(text: str, bits: int) -> Group:
    """The same solvers in the metric of the inputs (1,600 training images, BatchNorm folded in)."""
    net, name, rank_text = text.split(":")
    rank = int(rank_text)
    model, data, _ = NETS[net]()
    piece = Workpiece.of(model, Task.of(data), Jobs())
    site, second = piece.survey[name], piece.moments()[name]
    weight = piece.weight(site)
    problem = MetricCP(weight.flatten(2), second[0])
    grids = MetricCP.grids(rank, bits)
    term = Term(CP(rank), Grid.of(bits, axis=0))
    form = term.form

    def relative(factors: Sequence[Tensor]) -> float:
        delta = (form.contract(site, factors) - weight).flatten(1).double()
        return float(((delta @ problem.second) * delta).sum() / problem.power) ** 0.5

    def chained(held: Rounded) -> float:
        a, b, c = joined(held.factors)
        return relative((b.values, c.values.view(-1, *site.shape[2:]), a.values))

    found: Group = []

    def add(solver: str, error: float, seconds: float) -> None:
        settings = {"layer": text, "bits": bits, "solver": solver}
        found.append((settings, {"relative error": error, "seconds": seconds}))

    small = start(weight.flatten(1), second[0], site.shape[1], rank)
    first, seconds = timed(lambda: als(problem, MetricCP.split(*_filled(problem, small)), 50))
    add("float ALS", first.error, seconds)
    fit, seconds = timed(lambda: form.decompose(site, weight, second, Aim(0.0, None, 120)))
    add("float variable projection", relative(fit), seconds)
    kept, seconds = timed(lambda: epc(problem, first.factors, 1.05 * first.error, 20))
    add("float EPC, bound 1.05", kept.error, seconds)
    for label, run in {
        "EPC, ADMM, 3 sweeps": lambda: admm(problem, kept.factors, grids, 3),
        "EPC, rounded in turn": lambda: alternate(problem, kept.factors, grids, 5),
    }.items():
        held, seconds = timed(run)
        add(label, chained(held), seconds)
    numbers, seconds = timed(lambda: solve_menu(site, weight, [(term,)], Metric(second))[0])
    add("as Joint does", relative([q.values for q in numbers[0]]), seconds)
    return found


def _filled(problem: MetricCP, small: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """A, B and C from rows B [R, in] and C [R, k], with the best A for them."""
    b, c = (s.double().mT for s in small)
    gram, right, _ = problem.sides(
        MetricCP.split(torch.zeros(problem.shape[0], len(small[0])).double(), b, c), 0
    )
    return solved(gram, right), b, c


def correction(bits: int) -> Values:
    """EPC on the 3x3 layers of ResNet-56 at rate 2: bound, sensitivity and predictions."""
    model = reader("nets").cifar_resnet(56)
    grids = [Grid.of(bits)] * 3
    bound, gain, off = [], [], []
    for module in model.modules():
        if (
            not isinstance(module, torch.nn.Conv2d)
            or module.in_channels == 3
            or module.kernel_size == (1, 1)
        ):
            continue
        tensor = module.weight.detach().flatten(2)
        rank = int(tensor.numel() / sum(tensor.shape) / 2)
        problem = CPProblem(tensor)
        start = als(problem, svd_start(tensor, rank))
        fit = loosened(problem, start, grids)
        exact = epc(problem, start.factors, start.error)
        bound.append(exact.error / start.error)
        gain.append(sensitivity(start.factors) / sensitivity(exact.factors))
        off.append(abs(predicted(problem, fit, grids) / nearest(problem, fit, grids) - 1))
    return {
        "kernels": len(off),
        "error over its bound, largest": max(bound),
        "sensitivity lowered, median": statistics.median(gain),
        "least": min(gain),
        "% between predicted and true error, median": 100 * statistics.median(off),
        "worst": 100 * max(off),
    }


PROPORTIONS: dict[str, Callable[[tuple[int, ...], int], tuple[float, ...]]] = {
    "equal": lambda shape, rank: (rank,) * 3,
    "the middle one half as large again": lambda shape, rank: (
        rank, 1.5 * rank * max(1, shape[0] / shape[1]), rank * shape[0] / shape[1],
    ),
    "in proportion to what can be used": lambda shape, rank: tuple(
        rank * most / max(train_bonds(shape, math.prod(shape)))
        for most in train_bonds(shape, math.prod(shape))
    ),
}  # fmt: skip


def bonds(proportion: str, rate: float) -> Values:
    """What TT-SVD leaves of the 3x3 layers of ResNet-20 with bonds in some proportion."""
    errors = []
    for module in reader("nets").cifar_resnet(20).modules():
        if not isinstance(module, torch.nn.Conv2d) or module.kernel_size == (1, 1):
            continue
        shape = tuple(module.weight.shape)
        if shape[1] == 3:  # the first layer
            continue
        sizes = (*shape[1:], shape[0])
        whole = train_bonds(shape, math.prod(shape))
        tensor = module.weight.detach().double().movedim(0, -1)
        found = (1,) * 3
        for rank in range(1, max(whole) + 1):
            wanted = PROPORTIONS[proportion](shape, rank)
            tried = tuple(min(math.ceil(b), m) for b, m in zip(wanted, whole, strict=True))
            ends = zip((1, *tried), sizes, (*tried, 1), strict=True)
            if sum(a * n * b for a, n, b in ends) <= tensor.numel() / rate:
                found = tried
        first, *others = tt_svd(tensor.reshape(1, -1), sizes, (1, *found, 1))
        product = first
        for core in others:
            product = torch.tensordot(product, core, 1)
        errors.append(float((product.reshape(tensor.shape) - tensor).norm() / tensor.norm()))
    return {"mean relative error": statistics.mean(errors)}


def against_tensorly(text: str, threads: int, sweeps: int = 30, rounds: int = 5) -> Values:
    """Seconds per sweep from the same random start, in turn, and the final errors of both.

    Jobs run on one thread.
    """
    torch.set_num_threads(threads)
    weight, rank = kernel(text)
    tensor = weight.double().flatten(2)
    start = random_start(tensor.shape, rank)
    tensorly.set_backend("pytorch")
    problem = CPProblem(tensor)
    spent: dict[str, list[float]] = {"ours": [], "tensorly": []}
    for _ in range(rounds):
        ours, seconds = timed(lambda: als(problem, start, sweeps, 0.0))
        spent["ours"].append(seconds / sweeps)
        given = CPTensor((torch.ones(rank, dtype=torch.float64), [f.clone() for f in start]))
        theirs, seconds = timed(
            lambda given=given: parafac(tensor, rank, n_iter_max=sweeps, init=given, tol=0)
        )
        spent["tensorly"].append(seconds / sweeps)
    assert isinstance(ours, Fit)
    theirs_error = float((tensorly.cp_to_tensor(theirs) - tensor).norm() / tensor.norm())
    mine, other = (statistics.median(spent[k]) for k in ("ours", "tensorly"))
    return {
        "our error": ours.error,
        "tensorly's error": theirs_error,
        "our ms a sweep": 1e3 * mine,
        "tensorly's ms": 1e3 * other,
        "times faster": other / mine,
    }


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", nargs="+", default=LAYERS)
    parser.add_argument(
        "--metric", nargs="*", default=["resnet20:layer3.1.conv1:128"], help="layers of networks"
    )
    parser.add_argument("--bits", nargs="+", type=int, default=[4])
    add_options(parser)
    args = parser.parse_args()
    many = torch.get_num_threads()
    print(f"seed 0; {machine()}")
    records = Records("solver", args, packages=("tensorly",))
    table = Table(records, "solvers", SOLVED, "the weights alone")
    for text, bits in itertools.product(args.layers, args.bits):
        solvers(table, text, bits)
    table = Table(records, "metric", SOLVED, CIFAR)
    for text, bits in itertools.product(args.metric, args.bits):
        table.rows({"layer": text, "bits": bits}, functools.partial(in_metric, text, bits))
    table = Table(records, "correction", CORRECTED, "the weights of ResNet-56")
    for bits in args.bits:
        table.row({"network": "resnet56", "bits": bits}, functools.partial(correction, bits))
    table = Table(records, "bonds", BONDS, "the weights of ResNet-20")
    for proportion in PROPORTIONS:
        settings = {"network": "resnet20", "rate": 2.0, "bonds": proportion}
        table.row(settings, functools.partial(bonds, proportion, 2.0))
    table = Table(records, "tensorly", AGAINST, "the weights alone")
    for text, threads in itertools.product(args.layers, (1, many)):
        sweeps = 5 if text.startswith("shape") else 30
        table.row(
            {"layer": text, "threads": threads, "sweeps": sweeps},
            functools.partial(against_tensorly, text, threads, sweeps),
        )
    print(f"\npeak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")


if __name__ == "__main__":
    main()
