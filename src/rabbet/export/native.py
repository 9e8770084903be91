"""The native file read: safetensors with packed integers, its plan and survey in the header.

docs/format.md specifies it; `export.writing` writes it.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from rabbet.core.layout import (
    RESERVED,
    TYPE_NAMES,
    TYPES,
    Lengths,
    Rest,
    arrays,
    layer_lengths,
)
from rabbet.core.plan import Plan, outputs_named
from rabbet.core.survey import Survey
from rabbet.errors import FileError, PlanError, RabbetError
from rabbet.export.container import read_container
from rabbet.export.folders import native_paths
from rabbet.grids.grid import Grid
from rabbet.layers import Site, shares_table
from rabbet.layers.stored import rows_of
from rabbet.model.bn_fold import drop_norms, own_biases
from rabbet.model.build import empty, install, validate_line
from rabbet.model.compressed import (
    Compressed,
    Factor,
    all_layers,
    stored_weights,
    unpack_stored,
)
from rabbet.model.inspect import alike
from rabbet.model.prepare import like_a_file
from rabbet.model.tensors import stored_tensors

CODES = 8  # that a byte holds at most: those of one bit
LONGEST = 1000  # signs of a reason that are shown


def layer_factors(layer: Compressed) -> list[Factor]:
    """The factors of all terms of a layer, in order."""
    return list(itertools.chain.from_iterable(layer.factors))


@dataclass(frozen=True, slots=True)
class Contents:
    """A file as far as it can be read without a network; what it claims is what it holds.

    arrays: the arrays of all lines; rest: the tensors that are kept as they are.
    """

    survey: Survey
    plan: Plan
    arrays: dict[str, Tensor]
    rest: dict[str, Tensor]

    @property
    def kept(self) -> tuple[Rest, ...]:
        """What the file holds uncompressed."""
        return tuple(
            Rest(name, TYPE_NAMES[tensor.dtype], tuple(tensor.shape))
            for name, tensor in self.rest.items()
        )

    @classmethod
    def joined(cls, parts: Sequence["Contents"]) -> "Contents":
        """What several files hold together; raises FileError where they overlap."""
        if len(parts) == 1:
            return parts[0]
        sites = tuple(site for part in parts for site in part.survey)
        left = tuple(each for part in parts for each in part.survey.left)
        survey = Survey(sites, left, sum(part.survey.float_bytes for part in parts))
        arrays = {
            name: torch.cat([part.arrays[name] for part in parts if name in part.arrays])
            for name in dict.fromkeys(name for part in parts for name in part.arrays)
        }
        rest = {name: tensor for part in parts for name, tensor in part.rest.items()}
        if len(rest) < sum(len(part.rest) for part in parts):
            raise FileError("the files of the network hold a tensor twice")
        try:
            plan = Plan(tuple(line for part in parts for line in part.plan))
        except PlanError as e:
            raise FileError(f"the files of the network overlap: {e}") from None
        return cls(survey, plan, arrays, rest)


def read_native(path: Path, model: nn.Module) -> tuple[nn.Module, Survey, Plan, tuple[Rest, ...]]:
    """A compressed copy of `model` with the numbers of a file, or of those of a folder.

    The model provides the code, the file every number. The file's survey, its plan, and the tensors
    that it holds uncompressed are returned beside the copy. Raises FileError for a file that is
    missing, damaged, of another format, or of another network.
    """
    contents = read_contents(path)
    survey, plan = contents.survey, contents.plan
    result = _skeleton(model, contents, path)
    streams = {name: _Stream(array, name, path) for name, array in contents.arrays.items()}
    layers = all_layers(result)
    with torch.no_grad():
        for line in plan:
            _fill(layers[line.name], streams, path)
        for stream in streams.values():
            stream.close()
        for layer in stored_weights(result).values():
            unpack_stored(result, layer)
        _fill_rest(result, contents.rest, path)
    return result, survey, plan, contents.kept


def read_contents(path: Path) -> Contents:
    """What a native file holds, or those of a folder together; raises FileError."""
    return Contents.joined([read_parts(each) for each in native_paths(path)])


def read_parts(path: Path) -> Contents:
    """A file checked for damage, but not against a network; raises FileError.

    What it claims is held against its length before any work is done or memory taken for it.
    """
    try:
        container = read_container(path)
        survey = Survey.from_json(container.survey)
        if outputs_named(container.plan) > CODES * container.bytes:
            raise FileError("its plan names more outputs than a file of this length can hold")
        plan = Plan.parse(container.plan)
        rest = dict(container.tensors)
        arrays = _arrays(plan, survey, rest)
        return Contents(survey, plan, arrays, rest)
    except FileNotFoundError:
        raise FileError(f"there is no file {path}") from None
    except (OSError, RabbetError) as e:
        why = str(e)  # it may quote a line of the plan, which may be as long as the file
        shown = why if len(why) <= LONGEST else f"{why[:LONGEST]}..."
        raise FileError(f"{path} is damaged or not a rabbet file: {shown}") from None


def _arrays(plan: Plan, survey: Survey, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The arrays that a plan wants, taken out of the tensors; their numbers are sound."""
    if not len(plan):
        raise FileError("its plan is empty")
    codes = tensors.get("rabbet.codes")
    most, total = 0 if codes is None else codes.numel(), Lengths()
    if sum(len(line.terms) for line in plan) > most:  # each has codes, in bytes of its own
        raise FileError(f"rabbet.codes has {most:,} bytes; its plan has more terms")
    sites = {site.name: site for site in survey}
    for line in plan:
        validate_line(line, sites)
        total += layer_lengths(sites[line.name], line)
        if total.codes + total.zeros > most:  # line by line: the next may be costly to take apart
            raise FileError(f"rabbet.codes ends after {most:,} bytes; its plan wants more")
    result = {}
    for name, dtype, count in arrays(total):
        array = tensors.pop(name, None)
        if array is None or array.dtype != TYPES[dtype] or tuple(array.shape) != (count,):
            raise FileError(f"its plan wants {count:,} entries of {dtype} in {name}")
        if array.is_floating_point() and not bool(torch.isfinite(array).all()):
            raise FileError(f"an entry of {name} is not finite")
        result[name] = array
    if strange := next((name for name in tensors if name.startswith(RESERVED)), None):
        raise FileError(f"its plan wants no {strange[:80]}")
    return result


