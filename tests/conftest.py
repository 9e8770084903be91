"""One thread per worker, the same examples in every run, and the real data if it is there."""

import functools
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, settings
from torch.export import decomp_utils, exported_program
from torch.onnx._internal.exporter import _registration

from rabbet.export.onnx import compare
from rabbet.runtime.bench import EXACT, cpu

torch.set_num_threads(1)

# `test_devices.py` runs these, in a process of their own
collect_ignore = [] if "RABBET_FAR" in os.environ else ["far"]

settings.register_profile(
    "rabbet",
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("rabbet")

TABLES = (
    (_registration.ONNXRegistry, "from_torchlib"),
    (exported_program, "_collect_all_valid_cia_ops"),
    (decomp_utils, "_collect_all_valid_cia_ops"),
)

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))  # trials that tests share with benchmarks/endurance.py
DATA = Path(os.environ.get("RABBET_DATA", ROOT.parent / "shared" / "data"))


def pytest_configure(config):
    # torch says this of the user's layer, once per process, when it runs inside rabbet's survey
    config.addinivalue_line(
        "filterwarnings", "ignore:Using padding='same' with even kernel:UserWarning"
    )


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _programs_are_forgotten(tmp_path_factory):
    """A user's file that a test wrote and imported is not what the next test finds by its name."""
    path, known = sys.path[:], set(sys.modules)
    yield
    sys.path[:] = path
    written = str(tmp_path_factory.getbasetemp())
    for name in set(sys.modules) - known:
        if str(getattr(sys.modules[name], "__file__", None)).startswith(written):
            del sys.modules[name]


@pytest.fixture(scope="session")
def kernels_are_exact():
    """Whether onnxruntime's int8 kernels do not saturate here."""
    return cpu()["instructions"] in EXACT


@pytest.fixture(scope="session", autouse=True)
def _random_networks_may_saturate(kernels_are_exact):
    """Where kernels saturate, the export of a random network may differ more than rabbet allows."""
    before = compare.NEAR
    compare.NEAR = before if kernels_are_exact else 1.0
    yield
    compare.NEAR = before


@pytest.fixture(scope="session", autouse=True)
def _tables_of_the_exporter_are_read_once():
    """torch's exporter reads all its tables anew in every export, more than half of a small one."""
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in TABLES:
            if hasattr(owner, name):
                patch.setattr(owner, name, staticmethod(functools.cache(getattr(owner, name))))
        yield


@pytest.fixture(scope="session")
def real():
    """The readers `load` and `nets`, used from the data folder."""
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
