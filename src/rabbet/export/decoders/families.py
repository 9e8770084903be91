"""The decoders that are known, each as a graph that answers with its cache of keys and values.

Inputs are `input_ids` and `position_ids` [batch, length], `attention_mask` [batch, total] and for
each layer N `past_key_values.N.key` and `.value` [batch, heads, past, head size]; outputs are
`logits` [batch, length, words] and `present.N.key` and `.value` [batch, heads, total, head size].
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rabbet.errors import ModelError
from rabbet.export.decoders.writer import FLOAT, Writer
from rabbet.export.onnx.graph import Graph

if TYPE_CHECKING:
    import onnx_ir as ir

BOOL = 9  # of onnx.TensorProto
ROTATIONS = ("default", "linear", "llama3", "yarn")  # whose frequencies are constants
LOWEST = float(torch.finfo(torch.float32).min)
Writing = Callable[[Graph, nn.Module], Writer]
"""Makes the writer of a target."""


@dataclass(frozen=True)
class Sizes:
    """Of the attention of a decoder."""

    layers: int
    heads: int
    pairs: int
    """Heads of keys and values."""
    size: int
    """Of a head."""
    words: int


def sizes_of(config: Any) -> Sizes:
    """The sizes that a config of transformers tells."""
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    pairs = getattr(config, "num_key_value_heads", None) or heads
    return Sizes(config.num_hidden_layers, heads, pairs, size, config.vocab_size)


class Decoder:
    """A decoder while it is written: its inputs, its mask, and attention with a cache."""

    def __init__(self, model: nn.Module, writer: Writing) -> None:
        self.model = model
        self.config: Any = getattr(model, "config", None)
        self.sizes = s = sizes_of(self.config)
        past = ("FLOAT", ("batch", s.pairs, "past", s.size))
        self.graph = Graph.new(
            {
                "input_ids": ("INT64", ("batch", "length")),
                "attention_mask": ("INT64", ("batch", "total")),
                "position_ids": ("INT64", ("batch", "length")),
            }
            | {
                f"past_key_values.{n}.{part}": past
                for n in range(s.layers)
                for part in ("key", "value")
            }
        )
        self.given = {str(value.name): value for value in self.graph.inputs}
        self.w = writer(self.graph, model)
        self.presents: list[ir.Value] = []
        self.mask = self._mask()

    def _mask(self) -> "ir.Value":
        """What is added to scores, [batch, 1, length, total]: no later and no padded places.

        The lowest float, not minus infinity: rows of padding see nothing at all, and must not
        become NaN.
        """
        call, w = self.w.call, self.w
        given, ids = self.given["attention_mask"], self.given["input_ids"]
        one, zero = w.integers(1), w.integers(0)
        total = call("Squeeze", call("Shape", given, start=1, end=2), zero)
        length = call("Squeeze", call("Shape", ids, start=1, end=2), zero)
        start, step = self._scalar(0), self._scalar(1)
        keys = call("Range", start, total, step)
        queries = call("Unsqueeze", call("Range", call("Sub", total, length), total, step), one)
        earlier = call("LessOrEqual", keys, queries)
        seen = call("Unsqueeze", call("Cast", given, to=BOOL), w.integers(1, 2))
        return call("Where", call("And", earlier, seen), w.number(0.0), w.number(LOWEST))

    def _scalar(self, value: int) -> "ir.Value":
        return self.graph.shared(f"s.{value}", torch.tensor(value).numpy())

    def attention(self, q: "ir.Value", k: "ir.Value", v: "ir.Value", scale: float) -> "ir.Value":
        """Attention of the next layer, all [batch, length, heads * size]; the cache grows."""
        import onnx_ir as ir

        n, s = len(self.presents) // 2, self.sizes
        past = [self.given[f"past_key_values.{n}.{part}"] for part in ("key", "value")]
        out = ir.Value(name=f"attention.{n}")
        present = [ir.Value(name=f"present.{n}.{part}") for part in ("key", "value")]
        node = ir.node(
            "Attention",
            [q, k, v, self.mask, *past],
            {"q_num_heads": s.heads, "kv_num_heads": s.pairs, "scale": scale},
            outputs=[out, *present],
            name=f"attention.{n}",
        )
        self.graph.model.graph.append(node)
        self.presents += present
        return out

    def done(self, logits: "ir.Value") -> Graph:
        """The graph with its outputs."""
        s = self.sizes
        logits = self.w.named("Identity", "logits", logits)
        self.graph.output(logits, ("batch", "length", s.words))
        for value in self.presents:
            self.graph.output(value, ("batch", s.pairs, "total", s.size))
        return self.graph

    def add(self, a: "ir.Value", b: "ir.Value") -> "ir.Value":
        """A sum."""
        return self.w.call("Add", a, b)

    def activation(self, name: str, x: "ir.Value") -> "ir.Value":
        """A non-linearity by the name that transformers has for it."""
        call = self.w.call
        if name in ("silu", "swish"):
            return call("Mul", x, call("Sigmoid", x))
        if name == "relu":
            return call("Relu", x)
        if name in GELUS:
            return call("Gelu", x, approximate=GELUS[name])
        known = ("silu", "swish", "relu", *GELUS)
        raise ModelError(f"the activation {name!r} is not known here; known are {', '.join(known)}")


GELUS = {"gelu": "none", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu_fast": "tanh"}


def llama(d: Decoder) -> "ir.Value":
    """Llama, SmolLM: RMSNorm, rotated keys and queries, a gated MLP."""
    w, c, add = d.w, d.config, d.add
    x = w.table("model.embed_tokens", d.given["input_ids"])
    rotation: Any = d.model.get_submodule("model.rotary_emb")
    angles = w.call(
        "Mul",
        w.call("Unsqueeze", w.call("Cast", d.given["position_ids"], to=FLOAT), w.integers(2)),
        w.tensor("frequencies", rotation.inv_freq),
    )
    factor = w.number(float(rotation.attention_scaling))
    turns = [w.call("Mul", w.call(op, angles), factor) for op in ("Cos", "Sin")]
    for n in range(d.sizes.layers):
        name = f"model.layers.{n}"
        y = w.norm(f"{name}.input_layernorm", x)
        q, k, v = (w.linear(f"{name}.self_attn.{part}_proj", y) for part in "qkv")
        q = w.call("RotaryEmbedding", q, *turns, num_heads=d.sizes.heads)
        k = w.call("RotaryEmbedding", k, *turns, num_heads=d.sizes.pairs)
        y = d.attention(q, k, v, d.sizes.size**-0.5)
        x = add(x, w.linear(f"{name}.self_attn.o_proj", y))
        y = w.norm(f"{name}.post_attention_layernorm", x)
        gate = d.activation(c.hidden_act, w.linear(f"{name}.mlp.gate_proj", y))
        y = w.call("Mul", gate, w.linear(f"{name}.mlp.up_proj", y))
        x = add(x, w.linear(f"{name}.mlp.down_proj", y))
    return w.linear("lm_head", w.norm("model.norm", x))


def gpt2(d: Decoder) -> "ir.Value":
    """GPT-2: learned positions, one linear for queries, keys and values."""
    w, c, add = d.w, d.config, d.add
    words = w.table("transformer.wte", d.given["input_ids"])
    x = add(words, w.table("transformer.wpe", d.given["position_ids"]))
    width = c.hidden_size
    for n in range(d.sizes.layers):
        name = f"transformer.h.{n}"
        whole = w.linear(f"{name}.attn.c_attn", w.norm(f"{name}.ln_1", x))
        q, k, v = (
            w.call(
                "Slice", whole, w.integers(p * width), w.integers((p + 1) * width), w.integers(2)
            )
            for p in range(3)
        )
        scale = d.sizes.size**-0.5 if c.scale_attn_weights else 1.0
        scale /= n + 1 if c.scale_attn_by_inverse_layer_idx else 1
        x = add(x, w.linear(f"{name}.attn.c_proj", d.attention(q, k, v, scale)))
        y = w.linear(f"{name}.mlp.c_fc", w.norm(f"{name}.ln_2", x))
        x = add(x, w.linear(f"{name}.mlp.c_proj", d.activation(c.activation_function, y)))
    return w.linear("lm_head", w.norm("transformer.ln_f", x))


def opt(d: Decoder) -> "ir.Value":
    """OPT: learned positions from 2 on, norms before or behind their parts."""
    w, c, add = d.w, d.config, d.add
    base: Any = d.model.get_submodule("model.decoder")
    x = w.table("model.decoder.embed_tokens", d.given["input_ids"])
    if base.project_in is not None:
        x = w.linear("model.decoder.project_in", x)
    places = add(d.given["position_ids"], w.integers(base.embed_positions.offset))
    x = add(x, w.table("model.decoder.embed_positions", places))
    first = c.do_layer_norm_before
    for n in range(d.sizes.layers):
        name = f"model.decoder.layers.{n}"
        y = w.norm(f"{name}.self_attn_layer_norm", x) if first else x
        q, k, v = (w.linear(f"{name}.self_attn.{part}_proj", y) for part in "qkv")
        y = d.attention(q, k, v, d.sizes.size**-0.5)
        x = add(x, w.linear(f"{name}.self_attn.out_proj", y))
        x = x if first else w.norm(f"{name}.self_attn_layer_norm", x)
        y = w.norm(f"{name}.final_layer_norm", x) if first else x
        y = d.activation(c.activation_function, w.linear(f"{name}.fc1", y))
        x = add(x, w.linear(f"{name}.fc2", y))
        x = x if first else w.norm(f"{name}.final_layer_norm", x)
    if base.final_layer_norm is not None:
        x = w.norm("model.decoder.final_layer_norm", x)
    if base.project_out is not None:
        x = w.linear("model.decoder.project_out", x)
    return w.linear("lm_head", x)


FAMILIES: dict[str, Callable[[Decoder], Any]] = {
    "LlamaForCausalLM": llama,
    "GPT2LMHeadModel": gpt2,
    "OPTForCausalLM": opt,
}


def require_decoder(model: nn.Module) -> None:
    """Raise ModelError for a network that cannot be written as a decoder, and say which can."""
    name, config = type(model).__name__, getattr(model, "config", None)
    if name not in FAMILIES or config is None:
        raise ModelError(
            f"{name} is no decoder that is known here ({', '.join(FAMILIES)}); for other networks "
            "the targets are 'onnx', 'openvino' and 'torch'"
        )
    rotation = getattr(getattr(model, "model", None), "rotary_emb", None)
    kind = getattr(rotation, "rope_type", "default")
    if kind not in ROTATIONS:
        raise ModelError(
            f"the rotation {kind!r} of this decoder depends on the length; known are "
            f"{', '.join(ROTATIONS)}"
        )
    if getattr(config, "add_cross_attention", False):
        raise ModelError("this decoder also attends to an encoder, which is not known here")


def written(model: nn.Module, writer: Writing) -> tuple[Graph, tuple[str, ...]]:
    """A decoder as a graph, and what to know of it."""
    require_decoder(model)
    decoder = Decoder(model, writer)
    with torch.no_grad():
        graph = decoder.done(FAMILIES[type(model).__name__](decoder))
    return graph, tuple(dict.fromkeys(decoder.w.notes))
