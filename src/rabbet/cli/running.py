"""The commands about files for a runtime: export, eval, bench."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rabbet.cli import options

if TYPE_CHECKING:
    from rabbet.export import Written

Model = Annotated[
    str | None,
    typer.Option(
        help=f"The network that the file holds: {options.NETWORK}. Default: the demo network."
    ),
]
Onnx = Annotated[
    Path,
    typer.Argument(
        metavar="FILE", help="An exported .onnx file, or a folder to which a decoder was exported."
    ),
]


def export(
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="A native file, or a folder, as compress writes it."),
    ],
    output: options.Exported,
    model: Model = None,
    data: options.Data = None,
    target: Annotated[
        str | None, typer.Option(metavar="|".join(options.TARGETS), help="For which runtime.")
    ] = None,
    whole: Annotated[
        Path | None,
        typer.Option("--float", dir_okay=False, help="Write the float network as ONNX, too."),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Write a compressed network for a runtime; layers not run on integer kernels are listed.

    A folder holds a decoder with its config, so it takes no --model; its --target is a decoder's.
    """
    from rabbet._api import Result
    from rabbet.cli import folders
    from rabbet.cli.inputs import demo, open_inputs
    from rabbet.cli.outcomes import unheard
    from rabbet.cli.stored import ready, require_other
    from rabbet.cli.terminal import bars
    from rabbet.export.onnx.write import write_float

    if file.is_dir():
        folders.require_alone({"--model": model, "--data": data, "--float": whole})
        require_other(output, file)
        size, written = folders.export_folder(file, output, target)
        _show_export(as_json, str(target), str(file), size, {str(output): written.bytes}, written)
        return
    chosen = ready(output, target)
    if whole is not None and (whole.suffix != ".onnx" or whole.absolute() == output.absolute()):
        raise typer.BadParameter(
            f"{whole} must end in .onnx, and not be the --output itself", param_hint="--float"
        )
    if whole is not None:
        ready(whole)
    for path in (output, whole):
        if path is not None:
            require_other(path, file, model, data)
    with demo(model, "--model"):
        inputs = open_inputs(model, data)
        result = Result.load(file, inputs.network, inputs.task)
    for path in (output, whole):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
    sizes, native = dict[str, int](), result.cost.bytes
    with bars() as progress, unheard():
        progress("exporting: traced, measured and compared", 0, 1)
        written = result.export(output, chosen)
        sizes[str(output)] = written.bytes
        if whole is not None:
            progress("exporting the float network", 0, 1)
            sizes[str(whole)] = write_float(inputs.network, inputs.task, whole).bytes
    _show_export(as_json, chosen, str(file), native, sizes, written)


def _show_export(
    as_json: bool, target: str, file: str, native: int, sizes: dict[str, int], written: "Written"
) -> None:
    """What was written; native: the bytes of what it was made of."""
    from rabbet.cli import tables

    if as_json:
        facts = {"target": target, "files": sizes, "native": native, "notes": list(written.notes)}
        tables.print_json(facts | {"error": written.error})
        return
    lines = [f"{name}: {size:,} bytes" for name, size in sizes.items()]
    lines[0] = f"{lines[0]} ({native:,} in {file})"
    if written.error is not None:
        share = f"{100 * written.error:.2g} %"
        lines.append(f"relative error against the compressed network in torch: {share}")
    tables.show([*lines, *written.notes])


def evaluate(
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="A file or a folder of any kind that is written here."),
    ],
    test: options.Test = None,
    model: Model = None,
    as_json: options.Json = False,
) -> None:
    """Run a file, in its runtime, over labelled batches, text, or a function of your own.

    A folder holds a decoder with its config, so it takes no --model.
    """
    from rabbet.cli import folders, tables
    from rabbet.cli.inputs import DEMO_MODEL, DEMO_TEST, demo
    from rabbet.cli.judge import error_of, open_judge
    from rabbet.cli.networks import open_network
    from rabbet.cli.stored import opened, require_there
    from rabbet.hf import skeleton

    require_there(file)
    folder = file.is_dir()
    if folder:
        folders.require_alone({"--model": model})
    if test is None and (folder or model not in (None, DEMO_MODEL)):
        raise typer.BadParameter(
            "say what to measure with: batches of (inputs, labels), or text for a decoder",
            param_hint="--test",
        )
    ready = folders.opened_folder(file) if folder else None
    network = skeleton(file) if folder else open_network(DEMO_MODEL if model is None else model)
    judge = open_judge(DEMO_TEST if test is None else test, network=network)
    assert judge is not None
    if ready is None:
        with demo(model, "--model"):
            ready = opened(file, network)
    with demo(test, "--test"):
        score = judge(ready)
    if as_json:
        told = {"quantity": judge.quantity, "value": score, "error": error_of(score)}
        tables.print_json({"file": str(file), **told})
        return
    print(f"{file}: {judge.quantity} {judge.show(score)}")


def bench(
    file: Onnx,
    against: Annotated[
        list[Path] | None, typer.Option(help="Others of the kind, the float one first.")
    ] = None,
    data: options.Data = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Examples at a time, besides 1.")] = None,
    threads: Annotated[int, typer.Option(min=0, help="0 for all cores.")] = 0,
    runs: Annotated[
        int, typer.Option(min=1, help="Runs of each file (tokens of each decoder), at least.")
    ] = 60,
    plain: Annotated[
        bool, typer.Option(help="Time a plain int8 export of the first other file, too.")
    ] = True,
    as_json: options.Json = False,
) -> None:
    """Time files in turn in onnxruntime, and say which kernels really run.

    With a float file, a plain int8 export of it by onnxruntime's own quantiser is timed as well. Of
    decoders it is the tokens per second, each in its own runtime.
    """
    from rabbet.cli import decoding, tables, timing

    files = [file, *(against or [])]
    measured: decoding.DecoderBench | timing.Bench
    if any(path.is_dir() for path in files):
        given = {"--data": data, "--batch": batch}
        measured = decoding.measure_decoders(files, given, threads, runs)
    else:
        measured = timing.measure(files, data, batch or 1, threads, runs, plain)
    if as_json:
        tables.print_json(measured.facts())
    else:
        tables.show(measured.parts())
