"""CGMQ: LeNet-5 on MNIST and ResNet-20 on CIFAR-10 under budgets of bit operations.

    python benchmarks/cgmq.py [--parts lenet fc directions resnet20] [--seeds 3] [--epochs 18]
    # as in the paper: gates from the widest widths alone decide
    python benchmarks/cgmq.py --parts directions fc resnet20 --steps 50 --only dynamic
    python benchmarks/cgmq.py --parts directions fc --steps 50 --only "gates of weights"
    python benchmarks/cgmq.py --parts vgg7 --device cuda --epochs 120          # hours without a GPU

LeNet-5 (32C5-MP-64C5-MP-512FC-10, 4,267,008 MACs) and a fully connected network (300FC-100FC-10,
266,200 MACs) are trained in float first, by this script. Budgets are shares of the float32 bit
operations; the floor, everything at 2 bits, is 0.3906 %. Accuracy is that of the written file on
the test images (MNIST: 10,000, CIFAR-10: 5,000). A tenth of the training images chooses between
epochs; settings were chosen by its loss.
"""

import argparse
import functools
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import machine, reader
from frontier import cifar
from records import Records, Table, Values, add_options, spread, told
from torch import Tensor, nn

import rabbet
from rabbet import CGMQ, Joint, Task
from rabbet.core.cost import Cost
from rabbet.data.answers import scores_divergence
from rabbet.errors import BudgetError
from rabbet.methods import Method
from rabbet.methods.base import Fitted
from rabbet.train.tuning import Tuning
from rabbet.workpiece import Workpiece

Labelled = list[tuple[Tensor, Tensor]]
DENSE = Joint(adapters=(), forms=(), grids=("2hc", "3c", "4c", "5c", "6c", "7c", "8c"))
UNTRAINED = replace(DENSE, tuning=Tuning(steps=0))
BUDGETS = (0.40, 0.90, 1.40, 2.00, 5.00)


def moving(settings: CGMQ, **changed: Any) -> CGMQ:
    """The same number of epochs, with gates that move in the first two thirds.

    They start from the widest of the paper's widths unless told otherwise.
    """
    third = settings.finish // 3
    paper: dict[str, Any] = {"start": "widest", "widths": (2, 4, 8, 16, 32)}
    return replace(settings, epochs=third, finish=settings.finish - 2 * third, **paper | changed)


def on_held(result: rabbet.Result) -> str:
    """The loss of held-back images after training, from the notes of the result."""
    return next(
        (note.rpartition(" -> ")[2] for note in result.notes if "held-back loss" in note), "-"
    )


def task_of(batches: Labelled) -> Task:
    """Images with labels as a task that trains on them."""
    return Task(
        batches,
        forward=lambda m, b: m(b[0]),
        loss=lambda out, b: F.cross_entropy(out, b[1]),
        limit=sum(len(y) for _, y in batches),
    )


def lenet() -> nn.Module:
    """LeNet-5."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(1024, 512), nn.ReLU(), nn.Linear(512, 10),
    )  # fmt: skip


def fully_connected() -> nn.Module:
    """300FC-100FC-10 (LeCun et al., 1998)."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(),
        nn.Linear(100, 10),
    )  # fmt: skip


NETWORKS = {"LeNet-5": lenet, "300-100": fully_connected}


@functools.cache
def trained(network: str, seed: int, epochs: int = 8) -> nn.Module:
    """A network for MNIST, trained in float: Adam, a cosine schedule from 1e-3."""
    torch.manual_seed(seed)
    model = NETWORKS[network]()
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
    """Batches of images and labels."""
    return list(zip(x.split(size), y.split(size), strict=True))


def measured(
    model: nn.Module,
    budget: str,
    task: Task,
    method: Method,
    test: Labelled,
    seed: int,
) -> tuple[float, rabbet.Result, float]:
    """Accuracy of the written file, the result, and seconds."""
    start = time.perf_counter()
    result = rabbet.compress(model, budget, task, method, seed=seed)
    return _of_file(result, model, test), result, time.perf_counter() - start


