"""Random trials until time is up: what broke, and the seed that breaks it again.

    python benchmarks/endurance.py [--minutes 10] [--seed 0] [--only networks files ...]

The rows take turns, each with the next seed, so that `--only NAME --seed N --minutes 0` repeats
trial N of a row. Exits with 1 if anything broke. A new row is a function of a seed and an empty
folder that raises `BrokenPromiseError` with what broke, or any error, and a line in ROWS.
"""

import argparse
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from records import Group, Records, Table, add_options
from torch import Tensor, nn

from rabbet import ADMM, CGMQ, TTQAT, Budget, CoRa, Jobs, Joint, Result, Task, compress, fit, load
from rabbet.choose.program import Option, allocate, picked, require_feasible
from rabbet.cli.stored import Stored
from rabbet.core.budget import METRICS
from rabbet.core.cost import Cost
from rabbet.core.plan import LayerPlan
from rabbet.errors import BudgetError, FileError, PlanError, RabbetError
from rabbet.methods import Method
from rabbet.methods.cora.search import Ranking
from rabbet.report.text import plain, report_parts
from rabbet.train.tuning import Tuning
from rabbet.workpiece import Workpiece

UNTUNED = Tuning(steps=0)
BUDGETS = 8  # on every table of options


class BrokenPromiseError(Exception):
    """What a trial found."""


def require(holds: bool, what: str) -> None:
    """Raise BrokenPromiseError unless a promise holds."""
    if not holds:
        raise BrokenPromiseError(what)


# Random networks under random budgets


class Words(nn.Module):
    """A table, a layer over its rows, and a head."""

    def __init__(self, rows: int, width: int, classes: int) -> None:
        super().__init__()
        self.table, self.body = nn.Embedding(rows, width), nn.Linear(width, width)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of sentences [n, t]."""
        return self.head(self.norm(torch.relu(self.body(self.table(x)))).mean(1))


def random_network(draw: random.Random) -> tuple[nn.Module, list[Tensor]]:
    """A small network with the numbers of the global generator, and two batches for it."""
    kind = draw.choice(["vectors", "images", "words"])
    if kind == "words":
        rows = draw.randint(2, 60)
        words = Words(rows, 4 * draw.randint(1, 6), draw.randint(1, 7))
        return words.eval(), [torch.randint(rows, (6, 5)) for _ in range(2)]
    width = draw.randint(1, 9)
    layers: list[nn.Module] = []
    if kind == "images":
        batches, channels = [torch.randn(4, width, 6, 6) for _ in range(2)], width
        for _ in range(draw.randint(1, 3)):
            out = draw.choice([2, 4, 8, 13])
            size, stride = draw.choice([1, 3]), draw.choice([1, 1, 2])
            conv = nn.Conv2d(channels, out, size, stride, size // 2, bias=draw.random() < 0.5)
            norm = [nn.BatchNorm2d(out)] if draw.random() < 0.6 else []
            layers += [conv, *norm, nn.ReLU(inplace=draw.random() < 0.5)]
            channels = out
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, draw.randint(1, 9))]
    else:
        batches, features = [torch.randn(12, width) for _ in range(2)], width
        for _ in range(draw.randint(1, 4)):
            out = draw.randint(1, 24)
            layers += [nn.Linear(features, out), nn.Tanh()]
            features = out
    network = nn.Sequential(*layers)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean = torch.randn(module.num_features) * 0.3
            module.running_var = torch.rand(module.num_features) + 0.5
    return network.eval(), batches


METHODS: tuple[Callable[[], Method], ...] = (
    lambda: Joint(tuning=UNTUNED),
    lambda: Joint(grids=("2hc", "4c", "4g8z", "8c"), tuning=Tuning(steps=2, batch=4)),
    lambda: Joint(grids=("tc", "3c", "5"), adapters=(), forms=(), act=None, tuning=UNTUNED),
    lambda: ADMM(sweeps=1, inner=1),
    lambda: CoRa(ranking=Ranking(steps=2), tuning=UNTUNED),
    lambda: CGMQ(finish=1, steps=1, batch=6),
    lambda: TTQAT(epochs=1, finish=1),
)


def networks(seed: int, folder: Path) -> None:
    """The budget is kept, the network is untouched, and the file loads to the last bit."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    network, batches = random_network(draw)
    metric = draw.choice(["bytes", "bits", "bops", "macs", "bpw"])
    clauses = [f"{metric} <= {draw.choice([2, 5, 10, 20, 40, 100, 200])}%"]
    if draw.random() < 0.3:
        clauses.append(f"bits <= {draw.randint(2, 8)}") if metric != "bits" else None
    budget, method = ", ".join(clauses), draw.choice(METHODS)()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    try:
        result = compress(network, budget, batches, method)
    except (BudgetError, PlanError):
        return  # refused in words; that this is right is what `budgets` tries
    same = all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    require(same, "the caller's network was changed")
    path = folder / "f.safetensors"
    size = result.save(path)
    require(size == path.stat().st_size == result.cost.bytes, "the price is not the file's length")
    Budget.parse(budget).check(result.cost, result.float_cost)
    again, ours = load(path, network), result.model.state_dict()
    require(ours.keys() == again.state_dict().keys(), "names differ after loading")
    differing = [n for n, value in again.state_dict().items() if not torch.equal(value, ours[n])]
    require(not differing, f"differs after loading: {differing}")
    for batch in batches:
        with torch.no_grad():
            outputs = result.model(batch), again(batch)
        require(torch.equal(*outputs), "outputs differ after loading")


