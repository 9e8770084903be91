"""Files of causal language models of transformers, for the programs that run these."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from rabbet.core.plan import Plan
from rabbet.core.survey import Survey
from rabbet.export.base import Written
from rabbet.export.decoders.families import require_decoder
from rabbet.export.decoders.genai import genai_content, write_genai
from rabbet.export.decoders.gguf import gguf_files, write_gguf
from rabbet.export.decoders.openvino import openvino_content, write_openvino_decoder
from rabbet.model.build import blank_numbers, build
from rabbet.model.surgery import on_cpu

DecoderExport = Callable[[nn.Module, Path, Any], Written]

DECODERS: dict[str, DecoderExport] = {
    "genai": functools.partial(write_genai, exact=False),
    "genai-exact": functools.partial(write_genai, exact=True),
    "openvino-decoder": write_openvino_decoder,
    "gguf": functools.partial(write_gguf, half=False),
    "gguf-f16": functools.partial(write_gguf, half=True),
}
"""Targets for decoders alone: `(network, folder, tokenizer or None) -> Written`."""


def predict_bytes(
    model: nn.Module, plan: Plan, survey: Survey, target: str, tokenizer: Any = None
) -> int:
    """The bytes that a float decoder will take in the file for a target under a plan.

    It is what `Written.bytes` will be, counted on numbers that are all zero: no length depends on
    numbers, but where a scale is no bfloat16, or a product of it with a minimum no float16. Raises
    PlanError if the plan does not fit, and as the target does.
    """
    blank = {s.name: blank_numbers(s, line) for s in survey if (line := plan.get(s.name))}
    network = build(model, plan, survey, blank)
    if target in ("gguf", "gguf-f16"):
        files, _ = gguf_files(network, tokenizer, target == "gguf-f16")
        return sum(map(len, files.values()))
    if target == "openvino-decoder":
        return len(openvino_content(on_cpu(network))[0])
    return len(genai_content(on_cpu(network), target == "genai-exact")[0])


__all__ = ["DECODERS", "DecoderExport", "predict_bytes", "require_decoder"]
