"""Networks of Hugging Face's transformers: read from a folder, and written compressed into one.

`export` writes decoders for the programs that run these.

A folder that `save_pretrained` here has written holds the config, the native file, and a model card
made of the result; `from_pretrained` gives the compressed network back. Nothing is downloaded, no
code that lies in a folder is run, and nothing is unpickled.
"""

import contextlib
import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rabbet._api import Result
from rabbet._bench import Data
from rabbet._stream import CONFIG, Saved, stream
from rabbet.core.budget import Budget
from rabbet.data.task import Task
from rabbet.errors import FileError, ModelError
from rabbet.export import DECODERS, Written
from rabbet.export.decoders import predict_bytes
from rabbet.export.folders import NATIVE, earlier_files, native_files
from rabbet.export.native import read_native
from rabbet.files import write_whole
from rabbet.jobs import Jobs
from rabbet.methods.blockwise.folder import INDEX, hollow
from rabbet.methods.blockwise.method import Blockwise

CARD = "README.md"


def save_pretrained(
    result: Result, folder: str | Path, *, tokenizer: Any = None, data: str = ""
) -> Path:
    """Write a compressed network of transformers into a folder; returns the folder.

    tokenizer: is saved beside it. data: what it was calibrated or trained with, in words, for the
    model card, `README.md`, which is written anew. Raises ModelError for a network that is not of
    transformers, FileError for a place that cannot be written, and as `Result.save` does.
    """
    kind = type(result.model)
    if not hasattr(result.model, "config") or _known(kind.__name__) is not kind:
        raise ModelError(
            f"{kind.__name__} is no network of transformers; write it with result.save(...)"
        )
    if tokenizer is not None and not hasattr(tokenizer, "save_pretrained"):
        raise ModelError(f"tokenizer is one of transformers, found {type(tokenizer).__name__}")
    config: Any = copy.deepcopy(result.model.config)
    config.architectures = [kind.__name__]
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        result.save(folder / NATIVE)
        for path in earlier_files(folder)[1:]:  # of another network, which lay there before
            path.unlink()
        config.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        write_whole(folder / CARD, [card(result, data).encode()])
    except OSError as e:
        raise FileError(f"cannot write into {folder}: {e}") from e
    return folder


def from_pretrained(folder: str | Path) -> nn.Module:
    """The network of a folder in eval mode: compressed where `save_pretrained` here wrote it.

    It is of the class that the config names. It runs without a cache of keys and values, which is
    no output to compare. Raises FileError without transformers, for a folder without a readable
    config, of an architecture that transformers does not have, or whose weights are missing or
    damaged.
    """
    folder = Path(folder)
    kind = _class_of(folder)
    if not native_files(folder):
        return _read(folder, kind)
    with _quiet(), torch.random.fork_rng(devices=[]):  # random weights, which the file replaces
        try:
            network: Any = kind(kind.config_class.from_pretrained(folder, local_files_only=True))
        except Exception as e:  # transformers raises whatever it likes
            raise FileError(f"{folder} cannot be read as {kind.__name__}: {e}") from e
    network.config.use_cache = False
    network.name_or_path = network.config._name_or_path = str(folder)  # noqa: SLF001 (theirs)
    return read_native(folder, network.eval())[0]


def compress_pretrained(  # noqa: PLR0913 (those behind the star are options, given by name)
    folder: str | Path,
    budget: str | Budget,
    data: Data,
    output: str | Path,
    *,
    method: Blockwise | None = None,
    seed: int = 0,
    jobs: Jobs | None = None,
) -> Saved:
    """Compress the network of a `save_pretrained` folder into another, one block at a time.

    Never more than one block, its layers' problems and the hidden states between blocks are in
    memory, so that the network may be larger than that. The output has as many files as the input,
    the config, and the tokenizer's files; `from_pretrained` reads it. Finished blocks are kept in
    the output (or where `jobs` keeps them), and the same call goes on where it was stopped. What an
    earlier call wrote into the output stays there until all of the new files are written. data:
    as for `rabbet.compress`; of a `Task` its forward must do without labels and cache.

    Raises FileError for a folder that cannot be read, or written, ModelError for a network that is
    no stack of equal blocks, BudgetError at once for a budget that cannot be met.
    """
    folder, output = Path(folder), Path(output)
    network = skeleton(folder)
    if output.resolve().is_relative_to(folder.resolve()):
        raise FileError(f"{output} lies in the network's own folder; name another for the output")

    def beside(place: Path) -> None:
        for path in sorted(folder.iterdir()):  # the tokenizer, and whatever else belongs to it
            known = path.suffix in (".json", ".txt", ".model", ".jinja")
            if path.is_file() and known and path.name not in (CONFIG, INDEX):
                shutil.copyfile(path, place / path.name)
        network.config.save_pretrained(place)

    return stream(
        folder,
        network,
        Budget.parse(budget),
        Task.of(data),
        output,
        method=method or Blockwise(),
        seed=seed,
        jobs=jobs,
        beside=beside,
    )


