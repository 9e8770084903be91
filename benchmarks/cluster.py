r"""A decoder compressed over a Dask cluster: seconds by the number of workers, and the same bytes.

    python benchmarks/cluster.py                  # one worker, two, and four where there are cores

A checkpoint of random weights (see streaming.py; "small" has four blocks of width 512) is read from
its folder and compressed block by block, not tuned, with a cluster of processes of one thread each
on this machine. Passes over the windows and layers that are solved run on the workers; what is left
to the program that asked is counted as its own processor seconds. Every number of workers begins
anew and keeps nothing.

Efficiency: the seconds of one worker over those of n, n times. On paper: the same, if the workers'
processor seconds were shared out evenly and the program's own were not, (own + workers) over
n (own + workers / n); for more workers than the machine has cores that is all there is.
"""

import argparse
import hashlib
import os
import tempfile
import time
from pathlib import Path

import distributed
import streaming
import torch
from common import machine
from records import Group, Records, Table, add_options

import rabbet
from rabbet.hf import compress_pretrained

COLUMNS = {
    "workers": "", "seconds": ".0f", "workers' processor seconds": ".0f",
    "own processor seconds": ".0f", "efficiency": ".2f", "on paper": ".2f", "same bytes": "",
}  # fmt: skip


def spent() -> float:
    """Processor seconds of this process."""
    return time.process_time()


def run(folder: Path, output: Path, workers: int) -> tuple[float, float, float, str]:
    """Seconds, processor seconds of all workers and of this program, and a hash of the files."""
    task = streaming.task_of(folder)
    given = {"n_workers": workers, "threads_per_worker": 1, "dashboard_address": None}
    with (
        tempfile.TemporaryDirectory() as scratch,
        distributed.LocalCluster(
            **given, local_directory=scratch, silence_logs="CRITICAL"
        ) as cluster,
        distributed.Client(cluster, set_as_default=False) as client,
    ):
        client.run(_ready)
        before = sum(client.run(spent).values())
        own, start = spent(), time.perf_counter()
        jobs = rabbet.Jobs(client.get_executor())
        compress_pretrained(
            folder, streaming.BUDGET, task, output, method=streaming.METHOD, jobs=jobs
        )
        seconds, own = time.perf_counter() - start, spent() - own
        busy = sum(client.run(spent).values()) - before
    digest = hashlib.sha256()
    for path in sorted(output.glob("*.safetensors")):
        digest.update(path.read_bytes())
    return seconds, busy, own, digest.hexdigest()


def _ready() -> None:
    """What a worker imports for its first job."""
    import rabbet.hf
    import rabbet.methods.blockwise.looking

    assert rabbet.hf


def on_paper(workers: int, own: float, busy: float) -> float:
    """The efficiency if only the workers' seconds were shared out."""
    return (own + busy) / (workers * own + busy)


def rows(shape: str, numbers: list[int]) -> Group:
    """A row for each number of workers that there are cores for; on paper for the others."""
    found: Group = []
    first: tuple[float, float, float, str] | None = None
    for workers in numbers:
        if workers > (os.cpu_count() or 1) and first is not None:
            paper = {"on paper": on_paper(workers, first[2], first[1])}
            found.append(({"shape": shape, "workers": workers}, paper))
            continue
        with tempfile.TemporaryDirectory() as place:
            folder, output = Path(place) / "in", Path(place) / "out"
            folder.mkdir()
            blocks = int(streaming.SHAPES[shape]["num_hidden_layers"])
            streaming.checkpoint(shape, blocks, folder)
            taken = run(folder, output, workers)
        first = first or taken
        seconds, busy, own, digest = taken
        values = {
            "seconds": seconds, "workers' processor seconds": busy, "own processor seconds": own,
            "efficiency": first[0] * numbers[0] / (workers * seconds),
            "on paper": on_paper(workers, own, busy),
            "same bytes": "yes" if digest == first[3] else "NO",
        }  # fmt: skip
        found.append(({"shape": shape, "workers": workers}, values))
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=streaming.SHAPES, default="small")
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 2, 4])
    add_options(parser)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(machine())
    records = Records("cluster", args, packages=("transformers", "distributed"))
    table = Table(records, "workers", COLUMNS, "random weights and words")
    table.rows({"shape": args.shape}, lambda: rows(args.shape, args.workers))


if __name__ == "__main__":
    main()