class Watched:
    """`CGMQ` that remembers how its gates went."""

    def __init__(self, method: CGMQ) -> None:
        self.method = method
        self.landed = False

    def plan(self, piece: Workpiece, budget: rabbet.Budget) -> rabbet.Plan:
        """See `Method.plan`."""
        gating = self.method.search(piece, budget)
        # One state for each epoch, and one more if none of them kept the budget.
        self.landed = len(gating.shares) > 2 * self.method.epochs
        return gating.plan

    def fit(self, piece: Workpiece, plan: rabbet.Plan) -> Fitted:
        """See `Method.fit`."""
        return self.method.fit(piece, plan)


def fitted(
    model: nn.Module, plan: rabbet.Plan, task: Task, method: Method, test: Labelled
) -> tuple[float, rabbet.Result, float]:
    """The same for a given plan."""
    start = time.perf_counter()
    result = rabbet.fit(model, plan, task, method)
    return _of_file(result, model, test), result, time.perf_counter() - start


def _of_file(result: rabbet.Result, model: nn.Module, test: Labelled) -> float:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "small.safetensors"
        result.save(path)
        return rabbet.accuracy(rabbet.load(path, model), test)


def widths(result: rabbet.Result) -> str:
    """Bits of weights and inputs of each layer; for weights the mean where outputs differ."""
    pairs = []
    for line in result.plan:
        bits = [t.grid.bits for t in line.terms for _ in getattr(t.form, "rows", None) or (0,)]
        pairs.append(f"{statistics.mean(bits):.2g}/{line.act or 32}")
    return " ".join(pairs)


def short(result: rabbet.Result) -> str:
    """The widths of all layers but the first and the last, as ranges."""
    inner = list(result.plan)[1:-1]
    weights = [t.grid.bits for line in inner for t in line.terms]
    inputs = [line.act or 32 for line in inner]
    both = (("weights", weights), ("inputs", inputs))
    return ", ".join(
        f"{what} {min(bits)}" + (f" to {max(bits)}" if max(bits) > min(bits) else "")
        for what, bits in both
    )


def on_mnist(
    network: str, methods: dict[str, CGMQ], budgets: tuple[float, ...], table: Table, own: Values
) -> None:
    """A row for each method and budget: the mean over seeds."""
    assert isinstance(table.seed, list)
    seeds = table.seed

    @functools.cache
    def data() -> tuple[Labelled, Task, list[nn.Module]]:
        test = batched(*mnist("test"), 500)
        return test, task_of(batched(*mnist("train"), 500)), [trained(network, k) for k in seeds]

    def whole() -> Values:
        test, _, models = data()
        accuracies = [rabbet.accuracy(m, test) for m in models]
        return {"accuracy": statistics.mean(accuracies), "spread": _spread(accuracies)}

    def mean(method: CGMQ, share: float) -> Values:
        test, task, models = data()
        watched = [Watched(method) for _ in seeds]
        runs = [
            measured(m, f"bops <= {share}%", task, each, test, k)
            for k, m, each in zip(seeds, models, watched, strict=True)
        ]
        accuracies = [r[0] for r in runs]
        held = [float(on_held(r[1])) for r in runs if on_held(r[1]) != "-"]
        return {
            "found, largest": max(_per_cent(r[1], r[1].counted or r[1].cost) for r in runs),
            "stored, largest": max(_per_cent(r[1], r[1].cost) for r in runs),
            "accuracy": statistics.mean(accuracies),
            "spread": _spread(accuracies),
            "held-back loss": statistics.mean(held) if held else None,
            "seconds": statistics.mean(r[2] for r in runs),
            "landed in the end": sum(w.landed for w in watched) if method.epochs else None,
            "weights/inputs": widths(runs[0][1]),
            "weights/inputs of each seed": "; ".join(widths(r[1]) for r in runs),
        }

    table.row({"network": network, "method": "float32", "budget": None}, whole)
    for label, method in methods.items():
        for share in budgets:
            settings = {"network": network, "method": label, "budget": share} | own
            table.row(settings, functools.partial(mean, method, share))


def _per_cent(result: rabbet.Result, cost: Cost) -> float:
    """Bit operations of a cost in per cent of the float network's."""
    return 100 * cost.bops / result.float_cost.bops


