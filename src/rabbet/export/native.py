"""The native file: safetensors with packed integers, its plan and survey in the header.

docs/format.md specifies it.
"""

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from rabbet.core.layout import VERSION, WIDTHS, Rest, arrays, file_bytes, header, lengths
from rabbet.core.plan import Plan
from rabbet.core.survey import Survey
from rabbet.errors import FileError, PlanError, RabbetError
from rabbet.export.base import Parcel, Written
from rabbet.files import write_whole
from rabbet.grids.grid import Grid
from rabbet.grids.pack import pack, packed_bytes, unpack
from rabbet.layers import Site, shares_table
from rabbet.model.bn_fold import drop_norms, own_biases
from rabbet.model.build import empty, install, validate
from rabbet.model.compressed import Compressed, Factor, compressed_layers
from rabbet.model.inspect import alike, stored_tensors
from rabbet.model.surgery import copied

TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def write_native(parcel: Parcel, path: Path) -> Written:
    """Write the native file; its length is the plan's cost in bytes.

    Raises PlanError, and writes nothing, if a tensor that is kept uncompressed is gone or has
    changed its shape since.
    """
    tensors = stored_tensors(parcel.model)
    for r in parcel.rest:
        if r.name not in tensors or tuple(tensors[r.name].shape) != r.shape:
            raise PlanError(
                f"the network was changed: {r.name} is not what was compressed; compress it again"
            )
    values = {
        r.name: (r.dtype, tensors[r.name].detach().cpu().to(TYPES[r.dtype])) for r in parcel.rest
    }
    values |= {name: (dtype, tensor) for name, dtype, tensor in _packed(parcel)}
    order = sorted(sorted(parcel.rest, key=lambda r: r.name), key=lambda r: -WIDTHS[r.dtype])
    names = [r.name for r in order] + [
        name for name, _, _ in arrays(lengths(parcel.survey, parcel.plan))
    ]
    names.sort(key=lambda name: -WIDTHS[values[name][0]])
    parts = [
        header(parcel.survey, parcel.plan, parcel.rest),
        *(_raw(values[name][1]) for name in names),
    ]
    size, expected = sum(map(len, parts)), file_bytes(parcel.survey, parcel.plan, parcel.rest)
    if size != expected:
        raise FileError(
            f"the network takes {size:,} bytes and its plan {expected:,}: it was changed since; "
            "compress it again"
        )
    return Written(write_whole(path, parts))


def _raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _packed(parcel: Parcel) -> Iterator[tuple[str, str, Tensor]]:
    """The arrays of all layers, in the order of the plan."""
    layers = compressed_layers(parcel.model)
    ordered = [layers[line.name] for line in parcel.plan]
    factors = [f for layer in ordered for f in layer_factors(layer)]
    acts = [a for layer in ordered for a in layer.quantisers]
    biases = [layer.bias.detach().cpu() for layer in ordered if layer.bias is not None]
    content = {
        "rabbet.biases": biases,
        "rabbet.act_scales": [a.scale.cpu() for a in acts],
        "rabbet.scales": [f.scale.detach().cpu().to(torch.bfloat16) for f in factors],
        "rabbet.act_zeros": [a.zero.cpu().to(torch.uint8) for a in acts],
        "rabbet.codes": [part for f in factors for part in _integers(f)],
    }
    for name, dtype, _ in arrays(lengths(parcel.survey, parcel.plan)):
        yield name, dtype, torch.cat(content[name])


def _integers(factor: Factor) -> Iterator[Tensor]:
    """The codes of a factor, packed, and its zero points if it has any."""
    grid = factor.grid
    yield pack(factor.codes.detach().cpu() - grid.low, grid.levels)
    if factor.zero is not None:
        yield pack(factor.zero.detach().cpu() - grid.low, grid.levels)


def layer_factors(layer: Compressed) -> list[Factor]:
    """The factors of all terms of a layer, in order."""
    return list(itertools.chain.from_iterable(layer.factors))


