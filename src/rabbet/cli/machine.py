"""What is installed, what this processor can do, and what is missing for what."""

import importlib
import platform
from importlib import metadata
from typing import Any

import torch

from rabbet.report.text import Part, Table
from rabbet.runtime.bench import EXACT, processor

EXTRAS = {
    "onnx": (("onnx", "onnx-ir", "onnxscript", "onnxruntime"), ".onnx files, latency budgets"),
    "openvino": (("openvino",), "files for OpenVINO"),
    "hf": (("transformers",), "folders of save_pretrained, texts"),
    "vision": (("timm", "torchvision", "pillow"), "timm:NAME, torchvision:NAME, images"),
    "demo": (("scikit-learn",), "the demo's images"),
    "report": (("matplotlib", "vl-convert-python"), "drawings of searches, pages of reports"),
    "cluster": (("distributed",), "jobs on Dask, on many machines"),
}
"""What each extra installs, and what for."""


def versions() -> dict[str, dict[str, str | None]]:
    """The version of each package of each extra; None where it is missing."""
    return {extra: {name: version(name) for name in names} for extra, (names, _) in EXTRAS.items()}


def version(package: str) -> str | None:
    """The version of a package that is installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def machine() -> dict[str, str]:
    """Versions, the processor, and the devices that torch sees."""
    known = processor()
    best = known["instructions"]
    exact = "exact" if best in EXACT else "sums of products saturate at 16 bits (docs/onnx.md)"
    exact = "so nothing is known of them" if best == "unknown" else exact
    cards = [torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count())]
    return {
        "rabbet": version("rabbet") or "not installed",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "processor": f"{known['processor']}, {known['cores']} cores",
        "int8 kernels of onnxruntime": f"{best}, {exact}",
        "other devices": ", ".join(cards) or "none",
    }


def facts() -> dict[str, Any]:
    """All of it for JSON."""
    return machine() | {"extras": versions(), "broken": broken()}


def parts() -> list[Part]:
    """All of it for people."""
    found = versions()
    rows = [
        (name, known or "missing", EXTRAS[extra][1], f"rabbet[{extra}]")
        for extra, packages in found.items()
        for name, known in packages.items()
    ]
    missing = [extra for extra, packages in found.items() if None in packages.values()]
    wish = [f"to install what is missing: pip install 'rabbet[{','.join(missing)}]'"]
    table = Table(("package", "version", "for", "comes with"), rows, left=4)
    said = [*(wish if missing else []), *broken()]
    return [*(f"{n}: {v}" for n, v in machine().items()), "", table, *said]


def broken() -> list[str]:
    """What is installed and cannot be imported: torchvision, where it is not of torch's build."""
    if version("torchvision") is None:
        return []
    try:
        importlib.import_module("torchvision")
    except Exception as e:  # a library that does not fit raises anything
        return [
            f"torchvision {version('torchvision')} cannot be imported beside torch "
            f"{torch.__version__} ({e}), and timm needs it: install both anew, from one index"
        ]
    return []
