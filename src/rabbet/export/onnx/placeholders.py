"""What stands in a traced graph for a weight or for a quantised input, until an export writes the real thing."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir

# of the placeholders, which are gone in the end, and of the functions that a file brings along
DOMAIN = "rabbet"
# What a weight may go through before its use.
MOVING = {"Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"}


def is_placeholder(value: "ir.Value | None", op: str) -> bool:
    """Whether a value is what a placeholder makes; a weight may have been given another layout since."""
    node = None if value is None else value.producer()
    if op == "weight" and node is not None and node.op_type in MOVING:
        return is_placeholder(node.inputs[0], op)
    return node is not None and node.domain == DOMAIN and node.op_type == op


def name_of(placeholder: "ir.Node") -> str:
    """The name that a placeholder bears."""
    return placeholder.attributes["name"].as_string()
