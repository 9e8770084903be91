"""The commands about files for a runtime: export, eval, bench."""

import tempfile
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from rabbet._api import reopen
from rabbet.cli import options, tables
from rabbet.cli.inputs import (
    DEMO_DATA,
    DEMO_MODEL,
    DEMO_TEST,
    demo,
    open_inputs,
    open_network,
    open_task,
)
from rabbet.cli.judge import open_judge
from rabbet.cli.stored import opened, ready
from rabbet.data.batches import examples, first_examples, join
from rabbet.errors import FileError
from rabbet.export import EXPORTS
from rabbet.export.onnx.write import write_float
from rabbet.runtime.bench import Timing, cpu, plain_int8, time_files
from rabbet.runtime.session import KERNELS, kernels

Model = Annotated[
    str | None,
    typer.Option(
        help=f"The network that the file holds: {options.NETWORK}. Default: the demo network."
    ),
]
Onnx = Annotated[Path, typer.Argument(metavar="FILE", help="An exported .onnx file.")]


def export(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="A native file, as compress writes it.")
    ],
    output: options.Output,
    model: Model = None,
    data: options.Data = None,
    target: Annotated[
        str | None, typer.Option(metavar="|".join(EXPORTS), help="For which runtime.")
    ] = None,
    whole: Annotated[
        Path | None,
        typer.Option("--float", dir_okay=False, help="Write the float network as ONNX, too."),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Write a compressed network for a runtime; layers that will not run on integer kernels are listed."""
    chosen = ready(output, target)
    if whole is not None and (whole.suffix != ".onnx" or whole.absolute() == output.absolute()):
        raise typer.BadParameter(
            f"{whole} must end in .onnx, and not be the --output itself", param_hint="--float"
        )
    if whole is not None:
        ready(whole)
    inputs = open_inputs(model, data)
    with demo(model, "--model"):
        result = reopen(file, inputs.network, inputs.task)
    for path in (output, whole):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
    written = result.export(output, chosen)
    sizes = {str(output): written.bytes}
    if whole is not None:
        sizes[str(whole)] = write_float(inputs.network, inputs.task, whole).bytes
    if as_json:
        tables.print_json(
            {
                "target": chosen,
                "files": sizes,
                "native": result.cost.bytes,
                "notes": list(written.notes),
            }
        )
        return
    out = tables.console()
    for name, size in sizes.items():
        out.print(f"{name}: {size:,} bytes ({result.cost.bytes:,} in {file})", soft_wrap=True)
    for note in written.notes:
        out.print(note, soft_wrap=True)


def evaluate(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="A file of any kind that is written here.")
    ],
    test: options.Test = None,
    model: Model = None,
    as_json: options.Json = False,
) -> None:
    """Run a file, in the runtime that it was made for, over labelled batches or a function of your own."""
    if test is None and model not in (None, DEMO_MODEL):
        raise typer.BadParameter(
            "say what to measure with: batches of (inputs, labels)", param_hint="--test"
        )
    judge = open_judge(DEMO_TEST if test is None else test)
    assert judge is not None
    with demo(model, "--model"):
        network = opened(file, open_network(DEMO_MODEL if model is None else model))
    with demo(test, "--test"):
        found = judge(network)
    if as_json:
        tables.print_json({"file": str(file), "quantity": judge.quantity, "value": found})
        return
    print(f"{file}: {judge.quantity} {judge.show(found)}")


def bench(
    file: Onnx,
    against: Annotated[
        list[Path] | None, typer.Option(help="Other .onnx files, the float one first.")
    ] = None,
    data: options.Data = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Examples at a time, besides 1.")] = None,
    threads: Annotated[int, typer.Option(min=0, help="0 for all cores.")] = 0,
    runs: Annotated[int, typer.Option(min=1, help="Runs of each file, at least.")] = 60,
    plain: Annotated[
        bool, typer.Option(help="Time a plain int8 export of the first other file, too.")
    ] = True,
    as_json: options.Json = False,
) -> None:
    """Time files in turn in onnxruntime, and say which kernels really run.

    With a float file, a plain int8 export of it by onnxruntime's own quantiser is timed as well.
    """
    files = [file, *(against or [])]
    for path in files:
        if not path.is_file() or path.suffix != ".onnx":
            raise FileError(f"{path} is not an .onnx file; write one with rabbet export")
    batches = open_task(DEMO_DATA if data is None else data).read()
    with tempfile.TemporaryDirectory() as folder:
        timed = {str(path): path for path in files}
        if plain and against:
            timed["plain int8 of onnxruntime"] = plain_int8(against[0], batches, Path(folder))
        ran = {name: Counter(kernels(path).values()) for name, path in timed.items()}
        sizes = {name: path.stat().st_size for name, path in timed.items()}
        with demo(data, "--data"):
            found = {
                count: time_files(timed, _several(batches, count), threads, runs)
                for count in dict.fromkeys((1, batch or 1))
            }
    floats = [name for name, kernel in kernels(file).items() if kernel not in KERNELS]
    facts = cpu() | {"threads": str(threads or "all")}
    if as_json:
        tables.print_json(_facts(facts, found, ran, sizes) | {"float layers": floats})
        return
    out = tables.console()
    out.print(", ".join(f"{name}: {value}" for name, value in facts.items()), soft_wrap=True)
    out.print()
    base = str(against[0]) if against else str(file)
    heads = (
        "file",
        "batch",
        "median ms",
        "p95 ms",
        f"speed against {base}",
        "bytes",
        "integer kernels",
    )
    out.print(tables.table(heads, _lines(found, ran, sizes, base)))
    for name in floats:
        out.print(f"{name} runs in float in {file}", soft_wrap=True)


def _several(batches: list[Any], count: int) -> Any:
    """A batch of so many examples, repeated if there are not as many."""
    parts = [batches[0]] * -(-count // examples(batches[0]))
    return first_examples(join(parts), count)


def _lines(
    found: dict[int, dict[str, Timing]],
    ran: dict[str, Counter[str]],
    sizes: dict[str, int],
    base: str,
) -> list[tuple[str, ...]]:
    return [
        (
            name,
            str(count),
            f"{t.median:.3f}",
            f"{t.p95:.3f}",
            f"{times[base].median / t.median:.2f}x",
            f"{sizes[name]:,}",
            f"{sum(n for k, n in ran[name].items() if k in KERNELS)} of {ran[name].total()}",
        )
        for count, times in found.items()
        for name, t in times.items()
    ]


def _facts(
    facts: dict[str, str],
    found: dict[int, dict[str, Timing]],
    ran: dict[str, Counter[str]],
    sizes: dict[str, int],
) -> dict[str, Any]:
    files = [
        {
            "file": name,
            "bytes": size,
            "kernels": dict(ran[name]),
            "times": {k: asdict(t[name]) for k, t in found.items()},
        }
        for name, size in sizes.items()
    ]
    return {"machine": facts, "files": files}
