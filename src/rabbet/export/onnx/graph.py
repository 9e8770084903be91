"""An ONNX graph and the few changes that an export makes to it.

Most of what depends on the graph-editing library (`onnx_ir`) is here.
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rabbet.export.onnx.placeholders import DOMAIN, name_of
from rabbet.export.signature import BATCH

if TYPE_CHECKING:
    import onnx_ir as ir

OPSET = 23  # the first with attention as one node; 4-bit integers came with 21
IR_VERSION = 11
CONTRIB = "com.microsoft"  # the domain of onnxruntime's own operators
# The ending of the name of a weight that a runtime turns into float when it loads the file.
WHOLE = "float"
SHARED = "="  # how the names of constants begin that belong to no layer


class Graph:
    """A model whose nodes are added in any order: `bytes` sorts them and drops unused ones.

    functions_known: whether the target runtime reads functions that a file brings along.
    """

    def __init__(self, model: "ir.Model", functions_known: bool = True) -> None:
        self.model, self.functions_known = model, functions_known
        self.functions: dict[str, str] = {}
        self.carried: list[Any] = []  # functions of the file that it was read from
        self.known: dict[str, ir.Value] = {}

    @classmethod
    def read(cls, content: bytes) -> "Graph":
        """A graph from the bytes of a file."""
        import onnx
        import onnx_ir as ir

        proto = onnx.load_from_string(content)
        carried = list(proto.functions)
        del proto.functions[:]
        graph = cls(ir.from_proto(proto))
        graph.carried = carried
        return graph

    @classmethod
    def new(cls, inputs: "Mapping[str, tuple[str, Sequence[int | str]]]") -> "Graph":
        """A graph without nodes; of each input the type, such as INT64, and the shape."""
        import onnx_ir as ir

        values = [
            ir.Value(name=name, type=ir.TensorType(ir.DataType[kind]), shape=ir.Shape(shape))
            for name, (kind, shape) in inputs.items()
        ]
        opsets = {"": OPSET, CONTRIB: 1}
        graph = ir.Graph(values, [], nodes=[], opset_imports=opsets, name=DOMAIN)
        return cls(ir.Model(graph, ir_version=IR_VERSION))

    def output(self, value: "ir.Value", shape: "Sequence[int | str]", kind: str = "FLOAT") -> None:
        """Make a value an output of the network, after those it has."""
        import onnx_ir as ir

        value.type, value.shape = ir.TensorType(ir.DataType[kind]), ir.Shape(shape)
        self.model.graph.outputs.append(value)

    def copy(self) -> "Graph":
        """A copy of the graph, to be changed on its own."""
        import onnx_ir as ir

        return Graph(ir.from_proto(ir.to_proto(self.model)))

    def all_values(self) -> "list[ir.Value]":
        """Inputs, and the outputs of every node."""
        return [*self.inputs, *(out for node in self.nodes for out in node.outputs)]

    @property
    def nodes(self) -> "list[ir.Node]":
        """The nodes in order."""
        self.model.graph.sort()
        return list(self.model.graph)

    def name_axes(self, names: Mapping[str, Mapping[int, str]]) -> None:
        """Give free axes names: by input and axis, numbered where they are not proven to be equal.

        Only the axis of examples is known to be one in all inputs.
        """
        import onnx_ir as ir

        known: dict[str, str] = {}
        for value in self.inputs:
            for axis, name in names.get(str(value.name), {}).items():
                size = None if value.shape is None else value.shape[axis]
                symbol = str(size.value) if isinstance(size, ir.SymbolicDim) else "None"
                if symbol == "None" or symbol in known:
                    continue
                same = [n for n in known.values() if n.partition("_")[0] == name]
                known[symbol] = f"{name}_{len(same) + 1}" if same and name != BATCH else name

        def renamed(size: Any) -> Any:
            if not isinstance(size, ir.SymbolicDim) or size.value is None:
                return size
            text = re.sub(r"\w+", lambda m: known.get(m[0], m[0]), str(size.value))
            return ir.SymbolicDim(text)

        for value in self.all_values():
            if value.shape is not None:
                value.shape = ir.Shape([renamed(size) for size in value.shape])

    @property
    def inputs(self) -> "list[ir.Value]":
        """The inputs of the network."""
        return list(self.model.graph.inputs)

    @property
    def outputs(self) -> "list[ir.Value]":
        """The outputs of the network."""
        return list(self.model.graph.outputs)

    def placeholders(self, op: str) -> "Iterator[tuple[str, ir.Node]]":
        """The placeholders of one kind that tracing left, with the name that each bears."""
        for node in self.nodes:
            if node.domain == DOMAIN and node.op_type == op:
                yield name_of(node), node

    def constant(self, name: str, array: NDArray[Any], kind: str | None = None) -> "ir.Value":
        """An initializer, or the existing one of the same name.

        kind: a type that numpy lacks, such as INT4.
        """
        import onnx_ir as ir

        value = self.model.graph.initializers.get(name)
        if value is None:
            dtype = None if kind is None else ir.DataType[kind]
            numbers = array if dtype is None else array.astype(dtype.numpy())
            content = ir.tensor(numbers, dtype=dtype, name=name)
            value = ir.Value(
                name=name, type=ir.TensorType(content.dtype), shape=ir.Shape(array.shape)
            )
            value.const_value = content
            self.model.graph.register_initializer(value)
        return value

    def shared(self, name: str, array: NDArray[Any]) -> "ir.Value":
        """A constant that belongs to no layer: whatever needs one like it reads the same.

        name: says what it holds, so that equal names are equal constants.
        """
        return self.constant(f"{SHARED}{name}", array)

    def call(
        self, op: str, *inputs: "ir.Value", name: str, domain: str = "", **attributes: Any
    ) -> "ir.Value":
        """The output, called `name`, of a new node, or the existing value of that name."""
        import onnx_ir as ir

        if name not in self.known:
            self.known[name] = ir.Value(name=name)
            node = ir.node(
                op, inputs, attributes, domain=domain, outputs=[self.known[name]], name=name
            )
            self.model.graph.append(node)
        return self.known[name]

    def function(self, name: str, text: str) -> None:
        """Have the file define a function; text: in ONNX's own syntax."""
        self.functions[name] = text

    def swap(
        self,
        old: "ir.Value",
        new: "ir.Value",
        keep: "Collection[ir.Node]" = (),
        outputs: bool = True,
    ) -> None:
        """Replace every use of a value by another, except in the nodes of `keep`.

        outputs: whether graph outputs are replaced, too; an output keeps its name.
        """
        for use in list(old.uses()):
            if use.node not in keep:
                use.node.replace_input_with(use.idx, new)
        if not outputs:
            return
        ends = self.model.graph.outputs
        for k, value in enumerate(ends):
            if value is old:
                # The name is the user's and goes with the output.
                if not old.is_graph_input():
                    new.name, old.name = old.name, f"{old.name}.inner"
                new.type, new.shape = old.type, old.shape
                ends[k] = new

    def strip(self) -> None:
        """Remove the conversions between floats and integers at both ends.

        Integers then go in and come out.
        """
        import onnx_ir as ir

        inputs, outputs = self.model.graph.inputs, self.model.graph.outputs
        for k, value in enumerate(inputs):
            uses = list(value.uses())
            if len(uses) == 1 and uses[0].node.op_type == "QuantizeLinear":
                codes = uses[0].node.outputs[0]
                inputs[k] = ir.Value(
                    name=value.name, type=ir.TensorType(ir.DataType.UINT8), shape=value.shape
                )
                value.name = f"{value.name}.float"
                codes.replace_all_uses_with(inputs[k])
                self.model.graph.remove(uses[0].node, safe=True)
        for k, value in enumerate(outputs):
            node = value.producer()
            if node is None or node.op_type != "DequantizeLinear":
                continue
            if node.inputs[0] is not None:
                outputs[k] = node.inputs[0]
                outputs[k].type, outputs[k].shape = ir.TensorType(ir.DataType.UINT8), value.shape

    def expose(self, values: "Collection[ir.Value]") -> None:
        """Make values outputs of the network, after its own."""
        known = set(self.model.graph.outputs)
        self.model.graph.outputs.extend(v for v in values if v not in known)

    def bytes(self) -> bytes:
        """The file, as onnxruntime and OpenVINO read it."""
        import onnx
        import onnx_ir as ir
        from onnx_ir.passes import common

        self.model.graph.sort()
        common.ClearMetadataAndDocStringPass()(self.model)
        common.RemoveUnusedNodesPass()(self.model)
        for value in self.model.graph.all_nodes():
            for out in value.outputs:
                # The runtime infers types and shapes; in a file they only take room.
                if not out.is_graph_output():
                    out.type = out.shape = None
        proto = ir.to_proto(self.model)
        proto.ir_version = IR_VERSION
        proto.producer_name, proto.producer_version = DOMAIN, ""
        del proto.graph.value_info[:]  # what is left is about constants, which know their shapes
        del proto.functions[:]
        proto.functions.extend(self.carried)
        proto.functions.extend(onnx.parser.parse_function(text) for text in self.functions.values())
        used = {node.domain for node in proto.graph.node}
        kept = [o for o in proto.opset_import if o.domain in {"", *({CONTRIB} & used)}]
        del proto.opset_import[:]
        proto.opset_import.extend(kept)
        if proto.functions:
            proto.opset_import.append(onnx.helper.make_opsetid(DOMAIN, 1))
        return bytes(proto.SerializeToString())


def values(array: Any) -> NDArray[Any]:
    """The content of a constant."""
    return np.asarray(array.const_value.numpy())
