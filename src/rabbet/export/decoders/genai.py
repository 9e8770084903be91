"""A folder for onnxruntime-genai, and for any program that runs decoders with a cache by ONNX.

It holds `model.onnx`, `genai_config.json`, the config of transformers, and the tokenizer's files
where the network came from a folder that has them.
"""

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rabbet.data.batches import relative_error
from rabbet.errors import FileError, ModelError
from rabbet.export.base import Written
from rabbet.export.decoders.families import require_decoder, sizes_of, written
from rabbet.export.decoders.writer import Writer
from rabbet.export.onnx.graph import Graph
from rabbet.files import write_whole
from rabbet.model.surgery import on_cpu
from rabbet.runtime.decoding import MODEL, SETTINGS, Writing
from rabbet.runtime.session import Session, require_onnx

SAME = 1e-3  # relative error of kernels for floats: another order of sums
NEAR = 0.25  # the most that is taken of inputs rounded to 8 bits; a broken file errs far more
COARSE = "kernels round its inputs too coarsely, and 'genai-exact' does not, or "
LARGEST = 2**31 - 2**20  # bytes of a file that protobuf writes
PROMPT, STEPS = 12, 3  # tokens that the file is tried on
TOKENIZERS = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja",
)  # fmt: skip
TYPES = {"LlamaForCausalLM": "llama"}
ANY = "decoder"  # what onnxruntime-genai calls a decoder of no family that it knows


def write_genai(model: nn.Module, folder: Path, tokenizer: Any, exact: bool) -> Written:
    """Write a folder for onnxruntime-genai; the bytes are those of `model.onnx`.

    exact: kernels take inputs as floats, so that it answers as the network does; else they round
    them to 8 bits in blocks, which is several times as fast, and a note says how far off that makes
    its answers to some random tokens. tokenizer: of transformers, or None for that of the folder
    which the network was read from. Notes name weights that no kernel for blocks reads, and say
    where no tokenizer was found. Raises FileError if the packages are missing or the path is a
    file; ModelError for a network that is no decoder known here, or if the file does not answer as
    the network does.
    """
    require_onnx()
    require_decoder(model)
    require_folder(folder)
    model = on_cpu(model)
    content, notes = genai_content(model, exact)
    text = Writing(Session(content))
    error = compare(model, text, SAME) if exact else compare(model, text, NEAR, COARSE)
    folder.mkdir(parents=True, exist_ok=True)
    size = write_whole(folder / MODEL, [content])
    write_whole(folder / SETTINGS, [_json(genai_config(model))])
    told = _rounding(error) if error > SAME else ()
    return Written(size, (*notes, *told, *write_beside(model, folder, tokenizer)), error)


def _rounding(error: float) -> tuple[str]:
    """What makes the answers of kernels for integers others, and how not to have it."""
    return (
        f"its scores in onnxruntime are {100 * error:.2g} % off the network's in torch: kernels "
        "round inputs to 8 bits in blocks, which is coarse where a few inputs are far larger than "
        "the others; 'genai-exact' does not round them, and takes longer",
    )


def genai_content(model: nn.Module, exact: bool) -> tuple[bytes, tuple[str, ...]]:
    """The ONNX file, and what to know of it; ModelError if it is too long for one."""
    return content_of(*written(model, functools.partial(Writer, exact=exact)))


def content_of(graph: Graph, notes: tuple[str, ...]) -> tuple[bytes, tuple[str, ...]]:
    """A graph as a file, with its notes; ModelError if it is too long for one."""
    held = (v.const_value for v in graph.model.graph.initializers.values())
    count = sum(int(tensor.nbytes) for tensor in held if tensor is not None)
    if count > LARGEST:
        raise ModelError(
            f"the file would take {count:,} bytes, and an ONNX file holds at most 2 GiB: give the "
            "largest layers fewer bits"
        )
    return graph.bytes(), notes


def require_folder(path: Path) -> None:
    """Raise FileError for a path where something else than a folder lies."""
    if path.exists() and not path.is_dir():
        raise FileError(f"{path} is a file; this target writes a folder: name another path")


