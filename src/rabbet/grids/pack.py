"""Small integers in as few bytes as they need.

A code of `levels = 2**b` values takes b bits, least significant bit first, in one stream without
gaps. Three levels take a fifth of a byte: five ternary digits, least significant first, are a
number below 243.
"""

from functools import partial

import numpy as np
import torch
from torch import Tensor

_TRITS = torch.tensor([1, 3, 9, 27, 81], dtype=torch.uint8)
_PART = 40 * 2**14  # codes packed at once: of any width they fill whole bytes


def packed_bytes(count: int, levels: int) -> int:
    """Bytes that `count` codes of `levels` values take."""
    if levels == 3:
        return -(-count // 5)
    return -(-count * _bits(levels) // 8)


def pack(codes: Tensor, levels: int) -> Tensor:
    """Integers in [0, levels) of any shape, packed in row-major order into uint8 [packed_bytes].

    Raises ValueError for a code outside [0, levels) or a number of levels other than 3 or a power
    of two up to 256.
    """
    flat = codes.reshape(-1)
    if flat.numel() and (int(flat.min()) < 0 or int(flat.max()) >= levels):
        raise ValueError(
            f"codes must lie in [0, {levels}), found [{int(flat.min())}, {int(flat.max())}]"
        )
    write = _trits if levels == 3 else partial(_written, bits=_bits(levels))
    parts = [write(part.to(torch.uint8)) for part in flat.split(_PART)]
    return torch.cat(parts)


def _trits(codes: Tensor) -> Tensor:
    spare = codes.new_zeros(-len(codes) % 5)
    digits = torch.cat([codes, spare]).view(-1, 5)
    return (digits * _TRITS).sum(1, dtype=torch.uint8)


def _written(codes: Tensor, bits: int) -> Tensor:
    stream = (codes[:, None] >> torch.arange(bits, dtype=torch.uint8)) & 1  # [n, bits]
    return torch.from_numpy(np.packbits(stream.numpy(), bitorder="little"))


def unpack(packed: Tensor, levels: int, count: int) -> Tensor:
    """The `count` codes that `pack` wrote, int64 [count].

    Raises ValueError if the number of bytes is not the one that `count` codes take, if a byte is
    not five ternary digits, or if what is left over in the last byte is not zero.
    """
    if packed.numel() != packed_bytes(count, levels):
        raise ValueError(
            f"{count} codes of {levels} levels take {packed_bytes(count, levels)} bytes, "
            f"found {packed.numel()}"
        )
    flat, result = packed.reshape(-1), torch.empty(count, dtype=torch.int64)
    if levels == 3 and flat.numel() and int(flat.max()) >= 3**5:
        raise ValueError(f"five ternary digits are a number below 243, found {int(flat.max())}")
    size = packed_bytes(_PART, levels)
    for part, place in zip(flat.split(size), result.split(_PART), strict=True):
        if levels == 3:
            digits = (part[:, None] // _TRITS) % 3
            place.copy_(_without_spare(digits.reshape(-1), len(place)))
            continue
        bits = _bits(levels)
        stream = torch.from_numpy(np.unpackbits(part.numpy(), bitorder="little"))
        codes = _without_spare(stream, len(place) * bits).view(-1, bits)
        place.copy_((codes << torch.arange(bits, dtype=torch.uint8)).sum(1, dtype=torch.uint8))
    return result


def _without_spare(parts: Tensor, count: int) -> Tensor:
    """The first parts; raises ValueError if those behind them, which fill a byte, are not zero."""
    if bool(parts[count:].any()):
        raise ValueError("there is something behind the last code")
    return parts[:count]


def _bits(levels: int) -> int:
    bits = levels.bit_length() - 1
    if levels != 2**bits or not 1 <= bits <= 8:
        raise ValueError(f"codes have 3 or 2, 4, 8 ... 256 levels, asked for {levels}")
    return bits
