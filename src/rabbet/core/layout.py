"""What the native file holds for a plan: every array, its type and its length.

All of it is known before any number is. The writer and the cost both read this, so predicted and
written bytes cannot disagree. docs/format.md is the specification; the numbers of all layers lie in
five arrays, because one header entry per tensor would outweigh the scales.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from rabbet.core.plan import LayerPlan, Plan, Term
from rabbet.core.survey import Survey
from rabbet.grids.grid import Grid
from rabbet.layers import Site

VERSION = "rabbet/1"
FINISHED = 8  # bits of the weight that a runtime is given in place of cores
BETWEEN = 8  # bits of the activations between two factors
RESERVED = "rabbet."
CHECKSUM = "crc32"  # what the metadata calls the checksum
UNSTAMPED = "00000000"  # in its place while it is computed
STAMP = 8 + len('{"__metadata__":{"crc32":"')  # where its digits begin
TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
"""The types that a file can hold, by the names that safetensors gives them."""
TYPE_NAMES = {kind: name for name, kind in TYPES.items()}


@dataclass(frozen=True, slots=True)
class Rest:
    """A tensor that the file holds uncompressed: its name, safetensors type and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Bytes of its values."""
        count = 1
        for n in self.shape:
            count *= n
        return count * TYPES[self.dtype].itemsize


@dataclass(frozen=True, slots=True)
class Lengths:
    """Entries that a layer, or a network, puts into the five arrays."""

    codes: int = 0
    scales: int = 0
    zeros: int = 0
    biases: int = 0
    acts: int = 0

    def __add__(self, other: "Lengths") -> "Lengths":
        return Lengths(
            self.codes + other.codes,
            self.scales + other.scales,
            self.zeros + other.zeros,
            self.biases + other.biases,
            self.acts + other.acts,
        )

    @property
    def bytes(self) -> int:
        """Bytes of the values.

        Codes are uint8, scales bfloat16, biases float32, input scales float32, zero points uint8.
        """
        return self.codes + self.zeros + 2 * self.scales + 4 * self.biases + 5 * self.acts


def factor_shapes(site: Site, term: Term) -> tuple[tuple[int, ...], ...]:
    """Shapes of the factors of a term on a site."""
    return term.form.shapes(site)


def factor_lengths(shape: tuple[int, ...], grid: Grid) -> Lengths:
    """Codes and zero points, packed in whole bytes each, and scales of one factor."""
    scales = grid.scale_shape(shape)[0]
    zeros = grid.codebook.packed_bytes(scales) if grid.scales.zeros else 0
    return Lengths(grid.codebook.packed_bytes(math.prod(shape)), scales, zeros)


def term_lengths(site: Site, term: Term) -> Lengths:
    """Codes (packed, each factor in whole bytes) and scales of a term."""
    total = Lengths()
    for shape in factor_shapes(site, term):
        total += factor_lengths(shape, term.grid)
    return total


def act_bits(site: Site, layer: LayerPlan) -> list[int]:
    """Bits of the quantised activations: the input, then each tensor between two factors of a term.

    Between factors it is 8 bits whatever the input has: no plan chose that tensor to be coarse, and
    an integer runtime has it on 8 bits. For an adapter it never exists, as its product is added to
    the weight beside it.
    """
    if layer.act is None:
        return []
    return [layer.act, *[BETWEEN] * sum(t.form.gaps(site) for t in layer.terms)]


def layer_lengths(site: Site, layer: LayerPlan) -> Lengths:
    """Everything that a compressed layer puts into the arrays."""
    total = Lengths(biases=site.shape[0] if site.bias else 0, acts=len(act_bits(site, layer)))
    for term in layer.terms:
        total += term_lengths(site, term)
    return total


def lengths(survey: Survey, plan: Plan) -> Lengths:
    """Everything that a plan puts into the arrays."""
    total = Lengths()
    for layer in plan:
        total += layer_lengths(survey[layer.name], layer)
    return total


ARRAYS: dict[str, tuple[str, tuple[str, ...]]] = {
    "rabbet.biases": ("F32", ("biases",)),
    "rabbet.act_scales": ("F32", ("acts",)),
    "rabbet.scales": ("BF16", ("scales",)),
    "rabbet.act_zeros": ("U8", ("acts",)),
    "rabbet.codes": ("U8", ("codes", "zeros")),
}
"""The arrays in the order of the file: their type, and the fields of `Lengths` that fill them."""


def arrays(total: Lengths) -> Iterator[tuple[str, str, int]]:
    """Name, type and length of the arrays in the order of the file; empty ones are not stored."""
    for name, (dtype, parts) in ARRAYS.items():
        count = sum(getattr(total, part) for part in parts)
        if count:
            yield name, dtype, count


def placed(total: Lengths, rest: tuple[Rest, ...]) -> list[tuple[str, str, list[int], int]]:
    """Name, type, shape and bytes of every entry, in the order of the file.

    Wide types come first, so that every value is aligned.
    """
    whole = [(r.name, r.dtype, list(r.shape), r.bytes) for r in sorted(rest, key=lambda r: r.name)]
    packed = [(name, dtype, [n], n * TYPES[dtype].itemsize) for name, dtype, n in arrays(total)]
    return sorted([*whole, *packed], key=lambda entry: -TYPES[entry[1]].itemsize)


def header_text(survey: Survey, plan: Plan, rest: tuple[Rest, ...], total: Lengths) -> str:
    """The JSON of the header, not padded; the checksum is zeros, which the writer replaces.

    total: what the arrays hold, which need not be what the plan puts into them.
    """
    facts = {
        CHECKSUM: UNSTAMPED,  # first, so that its digits stand at the same place in every file
        "format": VERSION,
        "plan": plan.compact,
        "survey": survey.to_json(),
    }
    entries: dict[str, object] = {"__metadata__": facts}
    offset = 0
    for name, dtype, shape, size in placed(total, rest):
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    return json.dumps(entries, separators=(",", ":"), ensure_ascii=True)


def header(survey: Survey, plan: Plan, rest: tuple[Rest, ...]) -> bytes:
    """The file up to its first value, with zeros for its checksum.

    It is the header's length as uint64, then JSON padded with spaces to 8 bytes. rest: tensors
    kept uncompressed.
    """
    text = header_text(survey, plan, rest, lengths(survey, plan)).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def file_bytes(survey: Survey, plan: Plan, rest: tuple[Rest, ...]) -> int:
    """The exact length of the file."""
    values = sum(r.bytes for r in rest) + lengths(survey, plan).bytes
    return len(header(survey, plan, rest)) + values


def line_bytes(layer: LayerPlan) -> int:
    """Header bytes that a line of the plan takes: its JSON text and the escaped end of line."""
    return len(json.dumps(str(layer))) - 2 + 2
