"""A network that lies in a folder of safetensors, read tensor by tensor, written block by block."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from rabbet.core.cost import Cost, float_cost, plan_cost
from rabbet.core.frame import Frame, Rows, Step
from rabbet.core.layout import TYPES, Rest, file_bytes
from rabbet.core.plan import Plan
from rabbet.core.survey import Left, Survey
from rabbet.errors import FileError, ModelError
from rabbet.layers import Site, kind_of, shares_table
from rabbet.methods.blockwise.stack import Stack
from rabbet.model.tensors import float_bytes, own_tensors, stored_tensors

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MALFORMED = (ValueError, KeyError, TypeError, AttributeError, RecursionError)
"""What reading JSON of another shape than is expected raises."""


@dataclass(frozen=True, slots=True)
class _Place:
    """Where the values of a tensor lie: its file, type and shape, and the first of its bytes."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int


class Shards(Mapping[str, Tensor]):
    """The tensors of a folder by name, each read when it is asked for.

    No more than its bytes is read of a file, and none is mapped: of a file that is mapped as a
    whole, all counts for a limit of memory.
    """

    def __init__(self, folder: Path) -> None:
        """Raises FileError for a folder without weights, or whose files cannot be read."""
        self.paths = _files(folder)
        self._known: dict[str, _Place] = {}
        self._signs: dict[Path, tuple[int, ...]] = {}
        for path in self.paths:
            try:
                with path.open("rb") as file:
                    self._signs[path] = _sign(file)
                    self._known |= dict(_places(path, file))
            except (OSError, *MALFORMED) as e:
                raise FileError(f"{path} cannot be read: {e}") from e

    def __getitem__(self, name: str) -> Tensor:
        """Raises FileError for a file that was changed, or cannot be read any more."""
        place = self._known[name]
        if place.dtype not in TYPES:
            raise FileError(f"{name!r} in {place.path} is stored as {place.dtype}, unknown here")
        tensor = torch.empty(place.shape, dtype=TYPES[place.dtype])
        try:
            with place.path.open("rb") as file:
                if _sign(file) != self._signs[place.path]:
                    raise FileError(f"{place.path} was changed while it was read; start again")
                file.seek(place.start)
                count = file.readinto(tensor.reshape(-1).view(torch.uint8).numpy().data)
        except OSError as e:
            raise FileError(f"{place.path} cannot be read any more: {e.strerror or e}") from e
        if count != tensor.nbytes:
            raise FileError(f"{place.path} ends within {name!r}")
        return tensor

    def __contains__(self, name: object) -> bool:
        return name in self._known

    def __iter__(self) -> Iterator[str]:
        return iter(self._known)

    def __len__(self) -> int:
        return len(self._known)

    def kind(self, name: str) -> str:
        """The type of a tensor, as safetensors names it."""
        return self._known[name].dtype

    def shape(self, name: str) -> list[int]:
        """The shape of a tensor, which is not read for it."""
        return list(self._known[name].shape)

    def digest(self) -> str:
        """A hash of all bytes."""
        told = hashlib.blake2b(digest_size=20)
        for path in self.paths:
            with path.open("rb") as file:
                while part := file.read(2**24):
                    told.update(part)
        return told.hexdigest()


def _sign(file: BinaryIO) -> tuple[int, ...]:
    """What tells a file from one that took its place, or that was written to."""
    found = os.fstat(file.fileno())
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _places(path: Path, file: BinaryIO) -> Iterator[tuple[str, _Place]]:
    """The tensors of an open file by name, as its header has them; ValueError if it cannot be."""
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if length > size - 8:
        raise ValueError(f"its {size:,} bytes end within its header")
    for name, entry in json.loads(file.read(length)).items():
        if name == "__metadata__":
            continue
        dtype, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        whole = stop - start == Rest(name, dtype, shape).bytes if dtype in TYPES else True
        if not (0 <= start <= stop <= size - 8 - length and min(shape, default=0) >= 0 and whole):
            raise ValueError(f"the bytes of its tensor {name!r} are not all there")
        yield name, _Place(path, dtype, shape, 8 + length + start)


