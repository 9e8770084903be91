"""The commands that come before any work: doctor, init."""

from pathlib import Path
from typing import Annotated, Any

import typer

from rabbet.cli import options

EXTRAS = {
    "onnx": (("onnx", "onnx-ir", "onnxscript", "onnxruntime"), ".onnx files, latency budgets"),
    "openvino": (("openvino",), "files for OpenVINO"),
    "hf": (("transformers",), "folders of save_pretrained, texts"),
    "vision": (("timm", "torchvision", "pillow"), "timm:NAME, torchvision:NAME, images"),
    "demo": (("scikit-learn",), "the demo's images"),
    "report": (("matplotlib",), "drawings of searches"),
}
"""What each extra installs, and what for."""


def doctor(as_json: options.Json = False) -> None:
    """Say what is installed, which integer kernels this processor has, and what is missing."""
    from rabbet.cli import tables
    from rabbet.report.text import Table

    facts = _machine()
    found = {extra: {n: _version(n) for n in names} for extra, (names, _) in EXTRAS.items()}
    if as_json:
        tables.print_json(facts | {"extras": found})
        return
    rows = [
        (name, version or "missing", EXTRAS[extra][1], f"rabbet[{extra}]")
        for extra, versions in found.items()
        for name, version in versions.items()
    ]
    missing = [extra for extra, versions in found.items() if None in versions.values()]
    tables.show([f"{name}: {value}" for name, value in facts.items()])
    tables.show([Table(("package", "version", "for", "comes with"), rows, left=4)])
    if missing:
        tables.show([f"to install what is missing: pip install 'rabbet[{','.join(missing)}]'"])


def _machine() -> dict[str, str]:
    """Versions, the processor, and the devices that torch sees."""
    import platform

    import torch

    from rabbet.runtime.bench import EXACT, processor

    known = processor()
    best = known["instructions"]
    exact = "exact" if best in EXACT else "sums of products saturate at 16 bits (docs/onnx.md)"
    cards = [torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count())]
    return {
        "rabbet": _version("rabbet") or "not installed",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "processor": f"{known['processor']}, {known['cores']} cores",
        "int8 kernels of onnxruntime": f"{best}, {exact}",
        "other devices": ", ".join(cards) or "none",
    }


def _version(package: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def init(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=f"The network: {options.NETWORK}.")],
    out: Annotated[Path, typer.Option(dir_okay=False, help="The file to write.")] = Path("nets.py"),
) -> None:
    """Look at a network, and write a commented nets.py in which only the data are missing."""
    from rabbet.cli.networks import open_network
    from rabbet.cli.stored import writable
    from rabbet.errors import FileError
    from rabbet.files import write_whole

    if out.exists():
        raise FileError(f"{out} is there already; name another file with --out")
    if out.suffix != ".py":
        raise typer.BadParameter(f"{out} must end in .py", param_hint="--out")
    writable(out)
    text = _program(model, open_network(model))
    write_whole(out, [text.encode()])
    print(f"{out}: fill in what stands in capitals, then run")
    print(f"    rabbet survey {out}:network --data {out}:batches")


def _program(reference: str, network: Any) -> str:
    """The text of a nets.py for a network."""
    import inspect

    return TEMPLATE.format(
        reference=reference,
        kind=type(network).__name__,
        arguments=", ".join(inspect.signature(network.forward).parameters),
        inputs=_inputs(network),
    )


def _inputs(network: Any) -> str:
    """What the first layer that says it wants to be given."""
    from torch import nn

    for name, layer in network.named_modules():
        if isinstance(layer, nn.Embedding):
            return f"{name} takes int64 below {layer.num_embeddings}, [examples, length]"
        if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            sides = ("depth", "height", "width")[3 - len(layer.kernel_size) :]
            return (
                f"{name} takes float32 [{', '.join(('examples', str(layer.in_channels), *sides))}]"
            )
        if isinstance(layer, nn.Linear):
            return f"{name} takes float32 [examples, ..., {layer.in_features}]"
    return "no conv, linear or embedding was found"


TEMPLATE = '''"""A network, and data for it, as the commands of rabbet take them.

    rabbet survey nets.py:network --data nets.py:batches
    rabbet compress nets.py:network --data nets.py:batches --test nets.py:labelled \\
        --budget "bytes <= 10%" --output small.safetensors
    rabbet export small.safetensors --model nets.py:network --data nets.py:batches \\
        --output small.onnx
"""

from torch.utils.data import DataLoader

from rabbet.cli.networks import open_network

TRAIN = ...  # YOUR TRAINING DATA: a torch Dataset of (inputs, label), prepared as in training
TEST = ...  # YOUR TEST DATA, likewise; it is only measured on


def network():
    """The trained network ({kind}), in eval mode; its forward takes: {arguments}."""
    return open_network({reference!r})


def batches():
    """Some 500 to 2,000 examples of the training data, without labels and without augmentation.

    {inputs}. A batch is what the network is given: a tensor, a tuple of arguments, or a mapping of
    arguments by name. Examples drawn at random stand for all classes.
    """
    for count, (inputs, _) in enumerate(DataLoader(TRAIN, batch_size=32, shuffle=True)):
        if count == 32:
            break
        yield inputs


def labelled():
    """Pairs of (inputs, labels): whole numbers of classes, which are on axis 1 of the outputs."""
    yield from DataLoader(TEST, batch_size=64)
'''
