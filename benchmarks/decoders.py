"""A trained decoder at few bits: perplexity against bytes, method by method.

    python benchmarks/decoders.py                                # RTN and GPTQ at all budgets
    python benchmarks/decoders.py --methods HQQ AutoRound --budgets 4.25 2.5 --resume
    python benchmarks/decoders.py --windows 8 --held 4 --only 4.25          # a first look
    # network and texts come with packages: see language.py

SmolLM2-135M-Instruct, whose 210 linear layers hold 106,168,320 of 134,515,008 weights; the rest is
the table of its words, which is the classifier, too. A budget is of the bits a weight of the linear
layers, with scales and zero points; the table has a grid of its own, the same for every method
(`--words`). Bytes are all of the file: for RTN and GPTQ as it is written, for methods of other
packages counted as codes, scales and zero points of two bytes (HQQ) or a scale of two bytes and a
zero point of the width of a code (AutoRound), the table as here, and the rest in float32.

Calibration: 128 windows of 512 tokens of the c4 text. Perplexity: 32 windows of 1,024 tokens of the
wiki text, which do not overlap, spread evenly over it; every method sees the same. The ratio is to
the float network's on the same windows, with the standard error over them.

The weights of this network lie on grids of 4 bits in groups of 32 already (see language.py): that
flatters budgets near 4 bits, where its own grid can nearly be found again, of all methods alike.

Blockwise: rabbet's own method; its budget is of all bytes of the file, that many bits for each of
the 134,515,008 weights, and the program chooses the table's grid, too. It reads the network from a
folder, block by block; each is tuned for `--epochs`, then all of them together for `--passes`.

RTN: rounded to nearest, a scale of least squared error for each group. GPTQ: our own error feedback
at one width, a plan written by hand, each block solved for the inputs that the compressed blocks
before it make, nothing tuned, inputs float. HQQ and AutoRound run in environments of their own,
made when they are first needed in `--environments`; AutoRound takes `--iters` steps a block (200 is
its default).
A row over `--limit` minutes is given up, and is a row that says so.
"""

import argparse
import functools
import json
import math
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import language
import torch
from common import machine
from records import Records, Table, Values, add_options, told
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import rabbet
from rabbet.core.plan import quoted
from rabbet.core.survey import Survey
from rabbet.data.decoder import Estimate
from rabbet.grids.grid import Grid, Quantised
from rabbet.hf import compress_pretrained, from_pretrained
from rabbet.model.build import build
from rabbet.tasks import Perplexity, perplexity
from rabbet.workpiece import Workpiece

FOLDER = Path(__file__).parent / "quantisers"
GRIDS: dict[str, tuple[str, ...]] = {
    "4.25": ("4g64", "4g128", "4g128z"),
    "3.25": ("3g64", "3g128", "3g128z"),
    "2.5": ("2g64", "2g64z", "2g128z"),
    "2.1": ("2g192", "2g192z"),
}
"""Grids of RTN and GPTQ within a budget: 16 bits a scale, as many as a code a zero point."""
GROUPS: dict[str, dict[str, tuple[str, ...]]] = {
    "HQQ": {
        "4.25": ("4g128", "4g192"),
        "3.25": ("3g128", "3g192"),
        "2.5": ("2g64",),
        "2.1": ("2g384",),
    },
    "AutoRound": {"4.25": ("4g128",), "3.25": ("3g128",), "2.5": ("2g64",), "2.1": ("2g192",)},
}
"""Bits and groups of other packages within a budget, whose zero points take more.

HQQ cuts a matrix into groups as it lies in memory: those of 128 run over the ends of rows of 576,
those of 192 do not.
"""
WEIGHTS = 134_515_008
PACKAGES = {"HQQ": ("hqq", "0.2.8.post1"), "AutoRound": ("auto-round", "0.16.1")}


@dataclass(frozen=True)
class Setup:
    """What all methods are given: network, tokenizer, task, and what judges them.

    words: the grid of the table of words.
    """

    network: nn.Module
    tokenizer: Any
    task: rabbet.Task
    judge: Perplexity
    words: str
    args: argparse.Namespace

    @functools.cached_property
    def survey(self) -> Survey:
        """The layers of the network."""
        return rabbet.survey(self.network, self.task)

    @functools.cached_property
    def before(self) -> Estimate:
        """The perplexity of the float network."""
        return self.judge(self.network)

    def plan(self, grid: str) -> str:
        """Every linear layer on one grid, the table of words on its own."""
        lines = (
            f"{quoted(site.name)} dense@{self.words if site.looks_up else grid}"
            for site in self.survey
        )
        return "\n".join(lines)