def _files(folder: Path) -> list[Path]:
    index = folder / INDEX
    if index.is_file():
        try:
            places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            names = sorted({str(name) for name in places.values()})
        except (OSError, *MALFORMED) as e:
            raise FileError(f"{index} cannot be read: {e!r}") from None
        if not names or any(Path(name).name != name for name in names):
            raise FileError(f"{index} names no files, or files outside of its folder")
    else:
        names = [SINGLE]
    lost = next((name for name in names if not (folder / name).is_file()), None)
    if lost is not None:
        raise FileError(f"{folder} holds no {lost}; save the network with save_pretrained")
    return [folder / name for name in names]


FLOATS = ("F64", "F32", "F16", "BF16")


def types_of(network: nn.Module, shards: Shards, stack: Stack) -> dict[str, str]:
    """The types in which the parameters and buffers of a network are stored, by their first names.

    Raises FileError for a tensor that is not stored or of another shape, and for weights that are
    no floats: they were quantised, and are nothing without their scales.
    """
    assert isinstance(stack.tensors, Prefixed)
    types: dict[str, str] = {}
    for name, value in stored_tensors(network).items():
        found = [stack.tensors.place(each) for each in stack.names(name)]
        place = next((each for each in found if each is not None), None)
        if place is None:
            raise FileError(
                f"the files in {shards.paths[0].parent} lack the tensor {name!r} {[*value.shape]}; "
                "of a network that is stored under other names, such as experts one by one, take "
                "all of it: rabbet.compress(rabbet.hf.from_pretrained(folder), ...)"
            )
        types[name] = shards.kind(place)
        if value.is_floating_point() and types[name] not in FLOATS:
            raise FileError(
                f"the tensor {name!r} is stored as {types[name]}: the network is quantised "
                "already; give its float weights (float32, float16 or bfloat16)"
            )
        if shards.shape(place) != [*value.shape]:
            raise FileError(
                f"{name} is {shards.shape(place)} in the files, {[*value.shape]} in the network of "
                "its config"
            )
    return types


