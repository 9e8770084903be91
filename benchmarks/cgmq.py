"""CGMQ: LeNet-5 on MNIST and ResNet-20 on CIFAR-10 under budgets of bit operations.

    python benchmarks/cgmq.py [--parts lenet directions resnet20] [--seeds 3] [--epochs 6] [--finish 6]

LeNet-5 (32C5-MP-64C5-MP-512FC-10, 4,267,008 MACs) is trained in float first, by this script. Budgets are shares of the
float32 bit operations; the floor, everything at 2 bits, is 0.3906 %. Accuracy is that of the written file on the test
images (MNIST: 10,000, CIFAR-10: 5,000); a tenth of the training images chooses between epochs.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from common import head, machine, reader, row
from frontier import cifar
from torch import Tensor, nn

import rabbet
from rabbet import CGMQ, Joint, Task

Labelled = list[tuple[Tensor, Tensor]]
BUDGETS = (0.40, 0.90, 1.40, 2.00, 5.00)


def task_of(batches: Labelled) -> Task:
    """Images with labels as a task that trains on them."""
    return Task(
        batches,
        forward=lambda m, b: m(b[0]),
        loss=lambda out, b: F.cross_entropy(out, b[1]),
        limit=sum(len(y) for _, y in batches),
    )


def lenet(seed: int, epochs: int = 8) -> nn.Module:
    """LeNet-5, trained in float: Adam, a cosine from 1e-3."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 32, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(1024, 512), nn.ReLU(), nn.Linear(512, 10),
    )  # fmt: skip
    x, y = mnist("train")
    adam = torch.optim.Adam(model.parameters(), 1e-3)
    steps = epochs * (len(x) // 128)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
    for _ in range(epochs):
        order = torch.randperm(len(x))
        for k in range(len(x) // 128):
            chosen = order[128 * k : 128 * (k + 1)]
            adam.zero_grad()
            F.cross_entropy(model(x[chosen]), y[chosen]).backward()
            adam.step()
            schedule.step()
    return model.eval()


def mnist(split: str) -> tuple[Tensor, Tensor]:
    """Images [n, 1, 28, 28] between 0 and 1, and labels."""
    images, labels = reader("load").mnist(split)
    return torch.from_numpy(images), torch.from_numpy(labels)


def batched(x: Tensor, y: Tensor, size: int) -> Labelled:
    """Pairs of images and labels."""
    return list(zip(x.split(size), y.split(size), strict=True))


def measured(
    model: nn.Module, budget: str, task: Task, method: rabbet.methods.Method, test: Labelled, seed: int
) -> tuple[float, rabbet.Result, float]:
    """Accuracy of the written file, the result, and seconds."""
    start = time.perf_counter()
    result = rabbet.compress(model, budget, task, method, seed=seed)
    seconds = time.perf_counter() - start
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "small.safetensors"
        result.save(path)
        return rabbet.accuracy(rabbet.load(path, model), test), result, seconds


def widths(result: rabbet.Result) -> str:
    """Bits of weights and inputs, a layer each."""
    return " ".join(f"{x.terms[0].grid.bits}/{x.act or 32}" for x in result.plan)


def on_lenet(methods: dict[str, CGMQ], budgets: tuple[float, ...], seeds: int) -> None:
    """A row for each method and budget, the mean of the seeds."""
    test = batched(*mnist("test"), 500)
    task = task_of(batched(*mnist("train"), 500))
    models = [lenet(seed) for seed in range(seeds)]
    whole = [rabbet.accuracy(m, test) for m in models]
    row("LeNet-5", "float32", "100", "100", f"{statistics.mean(whole):.2f}", _spread(whole), "-", "-")
    for label, method in methods.items():
        for share in budgets:
            runs = [measured(m, f"bops <= {share}%", task, method, test, k) for k, m in enumerate(models)]
            found, spent = [r[0] for r in runs], statistics.mean(r[2] for r in runs)
            most = max(r[1].cost.bops / r[1].float_cost.bops for r in runs)
            row("LeNet-5", label, share, f"{100 * most:.4f}", f"{statistics.mean(found):.2f}", _spread(found),
                f"{spent:.0f}", widths(runs[0][1]))  # fmt: skip


def _spread(values: list[float]) -> str:
    return f"{statistics.stdev(values):.2f}" if len(values) > 1 else "-"


def on_resnet(settings: CGMQ) -> None:
    """The same on ResNet-20, against uniform widths, `Joint` with the same training, and no training."""
    model, data, test = cifar(20)
    images, labels = reader("load").cifar10("train", 20000)
    task = task_of(batched(torch.from_numpy(images), torch.from_numpy(labels), 500))
    row("ResNet-20", "float32", "100", "100", f"{rabbet.accuracy(model, test):.2f}", "-", "-", "-")
    whole = settings.epochs * 2 + settings.finish
    for share in (0.5, 1.0, 2.0):
        budget = f"bops <= {share}%"
        runs: dict[str, Callable[[], tuple[float, rabbet.Result, float]]] = {
            "CGMQ": lambda budget=budget: measured(model, budget, task, settings, test, 0),
            "uniform, trained as long": lambda share=share: _fitted(model, _uniform(model, data, share), task, settings,
                                                                    whole, test),
            "Joint, trained as long": lambda budget=budget: _fitted(model, _joint(model, budget, data), task, settings,
                                                                    whole, test),
            "Joint, not trained": lambda budget=budget: measured(model, budget, Task(data), _dense(), test, 0),
        }  # fmt: skip
        for label, run in runs.items():
            found, result, seconds = run()
            spent = f"{100 * result.cost.bops / result.float_cost.bops:.4f}"
            row("ResNet-20", label, share, spent, f"{found:.2f}", "-", f"{seconds:.0f}", widths(result))


def _dense() -> Joint:
    return Joint(adapters=(), forms=(), grids=("2hc", "3c", "4c", "5c", "6c", "7c", "8c"))


def _joint(model: nn.Module, budget: str, data: list[Tensor]) -> rabbet.Plan:
    """The best of Joint's plans over uniform widths of inputs: the program chooses weights only."""
    for act in (8, 6, 5, 4, 3, 2):
        try:
            return rabbet.plan(model, budget, data, replace(_dense(), act=act))
        except rabbet.BudgetError:
            continue
    raise AssertionError


def _uniform(model: nn.Module, data: list[Tensor], share: float) -> rabbet.Plan:
    """The largest equal widths within the budget; of two, inputs get the wider."""
    for bits, act in ((4, 5), (4, 4), (3, 4), (3, 3), (2, 3), (2, 2)):
        grid = "2hc" if bits == 2 else f"{bits}c"
        names = [s.name for s in rabbet.survey(model, data[0])]
        plan = rabbet.Plan.parse("\n".join(f"{n} dense@{grid} | act@{act}" for n in names))
        cost = rabbet.price(model, plan, data)
        if cost.bops <= share / 100 * 1024 * cost.macs:
            return plan
    raise AssertionError


def _fitted(
    model: nn.Module, plan: rabbet.Plan, task: Task, method: CGMQ, epochs: int, test: Labelled
) -> tuple[float, rabbet.Result, float]:
    start = time.perf_counter()
    result = rabbet.fit(model, plan, task, replace(method, finish=epochs))
    return rabbet.accuracy(result.model, test), result, time.perf_counter() - start


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=("lenet", "directions", "resnet20"),
                        default=("lenet", "directions", "resnet20"))  # fmt: skip
    parser.add_argument("--budgets", nargs="+", type=float, default=BUDGETS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--finish", type=int, default=6)
    parser.add_argument("--steps", type=int, help="of an epoch; default: all images")
    args = parser.parse_args()
    print(f"{machine()}\n")
    head("network", "method", "budget, % of BOPs", "found, largest", "accuracy", "spread", "seconds", "weights/inputs")
    settings = CGMQ(epochs=args.epochs, finish=args.finish, steps=args.steps)
    if "lenet" in args.parts:
        on_lenet({"CGMQ": settings}, tuple(args.budgets), args.seeds)
    if "directions" in args.parts:
        cases = {f"direction {d}": replace(settings, direction=d) for d in (1, 2, 3)}
        cases |= {"continuous": replace(settings, updates="continuous")}
        cases |= {"as in the paper": replace(settings, direction=1, scales="tensor", two="ternary")}
        on_lenet(cases, (0.40, 0.90), args.seeds)
    if "resnet20" in args.parts:
        on_resnet(settings)


if __name__ == "__main__":
    main()
