"""Read a native file with numpy alone, step by step as docs/format.md says: neither torch nor rabbet is needed.

python examples/read_format.py build/digits.safetensors
"""

import json
import math
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

TYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I16": "<i2"}
TYPES |= {"I8": "i1", "U8": "u1", "BOOL": "?"}
Take = Callable[[str, int], np.ndarray]


def read(path: Path) -> Iterator[tuple[str, str, np.ndarray, np.ndarray, list[tuple[float, int]]]]:
    """Name, line, weight, bias (empty: none) and (scale, zero point) of the inputs of every layer of the plan."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    entries = json.loads(data[8:start])
    facts = entries.pop("__metadata__")
    assert facts["format"] == "rabbet/1", f"of another format: {facts['format']}"
    arrays = {}
    for name, e in entries.items():
        first, last = (start + offset for offset in e["data_offsets"])
        arrays[name] = np.frombuffer(data[first:last], TYPES[e["dtype"]]).reshape(e["shape"])
    used = dict.fromkeys(arrays, 0)

    def take(array: str, count: int) -> np.ndarray:
        used[array] += count
        return arrays[array][used[array] - count : used[array]]

    sites = {site[0]: site for site in json.loads(facts["survey"])["sites"]}
    for line in facts["plan"].split("\n"):
        name, end = json.JSONDecoder().raw_decode(line) if line[0] == '"' else (line.split(" ")[0], line.index(" "))
        _, _, shape, _, _, other = sites[name]
        terms, _, act = line[end + 1 :].partition(" | act@")
        weight, gaps = np.zeros(shape, np.float32), 0
        for form, rank, grid in re.findall(r"([a-z]+)(?:\[(\d+)\])?@(\w+)", terms):
            r = int(rank or 0)
            q = -(-r * shape[0] // shape[1])
            rule, sizes = {
                "dense": ("...->...", [shape]),
                "lowrank": ("r...,or->o...", [(r, *shape[1:]), (shape[0], r)]),
                "cp": ("ri,r...,or->oi...", [(r, shape[1]), (r, *shape[2:]), (shape[0], r)]),
                "tucker": ("ri,qr...,oq->oi...", [(r, shape[1]), (q, r, *shape[2:]), (shape[0], q)]),
            }[form]
            weight = weight + np.einsum(rule, *(factor(size, grid, take) for size in sizes))
            gaps += len(sizes) - 1
        bias = take("rabbet.biases", shape[0]) if other.get("bias", True) else np.zeros(0, np.float32)
        count = 1 + gaps if act else 0
        scales, zeros = (take(f"rabbet.act_{part}", count) if act else [] for part in ("scales", "zeros"))
        yield name, line[end + 1 :], weight, bias, list(zip(map(float, scales), map(int, zeros), strict=True))
    assert all(used[n] == arrays[n].size for n in arrays if n.startswith("rabbet.")), "an array is too long"


def factor(shape: tuple[int, ...], grid: str, take: Take) -> np.ndarray:
    """One small tensor: its codes times its scales."""
    ternary, unsigned, bits, half, sliced, axis = re.fullmatch(r"(?:(t)|(u?)(\d)(h?))(c(\d*))?", grid).groups()
    count = math.prod(shape)
    if ternary:
        packed = take("rabbet.codes", -(-count // 5)).astype(int)
        codes = (packed[:, None] // [1, 3, 9, 27, 81] % 3).reshape(-1)[:count] - 1.0
    else:
        width = int(bits)
        packed = take("rabbet.codes", -(-count * width // 8))
        stream = np.unpackbits(packed, bitorder="little")[: count * width].reshape(count, width)
        codes = stream @ (1 << np.arange(width)) - (0.0 if unsigned else 2.0 ** (width - 1))
        codes += 0.5 if half or width == 1 else 0.0
    along = int(axis or 0) if sliced else None
    scale = take("rabbet.scales", 1 if along is None else shape[along])  # the upper half of a float32
    scale = (scale.astype(np.uint32) << 16).view(np.float32)
    return codes.reshape(shape).astype(np.float32) * scale.reshape([-1 if k == along else 1 for k in range(len(shape))])


if __name__ == "__main__":
    for name, line, weight, bias, acts in read(Path(sys.argv[1] if len(sys.argv) > 1 else "build/digits.safetensors")):
        print(f"{name or '(root)'}: {line}: {list(weight.shape)} in [{weight.min():.3f}, {weight.max():.3f}]", end="")
        print(f", {len(bias)} biases, inputs {', '.join(f'{s:.4g} * (code - {z})' for s, z in acts) or 'float'}")