def fill_buffers(network: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give a network the buffers that are stored, such as the biases of some routers."""
    stored = stored_tensors(network)
    for name, buffer in network.named_buffers():
        if name in stored:  # any other is made from the config
            buffer.copy_(tensors[name])


def renamed(network: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Stored names by those that transformers gives them in a network of its.

    What it makes of stored tensors by more than a name (experts put together, rows in another
    order) is left out, since what is stored is not what the network holds.
    """
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, rename_source_key
    except ImportError:  # before its version 5 files held what networks hold
        return {name: name for name in names}
    if not hasattr(network, "config"):
        return {name: name for name in names}
    about: Any = get_model_conversion_mapping(network)
    plain = [each for each in about if isinstance(each, WeightRenaming)]
    others = [each for each in about if not isinstance(each, WeightRenaming)]
    found = {name: rename_source_key(name, plain, others) for name in names}
    return {new: old for old, (new, source) in found.items() if source is None}


class Prefixed(Mapping[str, Tensor]):
    """The tensors of a folder by the names of a network.

    A network with a head on top may have been saved without the prefix of what is below it, and the
    other way round; of some, transformers renames what it reads (`renamed`).
    """

    def __init__(self, shards: Shards, network: nn.Module) -> None:
        prefix = str(getattr(network, "base_model_prefix", ""))
        self.shards, self.prefix = shards, f"{prefix}." if prefix else ""
        self._places = renamed(network, shards)

    def place(self, name: str) -> str | None:
        """The name under which a tensor is stored."""
        for each in (name, name.removeprefix(self.prefix), f"{self.prefix}{name}"):
            if each in self._places:
                return self._places[each]
        return None

    def __getitem__(self, name: str) -> Tensor:
        place = self.place(name)
        if place is None:
            raise KeyError(name)
        return self.shards[place]

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self.place(name) is not None

    def __iter__(self) -> Iterator[str]:
        return iter(self.shards)

    def __len__(self) -> int:
        return len(self.shards)


def survey_stack(stack: Stack, places: int) -> Survey:
    """The sites of a stack of which nothing was run: linears and tables, and what else is large.

    places: words of an example. Sites come in the order of their modules, tables first.
    """
    modules = dict(stack.model.named_modules())
    weights: dict[int, list[str]] = {}
    for name, module in modules.items():
        if kind_of(module) is not None and isinstance(
            getattr(module, "weight", None), nn.Parameter
        ):
            weights.setdefault(id(module.weight), []).append(name)
    sites: list[Site] = []
    for names in weights.values():
        tables = [n for n in names if not shares_table(modules[n])]
        name, *others = [*tables, *(n for n in names if n not in tables)]
        kind = kind_of(modules[name])
        assert kind is not None
        if kind.obstacle(modules[name]) or kind.space:
            continue
        if {*stack.names(f"{name}.weight")} != {f"{n}.weight" for n in names}:
            continue  # a module of another kind has the same tensor, and needs it as it is
        if others and not (kind.looks_up and all(shares_table(modules[n]) for n in others)):
            continue  # layers that share a weight otherwise: kept as they are
        module = modules[name]
        sites.append(
            Site(
                name=name,
                kind=kind,
                shape=tuple(kind.weight(module).shape),
                bias=getattr(module, "bias", None) is not None,
                positions=places,
                inputs=places,
                heads=tuple(others),
                head_positions=places * len(others),
                **kind.facts(module),
            )
        )
    if not sites:
        raise ModelError("the network holds no linear and no table that could be compressed")
    return Survey(tuple(sites), (), float_bytes(stack.model))


@dataclass(frozen=True)
class Part:
    """What one file of the output holds: some sites in order, and tensors that are kept."""

    survey: Survey
    rest: tuple[Rest, ...]

    def of(self, plan: Plan) -> Plan:
        """The lines of a plan that are this part's."""
        return Plan(tuple(line for line in plan if line.name in {s.name for s in self.survey}))


def rest_of(stack: Stack, survey: Survey, types: Mapping[str, str]) -> tuple[Rest, ...]:
    """Parameters and buffers that belong to no site, in the types in which they are stored."""
    covered = {name for site in survey for name in own_tensors(site)}
    held = stored_tensors(stack.model).items()
    return tuple(Rest(n, types[n], tuple(t.shape)) for n, t in held if n not in covered)


def parts_of(survey: Survey, rest: Sequence[Rest], count: int) -> list[Part]:
    """Sites in order over `count` files of about the same size in float; what is kept in the first.

    Each part says of its sites alone how large they are in float.
    """
    whole = sum(site.numel for site in survey)
    groups: list[list[Site]] = [[] for _ in range(max(1, min(count, len(survey.sites))))]
    seen = 0
    for site in survey:
        groups[min(len(groups) - 1, len(groups) * seen // whole)].append(site)
        seen += site.numel
    groups = [group for group in groups if group]
    if len(groups) == 1:
        return [Part(survey, tuple(rest))]
    parts = []
    for k, group in enumerate(groups):
        size = sum(4 * (s.numel + s.shape[0] * s.bias) for s in group)
        own = tuple(rest) if k == 0 else ()
        size += sum(r.bytes for r in own)
        parts.append(Part(Survey(tuple(group), (), size), own))
    return parts


@dataclass(frozen=True)
class Streamed:
    """What knows the cost of a plan for a network in a folder: see `choose.program.Priced`."""

    survey: Survey
    parts: Sequence[Part]
    left: Sequence[Left] = ()

    @property
    def float_cost(self) -> Cost:
        """What the float32 network costs."""
        return float_cost(self.survey)

    def cost(self, plan: Plan) -> Cost:
        """The exact cost of a plan: bytes are those of all files."""
        whole = plan_cost(self.survey, plan, ())
        size = sum(file_bytes(part.survey, part.of(plan), part.rest) for part in self.parts)
        return replace(whole, bytes=size)

    def frame(self, rows: Rows) -> Frame | None:
        """The header, if there is one file; the headers of several are counted afterwards."""
        if len(self.parts) > 1:
            return None
        return Frame.of(self.survey, self.parts[0].rest, rows)

    def steps(self, metric: str, rows: Rows) -> Sequence[Step]:
        """None: exported files are not priced here."""
        del metric, rows
        return ()


@contextlib.contextmanager
def hollow() -> Iterator[None]:
    """Modules that are made inside have parameters on the device `meta`, and real buffers."""
    try:
        from accelerate import init_empty_weights
    except ImportError:
        raise FileError(
            "networks are read block by block with accelerate; install rabbet[hf]"
        ) from None
    with init_empty_weights(include_buffers=False), torch.random.fork_rng(devices=[]):
        yield
