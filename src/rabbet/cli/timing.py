"""The work of bench: files timed in turn, their kernels counted, and what is said of it."""

import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rabbet.cli.inputs import DEMO_DATA, demo, open_task
from rabbet.cli.outcomes import unheard
from rabbet.core.survey import shapes
from rabbet.data.task import Task
from rabbet.errors import FileError
from rabbet.report.text import Part, Table
from rabbet.runtime.bench import Timing, cpu, plain_int8, time_files
from rabbet.runtime.session import KERNELS, kernels


@dataclass(frozen=True)
class Bench:
    """What was measured: of every file its kernels, its bytes, and its times by the batch's size.

    floats: the layers of the first file that run in float. base: the file that others are held
    against. example: the shapes of the tensors of one example. notes: what was asked for and not
    timed.
    """

    machine: dict[str, str]
    file: str
    base: str
    floats: list[str]
    kernels: dict[str, Counter[str]]
    sizes: dict[str, int]
    times: dict[int, dict[str, Timing]]
    example: tuple[tuple[int, ...], ...]
    notes: tuple[str, ...] = ()

    def facts(self) -> dict[str, Any]:
        """All of it for JSON."""
        files = [
            {
                "file": name,
                "bytes": size,
                "kernels": dict(self.kernels[name]),
                "times": {count: asdict(times[name]) for count, times in self.times.items()},
            }
            for name, size in self.sizes.items()
        ]
        return {
            "machine": self.machine,
            "example": [list(shape) for shape in self.example],
            "files": files,
            "float layers": self.floats,
            "notes": self.notes,
        }

    def parts(self) -> list[Part]:
        """All of it for people."""
        speed = f"speed against {self.base}"
        heads = ("file", "batch", "median ms", "p95 ms", speed, "bytes", "integer kernels")
        rows = [
            (
                name,
                str(count),
                f"{time.median:.3f}",
                f"{time.p95:.3f}",
                f"{times[self.base].median / time.median:.2f}x",
                f"{self.sizes[name]:,}",
                self._integer_kernels(name),
            )
            for count, times in self.times.items()
            for name, time in times.items()
        ]
        machine = ", ".join(f"{name}: {value}" for name, value in self.machine.items())
        floats = [f"{name} runs in float in {self.file}" for name in self.floats]
        inputs = f"one example as in the first batch: {shapes(self.example)}"
        return [machine, "", Table(heads, rows), inputs, *self.notes, *floats]

    def _integer_kernels(self, name: str) -> str:
        counts = self.kernels[name]
        return f"{sum(n for k, n in counts.items() if k in KERNELS)} of {counts.total()}"


def measure(
    files: list[Path], data: str | None, batch: int, threads: int, runs: int, plain: bool
) -> Bench:
    """Time files one example and `batch` examples at a time, on batches that a reference names.

    plain: a plain int8 export of the second file, if there is one, is timed as well.
    """
    for path in files:
        if not path.exists():
            raise FileError(f"there is no file {path}")
        if not path.is_file() or path.suffix != ".onnx":
            raise FileError(f"{path} is not an .onnx file; write one with rabbet export")
    task = open_task(DEMO_DATA if data is None else data)
    with tempfile.TemporaryDirectory() as folder:
        timed = {str(path): path for path in files}
        if plain and len(files) > 1:
            with demo(data, "--data"), unheard():
                timed["plain int8 of onnxruntime"] = plain_int8(files[1], task.read(), Path(folder))
        counts = {name: Counter(kernels(path).values()) for name, path in timed.items()}
        sizes = {name: path.stat().st_size for name, path in timed.items()}
        with demo(data, "--data"):
            times = {
                count: time_files(timed, _several(task, count), threads, runs)
                for count in dict.fromkeys((1, batch) if task.examples.known else (1,))
            }
    floats = [name for name, kernel in kernels(files[0]).items() if kernel not in KERNELS]
    machine = cpu() | {"threads": str(threads or "all")}
    base = str(files[1] if len(files) > 1 else files[0])
    notes: tuple[str, ...] = ()
    if batch not in times:
        notes = (f"no batch of {batch}: a batch of these data is one example, and none is joined",)
    example = tuple(shape for _, shape in task.examples.shapes(task.read()[0]))
    return Bench(machine, str(files[0]), base, floats, counts, sizes, times, example, notes)


def _several(task: Task, count: int) -> Any:
    """A batch of so many examples, repeated if there are not as many."""
    batch, axes = task.read()[0], task.examples
    return axes.first(axes.join([batch] * -(-count // axes.count(batch))), count)