# Mutated files


class Everything(nn.Module):
    """A norm that is folded, an adapter, ternary codes, groups with zero points, a table."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4)
        self.conv, self.bn = nn.Conv1d(4, 4, 3, padding=1, bias=False), nn.BatchNorm1d(4)
        self.fc, self.free, self.norm = nn.Linear(4, 6), nn.Linear(6, 2), nn.LayerNorm(2)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of sentences [n, t]."""
        y = torch.relu(self.bn(self.conv(self.table(x).mT))).mean(2)
        return self.norm(self.free(torch.relu(self.fc(y))))


EVERYTHING = """table ttm[2]@4
conv dense@2hc + lowrank[2]@8c | act@4
fc dense[0-3]@4g2z + dense[4-5]@tc + tt[2]@3 | act@8"""
CLAIMS = (
    "0",
    "-1",
    "9" * 40,
    "9" * 4000,
    "1e999",
    "true",
    "null",
    "[]",
    "{}",
    '"\\ud800"',
    "[" * 900,
)


def whole_file(folder: Path) -> tuple[nn.Module, bytes]:
    """A network and its file."""
    torch.manual_seed(0)
    network, path = Everything().eval(), folder / "whole"
    fit(network, EVERYTHING, [torch.arange(14).view(2, 7) % 7], Joint(tuning=UNTUNED)).save(path)
    return network, path.read_bytes()


