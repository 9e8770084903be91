r"""A network larger than memory: bytes, seconds and peak memory, block by block, from a folder.

    python benchmarks/streaming.py --shapes tiny 1b            # 1b: an hour or more
    python benchmarks/streaming.py --shapes 7b --blocks 2      # two blocks, the rest extrapolated
    python benchmarks/streaming.py --kills 20                  # the same bytes, if it is killed

Checkpoints of random weights in bfloat16, written shard by shard: "1b" has the shape of
TinyLlama-1.1B (22 blocks of width 2,048, 5,632 within, 32,000 words, head of its own), "7b" that of
Llama-2-7B (32 blocks of width 4,096, 11,008 within), "tiny" two small blocks to try the script.
Nothing is said of accuracy. Budget: `bpw <= 3.25`, not tuned; 16 windows of 128 random words, of
which 4 are scored.

Each run is a process of its own whose memory is limited to `--memory` GB (RLIMIT_DATA: all that it
allocates; files that it maps are not counted), and that gives back at once what it frees in tensors
of 16 MiB or more (MALLOC_MMAP_THRESHOLD_). Peak: the largest resident set, mapped files included.
With `--blocks` the checkpoint has so many blocks, two at least; the seconds of all blocks are those
and, for each block that is missing, what a block took of them: all but the start and the stages of
the ends (table of words and head), by the number of blocks.

kills: a process that compresses "tiny" is killed at random moments, so often, then runs to the end;
its files are compared with those of a run that nobody killed.
"""

import argparse
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import machine
from records import Records, Table, Values, add_options
from safetensors.torch import save_file
from transformers import LlamaConfig

import rabbet
from rabbet.hf import compress_pretrained
from rabbet.methods.blockwise.folder import INDEX

SHAPES = {
    "tiny": {"num_hidden_layers": 2, "hidden_size": 128, "intermediate_size": 256,
             "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 500},
    "small": {"num_hidden_layers": 4, "hidden_size": 512, "intermediate_size": 1408,
              "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 4000},
    "1b": {"num_hidden_layers": 22, "hidden_size": 2048, "intermediate_size": 5632,
           "num_attention_heads": 32, "num_key_value_heads": 4, "vocab_size": 32000},
    "7b": {"num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 11008,
           "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000},
}  # fmt: skip
BUDGET = "bpw <= 3.25"
FEWEST = 2  # blocks that a network has to have to be taken block by block
WINDOWS, LENGTH, SCORED = 16, 128, 4
METHOD = rabbet.Blockwise(epochs=0, passes=0, scored=SCORED)
COLUMNS = {
    "shape": "", "blocks": "", "weights": ",", "in the folder": ",", "bytes": ",",
    "seconds": ",.0f", "processor seconds": ",.0f", "seconds of all blocks": ",.0f",
    "peak MiB": ",.0f", "limit GB": "",
}  # fmt: skip
BLOCKS = "seconds of blocks"
KILLS = {"kills": "", "seconds": ".0f", "same bytes": ""}


def checkpoint(shape: str, blocks: int, folder: Path) -> int:
    """Write random weights, a file for each block and one for the ends; returns their number."""
    config = LlamaConfig(**{**SHAPES[shape], "num_hidden_layers": blocks})  # type: ignore[arg-type]
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    width, inner, words = config.hidden_size, config.intermediate_size, config.vocab_size
    pairs = width * config.num_key_value_heads // config.num_attention_heads
    g = torch.Generator().manual_seed(0)
    places: dict[str, str] = {}
    count = 0

    def write(file: str, shapes: dict[str, tuple[int, ...]]) -> None:
        nonlocal count
        tensors = {}
        for name, size in shapes.items():
            drawn = torch.ones(size) if len(size) == 1 else torch.randn(size, generator=g) * 0.02
            tensors[name] = drawn.bfloat16()
            count += drawn.numel()
        save_file(tensors, folder / file, metadata={"format": "pt"})
        places.update(dict.fromkeys(shapes, file))

    write("model-ends.safetensors", {
        "model.embed_tokens.weight": (words, width), "model.norm.weight": (width,),
        "lm_head.weight": (words, width),
    })  # fmt: skip
    for k in range(blocks):
        name = f"model.layers.{k}"
        write(f"model-{k:02d}.safetensors", {
            f"{name}.self_attn.q_proj.weight": (width, width),
            f"{name}.self_attn.k_proj.weight": (pairs, width),
            f"{name}.self_attn.v_proj.weight": (pairs, width),
            f"{name}.self_attn.o_proj.weight": (width, width),
            f"{name}.mlp.gate_proj.weight": (inner, width),
            f"{name}.mlp.up_proj.weight": (inner, width),
            f"{name}.mlp.down_proj.weight": (width, inner),
            f"{name}.input_layernorm.weight": (width,),
            f"{name}.post_attention_layernorm.weight": (width,),
        })  # fmt: skip
    index = {"metadata": {"total_size": 2 * count}, "weight_map": places}
    (folder / INDEX).write_text(json.dumps(index))
    return count


def compress(folder: Path, output: Path, memory: float) -> None:
    """What the process of a run does; it prints what it took."""
    if memory:
        most = int(memory * 2**30)
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    task, blocks = task_of(folder), Blocks()
    start = blocks.now
    jobs = rabbet.Jobs(progress=blocks.hear)
    stored = compress_pretrained(folder, BUDGET, task, output, method=METHOD, jobs=jobs)
    blocks.hear("", 0, 0)
    used = resource.getrusage(resource.RUSAGE_SELF)
    print(json.dumps({
        "bytes": stored.cost.bytes, "seconds": blocks.now - start, BLOCKS: blocks.seconds,
        "processor seconds": used.ru_utime + used.ru_stime, "peak MiB": used.ru_maxrss / 1024,
    }))  # fmt: skip


class Blocks:
    """Hears progress, and adds up the seconds that are not for the ends."""

    def __init__(self) -> None:
        self.now, self.seconds, self.counts = time.perf_counter(), 0.0, False

    def hear(self, stage: str, _done: int, _total: int) -> None:
        """What follows belongs to this stage."""
        before, self.now = self.now, time.perf_counter()
        self.seconds += self.counts * (self.now - before)
        self.counts = " ends" not in stage


def task_of(folder: Path) -> rabbet.Task:
    """Windows of random words for a checkpoint."""
    words = json.loads((folder / "config.json").read_text())["vocab_size"]
    g = torch.Generator().manual_seed(1)
    batches = [torch.randint(words, (1, LENGTH), generator=g) for _ in range(WINDOWS)]
    return rabbet.Task(batches, forward=_scores)


def _scores(network: Any, batch: torch.Tensor) -> Any:
    return network(batch, use_cache=False).logits


def _process(folder: Path, output: Path, memory: float) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, "--run", str(folder), str(output), str(memory)]
    # glibc would keep what is freed, in tensors of up to 32 MiB
    settings = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**24)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=settings)


