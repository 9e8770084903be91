r"""Many budgets at once: how long a frontier takes, what its intervals hold, what a drop finds.

    python benchmarks/budgets.py --nets resnet20 digits --parts frontier coverage drop
    python benchmarks/budgets.py --nets resnet56 --parts frontier drop

frontier: 200 points along bytes. Processor seconds on one thread: of solving and measuring
candidates, and of the integer program at all points once that is done ("choosing"). "As compress":
of five points, how many have the plan that `rabbet.plan` chooses for that budget alone, and how
many times the harm of the frontier's plan that other plan has, at most.
coverage: nine points are fitted and measured; then eight others between them. The share of those
whose measure lies within the interval that was told (90 % is the goal).
drop: the least bytes whose measured drop is at most so many points, in at most four fits, and the
drop on images that choosing never saw.

Networks are compressed with quality "fast". ResNets: choosing measures on the first 2,500 test
images of CIFAR-10, the end on the other 2,500: the networks were trained on all training images.
Digits: on the training images, which the network has seen, and on the held-out ones. ATIS: the
Transformer of recurrent.py, by slot F1 on dev, and at the end on test; `--keep` names the folder in
which recurrent.py keeps it.
"""

import argparse
import itertools
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import recurrent
import torch
from common import machine
from frontier import Labelled, cifar
from records import Records, Table, Values, add_options
from sentences import Sentences, corpus, score
from torch import nn

import rabbet
from rabbet import Frontier, Jobs, Task, demo
from rabbet.data.accuracy import deviation
from rabbet.methods import QUALITY

FAST = QUALITY["fast"]
POINTS, KNOWN = 200, 9
DROPS = (0.5, 1.0)
DATA = "see the head of the script"
COLUMNS = {
    "frontier": {
        "network": "", "layers": "", "points": "", "scoring": ".1f", "choosing": ".1f",
        "as compress": "", "harm of the other": ".4f",
    },
    "coverage": {
        "network": "", "measured": "", "others": "", "inside": "", "mean width": ".2f",
        "largest miss": ".2f",
    },
    "drop": {
        "network": "", "asked": "", "bytes": ",", "of float32": ".2f", "fits": "",
        "drop there": ".2f", "drop on the rest": ".2f", "standard error": ".2f",
    },
}  # fmt: skip

Measure = Callable[[nn.Module], float]


@dataclass(frozen=True)
class Net:
    """A network, what calibrates it, what choosing and the end measure, of how many examples."""

    model: nn.Module
    data: Any
    held: Measure
    rest: Measure
    counts: tuple[int, int]

    @classmethod
    def of(cls, model: nn.Module, data: Any, held: Labelled, rest: Labelled) -> "Net":
        """With accuracies."""
        counts = (sum(len(y) for _, y in held), sum(len(y) for _, y in rest))
        each = (partial(rabbet.accuracy, batches=batches) for batches in (held, rest))
        return cls(model, data, *each, counts)


def resnet(depth: int, _: Path | None) -> Net:
    """A ResNet on CIFAR-10."""
    model, data, test = cifar(depth)
    return Net.of(model, data, test[:10], test[10:])


def digits(_: Path | None) -> Net:
    """The demo network."""
    return Net.of(demo.model(), demo.calibration(), demo.labelled(), demo.test())


def atis(keep: Path | None) -> Net:
    """A Transformer that tags the words of sentences."""
    if keep is None:
        raise SystemExit("atis needs --keep FOLDER, where its network is kept, or trained")
    data = corpus()
    shown = [(ids, mask) for ids, mask, *_ in data.train.batches(32, random.Random(0))[:32]]

    def slots(model: nn.Module, part: Sentences) -> float:
        return score(model, part).slots

    return Net(
        recurrent.trained("Transformer", data, 0, keep), Task(shown, outputs="scores"),
        partial(slots, part=data.dev), partial(slots, part=data.test),
        (len(data.dev.items), len(data.test.items)),
    )  # fmt: skip


