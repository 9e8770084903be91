"""Placeholders: nodes that stand for a weight or a quantised input until an export writes it."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir

# The domain of the placeholders, which are replaced in the end, and of a file's own functions.
DOMAIN = "rabbet"
# Operators that a weight may go through before its use.
MOVING = {"Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"}


def is_placeholder(value: "ir.Value | None", op: str) -> bool:
    """Whether a value is the output of a placeholder; a weight may have another layout since."""
    node = None if value is None else value.producer()
    if op == "weight" and node is not None and node.op_type in MOVING:
        return is_placeholder(node.inputs[0], op)
    return node is not None and node.domain == DOMAIN and node.op_type == op


def name_of(placeholder: "ir.Node") -> str:
    """The name of the weight or input that a placeholder stands for."""
    return placeholder.attributes["name"].as_string()
