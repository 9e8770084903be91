"""A forward pass that leaves no trace, in the network or in the random numbers that others draw.

A forward may write to buffers, keep activations as attributes, count its calls or draw random
numbers. Every pass that rabbet runs starts from the state that the user's network has, and draws
the same numbers for the same batch: so what is handed out has that state, a network can be compared
with its compressed copy, and the same seed gives the same bytes.
"""

import collections
import contextlib
import copy
import random
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rabbet.data.batches import Batch, tensors

OF_TORCH = frozenset(vars(nn.Module())) - {"training"}
"""What torch itself keeps in every module; buffers among it are looked after one by one."""
CONTAINERS = (list, dict, set, collections.OrderedDict, collections.defaultdict, collections.deque)
CHANCE = (random.Random, np.random.Generator, np.random.RandomState)
LARGE = 1000  # entries of a container, beyond which its entries are not looked into: a vocabulary
ENTRIES = 1024  # of each tensor of a batch, evenly spread, which its seed depends on


class Solved(nn.Module):
    """A module of rabbet's own: what it holds is changed on purpose while a network runs."""


class Pass:
    """What is known of a forward pass afterwards."""

    drew = False
    """Whether it drew random numbers from one of the generators that all code shares."""
    wrote = False
    """Whether it wrote to buffers or attributes of the network."""
    rewrote: tuple[str, ...] = ()
    """The parameters that it wrote to or put others in the place of."""


@contextlib.contextmanager
def clean_pass(model: nn.Module, batch: Batch) -> Iterator[Pass]:
    """Run a network once on a batch within this; afterwards all is as it was before."""
    seen = Pass()
    with state_kept(model, seen), _seeded(model, batch, seen):
        before = _parameters(model)
        yield seen
        now = _parameters(model)
        seen.rewrote = tuple(name for name in before if now.get(name) != before[name])


def makeup(model: nn.Module) -> dict[str, tuple[object, ...]]:
    """Which objects the modules and parameters of a network are, what was written, their types.

    Another device is no other parameter.
    """
    parts: dict[str, tuple[object, ...]] = {name: (id(m),) for name, m in model.named_modules()}
    types = {name: p.dtype for name, p in model.named_parameters()}
    return parts | {name: (*known, types[name]) for name, known in _parameters(model).items()}