Found = tuple[nn.Module, int, str]
"""A network, all of its bytes, and notes."""


def nearest(setup: Setup, grid: str) -> Found:
    """Rounded to nearest."""
    piece = Workpiece.of(setup.network, setup.task, rabbet.Jobs())
    plan = rabbet.Plan.parse(setup.plan(grid))
    return build(piece.model, plan, piece.survey), piece.cost(plan).bytes, ""


def gptq(setup: Setup, grid: str) -> Found:
    """Rounded with error feedback, block by block, for the inputs that compressed blocks make."""
    method = rabbet.Blockwise(
        grids=(grid, setup.words), rank=False, scale=False, permute=False, scored=1, epochs=0,
        passes=0,
    )  # fmt: skip
    result = rabbet.fit(setup.network, setup.plan(grid), setup.task, method, jobs=_jobs(setup))
    return result.model, result.cost.bytes, "; ".join(result.notes)


def _jobs(setup: Setup) -> rabbet.Jobs:
    folder = setup.args.resume
    return rabbet.Jobs(folder=Path(folder) if isinstance(folder, str) else None)


def blockwise(rank: bool, setup: Setup, budget: str) -> Found:
    """Chosen and fitted block by block, from a folder into a folder."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        setup.network.save_pretrained(folder / "network")  # type: ignore[operator]
        args = setup.args
        method = rabbet.Blockwise(rank=rank, epochs=args.epochs, passes=args.passes)
        stored = compress_pretrained(
            folder / "network", budget, setup.task, folder / "small", method=method,
            jobs=_jobs(setup) if isinstance(setup.args.resume, str) else None,
        )  # fmt: skip
        network = from_pretrained(folder / "small")
    expected = f"expected {math.exp(stored.expected):.3f} times"
    return network, stored.cost.bytes, expected


def elsewhere(name: str, setup: Setup, grid: str) -> Found:
    """The weights that another package makes of those of the linear layers, as floats."""
    bits, group = map(int, grid.split("g"))
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        setup.network.save_pretrained(folder / "network")  # type: ignore[operator]
        setup.tokenizer.save_pretrained(folder / "network")
        windows = torch.cat([b["input_ids"] for b in setup.task.read()])
        save_file({"windows": windows}, folder / "windows.safetensors")
        asked = {"bits": bits, "group": group, "iters": setup.args.iters}
        asked["layers"] = [site.name for site in setup.survey if not site.looks_up]
        (folder / "asked.json").write_text(json.dumps(asked))
        script = FOLDER / f"{PACKAGES[name][0].replace('-', '_')}.py"
        command = [str(_environment(name, setup.args.environments)), "-P", str(script), place]
        subprocess.run(command, check=True, timeout=60 * setup.args.limit)
        weights = load_file(folder / "weights.safetensors")
        counted = json.loads((folder / "counted.json").read_text())
    network, _ = language.smollm2()
    with torch.no_grad():
        for site in setup.survey:
            own = network.get_submodule(site.name).weight
            assert isinstance(own, Tensor)
            if not site.looks_up:
                own.copy_(weights[site.name])
                continue
            table = Quantised.nearest(own.detach(), Grid.parse(setup.words))
            own.copy_(table.values)
            counted["bytes"] += -(-table.codes.numel() * table.grid.bits // 8)
            counted["bytes"] += 2 * table.scale.numel()
    counted["bytes"] += sum(4 * p.numel() for p in network.parameters() if p.ndim == 1)
    return network, counted["bytes"], counted["notes"]


def _environment(name: str, folder: Path) -> Path:
    """The Python of an environment that holds a package, and what this one has."""
    package, version = PACKAGES[name]
    place = folder / package
    python = place / "bin" / "python"
    if not python.exists():
        venv.create(place, with_pip=True)
        inside = next((place / "lib").glob("python*")) / "site-packages"
        # torch, transformers and the like are taken from here
        (inside / "shared.pth").write_text("\n".join(p for p in sys.path if "site-packages" in p))
        subprocess.run([python, "-m", "pip", "install", f"{package}=={version}"], check=True)
    return python


@dataclass(frozen=True)
class Method:
    """How a network of one grid is made, and of which grids there are rows for each budget."""

    run: Callable[[Setup, str], Found]
    grids: Mapping[str, tuple[str, ...]]


def _of_package(name: str) -> Method:
    return Method(functools.partial(elsewhere, name), GROUPS[name])


def _of_all_bytes(run: Callable[[Setup, str], Found]) -> Method:
    grids = {bits: (f"bytes <= {float(bits) * WEIGHTS / 8:.0f}",) for bits in GRIDS}
    return Method(run, grids)


METHODS: dict[str, Method] = {
    "Blockwise": _of_all_bytes(functools.partial(blockwise, True)),
    "Blockwise without rank": _of_all_bytes(functools.partial(blockwise, False)),
    "RTN": Method(nearest, GRIDS),
    "GPTQ": Method(gptq, GRIDS),
    "HQQ": _of_package("HQQ"),
    "AutoRound": _of_package("AutoRound"),
}
"""A line for each method."""

COLUMNS = {
    "budget": "", "method": "", "grid": "", "words": "", "bytes": ",", "bits a parameter": ".3f",
    "perplexity": ".2f", "± ": ".2f", "ratio": ".4f", "±": ".4f", "seconds": ".0f", "notes": "",
}  # fmt: skip


def values_of(setup: Setup, found: Found, seconds: float) -> Values:
    """The cells of a row."""
    network, size, notes = found
    after = setup.judge(network)
    ratio, error = after.ratio(setup.before)
    parameters = sum(p.numel() for p in setup.network.parameters())
    return {
        "bytes": size, "bits a parameter": 8 * size / parameters, "perplexity": float(after),
        "± ": after.error, "ratio": ratio, "±": error, "seconds": seconds, "notes": notes,
    }  # fmt: skip


def row_of(setup: Setup, name: str, grid: str) -> Values:
    """One method on one grid, measured; or why there is nothing to measure."""
    start = time.perf_counter()
    try:
        found = METHODS[name].run(setup, grid)
    except subprocess.TimeoutExpired:
        return {"notes": f"given up after {setup.args.limit:g} minutes"}
    except subprocess.CalledProcessError as e:
        return {"notes": f"failed: the package's process ended with {e.returncode}"}
    return values_of(setup, found, time.perf_counter() - start)


def setup_of(args: argparse.Namespace) -> Setup:
    """Network, calibration and test of all rows."""
    network, tokenizer = language.smollm2()
    task = perplexity(language.text("c4"), tokenizer, 512, windows=args.windows)
    judge = Perplexity.of(language.text("wiki"), tokenizer, 1024, limit=args.held)
    return Setup(network, tokenizer, task, judge, args.words, args)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["RTN", "GPTQ"])
    parser.add_argument("--budgets", nargs="+", choices=GRIDS, default=list(GRIDS))
    parser.add_argument("--words", default="8c", help="grid of the table of words: 8c, 4g64")
    parser.add_argument("--windows", type=int, default=128, help="to calibrate, 512 tokens each")
    parser.add_argument("--held", type=int, default=32, help="to measure, 1,024 tokens each")
    parser.add_argument("--iters", type=int, default=200, help="steps of AutoRound a block")
    parser.add_argument(
        "--epochs", type=int, default=rabbet.Blockwise().epochs, help="Blockwise's passes of tuning"
    )
    parser.add_argument(
        "--passes", type=int, default=rabbet.Blockwise().passes, help="those of all blocks together"
    )
    parser.add_argument("--limit", type=float, default=240, help="minutes of a package's row")
    parser.add_argument(
        "--environments", type=Path, default=Path("build/environments"), metavar="FOLDER",
        help="where environments of other packages are kept",
    )  # fmt: skip
    add_options(parser, folder=True)
    args = parser.parse_args()
    print(machine())
    records = Records("decoders", args, packages=("transformers", *language.PACKAGES))
    setup = setup_of(args)
    data = (
        f"SmolLM2-135M-Instruct; {args.windows} windows of 512 tokens of c4 to calibrate, "
        f"{len(setup.judge.windows)} of 1,024 of wiki to measure"
    )
    table = Table(records, "decoders", COLUMNS, data)
    shared = {"words": args.words} | told(parser, args, "windows", "held")

    def whole() -> Values:
        size = sum(4 * p.numel() for p in setup.network.parameters())
        return values_of(setup, (setup.network, size, ""), 0)

    table.row({"budget": "float32", "method": None, "grid": None, **shared}, whole)
    for budget in args.budgets:
        for name in args.methods:
            more = told(parser, args, "iters") if name == "AutoRound" else {}
            if name.startswith("Blockwise"):
                more |= {"epochs": args.epochs, "passes": args.passes}
            for grid in METHODS[name].grids[budget]:
                settings = {"budget": budget, "method": name, "grid": grid, **shared, **more}
                table.row(settings, functools.partial(row_of, setup, name, grid))


if __name__ == "__main__":
    main()
