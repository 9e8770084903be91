"""GPT-2 at its real size (12 blocks, width 768, 50,257 words) as tensor trains: bytes and speed.

    python benchmarks/decoder.py [--start metric | plain | random]

No trained weights are at hand: they are random, so nothing is said about accuracy. The cores start
from them in the metric of their inputs, learn for one epoch in float and one on 4 bits (three
batches of two sequences of 32 tokens, a fourth held back), are written, loaded again and exported.
Latency is that of one sequence on one thread, in turn with the float network in onnxruntime.
"""

import argparse
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from common import machine
from records import Group, Records, Table, add_options
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

import rabbet
from rabbet import TTQAT, Task
from rabbet.export.onnx.write import write_float
from rabbet.runtime.bench import time_files

TOKENS = 32


def batches(words: int) -> list[dict[str, Tensor]]:
    """Four batches of two sequences."""
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(words, (2, TOKENS), generator=generator)} for _ in range(4)]


def network() -> GPT2LMHeadModel:
    """GPT-2 with random weights."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config()).eval()


def measured(begin: str) -> Group:
    """All figures, of one run."""
    found: dict[str, float] = {}
    model = network()
    task = Task(
        batches(model.config.vocab_size),
        forward=lambda m, b: m(b["input_ids"], use_cache=False).logits,
    )
    batch = task.read()[0]
    start = time.perf_counter()
    method = TTQAT(4, start=begin, epochs=1, finish=1)
    result = rabbet.compress(model, "bytes <= 10%", task, method)
    found["float bytes"] = result.float_cost.bytes
    found["compressed in, minutes"] = round((time.perf_counter() - start) / 60, 1)
    with tempfile.TemporaryDirectory() as folder:
        small, files = (
            Path(folder) / "small.safetensors",
            {n: Path(folder) / f"{n}.onnx" for n in ("float", "tt")},
        )
        result.save(small)
        found["file bytes"] = small.stat().st_size
        found["times smaller"] = round(result.float_cost.bytes / small.stat().st_size)
        with torch.no_grad():
            gap = (
                (task.run(rabbet.load(small, model), batch) - task.run(result.model, batch))
                .abs()
                .max()
            )
        found["largest difference of a score, the file against the result"] = float(gap)
        start = time.perf_counter()
        result.export(files["tt"])
        found["exported in, seconds"] = round(time.perf_counter() - start)
        write_float(model, task, files["float"])
        found["ONNX bytes, float"] = files["float"].stat().st_size
        found["ONNX bytes, tensor trains"] = files["tt"].stat().st_size
        timings = time_files(files, [batch["input_ids"][:1]], runs=30, threads=1)
    found[f"ms for {TOKENS} tokens, float"] = round(timings["float"].median)
    found[f"ms for {TOKENS} tokens, tensor trains"] = round(timings["tt"].median)
    found["times faster"] = round(timings["float"].median / timings["tt"].median, 1)
    return [({"what": what, "start": begin}, {"found": value}) for what, value in found.items()]


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--start", choices=("metric", "plain", "random"), default="metric")
    add_options(parser)
    args = parser.parse_args()
    print(machine())
    records = Records("decoder", args, packages=("transformers", "onnxruntime"))
    table = Table(records, "figures", {"what": "", "found": ",.10g"}, "random tokens and weights")
    table.rows({"start": args.start}, partial(measured, args.start))


if __name__ == "__main__":
    main()
