"""Transformers at their real sizes as tensor trains: bytes, seconds of a training step, memory.

    python benchmarks/encoders.py [--only BERT]

No trained weights are at hand: they are random, so nothing is said about accuracy, and cores start
at random. Linear layers and tables have rank 20 and 4 bits, what does not become a chain 8 bits.
Each network runs in a process of its own, in which the float network teaches the tensor trains for
one epoch in float and one on 4 bits: three batches, a fourth held back. A step holds forward passes
of both networks (the float one's only in the first epoch) and the backward pass of the chains.
Memory is that of the process at its peak; the file is written and loaded again.
"""

import argparse
import itertools
import multiprocessing
import resource
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from common import machine
from records import Records, Table, Values, add_options
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    RobertaConfig,
    RobertaForMaskedLM,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
)

import rabbet
from rabbet import TTQAT, Task
from rabbet.data.batches import outputs

SENTENCES, TOKENS = 4, 64
SAMPLES = 16_000  # a second of sound
COLUMNS = {
    "network": "", "blocks": "", "parameters": ",", "float bytes": ",", "file bytes": ",",
    "times smaller": ".0f", "chains": "", "s a step, in float": ".1f", "s a step, on 4 bits": ".1f",
    "MB before": ",", "MB at the peak": ",",
}  # fmt: skip
NETWORKS = ("BERT-base", "RoBERTa-base", "GPT-2", "wav2vec2-base")


def network(name: str) -> nn.Module:
    """A network of its published shape with random weights."""
    torch.manual_seed(0)
    if name == "BERT-base":
        return BertForMaskedLM(BertConfig()).eval()
    if name == "RoBERTa-base":
        sizes = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1}
        return RobertaForMaskedLM(RobertaConfig(**sizes)).eval()
    if name == "GPT-2":
        return GPT2LMHeadModel(GPT2Config(use_cache=False)).eval()
    return Wav2Vec2ForCTC(Wav2Vec2Config(apply_spec_augment=False)).eval()


def batches(name: str, model: nn.Module) -> list[dict[str, Tensor]]:
    """Four batches: sentences of random words, or seconds of noise."""
    generator = torch.Generator().manual_seed(0)
    if name == "wav2vec2-base":
        sizes = (SENTENCES, SAMPLES)
        return [{"input_values": torch.randn(sizes, generator=generator)} for _ in range(4)]
    words = int(model.config.vocab_size)  # type: ignore[union-attr, arg-type]
    ids = [torch.randint(words, (SENTENCES, TOKENS), generator=generator) for _ in range(4)]
    return [{"input_ids": i, "attention_mask": torch.ones_like(i)} for i in ids]


def peak() -> int:
    """The most memory that this process has held, in MB."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def measured(name: str) -> Values:
    """The figures of a network; run it in a process of its own."""
    marks: list[float] = []

    def seen(stage: str, done: int, total: int) -> None:
        if stage.startswith("teaching"):
            marks.append(time.perf_counter())

    model = network(name)
    task = Task(batches(name, model))
    before = peak()
    method = TTQAT(4, start="random", epochs=1, finish=1)
    result = rabbet.compress(model, "bytes <= 50%", task, method, jobs=rabbet.Jobs(progress=seen))
    most = peak()
    steps = [b - a for a, b in itertools.pairwise(marks)]
    half = len(marks) // 2  # as many epochs on the grid as in float
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "small.safetensors"
        size = result.save(path)
        batch = task.read()[0]
        with torch.no_grad():
            again, ours = (
                outputs(task.run(m, batch)) for m in (rabbet.load(path, model), result.model)
            )
        if not all(torch.equal(a, b) for a, b in zip(again, ours, strict=True)):
            raise RuntimeError(f"{name}: the file gives other outputs than the network")
    forms = [term.form.name for line in result.plan for term in line.terms]
    return {
        "blocks": int(model.config.num_hidden_layers),  # type: ignore[union-attr, arg-type]
        "parameters": sum(p.numel() for p in model.parameters()),
        "float bytes": result.float_cost.bytes,
        "file bytes": size,
        "times smaller": result.float_cost.bytes / size,
        "chains": f"{sum(f in ('tt', 'ttm') for f in forms)} of {len(forms)}",
        "s a step, in float": statistics.median(steps[: half - 1]),
        "s a step, on 4 bits": statistics.median(steps[half:]),
        "MB before": before,
        "MB at the peak": most,
    }


def alone(name: str) -> Values:
    """`measured` in a fresh process, whose memory is this network's."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measured, (name,))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser)
    args = parser.parse_args()
    print(f"{machine()}\n")
    records = Records("encoders", args, packages=("transformers",))
    data = f"random words, {SENTENCES} x {TOKENS}, or noise, {SENTENCES} x {SAMPLES} samples"
    table = Table(records, "encoders", COLUMNS, data)
    for name in NETWORKS:
        table.row({"network": name}, partial(alone, name), name)


if __name__ == "__main__":
    main()