def _skeleton(model: nn.Module, contents: Contents, path: Path) -> nn.Module:
    survey, plan = contents.survey, contents.plan
    result = like_a_file(model, survey, contents.rest).eval().requires_grad_(False)
    modules = dict(result.named_modules(remove_duplicate=False))
    tensors = stored_tensors(result)
    for site in survey:
        why = _contradiction(site, modules) if site.runs else _unlike(site, tensors)
        if why:
            raise FileError(f"{path} is of another network: {why}")
        if not site.runs:
            continue
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


def _unlike(site: Site, tensors: dict[str, Tensor]) -> str | None:
    """How a network contradicts a file's facts of a stored weight; None if it does not."""
    if site.name not in tensors:
        return f"the model has no tensor {site.name!r}"
    shape = tensors[site.name].shape
    if rows_of(shape) != site.shape:
        return f"{site.name!r} has the shape {list(shape)}, the file says rows of {site.columns}"
    return None


class _Stream:
    """Reads one of the file's arrays piece by piece, from front to back."""

    def __init__(self, values: Tensor, name: str, path: Path) -> None:
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
    count, book = shape.numel(), grid.codebook
    return book.unpack(stream.take(book.packed_bytes(count)), count).view(shape)


def _fill(layer: Compressed, streams: dict[str, _Stream], path: Path) -> None:
    for factor in layer_factors(layer):
        try:
            _fill_factor(factor, streams)
        except ValueError as e:
            raise FileError(f"{path} is damaged: the codes of {layer.site.name!r}: {e}") from None
    if layer.bias is not None:
        layer.bias.copy_(streams["rabbet.biases"].take(len(layer.bias)))
    for act in layer.quantisers:
        act.set_range(
            streams["rabbet.act_scales"].take(1), streams["rabbet.act_zeros"].take(1).float()
        )
        if not bool((act.scale > 0).all()):
            raise FileError(
                f"{path} is damaged: an input scale of {layer.site.name!r} is not a positive number"
            )
        if float(act.zero) > act.grid.high:
            raise FileError(
                f"{path} is damaged: a zero point of {layer.site.name!r} is above {act.grid.high}"
            )


def _fill_factor(factor: Factor, streams: dict[str, _Stream]) -> None:
    """Raises ValueError for codes that the grid does not have, or that are too large."""
    for part in (factor.codes, factor.zero):
        if part is not None:
            part.copy_(_unpacked(streams["rabbet.codes"], factor.grid, part.shape))
    factor.scale.copy_(streams["rabbet.scales"].take(len(factor.scale)).float())
    # An integer lies at most as many levels from zero, and as many again from its zero point.
    floats = factor.grid.codebook.floats
    far = factor.codes.abs().amax() if floats else 2 * factor.grid.levels
    if not bool(torch.isfinite(factor.scale * far).all()):
        raise ValueError("a scale is too large for them")


def _fill_rest(model: nn.Module, values: dict[str, Tensor], path: Path) -> None:
    own = [f"{name}." for name, m in model.named_modules() if isinstance(m, Compressed)]
    stored = stored_weights(model)
    wanted = {
        n: t
        for n, t in stored_tensors(model).items()
        if n not in stored and not any(n.startswith(o) for o in own if o != ".")
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
