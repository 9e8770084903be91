"""A file in OpenVINO."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rabbet.errors import FileError

EXACT: dict[str, Any] = {
    "INFERENCE_PRECISION_HINT": "f32",  # floats stay 32 bits wide where bfloat16 is faster
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,  # inputs of compressed weights stay floats
}


def openvino_known() -> bool:
    """Whether OpenVINO is installed."""
    return find_spec("openvino") is not None


class Compiled:
    """A file, read and compiled for the CPU, which computes in float32.

    threads: 0 for as many as OpenVINO likes. Raises FileError if OpenVINO cannot read the file,
    compile it or, in `run`, run it.
    """

    def __init__(self, content: bytes, threads: int = 0) -> None:
        import openvino

        with _told():
            core = openvino.Core()
            settings = EXACT | {"INFERENCE_NUM_THREADS": threads}
            self.model = core.compile_model(core.read_model(io.BytesIO(content)), "CPU", settings)

    @property
    def shapes(self) -> dict[str, tuple[Any, ...]]:
        """Of each input the sizes, in order; None for a free axis."""
        return {
            value.any_name: tuple(
                axis.get_length() if axis.is_static else None for axis in value.partial_shape
            )
            for value in self.model.inputs
        }

    def run(self, feed: dict[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """The outputs, in order, for input arrays by name."""
        with _told():
            result = self.model({n: np.ascontiguousarray(array) for n, array in feed.items()})
            return [np.array(result[k]) for k in range(len(self.model.outputs))]


def run_openvino(content: bytes, feed: dict[str, NDArray[Any]]) -> list[NDArray[Any]]:
    """The outputs of a file, on the CPU, for input arrays by name; FileError as `Compiled`."""
    return Compiled(content).run(feed)


@contextmanager
def _told() -> Iterator[None]:
    """OpenVINO's errors as a FileError of one line."""
    try:
        yield
    except RuntimeError as e:
        last = [line for line in str(e).splitlines() if line.strip()][-1:]
        raise FileError(f"OpenVINO does not run the file: {' '.join(last).strip()}") from e
