"""Files of causal language models of transformers, for the programs that run these."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from rabbet.export.base import Written
from rabbet.export.decoders.families import require_decoder
from rabbet.export.decoders.genai import write_genai
from rabbet.export.decoders.gguf import write_gguf

DecoderExport = Callable[[nn.Module, Path, Any], Written]

DECODERS: dict[str, DecoderExport] = {
    "genai": functools.partial(write_genai, exact=False),
    "genai-exact": functools.partial(write_genai, exact=True),
    "gguf": functools.partial(write_gguf, half=False),
    "gguf-f16": functools.partial(write_gguf, half=True),
}
"""Targets for decoders alone: `(network, folder, tokenizer or None) -> Written`."""

__all__ = ["DECODERS", "DecoderExport", "require_decoder"]
