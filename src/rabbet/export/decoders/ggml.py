"""Tensors in the types of ggml that hold a grid exactly, as the files of llama.cpp have them.

A type is blocks of 32 or 256 columns with a float16 scale d, some with a float16 minimum m:

    TQ1_0, TQ2_0   d (q - 1), q of 0 .. 2 and 0 .. 3      Q4_1, Q5_1   d q + m, q of 4 and 5 bits
    Q4_0, Q5_0     d (q - 8) and d (q - 16)               Q8_0         d q, q of 8 bits, signed

Nothing is rounded but what is zero by any measure (`DEAD`): a grid of fewer bits lies in a wider
type, and a scale that several blocks share is repeated. Layouts: ggml-common.h and ggml-quants.c of
llama.cpp.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rabbet.grids.grid import Grid, Quantised

Bytes = NDArray[np.uint8]
DEAD = 1e-10  # a block of no larger values, such as the row of padding, becomes zero


@dataclass(frozen=True)
class Type:
    """A type of ggml: codes from `low` to `high` beside a scale, or from a minimum upwards."""

    name: str
    block: int
    bytes: int
    low: int
    high: int
    minimum: bool = False


TYPES = (
    Type("TQ1_0", 256, 54, -1, 1),
    Type("TQ2_0", 256, 66, -1, 2),
    Type("Q4_0", 32, 18, -8, 7),
    Type("Q4_1", 32, 20, 0, 15, minimum=True),
    Type("Q5_0", 32, 22, -16, 15),
    Type("Q5_1", 32, 24, 0, 31, minimum=True),
    Type("Q8_0", 32, 34, -128, 127),
)
"""The shortest first."""


@dataclass(frozen=True)
class Stored:
    """A matrix in a type: uint8 [rows, bytes of a row]."""

    type: str
    content: Bytes


def span(grid: Grid) -> tuple[int, int] | None:
    """The least and the greatest whole number of scales that a grid stands for; None if not whole.

    A half-step code stands for an odd number of half the scale.
    """
    if grid.codebook.uniform is None or grid.codebook.integers is None:
        return None
    gain, offset = grid.codebook.integers
    low, high = gain * grid.low + offset, gain * grid.high + offset
    return (low - gain * grid.high, high - gain * grid.low) if grid.scales.zeros else (low, high)


def fitting(grid: Grid, columns: int) -> list[tuple[Type, bool]]:
    """The types that hold a grid, the shortest first, and whether signs are turned for that."""
    ends, parts = span(grid), grid.scales.parts(columns)
    if ends is None or (parts is None and not grid.scales.single):
        return []
    group, found = grid.scales.part_size(columns), []
    for kind in TYPES:
        whole = columns % kind.block == 0 and (group >= columns or group % kind.block == 0)
        for low, high, turned in ((*ends, False), (-ends[1], -ends[0], True)):
            inside = kind.low <= low and high <= kind.high
            short = kind.minimum and high - low <= kind.high and not grid.scales.zeros
            if whole and (short or (inside and not kind.minimum)):
                found.append((kind, turned))
                break
    return found


def stored(numbers: Quantised) -> Stored | None:
    """A factor [rows, columns] in the shortest type that holds it exactly; None if none does."""
    rows, columns = numbers.codes.shape
    ends = span(numbers.grid)
    for kind, turned in fitting(numbers.grid, columns):
        assert ends is not None
        sign = -1 if turned else 1
        whole, scale = _steps(numbers)
        whole, scale = sign * whole, sign * scale
        base = min(sign * ends[0], sign * ends[1]) if kind.minimum else kind.low
        each = _each(numbers.grid, scale, rows, columns, kind.block)
        most = whole.abs().reshape(rows, -1, kind.block).amax(2) * each.abs()
        each = torch.where(most < DEAD, 0.0, each)
        floats = [each, each * base] if kind.minimum else [each]
        if all(map(_in_half, floats)):
            codes = (whole - base).numpy().astype(np.uint8).reshape(-1, kind.block)
            heads = [h.numpy().astype(np.float16).reshape(-1, 1).view(np.uint8) for h in floats]
            content = PACKED[kind.name](codes, np.concatenate(heads, 1))
            return Stored(kind.name, content.reshape(rows, -1))
    return None


def size(grid: Grid, shape: tuple[int, int]) -> int | None:
    """The bytes of a matrix on a grid; None if no type holds it.

    It may take more where a scale times a minimum is no float16.
    """
    kinds = fitting(grid, shape[1])
    return shape[0] * (shape[1] // kinds[0][0].block) * kinds[0][0].bytes if kinds else None


def _steps(numbers: Quantised) -> tuple[Tensor, Tensor]:
    """Whole numbers of scales, less their zero points, [rows, columns], and these scales."""
    gain, offset = numbers.grid.codebook.integers or (1, 0)
    whole = gain * numbers.codes.detach().cpu() + offset
    if numbers.zero is not None:
        zero = numbers.grid.spread(numbers.zero.detach().cpu(), tuple(whole.shape))
        whole = whole - gain * zero
    return whole, numbers.scale.detach().cpu().float() / gain


def _each(grid: Grid, scale: Tensor, rows: int, columns: int, block: int) -> Tensor:
    """The scale of each block, [rows, blocks]."""
    first = torch.arange(0, columns, block)
    wide = grid.spread(scale, (rows, columns)).expand(rows, columns)
    return wide[:, first].contiguous()


def _in_half(values: Tensor) -> bool:
    """Whether float16 holds some values exactly."""
    return bool(torch.equal(values.half().float(), values))


# Codes from zero on, [blocks, columns of a block], and the floats' bytes in front of them, packed.


def _fours(codes: Bytes, heads: Bytes) -> Bytes:
    half = codes.shape[1] // 2
    nibbles = (codes[:, :half] & 15) | ((codes[:, half:] & 15) << 4)
    return np.concatenate([heads, nibbles], 1)


def _fives(codes: Bytes, heads: Bytes) -> Bytes:
    fifth = np.packbits(codes >> 4, axis=1, bitorder="little")
    return _fours(codes, np.concatenate([heads, fifth], 1))


def _eights(codes: Bytes, heads: Bytes) -> Bytes:
    return np.concatenate([heads, codes ^ 128], 1)  # from 0 on to two's complement


def _twos(codes: Bytes, heads: Bytes) -> Bytes:
    parts = codes.reshape(-1, 2, 4, 32)
    whole = parts[:, :, 0] | parts[:, :, 1] << 2 | parts[:, :, 2] << 4 | parts[:, :, 3] << 6
    return np.concatenate([whole.reshape(len(codes), -1), heads], 1)


def _trits(codes: Bytes, heads: Bytes) -> Bytes:
    """Five digits of base 3 a byte (four in the last four), as a fraction of 256, rounded up."""
    n, powers = len(codes), np.array([81, 27, 9, 3, 1], np.uint16)
    parts = [
        (codes[:, start : start + count * width].reshape(n, count, width), count)
        for start, count, width in ((0, 5, 32), (160, 5, 16), (240, 4, 4))
    ]
    sums = [(p.astype(np.uint16) * powers[:count, None]).sum(1) for p, count in parts]
    whole = (np.concatenate(sums, 1).astype(np.uint16) * 256 + 242) // 243
    return np.concatenate([whole.astype(np.uint8), heads], 1)


PACKED = {
    "TQ1_0": _trits,
    "TQ2_0": _twos,
    "Q4_0": _fours,
    "Q4_1": _fours,
    "Q5_0": _fives,
    "Q5_1": _fives,
    "Q8_0": _eights,
}
