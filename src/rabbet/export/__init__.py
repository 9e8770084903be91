"""Files: each export is `(parcel, path) -> Written`.

A new one is a file here and a line in EXPORTS.
"""

from collections.abc import Callable
from pathlib import Path

from torch import nn

from rabbet.data.task import Task
from rabbet.errors import FileError
from rabbet.export.base import Export, Written
from rabbet.export.decoders import DECODERS, DecoderExport, require_decoder
from rabbet.export.onnx.write import float_content, write_onnx, write_openvino
from rabbet.export.torch import program, write_torch
from rabbet.export.writing import write_native


def _of_decoder(write: DecoderExport) -> Export:
    return lambda parcel, path: write(parcel.model, path, None)


EXPORTS: dict[str, Export] = {
    "safetensors": write_native,
    "onnx": write_onnx,
    "openvino": write_openvino,
    "torch": write_torch,
} | {name: _of_decoder(write) for name, write in DECODERS.items()}


def _decoder(model: nn.Module, _: Task) -> None:
    require_decoder(model)


TRIALS: dict[str, Callable[[nn.Module, Task], object]] = {
    "onnx": float_content,
    "openvino": float_content,
    "torch": program,
    **dict.fromkeys(DECODERS, _decoder),
}
"""What shows on a float network, before any work, whether torch can export it for a target."""
ENDINGS = {".safetensors": "safetensors", ".onnx": "onnx", ".pt2": "torch"}
"""The target that a path asks for by its ending."""


def target_of(path: Path, target: str | None = None) -> str:
    """The target asked for: by name, else by the ending of the path.

    Raises FileError if no target has that name or ending.
    """
    if target is None and path.suffix in ENDINGS:
        return ENDINGS[path.suffix]
    if target not in EXPORTS:
        asked = (
            f"to {target!r}" if target is not None else f"to a file that ends in {path.suffix!r}"
        )
        raise FileError(
            f"cannot export {asked}; the targets are {', '.join(EXPORTS)}, "
            f"the endings {', '.join(ENDINGS)}"
        )
    return target


__all__ = ["DECODERS", "ENDINGS", "EXPORTS", "TRIALS", "Export", "Written", "target_of"]
