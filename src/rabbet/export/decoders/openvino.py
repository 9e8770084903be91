"""A decoder as an ONNX file that OpenVINO reads, with weights that stay compressed when it runs.

OpenVINO reads `MatMulNBits` of 2, 4 and 8 bits and keeps its codes; of tables it keeps none that
are 2 bits wide, or that a head shares, and it reads no functions that a file brings along. So rows
are looked up as bytes and unpacked in the graph, and what lies on other widths is widened before it
is written.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from rabbet.export.base import Written
from rabbet.export.decoders.blocks import Blocks
from rabbet.export.decoders.families import require_decoder, written
from rabbet.export.decoders.genai import (
    SAME,
    compare,
    content_of,
    require_folder,
    write_beside,
)
from rabbet.export.decoders.writer import FLOAT, INT32, Writer
from rabbet.export.onnx.graph import Graph
from rabbet.files import write_whole
from rabbet.model.compressed import Factor
from rabbet.model.surgery import on_cpu
from rabbet.runtime.decoding import MODEL, Writing
from rabbet.runtime.openvino import Compiled, openvino_known
from rabbet.runtime.session import Session, require_onnx

if TYPE_CHECKING:
    import onnx_ir as ir

UNTRIED = "not tried in OpenVINO, which is not installed, but in onnxruntime"


def write_openvino_decoder(model: nn.Module, folder: Path, tokenizer: Any) -> Written:
    """Write a folder with `model.onnx` for OpenVINO; the bytes are those of that file.

    Inputs and outputs are those of the target genai; onnxruntime runs the file, too. tokenizer: of
    transformers, or None for that of the folder which the network was read from. Notes name weights
    that are wider in the file than in the plan or float32 once it is loaded, and say where OpenVINO
    is not installed, or no tokenizer was found. Raises FileError if the packages for ONNX are
    missing, the path is a file, or OpenVINO does not run what was written; ModelError for a network
    that is no decoder known here, or if the file does not answer as the network does.
    """
    require_onnx()
    require_decoder(model)
    require_folder(folder)
    model = on_cpu(model)
    content, notes = openvino_content(model)
    known = openvino_known()
    error = compare(model, Writing(Compiled(content) if known else Session(content)), SAME)
    folder.mkdir(parents=True, exist_ok=True)
    size = write_whole(folder / MODEL, [content])
    told = (*notes, *(() if known else (UNTRIED,)))
    return Written(size, (*told, *write_beside(model, folder, tokenizer)), error)


def openvino_content(model: nn.Module) -> tuple[bytes, tuple[str, ...]]:
    """The ONNX file, and what to know of it; ModelError if it is too long for one."""
    return content_of(*written(model, OpenVINOWriter))


class OpenVINOWriter(Writer):
    """Layers as OpenVINO keeps their weights compressed."""

    # What it makes of a product of integers with scales that are as many.
    unreadable = "float32, or 8 bits with a float32 scale for each entry,"

    def __init__(self, graph: Graph, model: nn.Module) -> None:
        super().__init__(graph, model, exact=True)
        graph.functions_known = False

    def _readable(self, factor: Factor) -> Blocks | None:
        return Blocks.of(factor.numbers)

    def _product(self, name: str, factor: Factor, x: "ir.Value") -> "ir.Value":
        """X times the transpose of a factor [out, in].

        A row whose last block is filled up would become float32 at load: the input is, too.
        """
        blocks = self._readable(factor)
        if blocks is None:
            return self._float_product(name, self._whole(name, factor), x)
        if blocks.padding:
            x = self.call("Pad", x, self.integers(0, 0, 0, 0, 0, blocks.padding))
        return self._block_product(name, blocks, x, blocks.columns + blocks.padding)

    def _looked_up(self, name: str, blocks: Blocks, ids: "ir.Value") -> "ir.Value":
        """Rows of a table in blocks, [batch, length] -> [batch, length, columns]."""
        blob, scales, zeros = self._blocks(name, blocks)
        codes = self._digits(self.call("Gather", blob, ids, axis=0), blocks.bits)
        steps = self.call("Reshape", codes, self.integers(0, 0, blocks.count, blocks.size))
        points: ir.Value = self.number(2.0 ** (blocks.bits - 1))
        if zeros is not None:
            each = self._digits(self.call("Gather", zeros, ids, axis=0), blocks.bits)
            each = self.call("Reshape", each, self.integers(0, 0, -1, 1))
            points = self._first(each, blocks.count, 2)
        each = self.call("Unsqueeze", self.call("Gather", scales, ids, axis=0), self.integers(3))
        values = self.call("Mul", self.call("Sub", steps, points), each)
        rows = self.call("Reshape", values, self.integers(0, 0, blocks.count * blocks.size))
        return self._first(rows, blocks.columns, 2) if blocks.padding else rows

    def _digits(self, packed: "ir.Value", bits: int) -> "ir.Value":
        """The codes that bytes hold, as floats, along a new last axis."""
        powers = np.array([1 << k for k in range(0, 8, bits)], np.int32)
        wide = self.call("Unsqueeze", self.call("Cast", packed, to=INT32), self.integers(-1))
        shifted = self.call("Div", wide, self.graph.shared(f"powers.{bits}", powers))
        base = self.graph.shared(f"base.{bits}", np.array(1 << bits, np.int32))
        return self.call("Cast", self.call("Mod", shifted, base), to=FLOAT)

    def _first(self, x: "ir.Value", count: int, axis: int) -> "ir.Value":
        ends = self.integers(0), self.integers(count), self.integers(axis)
        return self.call("Slice", x, *ends)

    def _repacked(self, key: str, name: str, blocks: Blocks) -> "ir.Value":
        """Codes as kernels read them, in the file: OpenVINO reads no functions that unpack them."""
        if blocks.grid.levels < 2**blocks.bits:
            self.notes.append(
                f"{blocks.grid} takes {blocks.bits} bits a code in this file: OpenVINO reads codes "
                "of 2, 4 and 8 bits alone"
            )
        return self.graph.constant(f"{key}.blob", blocks.blob())
