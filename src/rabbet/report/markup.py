"""Elements of a page, built as a tree: what is text in the tree is text in the page."""

from collections.abc import Iterable, Sequence
from xml.etree import ElementTree as ET

Element = ET.Element
Child = Element | str


def element(tag: str, *children: Child | None, **attributes: str | None) -> Element:
    """An element with its children in order.

    The names of attributes are those of HTML, with `_` for `-`, and one behind `class_`; an
    attribute or a child that is None is left out.
    """
    names = {name: name.strip("_").replace("_", "-") for name in attributes}
    made = Element(tag, {names[n]: value for n, value in attributes.items() if value is not None})
    last: Element | None = None
    for child in children:
        if isinstance(child, ET.Element):
            made.append(child)
            last = child
        elif child is not None and last is None:
            made.text = (made.text or "") + child
        elif child is not None and last is not None:
            last.tail = (last.tail or "") + child
    return made


def markup(*elements: Element) -> str:
    """Elements as HTML."""
    return "".join(ET.tostring(e, encoding="unicode", method="html") for e in elements)


def cell(content: Child, label: str = "", kind: str = "", part: float | None = None) -> Element:
    """A cell of a table.

    label: the head of its column, shown beside it where a screen is narrow. kind: its classes.
    part: a share from 0 to 1, drawn as a bar.
    """
    style = None if part is None else f"--part: {min(max(part, 0.0), 1.0):.4f}"
    kinds = f"{kind} bar".strip() if part is not None else kind
    return element("td", content, class_=kinds or None, style=style, data_label=label or None)


def table(
    heads: Sequence[tuple[str, str]], rows: Iterable[Element], kind: str = "", label: str = ""
) -> Element:
    """A table of rows under heads, each a text and its classes."""
    cells = (element("th", text, class_=of or None, scope="col") for text, of in heads)
    head = element("thead", element("tr", *cells))
    return element(
        "table", head, element("tbody", *rows), class_=kind or None, aria_label=label or None
    )
