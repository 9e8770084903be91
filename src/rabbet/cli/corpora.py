"""Text that a decoder is calibrated and measured on: `corpus.txt length=512`, `corpus.jsonl`.

A decoder is a network of transformers that says the next word, read from a folder that holds its
tokenizer, too. For any other network a `.txt` is a text a line (`datasets`).
"""

from pathlib import Path

from torch import nn

from rabbet.cli.datasets import Asked, tokenizer_of
from rabbet.cli.references import settings_of
from rabbet.data.decoder import Continuations, Perplexity
from rabbet.data.task import Task
from rabbet.data.text import FILES
from rabbet.tasks import perplexity

LENGTH = 512  # tokens of a window, where the network takes as many
WINDOWS = 128  # to calibrate with


def is_corpus(reference: str, network: nn.Module | None) -> bool:
    """Whether a reference names text for the decoder that this network is."""
    path = Path(settings_of(reference)[0])
    return path.suffix.lower() in FILES and network is not None and _decodes(network)


def _decodes(network: nn.Module) -> bool:
    """Whether transformers lists a network among those that say the next word."""
    if not type(network).__module__.startswith("transformers."):
        return False
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return type(network).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()


def open_corpus(reference: str, network: nn.Module, option: str) -> Task:
    """The windows of a text to calibrate with.

    Settings: `length` of a window, `limit` of their number, `batch`. Raises FileError and DataError
    as `perplexity` does, and a usage error for settings that there are not.
    """
    asked = _asked(reference, network, option)
    asked.require("length")
    batch, limit = asked.number("batch", 1), asked.number("limit", WINDOWS)
    assert batch is not None
    assert limit is not None
    tokenizer = tokenizer_of(asked)
    return perplexity(asked.path, tokenizer, _length(asked), windows=limit, batch=batch)


def open_held_corpus(
    reference: str, network: nn.Module, option: str
) -> tuple[Perplexity, Continuations]:
    """The perplexity on a text, and what is written behind prompts of it.

    Settings: `length` of a window, `stride`, `limit` of their number. Raises as `open_corpus` does.
    """
    asked = _asked(reference, network, option)
    asked.require("length", "stride")
    stride, limit = asked.number("stride", None), asked.number("limit", None)
    tokenizer = tokenizer_of(asked)
    judge = Perplexity.of(asked.path, tokenizer, _length(asked), stride, limit)
    return judge, Continuations.of(judge, tokenizer)


def _asked(reference: str, network: nn.Module, option: str) -> Asked:
    place, settings = settings_of(reference)
    return Asked(Path(place), settings, network, option)


def _length(asked: Asked) -> int:
    config = getattr(asked.network, "config", None)
    most = getattr(config, "max_position_embeddings", None) or LENGTH
    length = asked.number("length", min(LENGTH, most))
    assert length is not None
    return length