def _spread(values: list[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def on_resnet(
    settings: CGMQ, paper: CGMQ, budgets: tuple[float, ...], table: Table, own: Values
) -> None:
    """The same on ResNet-20, against uniform widths and `Joint`, with and without that training.

    Both have 8 bits for the image and the input of the last layer; uniform widths, as is usual,
    also for the weights of these two layers.
    """
    model, data, test = cifar(20)
    images = torch.from_numpy(reader("load").cifar10("train", 20000)[0])
    task = Task(list(images.split(500)), limit=len(images))  # no labels: taught by its own outputs
    held = list(images[1600:2600].split(100))
    jobs = rabbet.Jobs()
    table.row(
        {"network": "ResNet-20", "chosen by": None, "training": "float32", "budget": None},
        lambda: {"accuracy": rabbet.accuracy(model, test)},
    )
    gates: dict[str, tuple[str, CGMQ]] = {
        "CGMQ": ("CGMQ, gates at rest", settings),
        "CGMQ, gates go on": (
            "CGMQ, gates go on",
            moving(settings, start="program", widths=settings.widths),
        ),
        "CGMQ, gates from the widest": ("CGMQ, gates from the widest", moving(settings)),
        "CGMQ, the paper's dynamic": ("CGMQ, the paper's dynamic", paper),
    }
    plain = {
        "trained": ("trained as long", task, settings),
        "tuned": ("only fitted", Task(data), DENSE),
        "not tuned": ("without training", Task(data), UNTRAINED),
    }
    for share in budgets:
        plans: dict[str, tuple[str, Callable[[], rabbet.Plan]]] = {
            "equal widths": ("uniform", functools.partial(_uniform, model, data, share)),
            "Joint": (
                "Joint",
                functools.cache(functools.partial(_joint, model, share, data, held, jobs)),
            ),
        }

        def line(
            chosen: str, training: str, label: str, run: Callable[[], Run], share: float = share
        ) -> None:
            row = {"network": "ResNet-20", "chosen by": chosen, "training": training}
            table.row(
                row | {"budget": share} | own, lambda: _found(*run()), f"{label}, {share:g} %"
            )

        for chosen, (label, method) in gates.items():
            budget = f"bops <= {share}%"
            run = functools.partial(measured, model, budget, task, method, test, 0)
            line(chosen, "trained", label, run)
        for chosen, (name, plan) in plans.items():
            for training, (how, batches, method) in plain.items():
                run = functools.partial(_of_plan, model, plan, batches, method, test)
                line(chosen, training, f"{name}, {how}", run)


Run = tuple[float, rabbet.Result, float]


def _of_plan(
    model: nn.Module, plan: Callable[[], rabbet.Plan], task: Task, method: Method, test: Labelled
) -> Run:
    return fitted(model, plan(), task, method, test)


def _found(accuracy: float, result: rabbet.Result, seconds: float) -> Values:
    """What a row of one run shows."""
    loss = on_held(result)
    return {
        "found": 100 * result.cost.bops / result.float_cost.bops,
        "file bytes": result.cost.bytes,
        "accuracy": accuracy,
        "held-back loss": None if loss == "-" else float(loss),
        "seconds": seconds,
        "widths": short(result),
        "weights/inputs": widths(result),
    }


def _share(model: nn.Module, plan: rabbet.Plan, data: list[Tensor]) -> float:
    """Bit operations in per cent of the float network's."""
    cost = rabbet.price(model, plan, data)
    return 100 * cost.bops / (1024 * sum(s.macs for s in rabbet.survey(model, data)))


def _ended(plan: rabbet.Plan) -> rabbet.Plan:
    """The same plan with 8 bits for the inputs of the first and the last layer."""
    ends = plan.layers[0], plan.layers[-1]
    return rabbet.Plan(tuple(replace(x, act=8) if x in ends else x for x in plan))


def _joint(
    model: nn.Module, share: float, data: list[Tensor], held: list[Tensor], jobs: rabbet.Jobs
) -> rabbet.Plan:
    """The best plan over equal widths of inputs, by held-back images; weights by the program."""
    candidates = []
    for act in (8, 6, 5, 4, 3, 2):
        room, plan = share, None
        try:
            while plan is None or (over := _share(model, plan, data) - share) > 0:
                room -= 0 if plan is None else over
                plan = _ended(
                    rabbet.plan(
                        model, f"bops <= {room:.6f}%", data, replace(DENSE, act=act), jobs=jobs
                    )
                )
        except BudgetError:
            continue
        result = rabbet.fit(model, plan, data, UNTRAINED, jobs=jobs)
        with torch.no_grad():
            apart = [float(scores_divergence(result.model(x), model(x))) for x in held]
        candidates.append((statistics.mean(apart), act, plan))
    return min(candidates)[2]


def _uniform(model: nn.Module, data: list[Tensor], share: float) -> rabbet.Plan:
    """The largest equal widths within the budget; of two, inputs get the wider."""
    names = [s.name for s in rabbet.survey(model, data)]
    for bits, act in ((4, 5), (4, 4), (3, 4), (3, 3), (2, 3), (2, 2)):
        grid = "2hc" if bits == 2 else f"{bits}c"
        inner = (f"{n} dense@{grid} | act@{act}" for n in names[1:-1])
        plan = rabbet.Plan.parse(
            "\n".join([f"{names[0]} dense@8c | act@8", *inner, f"{names[-1]} dense@8c | act@8"])
        )
        if _share(model, plan, data) <= share:
            return plan
    raise AssertionError


def vgg(device: str, epochs: int) -> nn.Module:
    """VGG-7, trained in float on crops and flips.

    2x128C3-MP-2x256C3-MP-2x512C3-MP-1024FC-10, 615,917,568 MACs.
    """
    torch.manual_seed(0)
    blocks: list[nn.Module] = []
    for ins, outs in ((3, 128), (128, 256), (256, 512)):
        for width in (ins, outs):
            blocks += [
                nn.Conv2d(width, outs, 3, padding=1, bias=False),
                nn.BatchNorm2d(outs),
                nn.ReLU(),
            ]
        blocks.append(nn.MaxPool2d(2))
    head = (
        nn.Flatten(),
        nn.Linear(8192, 1024, bias=False),
        nn.BatchNorm1d(1024),
        nn.ReLU(),
        nn.Linear(1024, 10),
    )
    model = nn.Sequential(*blocks, *head).to(device)
    x, y = (torch.from_numpy(a).to(device) for a in reader("load").cifar10("train", 20000))
    adam = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.05)
    count = len(x) // 128
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, epochs * count)
    for _ in range(epochs):
        for chosen in torch.randperm(len(x), device=device)[: 128 * count].split(128):
            adam.zero_grad()
            F.cross_entropy(model(_moved(x[chosen])), y[chosen], label_smoothing=0.1).backward()
            adam.step()
            schedule.step()
    return model.eval()