def read_native(path: Path, model: nn.Module) -> tuple[nn.Module, Survey, Plan, tuple[Rest, ...]]:
    """A compressed copy of `model` with the numbers of a file.

    The model provides the code, the file every number. The file's survey, its plan, and the tensors
    that it holds uncompressed are returned beside the copy. Raises FileError for a file that is
    missing, damaged, of another format, or of another network.
    """
    survey, plan, values = read_parts(path)
    result = _skeleton(model, survey, plan, path)
    wanted = arrays(lengths(survey, plan))
    streams = {
        name: _Stream(values.pop(name, None), dtype, name, path) for name, dtype, _ in wanted
    }
    layers = compressed_layers(result)
    with torch.no_grad():
        for line in plan:
            _fill(layers[line.name], streams, path)
        for stream in streams.values():
            stream.close()
        _fill_rest(result, values, path)
    return result, survey, plan, kept_as_it_is(values, path)


def kept_as_it_is(values: Mapping[str, Tensor], path: Path) -> tuple[Rest, ...]:
    """The tensors that a file holds uncompressed; raises FileError for an unknown type."""
    names = {kind: name for name, kind in TYPES.items()}
    strange = next((name for name, tensor in values.items() if tensor.dtype not in names), None)
    if strange:
        raise FileError(
            f"{path} is not a rabbet file: {strange} is of type {values[strange].dtype}"
        )
    return tuple(
        Rest(name, names[tensor.dtype], tuple(tensor.shape)) for name, tensor in values.items()
    )


def read_parts(path: Path) -> tuple[Survey, Plan, dict[str, Tensor]]:
    """Survey, plan and raw tensors of a file, checked for damage but not against a network."""
    try:
        with safe_open(path, framework="pt") as file:
            facts = file.metadata() or {}
            if facts.get("format") != VERSION:
                raise FileError(
                    f"it is of format {facts.get('format')!r}, this version reads {VERSION!r}"
                )
            survey = Survey.from_json(facts.get("survey", ""))
            plan = Plan.parse(facts.get("plan", ""))
            validate(plan, survey)
            names = file.keys()  # the file is no dict: it cannot be iterated
            return survey, plan, {name: file.get_tensor(name) for name in names}
    except FileNotFoundError:
        raise FileError(f"there is no file {path}") from None
    except (SafetensorError, OSError, RabbetError) as e:
        raise FileError(f"{path} is damaged or not a rabbet file: {e}") from None


def _skeleton(model: nn.Module, survey: Survey, plan: Plan, path: Path) -> nn.Module:
    result = copied(model).eval().requires_grad_(False)
    modules = dict(result.named_modules(remove_duplicate=False))
    for site in survey:
        if why := _contradiction(site, modules):
            raise FileError(f"{path} is of another network: {why}")
        layer = modules[site.name]
        if site.norm is not None and plan.get(site.name) is None and layer.bias is None:
            layer.bias = nn.Parameter(torch.zeros(site.shape[0]), requires_grad=False)
    result = drop_norms(own_biases(result.float(), survey), survey)
    home = next(iter(stored_tensors(result).values())).device
    for site in survey:
        line = plan.get(site.name)
        if line is not None:
            result = install(result, site, empty(site, line).to(home))
    return result


def _contradiction(site: Site, modules: dict[str, nn.Module]) -> str | None:
    """How a network contradicts a file's facts of a layer, in words; None if it does not."""
    norm = [site.norm] if site.norm is not None else []
    for name in (*site.names, *norm, *site.heads):
        if name not in modules:
            return f"the model has no layer {name!r}"
    layer = modules[site.name]
    if not site.kind.fits(layer):
        return f"{site.name!r} is a {type(layer).__name__}, the file says {site.kind.name}"
    facts: dict[str, object] = {
        "shape": tuple(site.kind.weight(layer).shape),
        **site.kind.facts(layer),
    }
    facts["bias"] = bool(norm) or getattr(layer, "bias", None) is not None
    for fact, value in facts.items():
        if getattr(site, fact) != value:
            return f"{site.name!r} has {fact} {value}, the file says {getattr(site, fact)}"
    if any(modules[name] is not layer and not alike(layer, modules[name]) for name in site.tied):
        return f"{site.name!r} is not the same layer as {', '.join(map(repr, site.tied))}"
    apart = [
        n
        for n in site.heads
        if not shares_table(modules[n]) or modules[n].weight is not layer.weight
    ]
    if apart:
        return f"{', '.join(map(repr, apart))} does not share the table of {site.name!r}"
    if any(not isinstance(modules[name], _BatchNorm | nn.Identity) for name in norm):
        return f"{site.norm!r} is not a BatchNorm"
    return None