def _parameters(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Which object each parameter is, and how often it was written to.

    Not of tables of bounded norm, of which a pass is lent a copy.
    """
    bounded = {id(m.weight) for m in model.modules() if getattr(m, "max_norm", None) is not None}
    return {
        name: (id(p), 0 if p.is_inference() else p._version)  # noqa: SLF001 (no public way)
        for name, p in model.named_parameters()
        if id(p) not in bounded
    }


@contextlib.contextmanager
def state_kept(model: nn.Module, seen: Pass | None = None) -> Iterator[None]:
    """Give a network copies of its buffers and plain attributes for a while, then its own back.

    Copies, so that nothing is written to its own: an output or a gradient may still need what a
    pass has written. Objects of other classes that a network keeps are not looked into.
    """
    before: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = []
    fresh = _Fresh()
    try:
        for module in model.modules():
            if isinstance(module, Solved):
                continue
            lent = [vars(module), module._buffers]  # noqa: SLF001 (no public way to them)
            if getattr(module, "max_norm", None) is not None:  # rewrites its table in every pass
                lent.append(module._parameters)  # noqa: SLF001
            for held in lent:
                own = dict(held)
                change = _table if held is module._parameters else fresh  # noqa: SLF001
                held.update({k: change(v) for k, v in own.items() if k not in OF_TORCH})
                before.append((held, own, dict(held)))
        yield
    finally:
        if seen is not None:
            seen.wrote = any(_written(held, given) for held, _, given in before)
        for held, own, _ in before:
            held.clear()
            held.update(own)


def _written(held: dict[str, Any], given: dict[str, Any]) -> bool:
    """Whether what was lent to a pass is not what came back; tensors count what is written."""
    return held.keys() != given.keys() or any(
        held[name] is not value or (isinstance(value, Tensor) and not _untouched(value))
        for name, value in given.items()
    )


def _untouched(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter) or tensor.is_inference() or not tensor._version  # noqa: SLF001


def _table(parameter: nn.Parameter | None) -> nn.Parameter | None:
    if parameter is None:
        return None
    return nn.Parameter(parameter.detach().clone(), parameter.requires_grad)


class _Fresh:
    """Copies tensors, containers and generators, each once; what else there is stays the same."""

    def __init__(self) -> None:
        self.known: dict[int, Any] = {}

    def __call__(self, value: Any) -> Any:
        if id(value) not in self.known:
            made = self._copied(value)
            if made is value:
                return value
            self.known[id(value)] = made
        return self.known[id(value)]

    def _copied(self, value: Any) -> Any:
        if isinstance(value, nn.Parameter):
            return value
        if isinstance(value, Tensor):
            return value.detach().clone().requires_grad_(value.requires_grad)
        if isinstance(value, torch.Generator):
            return value.clone_state()
        if isinstance(value, CHANCE):
            return copy.deepcopy(value)
        if type(value) is tuple:
            parts = tuple(self(v) for v in value)
            return parts if any(a is not b for a, b in zip(parts, value, strict=True)) else value
        return self._contents(value) if type(value) in CONTAINERS else value

    def _contents(self, value: Any) -> Any:
        """A container with copies of what it holds."""
        result = self.known[id(value)] = copy.copy(value)  # it may hold itself
        if len(value) <= LARGE and isinstance(value, dict):
            result.update({k: self(v) for k, v in value.items()})
        elif len(value) <= LARGE and not isinstance(value, set):
            result.clear()
            result.extend(self(v) for v in value)
        return result


@contextlib.contextmanager
def _seeded(model: nn.Module, batch: Batch, seen: Pass) -> Iterator[None]:
    """Seed every generator that a forward may draw from, by the batch; then put all back."""
    seed = seed_of(batch)
    places = [_torch(g) for g in _generators(model)] + [_NUMPY, _PYTHON]
    before = [get() for get, _, _ in places]
    try:
        for _, _, start in places:
            start(seed)
        started = [get() for get, _, _ in places]
        yield
        now = [get() for get, _, _ in places]
        seen.drew = not all(_equal(a, b) for a, b in zip(started, now, strict=True))
    finally:
        for (_, put, _), state in zip(places, before, strict=True):
            put(state)


def seed_of(batch: Batch) -> int:
    """The seed of a pass, from entries of all of a batch: other batches draw other numbers."""
    seed = 0
    for tensor in tensors(batch):
        flat = tensor.detach().flatten()
        some = flat[:: max(1, len(flat) // ENTRIES)].cpu().contiguous()
        seed = zlib.crc32(some.view(torch.uint8).numpy().tobytes(), seed)
    return seed


_Place = tuple[Callable[[], Any], Callable[[Any], Any], Callable[[int], Any]]
"""How the state of a generator is read and set, and how it is seeded."""


def _torch(generator: torch.Generator) -> _Place:
    return generator.get_state, generator.set_state, generator.manual_seed


_NUMPY: _Place = (np.random.get_state, np.random.set_state, np.random.seed)
_PYTHON: _Place = (random.getstate, random.setstate, random.seed)


def _generators(model: nn.Module) -> list[torch.Generator]:
    """The shared generators of torch of the devices on which a network may draw."""
    found = [torch.default_generator]
    for place in sorted({p.device for p in model.parameters()}, key=str):
        theirs = getattr(getattr(torch, place.type, None), "default_generators", ())
        found += [generator for generator in theirs if generator.device == place]
    return found


def _equal(one: Any, other: Any) -> bool:
    """Whether two states of a generator are the same: tensors, or nested tuples of numbers."""
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return np.array_equal(one, other)
    if isinstance(one, tuple):
        return len(one) == len(other) and all(map(_equal, one, other))
    return bool(one == other)