def without_checksum(data: bytes) -> bytes:
    """The file as it was written before there were checksums."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header["__metadata__"].pop("crc32", None)
    return framed(json.dumps(header).encode(), data[8 + size :])


def framed(text: bytes, values: bytes) -> bytes:
    """A file from the text of its header and its values."""
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + values


def restamped(data: bytes) -> bytes:
    """The file with a checksum that is right, where it has one at all."""
    if data[34:42] != b"00000000" and not data[8:34].endswith(b'"crc32":"'):
        return data
    zeroed = data[:34] + b"00000000" + data[42:]
    return data[:34] + b"%08x" % zlib.crc32(zeroed) + data[42:]


def mutated(draw: random.Random, data: bytes) -> bytes:
    """A file with a few bytes, or one claim of its header, changed."""
    kind = draw.choice(["flip", "flip", "cut", "insert", "swap", "claim", "claim", "header"])
    at = draw.randrange(len(data))
    size = int.from_bytes(data[:8], "little")
    if kind == "flip":
        changed = bytearray(data)
        for _ in range(draw.randint(1, 4)):
            changed[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        return bytes(changed)
    if kind == "cut":
        return data[:at]
    if kind == "insert":
        return data[:at] + draw.randbytes(draw.randint(1, 9)) + data[at:]
    if kind == "swap":
        other, count = draw.randrange(len(data)), draw.randint(1, 16)
        return data[:at] + data[other : other + count] + data[at + count :]
    text = data[8 : 8 + size]
    if kind == "header":
        place = draw.randrange(len(text))
        return framed(text[:place] + draw.randbytes(2) + text[place + 2 :], data[8 + size :])
    # A number, somewhere in the header, the survey or the plan, claims something else.
    digits = [k for k, c in enumerate(text) if chr(c).isdigit()]
    place, claim = draw.choice(digits), draw.choice(CLAIMS).encode()
    return framed(text[:place] + claim + text[place + 1 :], data[8 + size :])


def files(seed: int, folder: Path) -> None:
    """A mutated file is refused by a FileError or reads like the whole one; older ones run."""
    draw = random.Random(seed)
    network, data = whole_file(folder)
    expected = load(folder / "whole", network).state_dict()
    path = folder / "f.safetensors"
    for _ in range(20):
        old = draw.random() < 0.5
        changed = mutated(draw, without_checksum(data) if old else data)
        if not old and draw.random() < 0.3:
            changed = restamped(changed)
            old = True
        path.write_bytes(changed)
        for read in (lambda: load(path, network), lambda: _shown(path)):
            try:
                loaded = read()
            except FileError:
                continue
            except RabbetError as e:
                raise BrokenPromiseError(f"not a FileError: {type(e).__name__}: {e}") from e
            if isinstance(loaded, nn.Module) and not old and changed != data:
                state = loaded.state_dict()
                same = all(torch.equal(value, expected[n]) for n, value in state.items())
                require(same, "loads other numbers than were written")
                raise BrokenPromiseError("a changed file passes its checksum")


def _shown(path: Path) -> str:
    """What `rabbet show` says."""
    stored = Stored.read(path)
    return plain(report_parts(stored.survey, stored.plan, stored.cost, stored.float_cost))


# Budgets against brute force


def random_table(draw: random.Random) -> tuple[Workpiece, list[list[Option]]]:
    """A tiny network, and a few options for each of its layers."""
    network: nn.Module
    widths = [draw.randint(1, draw.choice([6, 40])) for _ in range(4)]
    layers: list[nn.Module] = [nn.Linear(*widths[:2]), nn.Tanh(), nn.Linear(*widths[1:3])]
    layers += [nn.Tanh(), nn.Linear(*widths[2:])] if draw.random() < 0.5 else []
    network = nn.Sequential(*layers).eval()
    if draw.random() < 0.3:  # where it lies in the file depends on the plan
        spare = torch.zeros(draw.randint(1, 60), dtype=torch.float16)
        network.register_buffer("spare", spare)
    piece = Workpiece.of(network, Task([torch.randn(4, widths[0])]), Jobs())
    method = Joint(act=draw.choice([None, 8, 8, 4]))
    table = []
    for site in piece.survey:
        menu = method.menu(site)
        chosen = draw.sample(menu, min(len(menu), draw.randint(1, 8)))
        lines = [LayerPlan(site.name, terms, method.act) for terms in chosen]
        if method.act is not None and draw.random() < 0.2:
            lines.append(LayerPlan(site.name, chosen[0], None))
        table.append([Option(line, piece.layer_cost(site, line)) for line in lines])
    return piece, table


def random_budget(draw: random.Random, known: Cost) -> Budget:
    """One to four limits near what a known plan costs, mostly without any slack."""
    clauses = []
    for metric in draw.sample(["bytes", "macs", "bops", "bits", "bpw"], draw.choice([1, 2, 3, 4])):
        amount = METRICS[metric].amount(known)
        if metric in ("bits", "bpw"):
            clauses.append(f"{metric} <= {amount / known.weights + 0.001:.6f}")
        else:
            clauses.append(f"{metric} <= {max(amount + draw.choice([0, 0, 0, -1, -8, 5]), 1)}")
    return Budget.parse(", ".join(clauses))


def budgets(seed: int, folder: Path) -> None:
    """No budget that some choice keeps is refused, and no choice is better than the one made."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    piece, table = random_table(draw)
    power = draw.choice([1, 8])
    scores = [[draw.random() ** power * 10 ** draw.uniform(-6, 1) for _ in row] for row in table]
    choices = list(itertools.product(*(range(len(row)) for row in table)))
    costs = [piece.cost(picked(table, choice)) for choice in choices]
    for _ in range(BUDGETS):
        budget = random_budget(draw, draw.choice(costs))
        keeping = [
            sum(row[k] for row, k in zip(scores, choice, strict=True))
            for choice, cost in zip(choices, costs, strict=True)
            if not any(limit.broken_by(cost, piece.float_cost) for limit in budget.limits)
        ]
        try:
            require_feasible(table, budget, piece)
            plan = allocate(scores, table, budget, piece)
        except BudgetError as e:
            require(not keeping, f"{budget} is refused though {len(keeping)} plans keep it: {e}")
            _require_least(str(e), budget, costs)
            continue
        budget.check(piece.cost(plan), piece.float_cost)
        harm = {option.plan: s for row, own in zip(table, scores, strict=True)
                for option, s in zip(row, own, strict=True)}  # fmt: skip
        total = sum(harm[line] for line in plan)
        require(total <= min(keeping) * (1 + 1e-9), f"{budget}: {total}, not {min(keeping)}")


