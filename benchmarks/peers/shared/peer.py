"""What runs inside a peer's own environment: a job as files, one result as a line of JSON.

`benchmarks/peers.py` starts `NAME.py` with a file that says what to do. Only numpy is needed here;
each peer imports its own packages before it calls `run`, so that they are not part of what its
method takes. Nothing here knows rabbet.
"""

import importlib.metadata
import importlib.util
import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Predict = Callable[[Array], Array]
BURST, ROUNDS, WARM = 3, 15, 3
SIMULATED = "a simulation only"


@dataclass
class Job:
    """A method, the bits that are asked of it, and a network with its images.

    folder: holds float.onnx, network.py and state.safetensors, calibrate.npy and test.npy, both
    [n, 3, height, width] float32. out: where the peer writes its files. size: images in a batch.
    make: what makes the network, with its arguments. limit: seconds of processor.
    """

    folder: Path
    out: Path
    method: str
    bits: int
    size: int
    make: str
    arguments: list[Any]
    limit: float
    calibrate: Array = field(init=False)
    test: Array = field(init=False)

    def __post_init__(self) -> None:
        self.folder, self.out = Path(self.folder), Path(self.out)
        self.calibrate = np.load(self.folder / "calibrate.npy")
        self.test = np.load(self.folder / "test.npy", mmap_mode="r")

    @property
    def onnx(self) -> Path:
        """The float network as ONNX: one input [batch, 3, height, width], one output."""
        return self.folder / "float.onnx"

    def batches(self) -> list[Array]:
        """The calibration images in batches."""
        images = self.calibrate
        return [images[k : k + self.size] for k in range(0, len(images), self.size)]

    def tensors(self) -> list[Any]:
        """The same as tensors of torch."""
        import torch

        return [torch.from_numpy(batch) for batch in self.batches()]

    def network(self) -> Any:
        """The float network in torch, in eval mode."""
        from safetensors.torch import load_file

        spec = importlib.util.spec_from_file_location("network", self.folder / "network.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["network"] = module  # where torch's tracers look for its classes
        spec.loader.exec_module(module)
        model = getattr(module, self.make)(*self.arguments)
        model.load_state_dict(load_file(self.folder / "state.safetensors"))
        return model.eval()

    def one(self) -> Array:
        """One image, as a batch."""
        return np.array(self.test[:1])


@dataclass
class Outcome:
    """What a method gives: how it runs, and what it takes.

    bytes: of the file on the disk; None if there is none. packed: bytes that codes, scales and
    biases would take at least, where the file holds them in float. pair: runs one image in float
    and as quantised, in the same runtime; None with the reason in `untimed`.
    """

    file: str
    predict: Predict
    bytes: int | None = None
    packed: int | None = None
    pair: tuple[Callable[[], Any], Callable[[], Any]] | None = None
    untimed: str | None = None
    notes: str | None = None


Method = Callable[[Job], Iterable[Outcome]]


def in_torch(model: Any) -> Predict:
    """A module of torch as a function of arrays."""
    import torch

    def predict(images: Array) -> Array:
        with torch.no_grad():
            found = model(torch.from_numpy(np.array(images)))
            return np.asarray(found)

    return predict


def in_onnxruntime(path: Path, optimised: bool = True) -> Predict:
    """A file in onnxruntime, on one thread. optimised: with all changes to the graph."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    if not optimised:
        level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.graph_optimization_level = level
    session = onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: session.run(None, {name: np.ascontiguousarray(images)})[0]


def in_openvino(source: Any) -> Predict:
    """A model of OpenVINO, or a file of one, on one thread."""
    import openvino

    core = openvino.Core()
    model = core.read_model(source) if isinstance(source, Path) else source
    exact = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    compiled = core.compile_model(model, "CPU", exact)

    def predict(images: Array) -> Array:
        return np.array(compiled(np.ascontiguousarray(images))[0])

    return predict


def onnx_outcome(job: Job, path: Path, **more: Any) -> Outcome:
    """A quantised ONNX file, in onnxruntime beside the float file."""
    run, whole, image = in_onnxruntime(path), in_onnxruntime(job.onnx), job.one()
    pair = (lambda: whole(image), lambda: run(image))
    return Outcome("ONNX, onnxruntime", run, size(path), pair=pair, **more)


def saturates() -> bool:
    """Whether sums of two products of 8 bits overflow 16 here, as on x86 without VNNI."""
    told = Path("/proc/cpuinfo").read_text()
    return "avx2" in told and not any(s in told for s in ("avx512_vnni", "avx_vnni", "amx_int8"))


def size(path: Path) -> int:
    """Bytes of a file, with the file of data beside it if it has one."""
    return sum(p.stat().st_size for p in path.parent.glob(f"{path.name}*"))


def packed(model: Any, bits: Callable[[str], float]) -> int:
    """Bytes of codes of so many bits, a 2-byte scale a channel, 4-byte biases; no header.

    bits: of the layer of a name. model: a float network, whose BatchNorms become biases.
    """
    from torch import nn

    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    codes = sum(m.weight.numel() * bits(name) for name, m in layers.items())
    return round(codes / 8) + sum(6 * m.weight.shape[0] for m in layers.values())


def ends(model: Any) -> set[str]:
    """The names of the first and of the last layer of a float network."""
    from torch import nn

    names = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    return {names[0], names[-1]}


def peak() -> float:
    """The most memory that this process has held, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) / 1024 for x in lines if x.startswith("VmHWM:"))


