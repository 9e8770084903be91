"""A file in OpenVINO."""

import io
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rabbet.errors import FileError

EXACT = {"INFERENCE_PRECISION_HINT": "f32"}  # floats stay 32 bits wide where bfloat16 is faster


def openvino_known() -> bool:
    """Whether OpenVINO is installed."""
    return find_spec("openvino") is not None


def run_openvino(content: bytes, feed: dict[str, NDArray[Any]]) -> list[NDArray[Any]]:
    """The outputs of a file, on the CPU, for input arrays by name.

    Raises FileError if OpenVINO cannot read the file, compile it or run it.
    """
    import openvino

    try:
        core = openvino.Core()
        compiled = core.compile_model(core.read_model(io.BytesIO(content)), "CPU", EXACT)
        result = compiled({name: np.ascontiguousarray(array) for name, array in feed.items()})
        return [np.array(result[k]) for k in range(len(compiled.outputs))]
    except RuntimeError as e:
        last = [line for line in str(e).splitlines() if line.strip()][-1:]
        raise FileError(f"OpenVINO does not run the file: {' '.join(last).strip()}") from e