def skeleton(folder: str | Path) -> Any:
    """The network of a `save_pretrained` folder without its weights, which are on torch's `meta`.

    Raises FileError as `from_pretrained` does.
    """
    folder = Path(folder)
    kind = _class_of(folder)
    try:
        with _quiet(), hollow():
            network: Any = kind(kind.config_class.from_pretrained(folder, local_files_only=True))
        network.tie_weights()
    except FileError:
        raise
    except Exception as e:  # transformers raises whatever it likes
        raise FileError(f"{folder} cannot be read as {kind.__name__}: {e}") from e
    network.config.use_cache = False
    network.config.architectures = [kind.__name__]
    network.name_or_path = network.config._name_or_path = str(folder)  # noqa: SLF001 (theirs)
    return network


def export(
    network: Result | nn.Module, folder: str | Path, target: str = "genai", *, tokenizer: Any = None
) -> Written:
    """Write a decoder for a program that runs such; returns its bytes and what to know of it.

    network: a result, or what `from_pretrained` gave; of a float one the weights stay floats.
    target: one of `rabbet.export.DECODERS`. tokenizer: is saved beside it; the default is that of
    the folder that the network was read from, if it has one. Raises FileError for an unknown target
    or a place that cannot be written, ModelError for a network that is no decoder known here, and
    as the target does.
    """
    if target not in DECODERS:
        raise FileError(
            f"cannot export a decoder to {target!r}; the targets are {', '.join(DECODERS)}"
        )
    model = network.model if isinstance(network, Result) else network
    folder = Path(folder)
    try:
        written = DECODERS[target](model, folder, tokenizer)
    except OSError as e:
        raise FileError(f"cannot write into {folder}: {e}") from e
    return written


def card(result: Result, data: str = "") -> str:
    """A model card in Markdown: what it is, what it costs, how it was made, how it is run."""
    name, budget = type(result.model).__name__, result.budget
    smaller = result.float_cost.bytes / result.cost.bytes
    base = str(getattr(getattr(result.model, "config", None), "_name_or_path", "") or "")
    head = ["---", "library_name: rabbet", "tags: [rabbet, compressed, quantized]", "---"]
    lines = [
        *head,
        "",
        f"# {name}, compressed {smaller:.3g} times",
        "",
        f"{result.cost.bytes:,} bytes in place of {result.float_cost.bytes:,} in float32"
        f"{f', by the budget `{budget}`' if budget else ''}.",
        *([f"Made from `{base}`."] if base else []),
        f"Data: {data or 'not said'}.",
        "",
        "```",
        str(result),
        "```",
        "",
        "To run it:",
        "",
        "```python",
        "from rabbet.hf import from_pretrained",
        "",
        'network = from_pretrained("this folder")',
        "```",
        "",
    ]
    return "\n".join(lines)


def _known(name: str) -> Any:
    """What transformers has under a name."""
    import transformers

    return getattr(transformers, name, None)


def _class_of(folder: Path) -> Any:
    """The class of transformers that the config in a folder names."""
    config = folder / CONFIG
    if not config.is_file():
        raise FileError(
            f"{folder} has no config.json: it is not a folder that save_pretrained wrote"
        )
    try:
        import transformers
    except ImportError:
        raise FileError(f"{folder} is read with transformers; install rabbet[hf]") from None
    try:
        names = json.loads(config.read_text(encoding="utf-8")).get("architectures") or [""]
    except (OSError, ValueError, AttributeError) as e:
        raise FileError(f"{config} cannot be read: {e}") from None
    kind: Any = getattr(transformers, str(names[0]), None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise FileError(
            f"{config} names the architecture {names[0]!r}, which transformers does not have"
        )
    return kind


def _read(folder: Path, kind: Any) -> nn.Module:
    """The float network of a known class."""
    if not any(folder.glob("*.safetensors")):
        raise FileError(f"{folder} holds no *.safetensors; save the network with save_pretrained")
    network: Any
    try:
        with _quiet():
            network, info = kind.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, output_loading_info=True
            )
    except Exception as e:  # transformers and safetensors raise whatever they like
        raise FileError(f"{folder} cannot be read as {kind.__name__}: {e}") from e
    if info["missing_keys"]:
        # transformers would make up what is not there
        raise FileError(
            f"{folder} lacks tensors of {kind.__name__}: {', '.join(sorted(info['missing_keys']))}"
        )
    network.config.use_cache = False
    ready: nn.Module = network.eval()
    return ready


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without a progress bar, and without a report of what is raised anyway."""
    from transformers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


__all__ = [
    "card",
    "compress_pretrained",
    "export",
    "from_pretrained",
    "predict_bytes",
    "save_pretrained",
]
