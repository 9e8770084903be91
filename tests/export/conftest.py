"""What the tests of exports know of the machine that they run on."""

import pytest

from rabbet.export.onnx import compare
from rabbet.runtime.bench import cpu

EXACT = ("amx_int8", "avx512_vnni", "avx_vnni", "asimddp")


@pytest.fixture(scope="session")
def kernels_are_exact():
    """Whether onnxruntime's int8 kernels do not saturate at 16 bits here (docs/onnx.md)."""
    return cpu()["instructions"] in EXACT


@pytest.fixture(scope="session", autouse=True)
def _random_networks_may_saturate(kernels_are_exact):
    """Where kernels saturate, an export of a random network may be further off than it allows."""
    before = compare.NEAR
    compare.NEAR = before if kernels_are_exact else 1.0
    yield
    compare.NEAR = before