def _run(shape: str, blocks: int, memory: float) -> tuple[Values, int, int]:
    with tempfile.TemporaryDirectory() as place:
        folder, output = Path(place) / "in", Path(place) / "out"
        folder.mkdir()
        weights = checkpoint(shape, blocks, folder)
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        child = _process(folder, output, memory)
        told = child.communicate()[0]
        if child.returncode:
            sys.exit(f"the process of {shape} ended with {child.returncode}")
    return json.loads(told.splitlines()[-1]), weights, size


def measured(shape: str, blocks: int, memory: float) -> Values:
    """The cells of a row."""
    found, weights, size = _run(shape, blocks, memory)
    whole = int(SHAPES[shape]["num_hidden_layers"])
    for_blocks = found.pop(BLOCKS)
    seconds = found["seconds"] + (whole / blocks - 1) * for_blocks if blocks < whole else None
    more = {"weights": weights, "in the folder": size, "seconds of all blocks": seconds}
    return found | more | {"limit GB": memory}


def killed(kills: int) -> Values:
    """Whether a run that is killed so often ends in the bytes of one that is not."""
    draw, start = random.Random(0), time.perf_counter()
    with tempfile.TemporaryDirectory() as place:
        folder, whole, parts = (Path(place) / name for name in ("in", "whole", "parts"))
        folder.mkdir()
        checkpoint("tiny", 4, folder)
        began = time.perf_counter()
        _process(folder, whole, 0).communicate()
        took, done = time.perf_counter() - began, 0
        while done < kills:
            child = _process(folder, parts, 0)
            try:
                child.wait(draw.uniform(0.3, 1) * took)
            except subprocess.TimeoutExpired:
                child.send_signal(signal.SIGKILL)
                done += 1
            child.communicate()
            if child.returncode == 0:  # it had ended: what it left is taken away again
                for path in parts.iterdir():
                    if path.is_file():
                        path.unlink()
        _process(folder, parts, 0).communicate()
        names = sorted(path.name for path in whole.glob("*.safetensors"))
        same = all((whole / n).read_bytes() == (parts / n).read_bytes() for n in names)
    return {"seconds": time.perf_counter() - start, "same bytes": "yes" if same else "NO"}


def main() -> None:
    """Print the tables."""
    if len(sys.argv) == 5 and sys.argv[1] == "--run":
        compress(Path(sys.argv[2]), Path(sys.argv[3]), float(sys.argv[4]))
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="*", choices=SHAPES, default=[])
    parser.add_argument("--blocks", type=int, help="of the checkpoint; all where not given")
    parser.add_argument("--memory", type=float, default=3, help="limit of a process in GB")
    parser.add_argument("--kills", type=int, default=0)
    add_options(parser)
    args = parser.parse_args()
    if args.blocks is not None and args.blocks < FEWEST:
        parser.error(f"--blocks {args.blocks}: at least 2, or they are not taken one by one")
    print(machine())
    records = Records("streaming", args, packages=("transformers",))
    table = Table(records, "memory", COLUMNS, "random weights and words")
    for shape in args.shapes:
        blocks = args.blocks or int(SHAPES[shape]["num_hidden_layers"])
        row = partial(measured, shape, blocks, args.memory)
        table.row({"shape": shape, "blocks": blocks}, row)
    if args.kills:
        table = Table(records, "killed", KILLS, "random weights and words")
        table.row({"kills": args.kills}, partial(killed, args.kills))


if __name__ == "__main__":
    main()
