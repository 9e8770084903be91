"""The container of a native file: safetensors with a checksum, read without believing it.

Nothing here takes work or memory beyond the length of the file: what a header claims is held
against the bytes that are there before anything is made of it.
"""

import json
import math
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rabbet.core.layout import CHECKSUM, STAMP, TYPES, UNSTAMPED, VERSION
from rabbet.errors import FileError
from rabbet.layers.files import MOST, is_count, is_text

FACTS = {"format", "plan", "survey"}
AXES = 64  # that a tensor of torch can have
STAMPED = slice(STAMP, STAMP + len(UNSTAMPED))


@dataclass(frozen=True, slots=True)
class Container:
    """What a file holds: plan and survey as text, every tensor by name, and its length."""

    plan: str
    survey: str
    tensors: dict[str, Tensor]
    bytes: int


def checksum(parts: Iterable[bytes | memoryview]) -> str:
    """Eight digits: the CRC-32 of a file whose own digits are zeros."""
    value = 0
    for part in parts:
        value = zlib.crc32(part, value)
    return f"{value:08x}"


def stamped(parts: Sequence[bytes]) -> list[bytes]:
    """The parts of a file, the header first, with the checksum in its place."""
    header = parts[0][: STAMPED.start] + checksum(parts).encode() + parts[0][STAMPED.stop :]
    return [header, *parts[1:]]


def read_container(path: Path) -> Container:
    """A file, checked for damage; raises FileError, which does not name the file."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 or size > len(data) - 8:
        raise FileError(f"its {len(data):,} bytes end within its header")
    entries = _header(data[8 : 8 + size])
    facts = entries.pop("__metadata__", {})
    if not isinstance(facts, dict) or not all(map(is_text, facts.values())):
        raise FileError("its metadata is not text")
    if facts.get("format") != VERSION:
        raise FileError(f"it is of format {facts.get('format')!r}, this version reads {VERSION!r}")
    _verify(data, facts)
    if strange := sorted(facts.keys() ^ (FACTS | {CHECKSUM} & facts.keys())):
        raise FileError(f"its metadata lacks, or should not have, {', '.join(strange)[:80]}")
    values = memoryview(data)[8 + size :]
    return Container(facts["plan"], facts["survey"], _tensors(entries, values), len(data))


def _header(text: bytes) -> dict[str, Any]:
    try:
        entries = json.loads(text.decode())
    except (ValueError, RecursionError) as e:  # RecursionError: it nests deeply
        raise FileError(f"its header is not JSON: {e}") from None
    if not isinstance(entries, dict):
        raise FileError("its header is not a JSON object")
    return entries


def _verify(data: bytes, facts: dict[str, str]) -> None:
    """Raise FileError unless the bytes are those that were written; older files do not say."""
    told = facts.get(CHECKSUM)
    if told is None:
        return
    if data[STAMPED] != told.encode():
        raise FileError(f"its checksum does not stand at byte {STAMPED.start}")
    whole = memoryview(data)
    own = checksum([whole[: STAMPED.start], UNSTAMPED.encode(), whole[STAMPED.stop :]])
    if own != told:
        raise FileError(
            f"its bytes are not those that were written: their checksum is {own}, the file says "
            f"{told}; take another copy"
        )


def _tensors(entries: dict[str, Any], values: memoryview) -> dict[str, Tensor]:
    """The values by name; they fill the file from end to end without gaps."""
    end, result = 0, {}
    for name, entry in sorted(entries.items(), key=lambda item: _first(*item)):
        dtype, shape, size = _claim(name, entry)
        first, last = entry["data_offsets"]
        if first != end or last != end + size or last > len(values):
            raise FileError(f"the values of {name[:80]!r} do not lie where its header says")
        raw, end = bytearray(values[first:last]), last
        if dtype == "BOOL" and any(part > 1 for part in set(raw)):
            raise FileError(f"{name[:80]!r} is of type BOOL and holds more than 0 and 1")
        flat = (
            torch.frombuffer(raw, dtype=TYPES[dtype]) if raw else torch.empty(0, dtype=TYPES[dtype])
        )
        result[name] = flat.view(shape)
    if end != len(values):
        raise FileError(f"its values end at byte {end:,} of {len(values):,}")
    return result


def _first(name: str, entry: object) -> tuple[int, int]:
    """Where the values of an entry begin and end."""
    try:
        first, last = entry["data_offsets"]  # type: ignore[index]
        if type(first) is type(last) is int:
            return first, last
    except (TypeError, KeyError, ValueError):
        pass
    raise FileError(f"the header does not say where the values of {name[:80]!r} lie")


def _claim(name: str, entry: dict[str, Any]) -> tuple[str, list[int], int]:
    """Type, shape and bytes of an entry, as far as they can be at all."""
    dtype, shape = entry.get("dtype"), entry.get("shape")
    if not is_text(name) or len(entry) != 3:
        raise FileError(f"{name[:80]!r} is no entry of a header")
    if not isinstance(dtype, str) or dtype not in TYPES:
        raise FileError(f"{name[:80]!r} is of none of the types {', '.join(TYPES)}")
    if not isinstance(shape, list) or len(shape) > AXES:
        raise FileError(f"{name[:80]!r} has no shape of at most {AXES} axes")
    if not all(is_count(n, 0) for n in shape) or math.prod(max(n, 1) for n in shape) >= MOST:
        raise FileError(f"{name[:80]!r} has the shape {str(shape)[:80]}, which no tensor has")
    return dtype, shape, math.prod(shape) * TYPES[dtype].itemsize
