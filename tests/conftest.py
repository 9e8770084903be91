"""One thread a worker, examples that never change from run to run, and the real data where it is to be found."""

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, settings

from rabbet.export.onnx import compare
from rabbet.runtime.bench import cpu

torch.set_num_threads(1)

settings.register_profile(
    "rabbet",
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("rabbet")

# Processors on which onnxruntime's int8 kernels do not saturate at 16 bits (docs/onnx.md).
EXACT = ("amx_int8", "avx512_vnni", "avx_vnni", "asimddp")

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))  # trials that tests share with benchmarks/endurance.py
DATA = Path(os.environ.get("RABBET_DATA", ROOT.parent / "shared" / "data"))


def pytest_configure(config):
    # said by torch of the user's layer, once a process, while it runs inside rabbet's survey
    config.addinivalue_line(
        "filterwarnings", "ignore:Using padding='same' with even kernel:UserWarning"
    )


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def kernels_are_exact():
    """Whether onnxruntime's int8 kernels do not saturate here."""
    return cpu()["instructions"] in EXACT


@pytest.fixture(scope="session", autouse=True)
def _random_networks_may_saturate(kernels_are_exact):
    """Where kernels saturate, an export of a random network may be further off than it allows."""
    before = compare.NEAR
    compare.NEAR = before if kernels_are_exact else 1.0
    yield
    compare.NEAR = before


@pytest.fixture(scope="session")
def real():
    """The readers `load` and `nets` of the data folder, used where they lie."""
    if not (DATA / "load.py").is_file():
        pytest.skip(f"no real networks at {DATA}; set RABBET_DATA to the folder that holds load.py")
    return SimpleNamespace(load=_module("load"), nets=_module("nets"))


def _module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"rabbet_data_{name}", DATA / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
