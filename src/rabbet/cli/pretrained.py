"""A network from a folder that Hugging Face's `save_pretrained` wrote."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from rabbet.errors import FileError


def pretrained(folder: Path) -> nn.Module:
    """The network of a folder with `config.json` and safetensors, in eval mode.

    It is of the class that the config names. It runs without a cache of keys and values, which is
    no output to compare. Code that lies in the folder is not run, and nothing is downloaded or
    unpickled. Raises FileError without transformers, for a folder without a readable config, of an
    architecture that transformers does not have, or whose weights are missing or damaged.
    """
    config = folder / "config.json"
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
    if not any(folder.glob("*.safetensors")):
        raise FileError(f"{folder} holds no *.safetensors; save the network with save_pretrained")
    return _read(folder, kind)


def _read(folder: Path, kind: Any) -> nn.Module:
    """The network of a known class."""
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
