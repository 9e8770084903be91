"""What the smallest install takes: a wheel without extras, in a fresh environment.

    python benchmarks/install.py

The wheel is built of this checkout and installed with `constraints.txt` from the registry that pip
is set up for; of torch that may be another build than yours, and builds for GPUs are far larger.
MB (10^6 bytes) are those of site-packages, pip not among them. Seconds are those of a whole
process, interpreter included: the median of five, after one that brings the files into memory;
CPU s are those of processors, which other work on the machine changes less.
Needs pip, and room for torch in the folder for temporary files.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

import torch
from records import ROOT, Records, Table, Values, add_options

RUNS = 5
COMPRESSES = """
import torch, rabbet
torch.manual_seed(0)
network = torch.nn.Sequential(torch.nn.Linear(24, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8))
result = rabbet.compress(network.eval(), "bits <= 4", [torch.randn(32, 24)], quality="fast")
assert result.save("small.safetensors") == result.cost.bytes
"""


def run(*words: str | Path, folder: Path | None = None) -> str:
    """What a command prints; it ends this script if it fails. Nothing of this checkout is seen."""
    done = subprocess.run(
        [*map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env={"HOME": str(folder)},
    )
    if done.returncode:
        sys.exit(f"{' '.join(map(str, words))}: {done.stderr}")
    return done.stdout


def installed(folder: Path) -> Path:
    """An environment with the wheel of this checkout and what that needs, no more."""
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    place = folder / "environment"
    venv.create(place)  # without pip
    subprocess.run([*pip, "wheel", "--no-deps", "-w", str(folder), str(ROOT)], check=True)
    (wheel,) = folder.glob("rabbet-*.whl")
    limits = ["-c", str(ROOT / "constraints.txt")]
    subprocess.run(
        [*pip, "--python", str(place / "bin/python"), "install", *limits, str(wheel)], check=True
    )
    return place


def megabytes(folder: Path) -> float:
    """What the files in a folder hold, in MB."""
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) / 1e6


def seconds(what: str, folder: Path, *words: str | Path) -> Values:
    """The median times of a command: from start to end, and of processors."""
    times = []
    for _ in range(RUNS + 1):
        start, used = time.perf_counter(), busy()
        run(*words, folder=folder)
        times.append((time.perf_counter() - start, busy() - used))
    wall, cpu = map(statistics.median, zip(*times[1:], strict=True))
    return {f"{what}, s": wall, f"{what}, CPU s": cpu}


def busy() -> float:
    """Seconds of processors that commands have taken so far."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def measured() -> Values:
    """All figures, after a small network was compressed with what is installed."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        place = installed(folder)
        python, command = place / "bin/python", place / "bin/rabbet"
        run(python, "-c", COMPRESSES, folder=folder)
        site = Path(
            run(python, "-c", "import rabbet; print(rabbet.__file__)", folder=folder)
        ).parents[1]
        return {
            "MB": megabytes(site),
            "torch, MB": megabytes(site / "torch"),
            "scipy, MB": sum(map(megabytes, site.glob("scipy*"))),
            "rabbet, MB": megabytes(site / "rabbet"),
            **seconds("python", folder, python, "-c", ""),
            **seconds("import", folder, python, "-c", "import rabbet"),
            **seconds("compress", folder, python, "-c", "import rabbet; rabbet.compress"),
            **seconds("help", folder, command, "--help"),
        }


def main() -> None:
    """Measure, print and store one row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser)
    args = parser.parse_args()
    columns = {"extras": "", "torch": "", "MB": ".0f", "torch, MB": ".0f", "scipy, MB": ".0f"}
    columns |= {"rabbet, MB": ".1f"}
    names = ("python", "import", "help", "compress")
    columns |= {f"{name}, {unit}": ".2f" for name in names for unit in ("s", "CPU s")}
    records = Records("install", args, ("numpy", "scipy"))
    table = Table(records, "smallest", columns, "constraints.txt")
    table.row({"extras": "none", "torch": torch.__version__}, measured)


if __name__ == "__main__":
    main()