class _Stream:
    """Reads one of the file's arrays piece by piece, from front to back."""

    def __init__(self, values: Tensor | None, dtype: str, name: str, path: Path) -> None:
        if values is None or values.ndim != 1 or values.dtype != TYPES[dtype]:
            raise FileError(
                f"{path} is damaged: the array {name} is missing, not flat or not of type {dtype}"
            )
        self.values, self.name, self.path, self.at = values, name, path, 0

    def take(self, count: int) -> Tensor:
        part = self.values[self.at : self.at + count]
        if len(part) != count:
            raise FileError(
                f"{self.path} is damaged: {self.name} ends after {len(self.values)} entries"
            )
        self.at += count
        return part

    def close(self) -> None:
        if self.at != len(self.values):
            raise FileError(
                f"{self.path} is damaged: {self.name} has {len(self.values)} entries, "
                f"the plan {self.at}"
            )


def _unpacked(stream: "_Stream", grid: Grid, shape: torch.Size) -> Tensor:
    """The next codes of a grid, in the given shape."""
    count = shape.numel()
    packed = stream.take(packed_bytes(count, grid.levels))
    return (unpack(packed, grid.levels, count) + grid.low).view(shape)


def _fill(layer: Compressed, streams: dict[str, _Stream], path: Path) -> None:
    for factor in layer_factors(layer):
        try:
            for part in (factor.codes, factor.zero):
                if part is not None:
                    part.copy_(_unpacked(streams["rabbet.codes"], factor.grid, part.shape))
        except ValueError as e:
            raise FileError(f"{path} is damaged: the codes of {layer.site.name!r}: {e}") from None
        factor.scale.copy_(streams["rabbet.scales"].take(len(factor.scale)).float())
    if layer.bias is not None:
        layer.bias.copy_(streams["rabbet.biases"].take(len(layer.bias)))
    for act in layer.quantisers:
        act.set_range(
            streams["rabbet.act_scales"].take(1), streams["rabbet.act_zeros"].take(1).float()
        )
        if not bool(torch.isfinite(act.scale).all() and (act.scale > 0).all()):
            raise FileError(
                f"{path} is damaged: an input scale of {layer.site.name!r} is not a positive number"
            )
        if float(act.zero) > act.grid.high:
            raise FileError(
                f"{path} is damaged: a zero point of {layer.site.name!r} is above {act.grid.high}"
            )
    if not all(torch.isfinite(f.scale).all() for f in layer_factors(layer)):
        raise FileError(f"{path} is damaged: a scale of {layer.site.name!r} is not finite")


def _fill_rest(model: nn.Module, values: dict[str, Tensor], path: Path) -> None:
    own = [f"{name}." for name, m in model.named_modules() if isinstance(m, Compressed)]
    wanted = {
        n: t
        for n, t in stored_tensors(model).items()
        if not any(n.startswith(o) for o in own if o != ".")
    }
    if isinstance(model, Compressed):
        wanted = {}
    if missing := sorted(wanted.keys() ^ values.keys()):
        raise FileError(f"{path} is of another network: {', '.join(missing[:5])} on one side only")
    for name, tensor in wanted.items():
        value = values[name]
        if tensor.shape != value.shape or tensor.is_floating_point() != value.is_floating_point():
            raise FileError(
                f"{path} is of another network: {name} is {value.dtype} {list(value.shape)}, "
                f"not {tensor.dtype} {list(tensor.shape)}"
            )
        tensor.copy_(value)
