"""Constants that a runtime computes when it loads a file.

They are written by the same code that computes them in torch.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from rabbet.export.onnx.graph import Graph

if TYPE_CHECKING:
    import onnx_ir as ir


class Expression:
    """A tensor that a graph computes: every operation on it is added as a node.

    It supports what forms do to factors to get a weight: products, sums, reshapes and
    transpositions.
    """

    def __init__(
        self, graph: Graph, value: "ir.Value", shape: Sequence[int], names: "Names"
    ) -> None:
        self.graph, self.value, self.shape, self.names = graph, value, tuple(shape), names

    def __len__(self) -> int:
        return self.shape[0]

    def __matmul__(self, other: "Expression") -> "Expression":
        assert len(self.shape) == len(other.shape) == 2
        return self._node("MatMul", other, shape=(self.shape[0], other.shape[1]))

    def __add__(self, other: "Expression") -> "Expression":
        return self._node("Add", other, shape=self.shape)

    def __mul__(self, other: Tensor) -> "Expression":
        value = self.graph.constant(f"{self.names.next()}.factor", other.numpy())
        return Expression(self.graph, self._call("Mul", value), self.shape, self.names)

    def index_select(self, axis: int, index: Tensor) -> "Expression":
        """Slices of an axis, in another order or several times."""
        shape = tuple(
            len(index) if k == axis % len(self.shape) else n for k, n in enumerate(self.shape)
        )
        value = self.graph.constant(f"{self.names.next()}.index", index.numpy().astype(np.int32))
        return Expression(self.graph, self._call("Gather", value, axis=axis), shape, self.names)

    @property
    def device(self) -> torch.device:
        """Where the constants that it is combined with are created."""
        return torch.device("cpu")

    def __getitem__(self, index: object) -> "Expression":
        assert index == (..., None)
        return self.reshape(*self.shape, 1)

    def reshape(self, *sizes: int) -> "Expression":
        """Other sizes; one of them may be -1."""
        known = math.prod(n for n in sizes if n != -1)
        whole = tuple(math.prod(self.shape) // known if n == -1 else n for n in sizes)
        if whole == self.shape:
            return self
        value = self._call("Reshape", shape_of(self.graph, whole))
        return Expression(self.graph, value, whole, self.names)

    view = reshape

    def flatten(self, first: int = 0, last: int = -1) -> "Expression":
        """Axes joined."""
        end = last % len(self.shape)
        joined = math.prod(self.shape[first : end + 1])
        return self.reshape(*self.shape[:first], joined, *self.shape[end + 1 :])

    def narrow(self, axis: int, first: int, count: int) -> "Expression":
        """`count` slices of an axis, from `first` on."""
        shape = tuple(count if k == axis else n for k, n in enumerate(self.shape))
        ends = [self.graph.shared(f"ends.{n}", np.array([n])) for n in (first, first + count, axis)]
        return Expression(self.graph, self._call("Slice", *ends), shape, self.names)

    def permute(self, *order: int) -> "Expression":
        """Axes in another order."""
        shape = tuple(self.shape[k] for k in order)
        return Expression(self.graph, self._call("Transpose", perm=list(order)), shape, self.names)

    def transpose(self, one: int, other: int) -> "Expression":
        """Two axes exchanged."""
        order = list(range(len(self.shape)))
        order[one], order[other] = order[other], order[one]
        return self.permute(*order)

    @property
    def mT(self) -> "Expression":  # noqa: N802 (torch's name)
        """The last two axes exchanged."""
        return self.transpose(-2, -1)

    def _node(self, op: str, other: "Expression", shape: Sequence[int]) -> "Expression":
        return Expression(self.graph, self._call(op, other.value), shape, self.names)

    def _call(self, op: str, *inputs: "ir.Value", **attributes: Any) -> "ir.Value":
        return self.graph.call(op, self.value, *inputs, name=self.names.next(), **attributes)


class Names:
    """Numbered names."""

    def __init__(self, root: str) -> None:
        self.root, self.count = root, 0

    def next(self) -> str:
        """A name that was not given yet."""
        self.count += 1
        return f"{self.root}.step{self.count}"


def shape_of(graph: Graph, sizes: Sequence[int]) -> "ir.Value":
    """A shape as a constant; equal shapes share one."""
    return graph.shared(f"shape.{'x'.join(map(str, sizes))}", np.array(sizes, np.int64))
