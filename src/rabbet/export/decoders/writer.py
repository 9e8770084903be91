"""Layers of a decoder as nodes of an ONNX graph for onnxruntime: weights in blocks.

Weights lie in the file at their own bits. Where a kernel of onnxruntime reads them as they are,
nothing happens at load; else the file's own functions unpack them into the next wider codes that
have a kernel, once, when the file is loaded (widths of 3, 5 and 6 bits, ternary, half-step grids).
"""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from rabbet.errors import ModelError
from rabbet.export.decoders.blocks import Blocks
from rabbet.export.onnx.graph import CONTRIB, OPSET, Graph
from rabbet.export.onnx.packed import Weight, unpacked
from rabbet.export.onnx.placeholders import DOMAIN
from rabbet.forms import Dense
from rabbet.grids.grid import stored
from rabbet.model.compressed import Compressed, Factor, Head, stored_weights

if TYPE_CHECKING:
    import onnx_ir as ir

FLOAT, UINT8, INT32 = 1, 2, 6  # of onnx.TensorProto
FAST = 4  # MatMulNBits' accuracy_level: inputs are rounded to 8 bits in blocks
EXACT = 1  # inputs are float32


class Writer:
    """A graph that grows by whole layers.

    exact: kernels take inputs as floats, so that the file answers as the network does, but for the
    order of sums; else as integers of 8 bits, block by block, which is several times as fast.
    unreadable: what becomes of integers that no kernel reads.
    """

    unreadable = "float32"

    def __init__(self, graph: Graph, model: nn.Module, exact: bool) -> None:
        self.graph, self.model, self.exact = graph, model, exact
        self.notes: list[str] = []
        self.stored = stored_weights(model)
        self._count = 0

    def call(self, op: str, *inputs: "ir.Value", **more: Any) -> "ir.Value":
        """The output of a node of ONNX's own."""
        return self.named(op, self._name(), *inputs, **more)

    def named(self, op: str, name: str, *inputs: "ir.Value", **more: Any) -> "ir.Value":
        """The same under a name."""
        return self.graph.call(op, *inputs, name=name, **more)

    def integers(self, *numbers: int) -> "ir.Value":
        """A constant of whole numbers, [n]."""
        return self.graph.shared(f"i.{'.'.join(map(str, numbers))}", np.array(numbers, np.int64))

    def number(self, value: float) -> "ir.Value":
        """A constant of one float, []."""
        return self.graph.shared(f"f.{value!r}", np.array(value, np.float32))

    def _name(self) -> str:
        self._count += 1
        return f"v{self._count}"

    # What runs.

    def linear(self, name: str, x: "ir.Value") -> "ir.Value":
        """The output of a linear, [..., in] -> [..., out]; Conv1D of transformers is one."""
        module = self.model.get_submodule(name)
        if isinstance(module, Head):
            held = module.table
            bias: Any = module.bias
        else:
            held, bias = module, getattr(module, "bias", None)
        out = self._terms(name, held, x) if isinstance(held, Compressed) else None
        if out is None:
            weight = _float_weight(name, held)
            out = self.call("MatMul", x, self.tensor(f"{name}.weight", weight.mT))
        if bias is None:
            return out
        return self.call("Add", out, self.tensor(f"{name}.bias", bias))

    def table(self, name: str, ids: "ir.Value") -> "ir.Value":
        """The rows of an embedding, [...] -> [..., columns]."""
        held: Any = self.stored.get(f"{name}.weight", self.model.get_submodule(name))
        if not isinstance(held, Compressed):
            weight = self.tensor(f"{name}.weight", held.weight)
            return self.call("Gather", weight, ids, axis=0)
        factor = _only(held)
        if factor is None:
            self.notes.append(f"{name} is float32 in the file: {held.plan.body} is no one table")
            rows = self.tensor(f"{name}.weight", held.canonical)
            return self.call("Gather", rows, ids, axis=0)
        blocks = self._readable(factor)
        if blocks is None:
            return self.call("Gather", self._whole(held.site.name, factor), ids, axis=0)
        return self._looked_up(held.site.name, blocks, ids)

    def _looked_up(self, name: str, blocks: Blocks, ids: "ir.Value") -> "ir.Value":
        """Rows of a table in blocks, [...] -> [..., columns]."""
        blob, scales, zeros = self._blocks(name, blocks)
        flat = self.integers(blocks.rows, -1)
        rows = self.named("Reshape", f"{name}.rows", blob, flat)
        if blocks.padding:
            width = self.integers(blocks.columns * blocks.bits // 8)
            rows = self.call("Slice", rows, self.integers(0), width, self.integers(1))
        return self.call(
            "GatherBlockQuantized",
            *[rows, ids, scales, *([] if zeros is None else [zeros])],
            domain=CONTRIB,
            gather_axis=0,
            quantize_axis=1,
            bits=blocks.bits,
            block_size=blocks.size,
        )

    def norm(self, name: str, x: "ir.Value") -> "ir.Value":
        """A LayerNorm, or an RMSNorm, over the last axis."""
        module: Any = self.model.get_submodule(name)
        if not isinstance(module, nn.LayerNorm):
            gain = self.tensor(f"{name}.weight", module.weight)
            return self.call("RMSNormalization", x, gain, axis=-1, epsilon=module.variance_epsilon)
        size = module.normalized_shape[0]
        weight = torch.ones(size) if module.weight is None else module.weight
        bias = torch.zeros(size) if module.bias is None else module.bias
        gain, shift = self.tensor(f"{name}.weight", weight), self.tensor(f"{name}.bias", bias)
        return self.call("LayerNormalization", x, gain, shift, axis=-1, epsilon=module.eps)

    def tensor(self, name: str, value: Tensor) -> "ir.Value":
        """A constant of floats."""
        return self.graph.constant(name, np.ascontiguousarray(value.detach().cpu().float().numpy()))

    # What they are made of.

    def _terms(self, name: str, layer: Compressed, x: "ir.Value") -> "ir.Value":
        """The sum of the terms of a layer, without its bias."""
        if layer.quantisers:
            raise ModelError(
                f"{name} rounds its input ({layer.plan.body}), which this target does not: "
                "compress with Joint(act=None), say, or export to 'onnx'"
            )
        parts = []
        for t, (form, factors) in enumerate(zip(layer.forms, layer.factors, strict=True)):
            key = f"{layer.site.name}.{t}" if t else layer.site.name
            if form == Dense():
                parts.append(self._product(key, factors[0], x))
            elif form.nested:
                inner = self._product(f"{key}.a", factors[0], x)
                parts.append(self._product(f"{key}.b", factors[1], inner))
            else:
                self.notes.append(f"{name} is float32 in the file: {form} has no kernel here")
                weight = form.contract(layer.site, [f() for f in factors])
                parts.append(self.call("MatMul", x, self.tensor(f"{key}.weight", weight.mT)))
        total = parts[0]
        for part in parts[1:]:
            total = self.call("Add", total, part)
        return total

    def _product(self, name: str, factor: Factor, x: "ir.Value") -> "ir.Value":
        """X times the transpose of a factor [out, in]."""
        blocks = self._readable(factor)
        if blocks is None or (self.exact and blocks.bits == 8):
            whole = self._whole(name, factor) if blocks is None else self._wide(name, blocks)
            return self._float_product(name, whole, x)
        return self._block_product(name, blocks, x, blocks.columns)

    def _float_product(self, name: str, whole: "ir.Value", x: "ir.Value") -> "ir.Value":
        wide = self.named("Transpose", f"{name}.transposed", whole, perm=[1, 0])
        return self.call("MatMul", x, wide)

    def _block_product(self, name: str, blocks: Blocks, x: "ir.Value", columns: int) -> "ir.Value":
        blob, scales, zeros = self._blocks(name, blocks)
        return self.call(
            "MatMulNBits",
            *[x, blob, scales, *([] if zeros is None else [zeros])],
            domain=CONTRIB,
            K=columns,
            N=blocks.rows,
            bits=blocks.bits,
            block_size=blocks.size,
            accuracy_level=EXACT if self.exact else FAST,
        )

    def _readable(self, factor: Factor) -> Blocks | None:
        """A factor in the codes that onnxruntime is fastest with; None for one that has none.

        With float inputs it has fast kernels for 4 bits alone; with 2 it unpacks the whole weight
        in every step. With integer ones it has them for 2 bits in blocks of 32 and more, too.
        """
        blocks = Blocks.of(factor.numbers)
        narrow = blocks is not None and blocks.bits == 2 and (self.exact or blocks.size < 32)
        return Blocks.of(factor.numbers, 4) if narrow else blocks

    def _whole(self, name: str, factor: Factor) -> "ir.Value":
        """A factor on any grid, float32 when the file is loaded, [out, in]."""
        if not factor.grid.codebook.floats:
            self.notes.append(
                f"{name} is {self.unreadable} once loaded: {factor.grid} is not in blocks of 16, "
                "32, 64 or 128 inputs"
            )
        return Weight.of(name, factor).values(self.graph)

    def _wide(self, name: str, blocks: Blocks) -> "ir.Value":
        """Codes of 8 bits as float32 when the file is loaded, [out, in].

        A kernel for float inputs would unpack them in every step.
        """
        self.notes.append(f"{name} is float32 once loaded: 8 bits have no fast kernel for floats")
        blob, scales, zeros = self._blocks(name, blocks)
        whole = self.named("Cast", f"{name}.wide", blob, to=FLOAT)
        middle: ir.Value = self.number(128.0)
        if zeros is not None:
            points = self.named("Cast", f"{name}.zeros.float", zeros, to=FLOAT)
            middle = self.named("Unsqueeze", f"{name}.zeros.wide", points, self.integers(2))
        steps = self.named("Sub", f"{name}.steps", whole, middle)
        each = self.named("Unsqueeze", f"{name}.scales.wide", scales, self.integers(2))
        values = self.named("Mul", f"{name}.values", steps, each)
        flat = self.named("Reshape", f"{name}.flat", values, self.integers(blocks.rows, -1))
        if not blocks.padding:
            return flat
        ends = self.integers(0), self.integers(blocks.columns), self.integers(1)
        return self.named("Slice", f"{name}.cut", flat, *ends)

    def _blocks(self, name: str, blocks: Blocks) -> "tuple[ir.Value, ir.Value, ir.Value | None]":
        """Codes, scales and zero points as kernels read them; a table and its head share them."""
        key = f"{name}.{blocks.bits}"
        if blocks.packed:
            blob = self.graph.constant(f"{name}.codes", blocks.blob())
        else:
            blob = self._repacked(key, name, blocks)
        zeros = blocks.zero_points()
        return (
            blob,
            self._scales(name, blocks),
            None if zeros is None else self.graph.constant(f"{key}.zeros", zeros),
        )

    def _repacked(self, key: str, name: str, blocks: Blocks) -> "ir.Value":
        """Codes unpacked from the file's own bits and packed for a kernel, when it is loaded."""
        shift = blocks.shift
        if blocks.grid.levels == 256:
            whole = (blocks.integers + shift).numpy().astype(np.uint8)
            codes, shift = self.graph.constant(f"{name}.codes", whole), 0
        else:
            codes = unpacked(self.graph, f"{name}.codes", blocks.grid, blocks.codes)
        self.graph.function("blocks", BLOCKS)
        powers = np.array([1 << k for k in range(0, 8, blocks.bits)], np.int32)
        return self.named(
            "blocks",
            f"{key}.blob",
            codes,
            self.graph.shared(f"shift.{shift}", np.array([shift], np.int32)),
            self.integers(0, 0, 0, blocks.padding),
            self.graph.shared(f"powers.{blocks.bits}", powers),
            self.integers(blocks.rows, blocks.count, blocks.size * blocks.bits // 8),
            domain=DOMAIN,
        )

    def _scales(self, name: str, blocks: Blocks) -> "ir.Value":
        """The scale of each block; the file holds each scale once, in bfloat16 where that is it."""
        short = bool(torch.equal(blocks.scales, stored(blocks.scales)))
        kind = "BFLOAT16" if short else "FLOAT"
        scales = self.graph.constant(f"{name}.scales", blocks.scales.numpy(), kind)
        if short:
            scales = self.named("Cast", f"{name}.scales.float", scales, to=FLOAT)
        places = blocks.places
        if len(places) == blocks.scales.shape[1]:
            return scales
        text = "x".join(map(str, (blocks.columns, blocks.group, blocks.size)))
        index = self.graph.shared(f"places.{text}", places)
        return self.named("Gather", f"{name}.scales.each", scales, index, axis=1)


BLOCKS = f"""
    <domain: "{DOMAIN}", opset_import: ["" : {OPSET}]>
    blocks (a, b, c, d, e) => (z)
    {{
        f = Cast <to = {INT32}> (a)
        g = Add(f, b)
        h = Pad(g, c)
        i = Shape(d)
        j = Constant <value_ints = [-1]> ()
        k = Concat <axis = 0> (j, i)
        l = Reshape(h, k)
        m = Mul(l, d)
        n = Constant <value_ints = [1]> ()
        o = ReduceSum <keepdims = 0> (m, n)
        p = Cast <to = {UINT8}> (o)
        z = Reshape(p, e)
    }}"""
"""The function `(integers [rows, columns], shift, padding, powers, shape) -> uint8 [*shape]`."""


def _only(layer: Compressed) -> Factor | None:
    """The one factor of a layer that is a dense weight."""
    return layer.factors[0][0] if layer.forms == [Dense()] else None


def _float_weight(name: str, module: Any) -> Tensor:
    """The weight of a layer that is not compressed, [out, in]."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        raise ModelError(f"{name} is a {type(module).__name__}, which is no linear known here")
    turned = type(module).__name__ == "Conv1D"  # transformers' own: [in, out]
    return weight.mT if turned else weight
