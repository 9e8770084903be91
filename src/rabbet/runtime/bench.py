"""How fast files are in onnxruntime, timed in turn, against float and a plain int8 export."""

import contextlib
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rabbet.data.batches import Batch
from rabbet.errors import FileError
from rabbet.runtime.decoding import Runs, Writing
from rabbet.runtime.session import Session, require_onnx

WARM = 5
BURST = 3  # timed runs of one file in a row, after one that brings its data back into the caches
SETS = ("amx_int8", "avx512_vnni", "avx_vnni", "avx512f", "avx2", "asimddp")
EXACT = {"amx_int8", "avx512_vnni", "avx_vnni", "asimddp"}
"""Those with which onnxruntime's int8 kernels do not saturate at 16 bits (docs/onnx.md)."""


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one run: the median, and what 95 of 100 runs stay below."""

    median: float
    p95: float


def time_files(
    files: Mapping[str, Path | bytes], batch: Batch, threads: int = 0, runs: int = 60
) -> dict[str, Timing]:
    """Time files on one batch, in turn.

    Every round runs each of them a few times, in an order that rotates. threads: 0 for all cores.
    runs: of each file, at least. Raises FileError for a file that onnxruntime does not take,
    DataError for a batch that does not fit.
    """
    sessions = {name: Session(source, threads) for name, source in files.items()}
    feeds = {name: session.feed(batch) for name, session in sessions.items()}
    times: dict[str, list[float]] = {name: [] for name in files}
    for name, session in sessions.items():
        for _ in range(WARM):
            session.run(feeds[name])
    names = list(files)
    for k in range(-(-runs // BURST)):
        for name in names[k % len(names) :] + names[: k % len(names)]:
            session, feed = sessions[name], feeds[name]
            session.run(feed)
            for _ in range(BURST):
                start = time.perf_counter()
                session.run(feed)
                times[name].append(1e3 * (time.perf_counter() - start))
    return {n: Timing(float(np.median(t)), float(np.percentile(t, 95))) for n, t in times.items()}


@dataclass(frozen=True)
class Speed:
    """Tokens per second: of a prompt that is read at once, and of those written behind it."""

    prompt: float
    new: float


def time_decoders(
    files: Mapping[str, Runs], prompt: int = 64, count: int = 32, rounds: int = 5
) -> dict[str, Speed]:
    """Time decoders in turn: each reads a prompt and writes tokens behind it, one sequence.

    prompt, count: tokens, the prompt's at random with a fixed seed. rounds: in which all take
    turns, after one to warm up; speeds are medians over them.
    """
    one = np.zeros((1, 1), np.int64)
    words = min(Writing(session).read(one).shape[-1] for session in files.values())
    ids = np.random.default_rng(0).integers(0, words, (1, prompt))
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in files}
    for k in range(rounds + 1):
        for name, session in files.items():
            text, start = Writing(session), time.perf_counter()
            last = text.read(ids)[:, -1:].argmax(-1)
            read = time.perf_counter()
            for _ in range(count):
                last = text.read(last)[:, -1:].argmax(-1)
            if k:
                times[name].append((read - start, time.perf_counter() - read))
    return {n: Speed(*np.array([prompt, count]) / np.median(t, axis=0)) for n, t in times.items()}


def plain_int8(source: Path, batches: Sequence[Batch], folder: Path) -> Path:
    """A float file quantised by onnxruntime's own static quantiser, at its best settings for x86.

    These are QDQ pairs, unsigned activations, and signed weights with a scale per channel, after
    its own pre-processing. Raises FileError if the quantiser fails.
    """
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantType,
        quant_pre_process,
        quantize_static,
    )

    session = Session(source, 1)
    feeds = iter([session.feed(batch) for batch in batches])

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def get_next(self) -> dict[str, Any] | None:
            return next(feeds, None)

    source, folder = source.resolve(), folder.resolve()
    ready, plain = folder / "ready.onnx", folder / "plain.onnx"
    try:
        with contextlib.chdir(folder):  # it leaves unfinished files in the working directory
            _prepare(quant_pre_process, source, ready)
            kinds = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
            quantize_static(ready, plain, Reader(), per_channel=True, **kinds)
    except Exception as e:  # it has no error class of its own
        raise FileError(
            f"onnxruntime's quantiser does not take {source}: {' '.join(str(e).split())[:300]}"
        ) from e
    return plain


def _prepare(quant_pre_process: Callable[..., None], source: Path, ready: Path) -> None:
    try:
        quant_pre_process(source, ready)
    except Exception:
        # Its symbolic shape inference cannot follow every attention mask, but may be skipped.
        quant_pre_process(source, ready, skip_symbolic_shape=True)


def cpu() -> dict[str, str]:
    """What timings depend on.

    Processor, cores, the best instruction set for integers, onnxruntime's version.
    """
    require_onnx("onnxruntime")
    import onnxruntime

    return processor() | {"onnxruntime": str(onnxruntime.__version__)}


def processor() -> dict[str, str]:
    """The processor, its cores, and its best instruction set for integers."""
    facts = _cpuinfo()
    flags = set(facts.get("flags", facts.get("Features", "")).split())
    return {
        "processor": facts.get("model name", platform.processor() or platform.machine()),
        "cores": str(os.cpu_count()),
        "instructions": next((s for s in SETS if s in flags), "unknown"),
    }


def _cpuinfo() -> dict[str, str]:
    """The first processor in the system's list, where there is one."""
    path = Path("/proc/cpuinfo")
    text = path.read_text() if path.exists() else ""
    pairs = (line.partition(":") for line in reversed(text.splitlines()) if ":" in line)
    return {key.strip(): value.strip() for key, _, value in pairs}
