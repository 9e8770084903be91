"""The picture of docs/figures.md that stands beside the table of other tools.

Points of ResNet-20 lost against bytes, by tool; the larger a point, the longer one image takes
against float in the same runtime, and a ring is a simulation, which has no such time.
"""

import math

from picture import Read, Row

WIDTH, HEIGHT = 760, 440
LEFT, RIGHT, TOP, BOTTOM = 64, 520, 46, 384  # of the axes
BYTES = (60_000, 600_000)
DROPS = (0.1, 20.0)  # what loses less or more is drawn at the end
TOOLS = {
    "rabbet": "rabbet", "onnxruntime": "onnxruntime", "nncf": "NNCF", "brevitas": "Brevitas",
    "mct": "Sony MCT", "aimet": "AIMET", "neural_compressor": "Neural Compressor",
    "torchao": "torchao", "ai_edge": "ai-edge-quantizer", "qdrop": "BRECQ, QDrop (ours)",
}  # fmt: skip
LIGHT = ("0550ae", "b35900", "116329", "a40e26", "6639ba", "1b7c83", "7d4e00", "bf3989", "57606a",
         "24292f")  # fmt: skip
DARK = ("79c0ff", "ffa657", "7ee787", "ff7b72", "d2a8ff", "76e3ea", "e3b341", "ff9bce", "9198a1",
        "e6edf3")  # fmt: skip


def points(read: Read) -> list[tuple[str, str, int, float, float | None]]:
    """What is drawn: tool, title, bytes, points lost, and latency against float if there is one."""
    found = []
    for row in read("peers", "peers"):
        settings, values = row["settings"], row["values"]
        size, drop = values.get("bytes") or values.get("packed"), values.get("drop")
        if settings["network"] == "resnet20" and settings["peer"] in TOOLS and drop is not None:
            name = TOOLS[settings["peer"]]
            title = f"{name}, {settings['method']}, {settings['bits']} bits, {settings['file']}"
            title = f"{title}: {size:,} bytes, {drop:.2f}"
            found.append((settings["peer"], title, size, drop, values.get("latency")))
    return found


def drawn(read: Read) -> str:
    """The SVG."""
    whole = next(r for r in read("peers", "peers") if _whole(r))["values"]
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        'font-family="system-ui, sans-serif" font-size="13">',
        "<title>ResNet-20 on CIFAR-10: points of accuracy lost against bytes, by tool</title>",
        f"<style>{_style()}</style>",
        f'<rect class="back" width="{WIDTH}" height="{HEIGHT}" rx="6"/>',
        *_axes(whole),
    ]
    met = points(read)
    known = [tool for tool in TOOLS if any(p[0] == tool for p in met)]
    for k, tool in enumerate(known):
        height = TOP + 14 + 26 * k
        marks = [_mark(*p[1:]) for p in met if p[0] == tool]
        marks.append(f'<circle cx="{RIGHT + 26}" cy="{height - 4}" r="5"/>')
        lines += [f'<g class="p{list(TOOLS).index(tool)}">', *marks, "</g>"]
        text = f'<text class="text" x="{RIGHT + 40}" y="{height}">{TOOLS[tool]}</text>'
        lines.append(text)
    return "\n".join([*lines, "</svg>", ""])


def _whole(row: Row) -> bool:
    settings = row["settings"]
    return bool(settings["network"] == "resnet20" and settings["peer"] == "float32")


def _style() -> str:
    def colours(chosen: tuple[str, ...]) -> str:
        return " ".join(f".p{k} {{ fill: #{c}; stroke: #{c}; }}" for k, c in enumerate(chosen))

    light = (
        ".back { fill: #ffffff; } .text { fill: #24292f; } .faint { fill: #57606a; } "
        ".grid { stroke: #d8dee4; } .axis { stroke: #57606a; } circle { fill-opacity: 0.7; } "
        ".ring { fill-opacity: 0; stroke-width: 2; }"
    )
    dark = (
        ".back { fill: #0d1117; } .text { fill: #e6edf3; } .faint { fill: #9198a1; } "
        ".grid { stroke: #30363d; } .axis { stroke: #9198a1; }"
    )
    night = f"@media (prefers-color-scheme: dark) {{ {dark} {colours(DARK)} }}"
    return f"{light} {colours(LIGHT)} {night}"


def _place(value: float, ends: tuple[float, float], low: int, high: int) -> float:
    """Where a value stands between two ends, on a logarithmic axis."""
    value = min(max(value, ends[0]), ends[1])
    share = math.log(value / ends[0]) / math.log(ends[1] / ends[0])
    return low + (high - low) * share


def _mark(title: str, size: int, drop: float, latency: float | None) -> str:
    x, y = _place(size, BYTES, LEFT, RIGHT), _place(drop, DROPS, BOTTOM, TOP)
    radius = 4.0 if latency is None else 2 + 4 * min(latency, 4) ** 0.5
    ring = ' class="ring"' if latency is None else ""
    return (
        f'<circle{ring} cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}"><title>{title}</title></circle>'
    )


def _axes(whole: Row) -> list[str]:
    lines = []
    for size in (60, 100, 150, 200, 300, 400, 600):
        x = f"{_place(1000 * size, BYTES, LEFT, RIGHT):.1f}"
        lines.append(f'<path class="grid" d="M{x} {TOP}V{BOTTOM}"/>')
        text = f'<text class="faint" x="{x}" y="{BOTTOM + 18}" text-anchor="middle">{size}</text>'
        lines.append(text)
    for drop in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20):
        y = _place(drop, DROPS, BOTTOM, TOP)
        lines.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{RIGHT}"/>')
        text = f'<text class="faint" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{drop}</text>'
        lines.append(text)
    lines.append(f'<path class="axis" fill="none" d="M{LEFT} {TOP}V{BOTTOM}H{RIGHT}"/>')
    lines.append(
        f'<text class="text" x="{(LEFT + RIGHT) // 2}" y="{BOTTOM + 40}" text-anchor="middle">'
        f"kilobytes (float32: {whole['bytes'] / 1000:,.0f})</text>"
    )
    lines.append(
        f'<text class="text" x="{LEFT - 48}" y="{TOP - 20}">'
        f"points of accuracy lost, of {whole['accuracy']:.2f}; lower is better</text>"
    )
    return lines
