"""Single kernels: quantised CP by every solver, what EPC does, and ALS sweeps against tensorly's.

    python benchmarks/solver.py
        [--layers resnet20:layer3.1.conv1:134 resnet56:layer3.1.conv1:134 ...]

Errors are relative, ||W - W'|| / ||W||, of the weight as it was trained (no BatchNorm folded in).
Layers named `shape:OUT:RANK` are OUT x OUT x 3 x 3 of normal entries: no trained network of that
size is at hand, so only their seconds mean something. All on the same threads, in turn, in one run.
Seed 0.
"""

import argparse
import resource
import statistics
import time
from collections.abc import Callable, Sequence

import tensorly
import torch
from common import head, machine, reader, row
from frontier import NETS
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
from rabbet.solve.metric_cp import MetricCP, joined
from rabbet.solve.rounding import Metric
from rabbet.workpiece import Workpiece

LAYERS = (
    "resnet20:layer3.1.conv1:134",
    "resnet20:layer2.1.conv1:63",
    "resnet56:layer3.1.conv1:134",
    "shape:512:1141",
)


def kernel(text: str) -> tuple[Tensor, int]:
    """A kernel [out, in, 3, 3] and a rank from the text of an option."""
    net, name, rank = text.split(":")
    if net == "shape":
        generator = torch.Generator().manual_seed(0)
        return torch.randn(int(name), int(name), 3, 3, generator=generator), int(rank)
    model = reader("nets").cifar_resnet(int(net.removeprefix("resnet")))
    return model.get_submodule(name).weight.detach(), int(rank)


def timed(run: Callable[[], object]) -> tuple[object, float]:
    """What a call returns, and its seconds."""
    start = time.perf_counter()
    result = run()
    return result, time.perf_counter() - start


def solvers(text: str, bits: int) -> None:
    """A row for each way to get quantised factors."""
    weight, rank = kernel(text)
    tensor = weight.flatten(2)
    problem, grids = CPProblem(tensor), [Grid.of(bits)] * 3
    ours: dict[str, Callable[[], float]] = {
        "variable projection, rounded in turn": lambda: quantised_cp(weight, rank, bits).error,
        "the same, a scale per column": lambda: quantised_cp(weight, rank, bits, "column").error,
    }
    if rank < 500:
        start, seconds = timed(lambda: als(problem, svd_start(tensor, rank)))
        assert isinstance(start, Fit)
        corrected = epc(problem, start.factors, start.error)
        loose = loosened(problem, start, grids)
        ours = {
            "ALS, to nearest": lambda: nearest(problem, start, grids),
            "ADMM from a random start": lambda: (
                admm(problem, random_start(tensor.shape, rank), grids).error
            ),
            "EPC, to nearest": lambda: nearest(problem, corrected, grids),
            "EPC, ADMM (the paper)": lambda: admm(problem, corrected.factors, grids).error,
            "EPC with slack, to nearest": lambda: nearest(problem, loose, grids),
            "EPC with slack, ADMM": lambda: admm(problem, loose.factors, grids).error,
            "EPC with slack, rounded in turn": lambda: (
                alternate(problem, loose.factors, grids).error
            ),
        } | ours
        row(text, bits, f"float ALS, {start.steps} sweeps", f"{start.error:.4f}", f"{seconds:.2f}")
    for name, run in ours.items():
        error, seconds = timed(run)
        row(text, bits, name, f"{error:.4f}", f"{seconds:.2f}")


def nearest(problem: CPProblem, fit: Fit, grids: list[Grid]) -> float:
    """The error of factors rounded to nearest, each on its best scale."""
    held = [
        Quantised.nearest(f.float(), g).values.double()
        for f, g in zip(fit.factors, grids, strict=True)
    ]
    return problem.relative(tuple(held))


def in_metric(text: str, bits: int) -> None:
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

    small = start(weight.flatten(1), second[0], site.shape[1], rank)
    first, seconds = timed(lambda: als(problem, MetricCP.split(*_filled(problem, small)), 50))
    row(text, bits, f"float ALS, {first.steps} sweeps", f"{first.error:.4f}", f"{seconds:.2f}")
    fit, seconds = timed(lambda: form.decompose(site, weight, second, Aim(0.0, None, 120)))
    row(text, bits, "float variable projection", f"{relative(fit):.4f}", f"{seconds:.2f}")
    kept, seconds = timed(lambda: epc(problem, first.factors, 1.05 * first.error, 20))
    row(text, bits, "float EPC, bound 1.05", f"{kept.error:.4f}", f"{seconds:.2f}")
    for label, run in {
        "EPC, ADMM, 3 sweeps": lambda: admm(problem, kept.factors, grids, 3),
        "EPC, rounded in turn": lambda: alternate(problem, kept.factors, grids, 5),
    }.items():
        held, seconds = timed(run)
        row(text, bits, label, f"{chained(held):.4f}", f"{seconds:.2f}")
    numbers, seconds = timed(
        lambda: solve_menu(site, weight, [(term,)], Metric(second), steps=120)[0]
    )
    row(
        text,
        bits,
        "as Joint does",
        f"{relative([q.values for q in numbers[0]]):.4f}",
        f"{seconds:.2f}",
    )


def _filled(problem: MetricCP, small: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """A, B and C from rows B [R, in] and C [R, k], with the best A for them."""
    b, c = (s.double().mT for s in small)
    gram, right, _ = problem.sides(
        MetricCP.split(torch.zeros(problem.shape[0], len(small[0])).double(), b, c), 0
    )
    return solved(gram, right), b, c


def correction(bits: int) -> None:
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
    row(len(off), bits, f"{max(bound):.6f}", f"{statistics.median(gain):.1f}x, {min(gain):.1f}x",
        f"{100 * statistics.median(off):.1f} %, {100 * max(off):.1f} %")  # fmt: skip


def against_tensorly(text: str, threads: int, sweeps: int = 30, rounds: int = 5) -> None:
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
    row(text, threads, sweeps, f"{ours.error:.5f}", f"{theirs_error:.5f}",
        f"{1e3 * mine:.2f}", f"{1e3 * other:.2f}", f"{other / mine:.1f}x")  # fmt: skip


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
    args = parser.parse_args()
    many = torch.get_num_threads()
    print(f"seed 0; {machine()}\n")
    head("layer", "bits", "solver", "relative error", "seconds")
    for text in args.layers:
        for bits in args.bits:
            solvers(text, bits)
    print()
    head("layer, in the metric of its inputs", "bits", "solver", "relative error", "seconds")
    for text in args.metric:
        for bits in args.bits:
            in_metric(text, bits)
    print()
    head("kernels", "bits", "EPC error / bound, largest", "sensitivity lowered, median and least",
         "predicted against true error, median and worst")  # fmt: skip
    for bits in args.bits:
        correction(bits)
    print()
    head(
        "layer",
        "threads",
        "sweeps",
        "our error",
        "tensorly's",
        "our ms a sweep",
        "tensorly's",
        "ratio",
    )
    for text in args.layers:
        for threads in (1, many):
            against_tensorly(text, threads, 5 if text.startswith("shape") else 30)
    print(f"\npeak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")


if __name__ == "__main__":
    main()
