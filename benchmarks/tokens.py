r"""Tokens per second of exported decoders in onnxruntime, against float and its own int4 quantiser.

    python benchmarks/tokens.py                   # SmolLM2-135M, which comes with a package
    python benchmarks/tokens.py --network network/ --folders small-genai/

The float network is exported as the same graph, and onnxruntime's own MatMulNBits quantiser
(round to nearest, 4 bits, blocks of 32 and 128, its default accuracy level 4 and symmetric) makes
its file of that. rabbet's files are of the network on one grid each, the table of words on 8 bits,
rounded to nearest; at fewer than 3 bits solved by `Blockwise` on random tokens, for what rounding
leaves there is noise, and the export refuses it. That changes accuracy and not speed. `--folders`
adds some that `rabbet export --target genai` wrote. All files run in turn, batch 1, greedily, on
random tokens with a fixed seed: a prompt is read at once, then tokens one by one with the cache.
Medians over rounds; after warm-up.
"""

import argparse
import logging
import tempfile
from functools import partial
from pathlib import Path

import language
import torch
from common import machine
from records import Group, Records, Table, add_options, told
from torch import nn

import rabbet
from rabbet import hf
from rabbet.core.plan import quoted
from rabbet.errors import FileError
from rabbet.grids.grid import Grid
from rabbet.model.build import build
from rabbet.runtime.bench import time_decoders
from rabbet.runtime.session import Session
from rabbet.workpiece import Workpiece

MODEL = "model.onnx"
BLOCKS = (32, 128)  # columns that share a scale in the peer's files
WORDS = "8c"  # the grid of the table of words
SAFE = 3  # bits from which on a network rounded to nearest still gives scores
SEED = 0
COLUMNS = {
    "network": "", "threads": "", "file": "", "bytes": ",", "prompt, tokens/s": ".1f",
    "new tokens/s": ".1f", "against float": ".2f",
}  # fmt: skip


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


def on_grid(network: nn.Module, grid: str) -> nn.Module:
    """A network on one grid, rounded to nearest, or solved where that would leave noise."""
    g = torch.Generator().manual_seed(SEED)
    words = int(network.config.vocab_size)  # type: ignore[union-attr, arg-type]
    batches = [{"input_ids": torch.randint(words, (2, 64), generator=g)} for _ in range(8)]
    piece = Workpiece.of(network, rabbet.Task(batches), rabbet.Jobs())
    grids = ((site, WORDS if site.looks_up else grid) for site in piece.survey)
    lines = (f"{quoted(site.name)} dense@{own}" for site, own in grids)
    plan = rabbet.Plan.parse("\n".join(lines))
    if Grid.parse(grid).bits >= SAFE:
        return build(piece.model, plan, piece.survey)
    method = rabbet.Blockwise(
        grids=(grid, WORDS), rank=False, scale=False, permute=False, scored=1, epochs=0, passes=0
    )
    return rabbet.fit(network, plan, piece.task, method).model


def gathered(
    network: nn.Module, grids: list[str], folders: list[Path], scratch: Path
) -> dict[str, Path]:
    """The files to time, by name: float, of two kinds of peers, of grids, and those of folders."""
    others = {str(folder): folder / MODEL for folder in folders}
    for file in others.values():
        if not file.is_file():
            raise FileError(f"there is no file {file}; write one with the target 'genai'")
    hf.export(network, scratch / "float", "genai")
    whole = scratch / "float" / MODEL
    files = {"float32": whole} | {
        f"onnxruntime's int4, blocks of {block}": peer(whole, scratch / f"int4-{block}.onnx", block)
        for block in BLOCKS
    }
    for grid in grids:
        hf.export(on_grid(network, grid), scratch / grid, "genai")
        files[f"rabbet, {grid}"] = scratch / grid / MODEL
    return files | others


def rows(name: str, network: nn.Module, given: argparse.Namespace, own: dict[str, int]) -> Group:
    """The rows of a network: every file on every number of threads."""
    found: Group = []
    with tempfile.TemporaryDirectory() as scratch:
        files = gathered(network, given.grids, given.folders, Path(scratch))
        for threads in given.threads:
            sessions = {file: Session(path, threads) for file, path in files.items()}
            speeds = time_decoders(sessions, given.prompt, given.count, given.rounds)
            for file, speed in speeds.items():
                settings = {"network": name} | own | {"threads": threads, "file": file}
                values = {
                    "bytes": files[file].stat().st_size, "prompt, tokens/s": speed.prompt,
                    "new tokens/s": speed.new, "against float": speed.new / speeds["float32"].new,
                }  # fmt: skip
                found.append((settings, values))
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", type=Path, help="a decoder's folder; SmolLM2-135M if none")
    parser.add_argument("--folders", nargs="*", type=Path, default=[], help="of the target genai")
    parser.add_argument("--grids", nargs="*", default=["4g32", "4g128", "2g128"])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--prompt", type=int, default=64, help="tokens that are read at once")
    parser.add_argument("--count", type=int, default=32, help="tokens behind the prompt")
    parser.add_argument("--rounds", type=int, default=5)
    add_options(parser)
    given = parser.parse_args()
    print(f"seed {SEED}; {machine()}")
    name = "SmolLM2-135M" if given.network is None else given.network.name
    network = language.smollm2()[0] if given.network is None else hf.from_pretrained(given.network)
    records = Records("tokens", given, packages=("onnxruntime", "transformers", *language.PACKAGES))
    own = told(parser, given, "prompt", "count", "rounds")
    data = f"a prompt of {given.prompt} random tokens, {given.count} behind it"
    table = Table(records, "speed", COLUMNS, data, SEED)
    table.rows({"network": name} | own, partial(rows, name, network, given, own))


if __name__ == "__main__":
    main()