def genai_config(model: nn.Module) -> dict[str, Any]:
    """What onnxruntime-genai reads beside the file."""
    config: Any = model.config
    sizes, said = sizes_of(config), getattr(model, "generation_config", None)
    ids = {name: _token(name, sizes.words, said, config) for name in ("bos", "eos", "pad")}
    ends = ids["eos"] if isinstance(ids["eos"], list) else [ids["eos"]]
    ids["pad"] = next((i for i in (ids["pad"], *ends) if i is not None), 0)
    ids["bos"] = next((i for i in (ids["bos"], *ends) if i is not None), 0)
    tokens = {f"{name}_token_id": i for name, i in ids.items() if i is not None}
    parts = ("key", "value")
    given = {name: name for name in ("input_ids", "attention_mask", "position_ids")}
    past = {f"past_{part}_names": f"past_key_values.%d.{part}" for part in parts}
    present = {f"present_{part}_names": f"present.%d.{part}" for part in parts}
    length = config.max_position_embeddings
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": MODEL,
        "head_size": sizes.size,
        "hidden_size": config.hidden_size,
        "inputs": given | past,
        "outputs": {"logits": "logits"} | present,
        "num_attention_heads": sizes.heads,
        "num_hidden_layers": sizes.layers,
        "num_key_value_heads": sizes.pairs,
    }
    network = {"context_length": length, "decoder": decoder} | tokens
    network |= {"type": TYPES.get(type(model).__name__, ANY), "vocab_size": sizes.words}
    search = {"do_sample": False, "max_length": length, "past_present_share_buffer": False}
    return {"model": network, "search": search}


def _token(name: str, words: int, *places: Any) -> Any:
    """A token of special use, or several; None where there is none that the network knows.

    A config that names none of its own names those of the family's first network, which may have
    had more words: onnxruntime-genai refuses such.
    """
    for place in places:
        found = getattr(place, f"{name}_token_id", None)
        several = found if isinstance(found, list) else [found]
        known = [i for i in several if i is not None and 0 <= i < words]
        if known:
            return known if isinstance(found, list) else known[0]
    return None


def write_beside(model: nn.Module, folder: Path, tokenizer: Any) -> tuple[str, ...]:
    """Write the config, and the tokenizer or the files of the one that a network came with."""
    config: Any = model.config
    write_whole(folder / "config.json", [config.to_json_string().encode()])
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
        return ()
    files = tokenizer_files(model)
    for file in files:
        if file.resolve().parent != folder.resolve():
            write_whole(folder / file.name, [file.read_bytes()])
    return () if files else ("no tokenizer was found beside the network: save it into this folder",)


def tokenizer_files(model: nn.Module) -> list[Path]:
    """The files of the tokenizer in the folder that a network was read from."""
    config: Any = model.config
    origin = str(getattr(config, "_name_or_path", "") or "")
    found = [Path(origin) / name for name in TOKENIZERS] if origin else []
    return [file for file in found if file.is_file()]


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def compare(model: nn.Module, text: Writing, most: float, other: str = "") -> float:
    """How far a file's answers lie from the network's; ModelError if that is too far.

    other: what may be the reason beside a network that is not as those known here.
    A prompt of two texts, the first padded on the left, then some tokens with the cache.
    """
    words = sizes_of(model.config).words
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, words, (2, PROMPT + STEPS), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, : PROMPT // 3] = 0
    wanted = _answer(model, ids, mask)
    answers = [text.read(ids[:, :PROMPT].numpy(), mask[:, :PROMPT].numpy())]
    answers += [text.read(ids[:, k : k + 1].numpy()) for k in range(PROMPT, PROMPT + STEPS)]
    found = torch.from_numpy(np.concatenate(answers, 1))
    error = relative_error(found[mask.bool()], wanted[mask.bool()])
    if not error <= most:
        raise ModelError(
            f"the file's answers differ from the network's by {100 * error:.3g} %: {other}"
            f"something in this {type(model).__name__} is not as in those known here; the target "
            "'onnx' traces any network"
        )
    return error


def _answer(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    places = (mask.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        answer = model(input_ids=ids, attention_mask=mask, position_ids=places, use_cache=False)
    logits: Tensor = answer.logits
    return logits
