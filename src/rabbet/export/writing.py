"""The native file written, whole or layer by layer; docs/format.md specifies it."""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from rabbet.core.layout import (
    TYPES,
    Rest,
    arrays,
    file_bytes,
    header,
    lengths,
    placed,
)
from rabbet.core.plan import Plan
from rabbet.core.survey import Survey
from rabbet.errors import FileError, PlanError
from rabbet.export.base import Parcel, Written
from rabbet.export.container import STAMPED, checksum, stamped
from rabbet.export.native import layer_factors
from rabbet.files import write_whole
from rabbet.model.compressed import Compressed, Factor, all_layers
from rabbet.model.tensors import stored_tensors


def write_native(parcel: Parcel, path: Path) -> Written:
    """Write the native file; its length is the plan's cost in bytes.

    Raises PlanError, and writes nothing, if a tensor that is kept uncompressed is gone or has
    changed its shape since; FileError if a name is no text that a file can hold.
    """
    require_names(parcel.survey, parcel.rest)
    tensors = stored_tensors(parcel.model)
    for r in parcel.rest:
        if r.name not in tensors or tuple(tensors[r.name].shape) != r.shape:
            raise PlanError(
                f"the network was changed: {r.name} is not what was compressed; compress it again"
            )
    values = {r.name: tensors[r.name].detach().cpu().to(TYPES[r.dtype]) for r in parcel.rest}
    values |= dict(_packed(parcel))
    order = placed(lengths(parcel.survey, parcel.plan), parcel.rest)
    parts = [
        header(parcel.survey, parcel.plan, parcel.rest),
        *(_raw(values[name]) for name, *_ in order),
    ]
    size, expected = sum(map(len, parts)), file_bytes(parcel.survey, parcel.plan, parcel.rest)
    if size != expected:
        raise FileError(
            f"the network takes {size:,} bytes and its plan {expected:,}: it was changed since; "
            "compress it again"
        )
    return Written(write_whole(path, stamped(parts)))


def require_names(survey: Survey, rest: tuple[Rest, ...]) -> None:
    """Raise FileError for a name with half of a pair of UTF-16, which readers of JSON refuse."""
    sites = (n for s in survey for n in (s.name, *s.heads, *s.tied, s.norm or ""))
    for name in (*sites, *(x.name for x in survey.left), *(r.name for r in rest)):
        if any("\ud800" <= sign <= "\udfff" for sign in name):
            raise FileError(
                f"the name {name!r} of the network holds a lone surrogate, which no file can; "
                "rename it, and compress it again"
            )


def write_layers(
    path: Path,
    survey: Survey,
    plan: Plan,
    rest: tuple[Rest, ...],
    layer: Callable[[str], Compressed],
    tensor: Callable[[str], Tensor],
) -> int:
    """Write the native file of layers and tensors that are asked for by name; returns its bytes.

    No more than one layer is held at a time. Each is asked for several times. Raises FileError as
    `write_native` does.
    """
    require_names(survey, rest)

    def parts() -> Iterator[bytes]:
        yield header(survey, plan, rest)
        types = {r.name: TYPES[r.dtype] for r in rest}
        for name, *_ in placed(lengths(survey, plan), rest):
            if name in types:
                yield _raw(tensor(name).to(types[name]))
                continue
            for line in plan:
                yield from map(_raw, _content(name, layer(line.name)))

    size = 0

    def counted() -> Iterator[bytes]:
        nonlocal size
        for part in parts():
            size += len(part)
            yield part

    digits, expected = checksum(counted()).encode(), file_bytes(survey, plan, rest)
    if size != expected:
        raise FileError(f"the layers take {size:,} bytes and their plan {expected:,}")

    def with_digits() -> Iterator[bytes]:
        stream = parts()
        head = next(stream)
        yield head[: STAMPED.start] + digits + head[STAMPED.stop :]
        yield from stream

    return write_whole(path, with_digits())


def _raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _packed(parcel: Parcel) -> Iterator[tuple[str, Tensor]]:
    """The arrays of all layers, in the order of the plan."""
    layers = all_layers(parcel.model)
    for name, _, _ in arrays(lengths(parcel.survey, parcel.plan)):
        yield name, torch.cat([t for x in parcel.plan for t in _content(name, layers[x.name])])


def _content(name: str, layer: Compressed) -> list[Tensor]:
    """What a layer puts into one of the arrays, in order."""
    factors, acts = layer_factors(layer), layer.quantisers
    match name:
        case "rabbet.biases":
            return [] if layer.bias is None else [layer.bias.detach().cpu()]
        case "rabbet.act_scales":
            return [a.scale.cpu() for a in acts]
        case "rabbet.scales":
            return [f.scale.detach().cpu().to(torch.bfloat16) for f in factors]
        case "rabbet.act_zeros":
            return [a.zero.cpu().to(torch.uint8) for a in acts]
    return [part for f in factors for part in _integers(f)]


def _integers(factor: Factor) -> Iterator[Tensor]:
    """The codes of a factor, packed, and its zero points if it has any."""
    for part in (factor.codes, factor.zero):
        if part is not None:
            yield factor.grid.codebook.pack(part.detach().cpu())
