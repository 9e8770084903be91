"""An ONNX file in onnxruntime: run it like a network, and see which kernels it runs on."""

import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from rabbet.data.batches import describe, tensors
from rabbet.errors import DataError, FileError

# Operators that multiply with a weight in an optimised graph, and the position of that input.
KERNELS = {
    "ConvInteger": 1,
    "DynamicQuantizeMatMul": 1,
    "MatMulInteger": 1,
    "MatMulIntegerToFloat": 1,
    "QAttention": 1,
    "QGemm": 3,
    "QLinearConv": 3,
    "QLinearMatMul": 3,
}
FLOAT = dict.fromkeys(
    (
        "Conv",
        "ConvTranspose",
        "FusedConv",
        "FusedGemm",
        "FusedMatMul",
        "Gemm",
        "MatMul",
        "MatMulNBits",
        "NhwcFusedConv",
    ),
    1,
)


def require_onnx(*names: str) -> None:
    """Raise FileError, saying what to install, if packages for ONNX files are missing.

    names: the packages; by default all that are needed to write and run such files.
    """
    missing = [
        name
        for name in names or ("onnx", "onnx_ir", "onnxruntime", "onnxscript")
        if find_spec(name) is None
    ]
    if missing:
        raise FileError(f"ONNX files need {', '.join(missing)}; install rabbet[onnx]")


class Session(nn.Module):
    """A file as a network: tensors in, tensors out.

    threads: 0 for as many as there are cores. optimised: where to write the graph that runs. exact:
    run every node as it is written, in floats between QDQ pairs, without integer kernels.
    """

    def __init__(
        self,
        source: Path | str | bytes,
        threads: int = 0,
        optimised: Path | None = None,
        exact: bool = False,
    ) -> None:
        super().__init__()
        require_onnx("onnxruntime")
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        # Threads that spin after a run would take the cores from whatever is timed next.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        levels = onnxruntime.GraphOptimizationLevel
        if exact:
            options.graph_optimization_level = levels.ORT_DISABLE_ALL
        if optimised is not None:
            options.optimized_model_filepath = str(optimised)
            # The last level only changes the layout of weights for the processor, and renames them.
            options.graph_optimization_level = levels.ORT_ENABLE_EXTENDED
        if not isinstance(source, bytes) and not Path(source).is_file():
            raise FileError(f"there is no file {source}")
        try:
            content = source if isinstance(source, bytes) else str(source)
            self.session = onnxruntime.InferenceSession(
                content, options, providers=["CPUExecutionProvider"]
            )
        except Exception as e:  # onnxruntime has no common root for its errors
            what = "the graph" if isinstance(source, bytes) else source
            raise FileError(f"onnxruntime does not take {what}: {e}") from e
        self.names = [i.name for i in self.session.get_inputs()]
        self.outputs = [o.name for o in self.session.get_outputs()]

    def forward(self, *parts: Any, **named: Any) -> Any:
        """Run on a batch's tensors; one tensor, or a tuple if the file has several outputs."""
        arrays = self.run(self.feed((parts, named)))
        result = tuple(torch.from_numpy(np.asarray(a)) for a in arrays)
        return result[0] if len(result) == 1 else result

    def feed(self, batch: Any) -> dict[str, np.ndarray[Any, Any]]:
        """The arrays of a batch by the inputs' names: a mapping by its keys, else in order."""
        with_names = isinstance(batch, tuple) and len(batch) == 2 and isinstance(batch[1], dict)
        keyed = batch[1] if with_names else batch
        if isinstance(keyed, dict) and set(self.names) <= keyed.keys():
            return {n: keyed[n].detach().cpu().numpy() for n in self.names}
        given = tensors(batch)
        if len(given) != len(self.names):
            raise DataError(
                f"the file takes {', '.join(self.names)}; the batch is {describe(batch)}"
            )
        return {n: t.detach().cpu().numpy() for n, t in zip(self.names, given, strict=True)}

    @property
    def shapes(self) -> dict[str, tuple[Any, ...]]:
        """Of each input the sizes, in order; of a free axis its name."""
        return {i.name: tuple(i.shape) for i in self.session.get_inputs()}

    def run(
        self, feed: dict[str, np.ndarray[Any, Any]], outputs: Sequence[str] | None = None
    ) -> list[Any]:
        """The named outputs (None: all) for input arrays by name."""
        try:
            return list(self.session.run(outputs, feed))
        except Exception as e:
            shapes = ", ".join(f"{n} {a.dtype}{list(a.shape)}" for n, a in feed.items())
            raise DataError(f"the file does not run on {shapes}: {e}") from e


def kernels(source: Path | bytes) -> dict[str, str]:
    """The kernel of every node that multiplies with a weight, by the weight's name.

    Nodes are those of the graph that onnxruntime has optimised for itself.
    """
    import onnx

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "optimised.onnx"
        Session(source, 1, path)
        graph = onnx.load(path).graph
    known = {i.name for i in graph.initializer}
    makers = {out: node for node in graph.node for out in node.output}
    names: dict[str, str] = {}
    for node in graph.node:
        place = (KERNELS | FLOAT).get(node.op_type)
        weight = None if place is None else _origin(node.input[place], makers, known)
        if weight is not None:
            names[weight if weight not in names else f"{weight} ({node.output[0]})"] = node.op_type
    return names


def _origin(name: str, makers: dict[str, Any], known: set[str]) -> str | None:
    """The constant that a value comes from; None if there is none.

    The search goes through the nodes that a runtime leaves in front of a float kernel.
    """
    while name not in known:
        node = makers.get(name)
        if node is None or node.op_type not in ("DequantizeLinear", "Transpose", "Cast", "Reshape"):
            return None
        name = node.input[0]
    return name
