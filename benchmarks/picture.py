"""The picture of docs/figures.md: what ResNet-20 loses at which size, by method.

Written by hand as SVG: few bytes, the same bytes every time, and colours for light and for dark.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]
Read = Callable[..., list[Row]]
WIDTH, HEIGHT = 760, 440
LEFT, RIGHT, TOP, BOTTOM = 64, 500, 46, 384  # of the axes
BYTES = (50_000, 200_000)
DROPS = (0.1, 10.0)  # what loses less or more is drawn at the end
STYLE = """
  .back { fill: #ffffff; } .text { fill: #24292f; } .faint { fill: #57606a; }
  .grid { stroke: #d8dee4; } .axis { stroke: #57606a; }
  .s0 { fill: #0550ae; } .s1 { fill: none; stroke: #0550ae; } .s2 { fill: #b35900; }
  .s3 { fill: #116329; } .s4 { fill: #a40e26; } .s5 { fill: #6639ba; } .s1 { stroke-width: 2; }
  @media (prefers-color-scheme: dark) {
    .back { fill: #0d1117; } .text { fill: #e6edf3; } .faint { fill: #9198a1; }
    .grid { stroke: #30363d; } .axis { stroke: #9198a1; }
    .s0 { fill: #79c0ff; } .s1 { fill: none; stroke: #79c0ff; } .s2 { fill: #ffa657; }
    .s3 { fill: #7ee787; } .s4 { fill: #ff7b72; } .s5 { fill: #d2a8ff; }
  }
"""


@dataclass(frozen=True)
class Series:
    """Points of one kind: (file bytes, points lost), and how they are drawn."""

    name: str
    shape: str
    points: list[tuple[int, float]]


def frontier(read: Read) -> str:
    """The picture, from stored rows."""
    whole = _whole(read)
    return drawn(series(read), whole["accuracy"], whole["file bytes"])


def series(read: Read) -> list[Series]:
    """What is drawn, of ResNet-20 alone."""
    compressed = _resnet20(read)
    both = [r for r in compressed if _is(r, rank="on", tier="default")]
    bits = [r for r in compressed if _is(r, rank="off", tier="default")]
    cora = [r for r in read("cora", "figures") if _is(r, network="resnet20")]
    paper = [r for r in cora if _is(r, method="CoRa, the paper's settings")]
    widths = {"chosen by": "equal widths", "training": "tuned"}
    equal = [r for r in read("cgmq", "resnet20") if _is(r, **widths)]
    admm = read("factorisation", "settings")
    admm = [r for r in admm if _is(r, network="resnet20", rate=2.0, setting="the paper")]
    return [
        Series("rank and bits", "circle", _points(r for r in both if not _limits_macs(r))),
        Series("the same, MACs limited too", "circle", _points(r for r in both if _limits_macs(r))),
        Series("bits only", "square", _points(bits)),
        Series("equal widths, inputs too", "diamond", _points(equal, _whole(read)["accuracy"])),
        Series("CoRa with the paper's settings", "up", _points(paper)),
        Series("ADMM of the paper", "down", _points(admm)),
    ]


def _resnet20(read: Read) -> list[Row]:
    return [r for r in read("frontier", "compressed") if _is(r, network="resnet20")]


def _whole(read: Read) -> Row:
    """What is stored of the float network."""
    found: Row = next(r for r in _resnet20(read) if _is(r, budget="float32"))["values"]
    return found


def _is(row: Row, **settings: Any) -> bool:
    return all(row["settings"].get(k) == v for k, v in settings.items())


def _limits_macs(row: Row) -> bool:
    return "macs" in row["settings"]["budget"]


def _points(rows: Any, whole: float | None = None) -> list[tuple[int, float]]:
    """Bytes and drop of rows; where only the accuracy is stored, `whole` is that of the float."""
    found = []
    for row in rows:
        values = row["values"]
        drop = values.get("drop") if whole is None else round(whole - values["accuracy"], 2)
        if BYTES[0] <= values.get("file bytes", 0) <= BYTES[1] and drop is not None:
            found.append((values["file bytes"], drop))
    return sorted(found)


def _x(size: float) -> float:
    low, high = (math.log(b) for b in BYTES)
    return LEFT + (RIGHT - LEFT) * (math.log(size) - low) / (high - low)


def _y(drop: float) -> float:
    low, high = (math.log(d) for d in DROPS)
    return BOTTOM - (BOTTOM - TOP) * (math.log(min(max(drop, DROPS[0]), DROPS[1])) - low) / (
        high - low
    )


def drawn(all_series: list[Series], accuracy: float, size: int) -> str:
    """The SVG of some series, and what the float network has."""
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        'font-family="system-ui, sans-serif" font-size="13">',
        "<title>ResNet-20 on CIFAR-10: points of accuracy lost against bytes of the file</title>",
        f"<style>{STYLE}</style>",
        f'<rect class="back" width="{WIDTH}" height="{HEIGHT}" rx="6"/>',
        *_axes(accuracy, size),
    ]
    for k, each in enumerate(all_series):
        marks = [_mark(each.shape, _x(size), _y(drop), f"{each.name}: {size:,} bytes, {drop:.2f}")
                 for size, drop in each.points]  # fmt: skip
        height = TOP + 14 + 26 * k
        marks.append(_mark(each.shape, RIGHT + 26, height - 4))
        lines += [f'<g class="s{k}">', *marks, "</g>"]
        lines.append(f'<text class="text" x="{RIGHT + 40}" y="{height}">{each.name}</text>')
    return "\n".join([*lines, "</svg>", ""])


def _axes(accuracy: float, whole: int) -> list[str]:
    lines = []
    for size in (50, 70, 100, 140, 200):
        x = f"{_x(1000 * size):.1f}"
        lines.append(f'<path class="grid" d="M{x} {TOP}V{BOTTOM}"/>')
        lines.append(
            f'<text class="faint" x="{x}" y="{BOTTOM + 18}" text-anchor="middle">{size}</text>'
        )
    for drop in (0.1, 0.2, 0.5, 1, 2, 5, 10):
        y = _y(drop)
        lines.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{RIGHT}"/>')
        lines.append(
            f'<text class="faint" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{drop}</text>'
        )
    lines.append(f'<path class="axis" fill="none" d="M{LEFT} {TOP}V{BOTTOM}H{RIGHT}"/>')
    middle = (LEFT + RIGHT) // 2
    lines.append(
        f'<text class="text" x="{middle}" y="{BOTTOM + 40}" text-anchor="middle">'
        f"kilobytes of the file (float32: {whole / 1000:,.0f})</text>"
    )
    lines.append(
        f'<text class="text" x="{LEFT - 48}" y="{TOP - 20}">'
        f"points of accuracy lost, of {accuracy:.2f}; lower is better</text>"
    )
    return lines


def _mark(shape: str, x: float, y: float, title: str = "") -> str:
    inner = f"<title>{title}</title>" if title else ""
    if shape == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5">{inner}</circle>'
    corners = {
        "square": ((-4.5, -4.5), (4.5, -4.5), (4.5, 4.5), (-4.5, 4.5)),
        "diamond": ((0, -6.5), (6.5, 0), (0, 6.5), (-6.5, 0)),
        "up": ((0, -6), (6, 5), (-6, 5)),
        "down": ((0, 6), (6, -5), (-6, -5)),
    }[shape]
    points = " ".join(f"{x + a:.1f},{y + b:.1f}" for a, b in corners)
    return f'<polygon points="{points}">{inner}</polygon>'