def _moved(x: Tensor) -> Tensor:
    """Images shifted by up to 4 pixels, half of them mirrored."""
    wide = F.pad(x, (4, 4, 4, 4))
    down, right = torch.randint(9, (2, len(x), 1, 1), device=x.device)
    rows = (torch.arange(32, device=x.device)[:, None] + down).expand(-1, -1, 32)
    columns = torch.arange(32, device=x.device)[None] + right
    columns = torch.where(
        torch.rand(len(x), 1, 1, device=x.device) < 0.5, columns.flip(-1), columns
    )
    each = torch.arange(len(x), device=x.device)[:, None, None]
    return wide[each, :, rows, columns.expand_as(rows)].permute(0, 3, 1, 2)


def on_vgg(settings: CGMQ, args: argparse.Namespace, table: Table, own: Values) -> None:
    """VGG-7 on CIFAR-10, taught by its own float outputs on augmented images, without labels."""
    device = args.device
    images, _ = reader("load").cifar10("train", 20000)
    data = list(torch.from_numpy(images).to(device).split(500))
    test = [(x.to(device), y.to(device)) for x, y in cifar(20)[2]]
    model = functools.cache(functools.partial(vgg, device, args.float_epochs))
    table.row(
        {"network": "VGG-7", "chosen by": None, "training": "float32", "budget": None} | own,
        lambda: {"accuracy": rabbet.accuracy(model(), test)},
    )

    def run(share: float) -> Values:
        task = Task(data, limit=len(images))
        return _found(*measured(model(), f"bops <= {share}%", task, settings, test, 0))

    for share in (0.40, 0.51, 1.0):
        row = {"network": "VGG-7", "chosen by": "CGMQ", "training": "trained", "budget": share}
        table.row(row | own, functools.partial(run, share))


