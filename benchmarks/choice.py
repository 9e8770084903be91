r"""The plan that is found with few candidates solved, against the one with all of them solved.

    python benchmarks/choice.py
    python benchmarks/choice.py --nets resnet20 --budgets "bits <= 2"

A plan's harm is the program's objective: the sum over its lines of what each, solved, does to the
network's output, as `rabbet.choose.sensitivity.output_errors` measures it. "Told" is the plan of
least harm as far as it is foretold before anything is solved, "search" what `Joint` takes, "all"
what it would take with every candidate solved and measured; harm is relative to that of "all".
Seconds are of the processor, on one thread; those of "all" are once for all budgets. Accuracy: of
the network that is fitted to the plan without tuning, on the first 5,000 test images.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import torch
from common import machine
from frontier import cifar
from records import Group, Records, Table, Values, add_options

import rabbet
from rabbet import Budget, Jobs, Plan, Task
from rabbet.choose.program import Allocator, Option, allocate
from rabbet.choose.scoring import scored
from rabbet.choose.search import Chooser, foretold
from rabbet.core.plan import LayerPlan
from rabbet.methods import QUALITY
from rabbet.methods.joint import Joint
from rabbet.workpiece import Workpiece

T = TypeVar("T")
BUDGETS = ("bits <= 4", "bits <= 3", "bits <= 2", "macs <= 50%, bytes <= 13%")
COLUMNS = {
    "network": "", "budget": "", "plan": "", "harm": ".4f", "lines as all": "", "layers": "",
    "options": ",",
    "processor seconds": ".1f", "accuracy": ".2f",
}  # fmt: skip
CIFAR = (
    "CIFAR-10: 1,600 training images without labels to calibrate, the first 5,000 test images to "
    "measure"
)


def timed(run: Callable[[], T]) -> tuple[T, float]:
    """What a call returns, and its seconds of the processor."""
    start = time.process_time()
    result = run()
    return result, time.process_time() - start


class Tried:
    """One network: its options, what each does when it is solved, and how plans of it do."""

    def __init__(self, depth: int, method: Joint, seed: int) -> None:
        self.model, self.data, self.test = cifar(depth)
        self.method, self.seed = method, seed
        self.jobs = Jobs(progress=lambda *_: None)
        self.piece = self.fresh(self.jobs)
        self.menus = {site.name: method.menu(site) for site in self.piece.survey}
        self.table = [
            [
                Option(line, self.piece.layer_cost(site, line))
                for terms in self.menus[site.name]
                for line in (LayerPlan(site.name, terms, method.act),)
            ]
            for site in self.piece.survey
        ]
        self.scores, self.seconds = timed(lambda: scored(self.piece, self.menus))

    def fresh(self, jobs: Jobs) -> Workpiece:
        """The network with nothing solved."""
        piece = Workpiece.of(self.model, Task(self.data), jobs, self.seed)
        piece.moments()
        return piece

    def harm(self, plan: Plan) -> float:
        """What the lines of a plan do, all in all."""
        total = 0.0
        for row, scores, line in zip(self.table, self.scores, plan, strict=True):
            total += scores[[option.plan for option in row].index(line)]
        return total

    def accuracy(self, plan: Plan) -> float:
        """Of the network on a plan."""
        result = rabbet.fit(
            self.model, plan, self.data, self.method, seed=self.seed, jobs=self.jobs
        )
        return rabbet.accuracy(result.model, self.test)

    def plans(self, budget: Budget) -> Group:
        """The three plans for a budget."""
        most, piece = allocate(self.scores, self.table, budget, self.piece), self.fresh(Jobs())
        told, seconds = timed(lambda: foretold(piece, self.table))
        first = allocate([layer.scores() for layer in told], self.table, budget, piece)
        fresh = self.fresh(Jobs())
        chooser = Chooser(fresh, Allocator(self.table, fresh))
        (found,), search_seconds = timed(lambda: chooser.plans([budget]))
        rows: list[tuple[str, Plan, float]] = [
            ("told", first, seconds), ("search", found, search_seconds), ("all", most, self.seconds)
        ]  # fmt: skip
        least = self.harm(most)
        return [
            (
                {"plan": name},
                {
                    "harm": self.harm(plan) / least,
                    "lines as all": sum(a == b for a, b in zip(plan, most, strict=True)),
                    "layers": len(self.table),
                    "options": sum(map(len, self.table)),
                    "processor seconds": spent,
                    "accuracy": self.accuracy(plan),
                    "lines": str(plan),
                },
            )
            for name, plan, spent in rows
        ]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nets", nargs="+", choices=("20", "56"), default=["20", "56"])
    parser.add_argument("--budgets", nargs="+", default=BUDGETS)
    parser.add_argument("--seed", type=int, default=0)
    add_options(parser)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"seed {args.seed}; {machine()}")
    table = Table(Records("choice", args), "plans", COLUMNS, CIFAR, args.seed)
    for depth in args.nets:
        tried: list[Tried] = []

        def measured(text: str, depth: str = depth, tried: list[Tried] = tried) -> Group:
            tried or tried.append(Tried(int(depth), QUALITY["fast"], args.seed))
            shared: Values = {"network": f"resnet{depth}", "budget": text}
            return [(shared | own, values) for own, values in tried[0].plans(Budget.parse(text))]

        for text in args.budgets:
            table.rows({"network": f"resnet{depth}", "budget": text}, partial(measured, text))


if __name__ == "__main__":
    main()