NETS: dict[str, Callable[[Path | None], Net]] = {
    "digits": digits,
    "resnet20": partial(resnet, 20),
    "resnet56": partial(resnet, 56),
    "atis": atis,
}


class Bench:
    """One network, and its frontier, which is found when it is first asked for."""

    def __init__(self, net: Net) -> None:
        self.net = net
        self.found: Frontier | None = None
        self.seconds = 0.0

    @property
    def frontier(self) -> Frontier:
        """200 points along bytes."""
        if self.found is None:
            start = time.process_time()
            jobs = Jobs(progress=lambda *_: None)
            self.found = rabbet.frontier(
                self.net.model, self.net.data, points=POINTS, method=FAST, jobs=jobs
            )
            self.seconds = time.process_time() - start
        return self.found

    def times(self) -> Values:
        """The row of a frontier."""
        frontier = self.frontier
        budgets = [rabbet.Budget((point.limit,)) for point in frontier.points]
        start = time.process_time()
        again = frontier.searched.plans(budgets)
        choosing = time.process_time() - start
        assert again == [point.plan for point in frontier.points]
        some = frontier.points[len(frontier.points) // 10 :: len(frontier.points) // 5][:5]
        others = [rabbet.plan(self.net.model, p.limit.text, self.net.data, FAST) for p in some]
        harms = [
            frontier.searched.harm(plan) / point.harm
            for plan, point in zip(others, some, strict=True)
            if plan != point.plan
        ]
        return {
            "layers": len(frontier.survey.sites),
            "points": len(frontier.points),
            "scoring": self.seconds - choosing,
            "choosing": choosing,
            "as compress": f"{len(some) - len(harms)} of {len(some)}",
            "harm of the other": max(harms, default=1.0),
        }

    def coverage(self) -> Values:
        """The row of intervals."""
        told = self.frontier.measure(KNOWN, self.net.held, self.net.counts[0])
        known = [k for k, point in enumerate(told.points) if point.measured]
        between = [(a + b) // 2 for a, b in itertools.pairwise(known)]
        inside, widths, misses = 0, [], [0.0]
        for k in between:
            point = told.points[k]
            assert point.accuracy is not None
            _, low, high = point.accuracy
            value = self.net.held(told.fit(point).model)
            inside += low <= value <= high
            widths.append(high - low)
            misses.append(max(low - value, value - high, 0.0))
        return {
            "measured": len(known),
            "others": len(between),
            "inside": inside,
            "mean width": sum(widths) / len(widths),
            "largest miss": max(misses),
        }

    def least(self, drop: float) -> Values:
        """The row of a drop."""
        found = self.frontier.within(drop, self.net.held, self.net.counts[0])
        before, after = map(self.net.rest, (self.net.model, found.result.model))
        cost = found.result.cost
        return {
            "bytes": cost.bytes,
            "of float32": 100 * cost.bytes / found.result.float_cost.bytes,
            "fits": len(found.tried),
            "drop there": found.drop,
            "drop on the rest": before - after,
            "standard error": deviation(self.net.counts[1], before, after),
        }


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nets", nargs="+", choices=NETS, default=["digits", "resnet20"])
    parser.add_argument("--parts", nargs="+", choices=COLUMNS, default=list(COLUMNS))
    parser.add_argument("--keep", type=Path, help="folder for trained networks")
    add_options(parser)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"seed 0; {machine()}")
    records = Records("budgets", args)
    tables = {part: Table(records, part, COLUMNS[part], DATA) for part in args.parts}
    for name in args.nets:
        bench = Bench(NETS[name](args.keep))
        if "frontier" in tables:
            tables["frontier"].row({"network": name}, bench.times)
        if "coverage" in tables:
            tables["coverage"].row({"network": name}, bench.coverage)
        for drop in DROPS if "drop" in tables else ():
            tables["drop"].row({"network": name, "asked": drop}, partial(bench.least, drop))


if __name__ == "__main__":
    main()
