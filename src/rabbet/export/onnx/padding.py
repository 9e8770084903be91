"""Borders of zeros: a separate padding in front of a conv becomes the conv's own.

TensorFlow's networks pad on two sides only, so they come with a layer for it. A runtime would
return to floats for that layer; a conv pads at no cost.
"""

from typing import TYPE_CHECKING

from rabbet.export.onnx.graph import Graph, values

if TYPE_CHECKING:
    import onnx_ir as ir


def adds_zeros(node: "ir.Node") -> bool:
    """Whether a node pads with zeros, which every range contains."""
    if node.op_type != "Pad":
        return False
    mode = node.attributes.get("mode")
    filled = node.inputs[2] if len(node.inputs) > 2 else None
    zeros = filled is None or (filled.const_value is not None and not values(filled).any())
    return zeros and (mode is None or mode.as_string() == "constant")


def absorb_borders(graph: Graph) -> None:
    """Move such paddings of a marked graph into the convs that read them, in place."""
    for _, placeholder in list(graph.placeholders("act")):
        border = placeholder.inputs[0].producer() if placeholder.inputs[0] is not None else None
        uses = list(placeholder.outputs[0].uses())
        sides = None if border is None or not adds_zeros(border) else _sides(border)
        only_convs = all(u.node.op_type == "Conv" and u.idx == 0 for u in uses)
        if border is None or sides is None or not only_convs:
            continue
        for use in uses:
            own = use.node.attributes["pads"].as_ints()
            use.node.attributes.add(_pads([a + b for a, b in zip(own, sides, strict=True)]))
        placeholder.replace_input_with(0, border.inputs[0])


def _sides(border: "ir.Node") -> list[int] | None:
    """Zeros before and after each place axis; None if they do not lie there, or are not known."""
    amounts = border.inputs[1]
    if amounts is None or amounts.const_value is None or len(border.inputs) > 3:
        return None
    zeros = values(amounts).tolist()
    half = len(zeros) // 2
    if any(zeros[:2]) or any(zeros[half : half + 2]) or min(zeros) < 0:
        return None
    return [*zeros[2:half], *zeros[half + 2 :]]


def _pads(amounts: list[int]) -> "ir.Attr":
    import onnx_ir as ir

    return ir.AttrInt64s("pads", amounts)