def _require_least(message: str, budget: Budget, costs: Sequence[Cost]) -> None:
    """The smallest reachable value that a refusal names is the smallest."""
    told = message.partition("the smallest reachable value is ")[2].split(" (")[0]
    if not told:
        return
    value, _, metric = told.partition(" ")
    least = min(METRICS[metric].amount(cost) for cost in costs)
    shown = METRICS[metric].show(least, costs[0].weights)
    require(value == shown, f"{budget}: {value} {metric} is called the smallest, it is {shown}")


# Runs that are killed

KILLED = """
import sys, torch, rabbet
from pathlib import Path
from torch import nn
torch.set_num_threads(1)
torch.manual_seed(0)
network = nn.Sequential(*(m for _ in range(4) for m in (nn.Linear(24, 24), nn.Tanh()))).eval()
method = rabbet.Joint(tuning=rabbet.train.tuning.Tuning(steps=20, batch=8))
jobs = rabbet.Jobs(folder=Path(sys.argv[1]))
rabbet.compress(network, "bytes <= 60%", [torch.randn(32, 24)], method, jobs=jobs).save(sys.argv[2])
"""


def kills(seed: int, folder: Path) -> None:
    """A run that is killed again and again, and goes on from its folder, writes the same bytes."""
    draw = random.Random(seed)
    script, kept = folder / "run.py", folder / "kept"
    script.write_text("import rabbet.train.tuning\n" + KILLED)

    def start(output: str, work: Path) -> subprocess.Popen[bytes]:
        command = [sys.executable, str(script), str(work), str(folder / output)]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    with start("whole", folder / "other") as process:
        _, errors = process.communicate()
        began = len(list((folder / "other").glob("*")))
    require(process.returncode == 0, f"a run ends with {process.returncode}: {errors.decode()}")
    require(began > 0, "nothing was kept")
    for _ in range(draw.randint(1, 3)):
        with start("killed", kept) as process:
            wanted = draw.randint(0, began)
            while process.poll() is None and len(list(kept.glob("*"))) < wanted:
                time.sleep(0.005)
            time.sleep(draw.random() * 0.05)
            process.send_signal(signal.SIGKILL)
            process.communicate()
        whole = (folder / "whole").read_bytes()
        there = (folder / "killed").exists()
        require(not there or (folder / "killed").read_bytes() == whole, "a broken file is left")
    with start("killed", kept) as process:
        _, errors = process.communicate()
    require(process.returncode == 0, f"cannot go on: {errors.decode()}")
    require((folder / "killed").read_bytes() == whole, "other bytes after a restart")


# Several writers of one output