MEANS = {
    "network": "", "method": "", "budget": "", "found, largest": ".4f", "stored, largest": ".4f",
    "accuracy": ".2f",
    "spread": ".2f", "held-back loss": ".4f", "seconds": ".0f", "landed in the end": "",
    "weights/inputs": "",
}  # fmt: skip
ONE_RUN = {
    "network": "", "chosen by": "", "training": "", "budget": "", "found": ".4f", "file bytes": ",",
    "accuracy": ".2f", "held-back loss": ".4f", "seconds": ".0f", "weights/inputs": "",
}  # fmt: skip
MNIST = (
    "MNIST: a tenth of the training images chooses between epochs; 10,000 test images to measure"
)
CIFAR = (
    "CIFAR-10: 20,000 training images without labels, 1,600 of them to tune; 5,000 test images to "
    "measure"
)
PARTS = ("lenet", "fc", "directions", "resnet20")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=(*PARTS, "vgg7"), default=PARTS)
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="of vgg7"
    )
    parser.add_argument("--float-epochs", type=int, default=60, help="of vgg7 in float")
    parser.add_argument("--budgets", nargs="+", type=float, help="default: all of theirs")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=18, help="in all")
    parser.add_argument("--steps", type=int, help="of an epoch; default: all images")
    parser.add_argument("--rate", type=float, help="default: that of CGMQ")
    add_options(parser, jobs=True)
    args = parser.parse_args()
    spread(args)
    print(f"{machine()}")
    records, own = Records("cgmq", args), told(parser, args, "epochs", "steps", "rate")
    settings = CGMQ(finish=args.epochs, steps=args.steps, rate=args.rate)
    paper = moving(CGMQ.paper(finish=args.epochs, steps=args.steps, rate=args.rate))
    dynamic = {f"the paper's dynamic, direction {d}": replace(paper, direction=d) for d in (1, 2)}
    # Found is then what gates of weights count; what is stored has more.
    dynamic |= {
        f"gates of weights, direction {d}": replace(
            paper, direction=d, granularity="weight", counts="gates"
        )
        for d in (1, 2)
    }
    seeds = list(range(args.seeds))
    many = Table(records, "lenet", MEANS, MNIST, seeds)
    if "lenet" in args.parts:
        on_mnist("LeNet-5", {"CGMQ": settings}, tuple(args.budgets or BUDGETS), many, own)
    if "fc" in args.parts:
        flat = Table(records, "fc", MEANS, MNIST, seeds)
        on_mnist("300-100", {"CGMQ": settings} | dynamic, tuple(args.budgets or BUDGETS), flat, own)
    if "directions" in args.parts:
        cases = {
            f"direction {d}, {what}": moving(settings, direction=d)
            for d, what in enumerate(
                ("the gradient", "gradient and size", "the measured harm of a width"), 1
            )
        }
        together = "continuous: direction 3, weights and gates in the same epochs"
        cases |= {together: moving(settings, updates="continuous")}
        cases |= {"gates of channels": moving(settings, granularity="channel")}
        cases |= dynamic | {"where the program starts": settings}
        on_mnist("LeNet-5", cases, tuple(args.budgets or (0.40, 0.90)), many, own)
    if "resnet20" in args.parts:
        one = Table(records, "resnet20", ONE_RUN, CIFAR)
        on_resnet(settings, paper, tuple(args.budgets or (0.5, 1.0, 2.0)), one, own)
    if "vgg7" in args.parts:
        own |= told(parser, args, "float_epochs")
        on_vgg(settings, args, Table(records, "vgg7", ONE_RUN, CIFAR), own)


if __name__ == "__main__":
    main()