def processor_seconds() -> float:
    """Of this process and of those that it has waited for."""
    each = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in each)


def in_turn(pair: tuple[Callable[[], Any], Callable[[], Any]]) -> tuple[float, float]:
    """Median milliseconds of two functions, run in turn in short bursts."""
    times: tuple[list[float], list[float]] = ([], [])
    for function in pair:
        for _ in range(WARM):
            function()
    for _ in range(ROUNDS):
        for function, spent in zip(pair, times, strict=True):
            function()  # brings its data back into the caches
            for _ in range(BURST):
                start = time.perf_counter()
                function()
                spent.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[0]), statistics.median(times[1])


def told(job: Job, outcome: Outcome) -> dict[str, Any]:
    """What was measured of an outcome; the predicted classes lie in a file of this name."""
    size = job.size
    parts = [outcome.predict(job.test[k : k + size]) for k in range(0, len(job.test), size)]
    name = f"{outcome.file}.npy".replace(" ", "-")
    np.save(job.out / name, np.concatenate(parts).argmax(1))
    times = in_turn(outcome.pair) if outcome.pair else (None, None)
    return {
        "file": outcome.file,
        "predicted": name,
        "bytes": outcome.bytes,
        "packed": outcome.packed,
        "float ms": times[0],
        "ms": times[1],
        "untimed": None if outcome.pair else outcome.untimed or SIMULATED,
        "notes": outcome.notes,
    }


def run(methods: Mapping[str, Method], *packages: str) -> None:
    """Do the job that the command line names, and print what came of it as the last line."""
    job = Job(**json.loads(Path(sys.argv[1]).read_text()))
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    resource.setrlimit(resource.RLIMIT_CPU, (round(job.limit), hard))
    spent, held, start = processor_seconds(), peak(), time.perf_counter()
    outcomes = list(methods[job.method](job))
    found = {
        "seconds": time.perf_counter() - start,
        "processor seconds": processor_seconds() - spent,
        "peak MiB": peak() - held,
        "version": ", ".join(f"{p} {importlib.metadata.version(p)}" for p in packages),
    }
    found["outcomes"] = [told(job, outcome) for outcome in outcomes]
    print(f"\nRESULT {json.dumps(found)}", flush=True)
    sys.stdout.flush()
    os._exit(0)  # some runtimes crash on their way out, when all is said
