"""A folder for llama.cpp: `model.gguf`, and `adapter.gguf` where layers have low-rank terms.

Weights lie in ggml's types exactly as they are on their grids; see `ggml`. Nothing is rounded
unless float16 is asked for. Of Llama the rows of queries and keys are in the order of ggml, which
turns neighbouring pairs where transformers turns halves.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rabbet.errors import FileError, ModelError
from rabbet.export.base import Written
from rabbet.export.decoders.families import require_decoder, sizes_of
from rabbet.export.decoders.genai import require_folder, tokenizer_files
from rabbet.export.decoders.ggml import stored
from rabbet.export.decoders.vocabulary import Vocabulary
from rabbet.files import write_whole
from rabbet.forms import Dense
from rabbet.grids.grid import Quantised
from rabbet.model.compressed import Compressed, Factor, stored_weights
from rabbet.model.surgery import on_cpu
from rabbet.runtime.decoding import GGUF

ADAPTER = "adapter.gguf"
FITTING = "2 to 6 or 8 bits, ternary, binary; for each output or in groups of 32, as 4c or 4g32"

LLAMA = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
GPT2 = {
    "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down", "ln_1": "attn_norm", "ln_2": "ffn_norm",
}  # fmt: skip


@dataclass(frozen=True)
class Names:
    """What the modules of a family are called: here, and in a GGUF file."""

    arch: str
    layers: str
    inner: dict[str, str]
    outer: dict[str, str]

    def all(self, count: int) -> dict[str, str]:
        """The tensors of a file by the names of modules, without their endings."""
        blocks = {
            f"{self.layers}.{n}.{ours}": f"blk.{n}.{theirs}"
            for n in range(count)
            for ours, theirs in self.inner.items()
        }
        return self.outer | blocks


NAMES = {
    "LlamaForCausalLM": Names(
        "llama",
        "model.layers",
        LLAMA,
        {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"},
    ),
    "GPT2LMHeadModel": Names(
        "gpt2",
        "transformer.h",
        GPT2,
        {
            "transformer.wte": "token_embd",
            "transformer.wpe": "position_embd",
            "transformer.ln_f": "output_norm",
            "lm_head": "output",
        },
    ),
}
GPT2_POSITIONS = 1024  # of every GPT-2 that transformers reads from a file
FLOATS = ("position_embd",)  # what llama.cpp wants in float32


@dataclass
class Content:
    """Tensors of the file and of its adapter: name, numbers, type of ggml (None: as numpy's)."""

    half: bool
    tensors: list[tuple[str, Any, str | None]] = field(default_factory=list)
    adapter: list[tuple[str, Any, str | None]] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def write_gguf(model: nn.Module, folder: Path, tokenizer: Any, half: bool) -> Written:
    """Write a folder for llama.cpp; the bytes are those of all its GGUF files.

    half: store as float16 what no type of ggml holds exactly; else that is refused. tokenizer: of
    transformers, or None for that of the folder which the network was read from. Raises FileError
    if `gguf` is missing or the path is a file; ModelError for a network that is not Llama or GPT-2,
    for layers on grids that do not fit, by name, and for tokenizers other than byte-level BPE.
    """
    require_folder(folder)
    files, notes = gguf_files(model, tokenizer, half)
    folder.mkdir(parents=True, exist_ok=True)
    size = sum(write_whole(folder / name, [content]) for name, content in files.items())
    if ADAPTER not in files:
        (folder / ADAPTER).unlink(missing_ok=True)  # an older export's is not of this network
    return Written(size, notes)


def gguf_files(
    model: nn.Module, tokenizer: Any, half: bool
) -> tuple[dict[str, bytes], tuple[str, ...]]:
    """The files by name, and what to know of them; raises as `write_gguf` does."""
    if find_spec("gguf") is None:
        raise FileError("GGUF files need gguf; install rabbet[gguf]")
    require_decoder(model)
    if type(model).__name__ not in NAMES:
        known = ", ".join(NAMES)
        raise ModelError(f"{type(model).__name__} has no GGUF format here; known are {known}")
    model = on_cpu(model)
    content = gguf_content(model, half)
    if content.refused:
        few = "; ".join(content.refused[:3]) + ("; ..." if len(content.refused) > 3 else "")
        raise ModelError(
            f"GGUF has no type that holds {len(content.refused)} of the layers exactly: {few}. "
            f"Choose dense weights on grids that fit ({FITTING}), with low rank beside them at "
            "most (Joint(forms=())), or write these as float16 with the target 'gguf-f16'"
        )
    words = Vocabulary.of(tokenizer, tokenizer_files(model), sizes_of(model.config).words)
    notes = [*content.notes, *words.notes]
    notes += _unread(model.config)
    with tempfile.TemporaryDirectory() as scratch:
        _write_model(Path(scratch) / GGUF, model, content, words)
        if content.adapter:
            _write_adapter(Path(scratch) / ADAPTER, model, content)
            notes.append(f"low-rank terms are {ADAPTER}: run it with --lora {ADAPTER}")
        files = {file.name: file.read_bytes() for file in sorted(Path(scratch).iterdir())}
    return files, tuple(notes)


@torch.no_grad()
def gguf_content(model: nn.Module, half: bool) -> Content:
    """The tensors of a network by the names of GGUF, and what no type holds."""
    names, content = NAMES[type(model).__name__], Content(half)
    held = stored_weights(model)
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight  # type: ignore[operator]
    for ours, theirs in names.all(sizes_of(model.config).layers).items():
        module: Any = model.get_submodule(ours)
        shared = isinstance(getattr(module, "table", None), nn.Module) or tied
        if theirs == "output" and shared:
            continue  # readers take the table for it
        order = _order(model, ours)
        layer = held.get(f"{ours}.weight", module)
        if isinstance(layer, Compressed):
            _add_layer(content, theirs, layer, order)
        else:
            _add_floats(content, theirs, module, order)
        bias = getattr(module, "bias", None)
        if bias is not None:
            content.tensors.append((f"{theirs}.bias", _numbers(order(bias)), None))
    return content


def _add_floats(
    content: Content, name: str, module: Any, order: Callable[[Tensor], Tensor]
) -> None:
    """A tensor that is not compressed, in float32."""
    weight = module.weight
    if type(module).__name__ == "Conv1D":
        weight = weight.mT
    content.tensors.append((f"{name}.weight", _numbers(order(weight)), None))


def _add_layer(
    content: Content, name: str, layer: Compressed, order: Callable[[Tensor], Tensor]
) -> None:
    """A compressed layer: its dense term, and adapters in a file of their own."""
    plan = layer.plan
    if layer.quantisers:
        content.notes.append(f"{plan.name} does not round its input in llama.cpp as {plan.body}")
    if name in FLOATS:
        content.tensors.append((f"{name}.weight", _numbers(layer.canonical), None))
        return
    if layer.forms[0] != Dense() or not all(f.nested for f in layer.forms[1:]):
        _add_half(content, name, layer, order)
        return
    dense, *others = layer.factors
    packed = stored(_ordered(dense[0], order))
    if packed is None:
        _add_half(content, name, layer, order, only=dense[0])
    else:
        content.tensors.append((f"{name}.weight", packed.content, packed.type))
    if others:
        a = torch.cat([factors[0]() for factors in others])
        b = torch.cat([factors[1]() for factors in others], 1)
        content.adapter.append((f"{name}.weight.lora_a", _numbers(a), None))
        content.adapter.append((f"{name}.weight.lora_b", _numbers(order(b)), None))


def _add_half(
    content: Content,
    name: str,
    layer: Compressed,
    order: Callable[[Tensor], Tensor],
    only: Factor | None = None,
) -> None:
    """What no type holds: float16 if that is wished, else it is refused."""
    weight = layer.canonical if only is None else only()
    if not content.half:
        content.refused.append(f"{layer.plan.name} ({layer.plan.body})")
        return
    content.notes.append(f"{layer.plan.name} is float16: no type holds {layer.plan.body} exactly")
    content.tensors.append((f"{name}.weight", _numbers(order(weight)).astype(np.float16), None))


def _ordered(factor: Factor, order: Callable[[Tensor], Tensor]) -> Quantised:
    """The numbers of a factor with its rows in another order."""
    q = factor.numbers
    rows, parts = q.codes.shape[0], q.grid.scales.parts(q.codes.shape[1])
    if parts is None:
        return Quantised(q.grid, order(q.codes), q.scale, q.zero)
    scale, zero = (
        None if t is None else order(t.reshape(rows, parts)).reshape(-1) for t in (q.scale, q.zero)
    )
    assert scale is not None
    return Quantised(q.grid, order(q.codes), scale, zero)


def _order(model: nn.Module, name: str) -> Callable[[Tensor], Tensor]:
    """How ggml has the rows of a layer: of Llama's queries and keys, pairs in place of halves."""
    sizes = sizes_of(model.config)
    heads = {"q_proj": sizes.heads, "k_proj": sizes.pairs}.get(name.rpartition(".")[2])
    if heads is None:
        return lambda rows: rows

    def paired(rows: Tensor) -> Tensor:
        halves = rows.reshape(heads, 2, -1, *rows.shape[1:])
        return halves.swapaxes(1, 2).reshape(rows.shape)

    return paired


def _numbers(tensor: Tensor) -> Any:
    return np.ascontiguousarray(tensor.detach().float().numpy())


def _write_model(path: Path, model: nn.Module, content: Content, words: Vocabulary) -> None:
    import gguf

    config: Any = model.config
    sizes, names = sizes_of(config), NAMES[type(model).__name__]
    _require_usual(config, names.arch)
    writer = gguf.GGUFWriter(path, names.arch)
    writer.add_name(str(getattr(config, "_name_or_path", "") or type(model).__name__))
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(sizes.layers)
    writer.add_head_count(sizes.heads)
    if names.arch == "llama":
        writer.add_vocab_size(sizes.words)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count_kv(sizes.pairs)
        writer.add_rope_dimension_count(sizes.size)
        writer.add_rope_freq_base(_base(config))
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    else:
        writer.add_feed_forward_length(config.n_inner or 4 * config.hidden_size)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    words.write(writer, config)
    _finish(writer, content.tensors)


def _unread(config: Any) -> list[str]:
    """What transformers does not take from a file, though it holds it; runtimes of ggml do.

    Its reader takes every GPT-2 for one of the usual positions and width inside.
    """
    if config.model_type != "gpt2" or (
        config.n_positions == GPT2_POSITIONS and config.n_inner in (None, 4 * config.n_embd)
    ):
        return []
    return [
        "transformers reads this file only with config=, which is to be the network's: without it "
        f"every GPT-2 of a GGUF file has {GPT2_POSITIONS:,} positions, and 4 times its width inside"
    ]


def _require_usual(config: Any, arch: str) -> None:
    """Refuse what llama.cpp would compute otherwise; ModelError names it."""
    width, heads = config.hidden_size, config.num_attention_heads
    usual: dict[str, tuple[Any, Any]] = {
        "head_dim": (getattr(config, "head_dim", None) or width // heads, width // heads),
    }
    if arch == "llama":
        usual["hidden_act"] = config.hidden_act, "silu"
        usual["attention_bias"] = bool(getattr(config, "attention_bias", False)), False
    else:
        usual["activation_function"] = config.activation_function, "gelu_new"
        usual["scale_attn_weights"] = config.scale_attn_weights, True
        usual["scale_attn_by_inverse_layer_idx"] = config.scale_attn_by_inverse_layer_idx, False
    strange = next((name for name, (is_, want) in usual.items() if is_ != want), None)
    if strange is not None:
        found, wanted = usual[strange]
        raise ModelError(
            f"the network's {strange} is {found!r}; a GGUF file of its kind stands for {wanted!r}"
        )


def _base(config: Any) -> float:
    """The base of the rotation; ModelError for one that a file would have to say more of."""
    rotation: Any = getattr(config, "rope_parameters", None)
    if rotation is None:  # transformers before 5
        rotation = dict(getattr(config, "rope_scaling", None) or {})
        rotation.setdefault("rope_theta", getattr(config, "rope_theta", 10000.0))
        rotation.setdefault("rope_type", rotation.get("type", "default"))
    form = rotation.get("rope_type", "default")
    if form != "default":
        raise ModelError(f"the rotation {form!r} is not written to GGUF here, only 'default' is")
    return float(rotation.get("rope_theta", 10000.0))


def _write_adapter(path: Path, model: nn.Module, content: Content) -> None:
    """Low-rank terms as an adapter; a scale of 0 has readers add it as it is."""
    import gguf

    writer = gguf.GGUFWriter(path, NAMES[type(model).__name__].arch)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 0.0)
    _finish(writer, content.adapter)


def _finish(writer: Any, tensors: list[tuple[str, Any, str | None]]) -> None:
    import gguf

    for name, numbers, kind in tensors:
        raw = None if kind is None else gguf.GGMLQuantizationType[kind]
        writer.add_tensor(name, numbers, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
