r"""Tokens per second of exported decoders in onnxruntime, against float and its own int4 quantiser.

    rabbet export small.safetensors --model hf:network/ --target genai --output small/
    python benchmarks/tokens.py small/ --network network/

The float network is exported as the same graph, and onnxruntime's own MatMulNBits quantiser
(round to nearest, 4 bits, blocks of 32 and 128, its default accuracy level 4 and symmetric) makes
its file of that. All files run in turn, batch 1, greedily, on random tokens with a fixed seed: a
prompt is read at once, then tokens one by one with the cache. Medians over rounds; after warm-up.
"""

import argparse
import logging
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from common import machine

from rabbet import hf
from rabbet.errors import FileError
from rabbet.runtime.decoding import Writing
from rabbet.runtime.session import Session

MODEL = "model.onnx"
BLOCKS = (32, 128)  # columns that share a scale in the peer's files
SEED = 0


def peer(source: Path, place: Path, block: int) -> Path:
    """The float file with its products on 4 bits, as onnxruntime's own quantiser writes it."""
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    logging.getLogger("onnxruntime.quantization").setLevel(logging.WARNING)  # a line a node
    quantiser = MatMulNBitsQuantizer(
        onnx.load(source), bits=4, block_size=block, is_symmetric=True, accuracy_level=4
    )
    quantiser.process()
    quantiser.model.save_model_to_file(str(place), use_external_data_format=False)
    return place


def once(session: Session, prompt: np.ndarray, count: int) -> tuple[float, float]:
    """Seconds for a prompt, and for each of so many tokens behind it."""
    text = Writing(session)
    start = time.perf_counter()
    last = text.read(prompt)[:, -1:].argmax(-1)
    read = time.perf_counter()
    for _ in range(count):
        last = text.read(last)[:, -1:].argmax(-1)
    return read - start, (time.perf_counter() - read) / count


def measured(
    files: dict[str, Path], threads: int, prompt: int, count: int, rounds: int
) -> dict[str, tuple[float, float]]:
    """Prompt and new tokens per second of each file, medians of rounds in which all take turns."""
    sessions = {name: Session(path, threads) for name, path in files.items()}
    words = min(int(s.session.get_outputs()[0].shape[2]) for s in sessions.values())
    ids = np.random.default_rng(SEED).integers(0, words, (1, prompt))
    seen: dict[str, list[tuple[float, float]]] = {name: [] for name in files}
    for k in range(rounds + 1):
        for name, session in sessions.items():
            times = once(session, ids, count)
            if k:  # the first round warms up
                seen[name].append(times)
    return {
        name: (
            prompt / statistics.median(t[0] for t in times),
            1 / statistics.median(t[1] for t in times),
        )
        for name, times in seen.items()
    }


def gathered(folders: list[Path], network: Path | None, scratch: Path) -> dict[str, Path]:
    """The files to time, by name: those of folders, and of the float network two kinds of peers."""
    files = {str(folder): folder / MODEL for folder in folders}
    for file in files.values():
        if not file.is_file():
            raise FileError(f"there is no file {file}; write one with the target 'genai'")
    if network is None:
        return files
    hf.export(hf.from_pretrained(network), scratch / "float", "genai")
    whole = scratch / "float" / MODEL
    peers = {
        f"onnxruntime's int4, blocks of {block}": peer(whole, scratch / f"int4-{block}.onnx", block)
        for block in BLOCKS
    }
    return files | {"float32": whole} | peers


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, help="written by the target genai")
    parser.add_argument("--network", type=Path, help="the float network's folder, for the peers")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--prompt", type=int, default=64, help="tokens that are read at once")
    parser.add_argument("--count", type=int, default=32, help="tokens behind the prompt")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    print(f"seed {SEED}, prompt of {given.prompt}, {given.count} tokens; {machine()}")
    print("| file | bytes | threads | prompt, tokens/s | new tokens/s |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        files = gathered(given.folders, given.network, Path(scratch))
        for threads in given.threads:
            found = measured(files, threads, given.prompt, given.count, given.rounds)
            for name, (read, new) in found.items():
                size = files[name].stat().st_size
                print(f"| {name} | {size:,} | {threads} | {read:.1f} | {new:.1f} |", flush=True)


if __name__ == "__main__":
    main()
