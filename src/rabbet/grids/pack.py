"""Small integers in as few bytes as they need.

A code of `levels = 2**b` values takes b bits, least significant bit first, in one stream without
gaps. Three levels take a fifth of a byte: five ternary digits, least significant first, are a
number below 243.
"""

import torch
from torch import Tensor

_TRITS = torch.tensor([1, 3, 9, 27, 81])


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
    flat = codes.reshape(-1).to(torch.int64)
    if flat.numel() and (int(flat.min()) < 0 or int(flat.max()) >= levels):
        raise ValueError(
            f"codes must lie in [0, {levels}), found [{int(flat.min())}, {int(flat.max())}]"
        )
    if levels == 3:
        digits = torch.zeros(-(-len(flat) // 5) * 5, dtype=torch.int64)
        digits[: len(flat)] = flat
        return (digits.view(-1, 5) * _TRITS).sum(1).to(torch.uint8)
    bits = _bits(levels)
    stream = (flat[:, None] >> torch.arange(bits)) & 1  # [n, bits]
    padded = torch.zeros(packed_bytes(len(flat), levels) * 8, dtype=torch.int64)
    padded[: stream.numel()] = stream.reshape(-1)
    return (padded.view(-1, 8) << torch.arange(8)).sum(1).to(torch.uint8)


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
    wide = packed.reshape(-1).to(torch.int64)
    if levels == 3:
        if wide.numel() and int(wide.max()) >= 3**5:
            raise ValueError(f"five ternary digits are a number below 243, found {int(wide.max())}")
        digits = ((wide[:, None] // _TRITS) % 3).reshape(-1)
        return _without_spare(digits, count)
    bits = _bits(levels)
    stream = ((wide[:, None] >> torch.arange(8)) & 1).reshape(-1)
    stream = _without_spare(stream, count * bits)
    return (stream.view(-1, bits) << torch.arange(bits)).sum(1)


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