def writers(seed: int, folder: Path) -> None:
    """Threads that compress and save to one path: it is whole whenever it is there."""
    draw, path, results = random.Random(seed), folder / "f.safetensors", []
    for k in range(2):
        torch.manual_seed(k)
        network = nn.Sequential(
            nn.Linear(32, 200 + 300 * k), nn.ReLU(), nn.Linear(200 + 300 * k, 4)
        )
        results.append(
            fit(network.eval(), "0 dense@8c", [torch.randn(4, 32)], Joint(tuning=UNTUNED))
        )
    whole = set()
    for result in results:
        result.save(path)
        whole.add(path.read_bytes())
    broken: set[str] = set()
    done = threading.Event()
    threads = [
        threading.Thread(target=_write, args=(results[k % 2], path, draw.randint(3, 12), broken))
        for k in range(4)
    ]
    reader = threading.Thread(target=_read, args=(path, whole, done, broken))
    for thread in (reader, *threads):
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    reader.join()
    require(not broken, "; ".join(sorted(broken)))
    left = [p.name for p in folder.iterdir() if p != path]
    require(not left, f"left behind: {left}")


def _write(result: Result, path: Path, times: int, broken: set[str]) -> None:
    try:
        for _ in range(times):
            result.save(path)
    except Exception as e:
        broken.add(f"a writer fails: {type(e).__name__}: {e}")


def _read(path: Path, whole: set[bytes], done: threading.Event, broken: set[str]) -> None:
    while not done.is_set():
        try:
            if path.read_bytes() not in whole:
                broken.add("a reader sees a broken file")
        except FileNotFoundError:
            broken.add("a reader sees no file")


Row = Callable[[int, Path], None]
ROWS: dict[str, Row] = {row.__name__: row for row in (networks, files, budgets, kills, writers)}


def tried(name: str, seed: int) -> str | None:
    """What one trial broke, in words; None if it broke nothing."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            ROWS[name](seed, Path(folder))
        except BrokenPromiseError as e:
            return str(e)
        except Exception as e:
            where = traceback.extract_tb(e.__traceback__)[-1]
            return f"{type(e).__name__}: {e} ({Path(where.filename).name}:{where.lineno})"
    return None


def tried_for(minutes: float, first: int, names: list[str]) -> Group:
    """Trials in turn until time is up: what broke is said at once, the counts are returned."""
    trials, failures = dict.fromkeys(names, 0), dict.fromkeys(names, 0)
    end = time.monotonic() + 60 * minutes
    for seed in itertools.count(first):
        for name in names:
            what = tried(name, seed)
            trials[name] += 1
            if what is not None:
                failures[name] += 1
                print(f"BROKEN --only {name} --seed {seed}: {what}", flush=True)
        if time.monotonic() >= end:
            break
    return [
        ({"row": n, "minutes": minutes}, {"tried": trials[n], "broken": failures[n]}) for n in names
    ]


def main() -> int:
    """Try, say what broke, and count."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0, help="of the first trial of each row")
    add_options(parser)
    given = parser.parse_args()
    names = [name for text in given.only or ROWS for name in text.split(",")]
    if strange := [name for name in names if name not in ROWS]:
        parser.error(f"no such row: {', '.join(strange)}; there are {', '.join(ROWS)}")
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if given.minutes == 0:  # repeats a trial, which is no figure
        found = tried_for(0, given.seed, names)
        for settings, counts in found:
            print(f"{settings['row']}: {counts['tried']} tried, {counts['broken']} broken")
        return int(any(counts["broken"] for _, counts in found))
    given.only = []  # all rows take turns, so they are one group
    columns = {"row": "", "minutes": "g", "tried": ",", "broken": ","}
    table = Table(Records("endurance", given), "trials", columns, "random", given.seed)
    shared = {"minutes": given.minutes, "rows": " ".join(names)}

    def measure() -> Group:
        found = tried_for(given.minutes, given.seed, names)
        return [(settings | shared, counts) for settings, counts in found]

    stored = table.rows(shared, measure)
    return int(any(values["broken"] for _, values in stored))


if __name__ == "__main__":
    sys.exit(main())
