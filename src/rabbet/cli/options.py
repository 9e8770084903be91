"""The options that commands share; `texts` reads what stands in them."""

from pathlib import Path
from typing import Annotated

import typer

DEFAULT_BUDGET = "bytes <= 10%"

# The help needs these names, and not what they name, which takes seconds to import.
METHODS = ("joint", "admm", "cora", "cgmq", "ttqat", "blockwise")
QUALITIES = ("fast", "default", "best")
OUTPUTS = ("scores", "values")
AXES = ("bytes", "macs", "bops", "bits", "bpw", "latency", "onnx", "openvino")
TARGETS = (
    "safetensors", "onnx", "openvino", "torch",
    "genai", "genai-exact", "openvino-decoder", "gguf", "gguf-f16",
)  # fmt: skip


def known_quality(name: str) -> str:
    """The name of a tier; a usage error for any other."""
    if name not in QUALITIES:
        raise typer.BadParameter(f"{name!r} is not one of {', '.join(QUALITIES)}")
    return name


def known_outputs(name: str | None) -> str | None:
    """What outputs are, if it is said; a usage error for anything else."""
    if name is not None and name not in OUTPUTS:
        raise typer.BadParameter(f"{name!r} is not one of {', '.join(OUTPUTS)}")
    return name


def known_target(name: str | None) -> str | None:
    """The name of a target, if there is one; a usage error for any other."""
    if name is not None and name not in TARGETS:
        raise typer.BadParameter(f"{name!r} is not one of {', '.join(TARGETS)}")
    return name


REFERENCE = "module:callable or file.py:callable, called without arguments"
NETWORK = (
    f"{REFERENCE}; timm:NAME, torchvision:NAME; hf:FOLDER of save_pretrained; a .pt2 "
    "of torch.export"
)
FILES = "a folder of images, .npy, .npz, .txt, .tsv, .jsonl"

Model = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL", help=f"The trained network: {NETWORK}. Default: the demo network."
    ),
]
Data = Annotated[
    str | None, typer.Option(help=f"Unlabelled batches or a Task: {REFERENCE}; or {FILES}.")
]
Outputs = Annotated[
    str | None,
    typer.Option(
        callback=known_outputs,
        metavar="|".join(OUTPUTS),
        help="What all outputs of the network are: scores of classes, or values. Default: what a "
        "Task says, else told by the outputs themselves.",
    ),
]
Test = Annotated[
    str | None,
    typer.Option(
        help="Batches of (inputs, labels), or a function from a model to a number, named likewise; "
        "or a folder of images for each class, .npz, .tsv; text (.txt, .jsonl) for a decoder."
    ),
]
BUDGET = (
    "Such as 'bytes <= 10%, bops <= 0.5%': bytes (of the file), bits (per weight, without scales), "
    "bpw (per weight, with scales and zero points), macs, bops"
)
MEASURED = "latency, onnx and openvino (bytes of the exported file)"
BudgetText = Annotated[str, typer.Option("--budget", help=f"{BUDGET}, {MEASURED}.")]
OptionalBudget = Annotated[
    str | None,
    typer.Option(
        "--budget",
        help=f"{BUDGET}, {MEASURED}. Default without --plan: {DEFAULT_BUDGET}.",
    ),
]
PlanFile = Annotated[Path | None, typer.Option(dir_okay=False, help="Fit the plan in this file.")]
Drop = Annotated[
    str | None,
    typer.Option(
        metavar="'<= X'",
        help="Find the least along --axis that loses at most this, in points of an accuracy, by "
        "which a perplexity rises or in the unit of a function, measured on --held; a --budget "
        "then holds beside it.",
    ),
]
Axis = Annotated[
    str, typer.Option(metavar="|".join(AXES), help="The metric along which budgets change.")
]
DropAxis = Annotated[
    str | None,
    typer.Option(
        "--axis",
        metavar="|".join(AXES),
        help="What a --drop looks for the least of. Default: bytes.",
    ),
]
Held = Annotated[
    str | None,
    typer.Option(
        help="What networks are measured on while one is chosen: labelled batches that --test does "
        "not hold, or a function, as for --test. Default: the task's own evaluation."
    ),
]
Quality = Annotated[
    str,
    typer.Option(
        callback=known_quality,
        metavar="|".join(QUALITIES),
        help="How long to tune after the choice.",
    ),
]
MethodText = Annotated[
    str | None,
    typer.Option(
        "--method",
        metavar="NAME [SETTING=VALUE ...]",
        help=f"One of {', '.join(METHODS)}, with settings: "
        "'cora bits=3 tuning.steps=0'. Default: joint.",
    ),
]
Target = Annotated[
    str | None,
    typer.Option(
        callback=known_target,
        metavar="|".join(TARGETS),
        help="For which runtime the file is; bytes in the budget are those of that file.",
    ),
]
Output = Annotated[
    Path,
    typer.Option(
        "--output", "-o", dir_okay=False, help="The file to write; its ending says what it is."
    ),
]
Exported = Annotated[
    Path,
    typer.Option(
        "--output",
        "-o",
        help="The file to write; its ending says what it is. A folder: for targets of decoders.",
    ),
]
Place = Annotated[
    Path,
    typer.Option(
        "--output",
        "-o",
        help="The file to write; its ending says what it is. A folder: for the network of a "
        "folder, which is then read block by block.",
    ),
]
Html = Annotated[
    Path | None,
    typer.Option(
        "--html", dir_okay=False, help="Write a report as one HTML file for a browser, too."
    ),
]
Seed = Annotated[
    int, typer.Option(min=0, max=2**32 - 1, help="The same seed gives the same bytes.")
]
Resume = Annotated[
    Path | None,
    typer.Option(metavar="DIR", file_okay=False, help="Keep finished work here and go on from it."),
]
Processes = Annotated[
    int, typer.Option("--jobs", min=1, metavar="N", help="Processes that share the layers.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
