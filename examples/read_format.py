"""Read a native file with numpy, step by step as in docs/format.md, without torch or rabbet.

python examples/read_format.py build/digits.safetensors
"""

import json
import math
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

TYPES = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
}
TYPES |= {"I8": "i1", "U8": "u1", "BOOL": "?"}
FLOATS = {"f32": "<f4", "f16": "<f2", "bf16": "<u2"}
Take = Callable[[str, int], np.ndarray]
Core = Callable[[tuple[int, ...]], np.ndarray]
Digits = list[list[int]]


def read(path: Path) -> Iterator[tuple[str, str, np.ndarray, np.ndarray, list[tuple[float, int]]]]:
    """For every layer of the plan: name, line, weight, bias (empty: none), ranges of its inputs.

    A range is (scale, zero point).
    """
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    entries = json.loads(data[8:start])
    facts = entries.pop("__metadata__")
    assert facts["format"] == "rabbet/1", f"of another format: {facts['format']}"
    if "crc32" in facts:  # older files have none
        own = f"{zlib.crc32(data[:34] + b'00000000' + data[42:]):08x}"
        assert data[34:42].decode() == facts["crc32"] == own, "damaged: its checksum is another"
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
        name, end = (
            json.JSONDecoder().raw_decode(line)
            if line[0] == '"'
            else (line.split(" ")[0], line.index(" "))
        )
        _, _, shape, _, _, other = sites[name]
        terms, _, act = line[end + 1 :].partition(" | act@")
        weight, gaps = np.zeros(shape, np.float32), 0
        for form, inside, grid in re.findall(r"([a-z]+)(?:\[([\d:x,-]+)\])?@(\w+)", terms):
            if form == "dense":
                own = rows(inside) if inside else slice(None)
                weight[own] += factor(weight[own].shape, grid, take)
                continue
            rank, _, digits = inside.partition(":")
            r = int(rank)
            if form in ("tt", "ttm"):
                own = (
                    [[int(n) for n in part.split("x")] for part in digits.split(":")]
                    if digits
                    else None
                )
                weight = weight + (table if form == "ttm" else train)(
                    r, own, shape, lambda size, g=grid: factor(size, g, take)
                )
                gaps += form == "tt"
                continue
            if form == "ttconv":
                own, count = convs(r, shape, lambda size, g=grid: factor(size, g, take))
                weight, gaps = weight + own, gaps + count - 1
                continue
            q = -(-r * shape[0] // shape[1])
            rule, sizes = {
                "lowrank": ("r...,or->o...", [(r, *shape[1:]), (shape[0], r)]),
                "cp": ("ri,r...,or->oi...", [(r, shape[1]), (r, *shape[2:]), (shape[0], r)]),
                "tucker": (
                    "ri,qr...,oq->oi...",
                    [(r, shape[1]), (q, r, *shape[2:]), (shape[0], q)],
                ),
            }[form]
            weight = weight + np.einsum(rule, *(factor(size, grid, take) for size in sizes))
            gaps += len(sizes) - 1
        bias = (
            take("rabbet.biases", shape[0]) if other.get("bias", True) else np.zeros(0, np.float32)
        )
        count = 1 + gaps if act else 0
        scales, zeros = (
            take(f"rabbet.act_{part}", count) if act else [] for part in ("scales", "zeros")
        )
        yield (
            name,
            line[end + 1 :],
            weight,
            bias,
            list(zip(map(float, scales), map(int, zeros), strict=True)),
        )
    assert all(used[n] == arrays[n].size for n in arrays if n.startswith("rabbet.")), (
        "an array is too long"
    )


def rows(text: str) -> list[int]:
    """The outputs of a dense term, from text such as 0-5,9."""
    ends = [part.partition("-") for part in text.split(",")]
    return [k for first, _, last in ends for k in range(int(first), int(last or first) + 1)]


def convs(rank: int, shape: list[int], core: Core) -> tuple[np.ndarray, int]:
    """The kernel that a tensor train of convs stands for, and how many factors it has."""
    out, channels, *kernel = shape
    axes = [k for k, n in enumerate(kernel) if n > 1]
    sizes = [channels, *(kernel[k] for k in axes), out]
    bonds = [min(rank, math.prod(sizes[:k]), math.prod(sizes[k:])) for k in range(1, len(sizes))]
    tensor = core((bonds[0], channels)).T  # [in, ..., bond]
    for k, a, b in zip(axes, bonds, bonds[1:], strict=False):
        own = core((b, a, *(n if j == k else 1 for j, n in enumerate(kernel))))
        tensor = np.tensordot(tensor, own.reshape(b, a, -1), ([-1], [1])).swapaxes(-1, -2)
    last = core((out, bonds[-1]))
    return np.tensordot(last, tensor, ([1], [-1])).reshape(shape), len(axes) + 2


def train(rank: int, digits: Digits | None, shape: list[int], core: Core) -> np.ndarray:
    """The weight that a tensor train stands for."""
    n = math.prod(shape[1:])
    ins, outs = digits or (factors(n, 3), factors(shape[0], 3)[::-1])
    most = math.inf if rank == min(n, shape[0]) else rank
    a = chain(rank, [(d,) for d in ins[::-1]], most, core)  # [rank, last digit, ..., first digit]
    b = chain(rank, [(d,) for d in outs], most, core)
    a = a.transpose(0, *range(len(ins), 0, -1)).reshape(rank, n)
    return (b.reshape(rank, -1).T @ a).reshape(shape)


def table(rank: int, digits: Digits | None, shape: list[int], core: Core) -> np.ndarray:
    """The table that a tensor-train matrix stands for."""
    if digits is None:
        rows, left = [], shape[0]
        for k in range(4, 0, -1):
            rows.append(next(n for n in range(1, left + 1) if n**k >= left))
            left = -(-left // rows[-1])
        columns = factors(shape[1], 4)
        digits = sorted(rows, reverse=True), [*columns, *[1] * (4 - len(columns))][::-1]
    pairs, m = list(zip(*digits, strict=True)), len(digits[0]) // 2
    most = (
        math.inf
        if rank == min(math.prod(r * c for r, c in part) for part in (pairs[:m], pairs[m:]))
        else rank
    )
    a, b = chain(rank, pairs[:m][::-1], most, core), chain(rank, pairs[m:], most, core)
    a = a.transpose(0, *range(2 * m - 1, 0, -2), *range(2 * m, 0, -2)).reshape(
        rank, math.prod(digits[0][:m]), -1
    )
    b = b.transpose(0, *range(1, b.ndim, 2), *range(2, b.ndim, 2)).reshape(
        rank, math.prod(digits[0][m:]), -1
    )
    return np.einsum("ruc,rld->ulcd", a, b).reshape(-1, shape[1])[: shape[0]]


def chain(rank: int, digits: list[tuple[int, ...]], most: float, core: Core) -> np.ndarray:
    """A contracted chain of cores, [rank, *digits], from the middle outwards."""
    tensor, a = np.eye(rank, dtype=np.float32), rank
    for k, d in enumerate(digits):
        to_come = math.prod(math.prod(later) for later in digits[k + 1 :])
        b = int(min(a * math.prod(d), to_come, most)) if k + 1 < len(digits) else 1
        tensor, a = np.tensordot(tensor, core((a, *d, b)), 1), b
    return tensor[..., 0]


def factors(size: int, count: int) -> list[int]:
    """The factors of a number with the least sum, at most `count` of them, in falling order."""
    best = [size]
    for n in range(2, math.isqrt(size) + 1) if count > 1 else ():
        if size % n == 0:
            best = min(
                best,
                sorted([n, *factors(size // n, count - 1)], reverse=True),
                key=lambda f: (sum(f), len(f), f),
            )
    return best


def factor(shape: tuple[int, ...], grid: str, take: Take) -> np.ndarray:
    """One small tensor: its codes, minus zero points if there are any, times its scales."""
    if grid in FLOATS:
        numbers = floats(math.prod(shape), grid, take).reshape(shape)
        return numbers * (take("rabbet.scales", 1).astype(np.uint32) << 16).view(np.float32)
    match = re.fullmatch(r"(t|(u?)(\d)(h?))(?:(c)(\d*)|g(\d+)(z?))?", grid)
    body, unsigned, bits, half, sliced, axis, size, zeros = match.groups()
    codes = integers(math.prod(shape), body, bits, take) - (1.0 if body == "t" else 0.0)
    lowest = 0.0 if unsigned or body == "t" else 2.0 ** (int(bits) - 1)
    shift = 0.5 if half or body == "1" else 0.0
    columns = math.prod(shape[1:])
    groups = -(-columns // int(size)) if size else 0
    count = shape[0] * groups if size else shape[int(axis or 0)] if sliced else 1
    zero = integers(count, body, bits, take) - lowest if zeros else np.zeros(count)
    zero = zero - (1.0 if zeros and body == "t" else 0.0)
    scale = take("rabbet.scales", count).astype(np.uint32) << 16  # the upper half of a float32
    scale = scale.view(np.float32)
    if size:
        place = np.arange(shape[0])[:, None] * groups + np.arange(columns) // int(size)
        scale, zero = scale[place].reshape(shape), zero[place].reshape(shape)
    else:
        along = int(axis or 0) if sliced else None
        wide = [-1 if k == along else 1 for k in range(len(shape))]
        scale, zero = scale.reshape(wide), zero.reshape(wide)
    values = (codes - lowest).reshape(shape) + shift - zero
    return values.astype(np.float32) * scale


def floats(count: int, grid: str, take: Take) -> np.ndarray:
    """The next floats, as float32."""
    numbers = take("rabbet.codes", count * int(grid[-2:]) // 8).view(FLOATS[grid])
    if grid == "bf16":  # the upper half of a float32
        return (numbers.astype(np.uint32) << 16).view(np.float32)
    return numbers.astype(np.float32)


def integers(count: int, body: str, bits: str | None, take: Take) -> np.ndarray:
    """The next packed integers, counted from the smallest code."""
    if body == "t":
        packed = take("rabbet.codes", -(-count // 5)).astype(int)
        return (packed[:, None] // [1, 3, 9, 27, 81] % 3).reshape(-1)[:count]
    width = int(bits or 0)
    packed = take("rabbet.codes", -(-count * width // 8))
    stream = np.unpackbits(packed, bitorder="little")[: count * width].reshape(count, width)
    return stream @ (1 << np.arange(width))


if __name__ == "__main__":
    for name, line, weight, bias, acts in read(
        Path(sys.argv[1] if len(sys.argv) > 1 else "build/digits.safetensors")
    ):
        print(
            f"{name or '(root)'}: {line}: {list(weight.shape)} "
            f"in [{weight.min():.3f}, {weight.max():.3f}]",
            end="",
        )
        print(
            f", {len(bias)} biases, inputs "
            f"{', '.join(f'{s:.4g} * (code - {z})' for s, z in acts) or 'float'}"
        )
