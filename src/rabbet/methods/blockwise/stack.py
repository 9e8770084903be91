"""A network as a stack of equal blocks: what comes before them, one at a time, what comes behind.

Nothing is known of an architecture. The blocks are the longest list of modules of one class that
the network holds; what is computed around them is computed by the network's own forward, in which
other modules stand where the blocks were: they write down what each block is given, or hand on
hidden states that were worked out before.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rabbet.data.batches import Batch, outputs
from rabbet.data.task import Task, evaluating
from rabbet.errors import FileError, ModelError
from rabbet.model.surgery import replace_module

HIDDEN = "hidden_states"  # the keyword of what a block works on, where it is not its first argument


class _EnoughError(Exception):
    """All blocks were met, and what follows them is of no use."""


@dataclass(frozen=True)
class Call:
    """What a block is given besides the hidden states."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    by_keyword: bool

    def __call__(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """The hidden states behind the block."""
        if self.by_keyword:
            return first(block(*self.args, **{**self.kwargs, HIDDEN: hidden}))
        return first(block(hidden, *self.args, **self.kwargs))


def first(answer: Any) -> Tensor:
    """The hidden states in what a block returns."""
    hidden = answer[0] if isinstance(answer, tuple | list) else answer
    if not isinstance(hidden, Tensor):
        raise ModelError(f"a block returns {type(hidden).__name__}, not hidden states")
    return hidden


class _Beside:
    """Stands for what a block returns besides hidden states, which no other block may be given."""


class _Stand(nn.Module):
    """Stands where a block was, and answers in its place."""

    def __init__(self, block: nn.Module, answer: Callable[..., Any]) -> None:
        super().__init__()
        vars(self)["block"] = block  # no child: its tensors may not be there
        vars(self)["answer"] = answer

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(vars(self)["block"], name)  # a network may read what its block says

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What was asked for."""
        return self.answer(args, kwargs)


class Stack:
    """A network whose blocks are run one by one.

    tensors: where weights come from, by name, if the network's own are on torch's device `meta`;
    they are there while `block` or `ends` is open. None: the network holds them.
    """

    def __init__(
        self,
        model: nn.Module,
        tensors: Mapping[str, Tensor] | None = None,
        types: Mapping[str, torch.dtype] | None = None,
    ) -> None:
        """types: in which tensors of a network in memory are stored, if not in their own.

        Raises ModelError for a network without such a list of blocks.
        """
        self.model, self.tensors, self.types = model, tensors, types or {}
        self.path = _longest(model)
        blocks = model.get_submodule(self.path)
        assert isinstance(blocks, nn.ModuleList)
        self.blocks = blocks
        if len({id(block) for block in blocks}) < len(blocks):
            raise ModelError(
                f"{self.path} holds a block several times, so blocks cannot be taken one by one; "
                "use another method"
            )
        self._beside: tuple[Any, ...] | None = None
        self._learned = False
        shared: dict[int, list[str]] = {}
        for name, p in model.named_parameters(remove_duplicate=False):
            shared.setdefault(id(p), []).append(name)
        self._names = {name: names for names in shared.values() for name in names}

    def __len__(self) -> int:
        return len(self.blocks)

    def prefix(self, k: int) -> str:
        """What the names of a block's modules and tensors begin with."""
        return f"{self.path}.{k}."

    def is_inside(self, name: str) -> int | None:
        """The block that a module or tensor belongs to; None for one outside."""
        rest = name.removeprefix(f"{self.path}.")
        number = rest.partition(".")[0]
        return int(number) if rest != name and number.isdigit() else None

    def within(self, name: str) -> str:
        """The name of a module of a block within it."""
        place = self.is_inside(name)
        return name if place is None else name.removeprefix(self.prefix(place))

    @contextlib.contextmanager
    def block(self, k: int) -> Iterator[nn.Module]:
        """A block with its weights in float32, in eval mode."""
        with self._filled(self.blocks[k], self.prefix(k)), evaluating(self.blocks[k]):
            yield self.blocks[k]

    @contextlib.contextmanager
    def ends(self) -> Iterator[nn.Module]:
        """The network with the weights of all that is no block's."""
        hollow = nn.ModuleList()
        with self._without(hollow), self._filled(self.model, ""):
            yield self.model

    def enter(self, task: Task, batch: Batch) -> tuple[Tensor, list[Call]]:
        """The hidden states before the first block, and what every block is given besides.

        To be called while `ends` is open. Raises ModelError if blocks are not run in their order,
        each on what the one before it left.
        """
        calls: list[Call] = []
        begun: list[Tensor] = []

        def answer(k: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if k != len(calls):
                raise ModelError(f"block {k} of {self.path} runs after {len(calls)} others")
            hidden, call = _taken_apart(args, kwargs)
            if any(isinstance(v, _Beside) for v in (*call.args, *call.kwargs.values())):
                raise ModelError(
                    f"block {k} of {self.path} is given what another block returns besides hidden "
                    "states, so blocks cannot be taken one by one; use another method"
                )
            calls.append(call)
            if k == 0:
                begun.append(hidden)
                self._learn(call, hidden)
            if len(calls) == len(self):
                raise _EnoughError
            return self._answer(hidden)

        with self._standing(answer):
            try:
                task.run(self.model, batch)
            except _EnoughError:
                return begun[0], calls
        raise ModelError(
            f"{len(calls)} of the {len(self)} blocks of {self.path} run in a pass of the network"
        )

    def leave(self, task: Task, batch: Batch, hidden: Tensor) -> Tensor:
        """The network's first output where `hidden` is what the last block leaves."""

        def answer(_: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            del args, kwargs
            return self._answer(hidden)

        with self._standing(answer):
            return outputs(task.run(self.model, batch))[0]

    def _answer(self, hidden: Tensor) -> Any:
        return hidden if self._beside is None else (hidden, *self._beside)

    def _learn(self, call: Call, hidden: Tensor) -> None:
        """What kind of answer a block gives: hidden states, or a tuple that begins with them."""
        if self._learned:
            return
        with self.block(0) as block, torch.no_grad():
            args = () if call.by_keyword else (hidden,)
            given = {HIDDEN: hidden} if call.by_keyword else {}
            answer = block(*args, *call.args, **call.kwargs, **given)
        if isinstance(answer, tuple):
            self._beside = tuple(None if each is None else _Beside() for each in answer[1:])
        self._learned = True

    @contextlib.contextmanager
    def _standing(self, answer: Callable[..., Any]) -> Iterator[None]:
        def one(k: int, block: nn.Module) -> _Stand:
            return _Stand(block, lambda args, kwargs: answer(k, args, kwargs))

        stands = nn.ModuleList(one(k, block) for k, block in enumerate(self.blocks))
        with self._without(stands), _uncached(getattr(self.model, "config", None)):
            yield

    @contextlib.contextmanager
    def _without(self, others: nn.ModuleList) -> Iterator[None]:
        """The network with other modules in place of its blocks."""
        before = self.model.get_submodule(self.path)
        replace_module(self.model, self.path, others)
        try:
            yield
        finally:
            replace_module(self.model, self.path, before)

    @contextlib.contextmanager
    def _filled(self, module: nn.Module, prefix: str) -> Iterator[None]:
        """A module of the network with its tensors read."""
        if self.tensors is None:
            yield
            return
        held = dict(module.named_parameters(remove_duplicate=False))
        made: dict[int, nn.Parameter] = {}
        for name, p in held.items():
            if p.is_meta and id(p) not in made:
                value = self.read(f"{prefix}{name}")
                if value.shape != p.shape:
                    raise FileError(
                        f"{prefix}{name} is {[*value.shape]} in the files, {[*p.shape]} in the "
                        "network of its config"
                    )
                made[id(p)] = nn.Parameter(value, requires_grad=False)
        for name, p in held.items():
            if id(p) in made:
                put(module, name, made[id(p)])
        try:
            yield
        finally:
            for name, p in held.items():
                if id(p) in made:
                    put(module, name, p)

    def names(self, name: str) -> tuple[str, ...]:
        """All names of a parameter: a table may be that of a head as well."""
        return (name, *(n for n in self._names.get(name, ()) if n != name))

    def stored_as(self, name: str) -> str:
        """That of the names of a parameter under which it is stored; raises FileError."""
        assert self.tensors is not None
        for each in self.names(name):
            if each in self.tensors:
                return each
        raise FileError(f"the files of the network lack the tensor {name!r}")

    def read(self, name: str) -> Tensor:
        """A tensor of the network in float32, under whichever of its names it is stored."""
        if self.tensors is None:
            return self.model.get_parameter(name).detach().float()
        return self.tensors[self.stored_as(name)].float()

    def kind(self, name: str) -> torch.dtype:
        """The type in which a tensor is stored."""
        if self.tensors is None:
            return self.types.get(name, self.model.get_parameter(name).dtype)
        return self.tensors[self.stored_as(name)].dtype

    def _require_no_memory(self, call: Call, hidden: Tensor) -> None:
        """Refuse blocks that answer otherwise once they have been called, as with a cache."""
        with self.block(0) as block, torch.no_grad():
            one = call(block, hidden.clone())
            call(block, hidden.roll(1, -1))
            same = _alike(one, call(block, hidden.clone()))
        if not same:
            raise ModelError(
                f"block 0 of {self.path} answers otherwise when it is called again: it is given "
                "something that it writes to, such as a cache of keys and values; let the forward "
                "of the task do without (use_cache=False)"
            )

    def require_a_chain(self, task: Task, batch: Batch) -> None:
        """Refuse a network whose blocks are given more than what the block before them leaves.

        To be called while `ends` is open. Raises ModelError, naming the block.
        """
        hidden, calls = self.enter(task, batch)
        if not hidden.is_floating_point():
            raise ModelError(f"the blocks of {self.path} work on {hidden.dtype}, not on floats")
        moved: list[Call] = []
        left: list[Tensor] = []
        noise = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0))

        def answer(k: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            given, call = _taken_apart(args, kwargs)
            if k and not _alike(given, left[-1]):
                raise ModelError(
                    f"block {k} of {self.path} works on something else than what the block before "
                    "it leaves, so blocks cannot be taken one by one; use another method"
                )
            moved.append(call)
            left.append(given + noise.to(given))
            if k + 1 == len(self):
                raise _EnoughError
            return self._answer(left[-1])

        with self._standing(answer), contextlib.suppress(_EnoughError):
            task.run(self.model, batch)
        self._require_no_memory(calls[0], hidden)
        for k, (one, other) in enumerate(zip(calls, moved, strict=True)):
            if not _alike((one.args, one.kwargs), (other.args, other.kwargs)):
                raise ModelError(
                    f"block {k} of {self.path} is given what depends on other blocks than the one "
                    "before it, so blocks cannot be taken one by one; use another method"
                )


@contextlib.contextmanager
def _uncached(config: Any) -> Iterator[None]:
    """A network of transformers without a cache of keys and values, for as long as this lasts."""
    before = getattr(config, "use_cache", None)
    if before is None:
        yield
        return
    config.use_cache = False
    try:
        yield
    finally:
        config.use_cache = before


def _longest(model: nn.Module) -> str:
    """The name of the list of equal blocks that holds most of the network."""
    found: dict[str, int] = {}
    for name, module in model.named_modules():
        kinds = {type(m) for m in module.children()}
        if isinstance(module, nn.ModuleList) and len(module) > 1 and len(kinds) == 1:
            found[name] = sum(p.numel() for p in module.parameters())
    if not found:
        raise ModelError(
            "the network holds no list of equal blocks (nn.ModuleList), such as the layers of a "
            "transformer; use another method"
        )
    return max(found, key=found.__getitem__)


def _taken_apart(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Call]:
    """The hidden states, and the rest of a call."""
    if args:
        return args[0], Call(_detached(args[1:]), _detached(dict(kwargs)), False)
    if HIDDEN not in kwargs:
        raise ModelError(f"a block is given no {HIDDEN} and no argument by position")
    rest = {name: value for name, value in kwargs.items() if name != HIDDEN}
    return kwargs[HIDDEN], Call((), _detached(rest), True)


def _detached(value: Any) -> Any:
    """Tensors without the graph behind them, in whatever holds them."""
    if isinstance(value, Tensor):
        return value.detach()
    if type(value) in (tuple, list):
        return type(value)(_detached(v) for v in value)
    if type(value) is dict:
        return {k: _detached(v) for k, v in value.items()}
    return value


def _alike(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and bool(torch.equal(one, other))
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_alike(one[k], other[k]) for k in one)
    if isinstance(one, tuple | list) and isinstance(other, tuple | list):
        return len(one) == len(other) and all(map(_alike, one, other))
    return type(one) is type(other)


def put(module: nn.Module, name: str, value: nn.Parameter) -> None:
    """Put a parameter in the place of another."""
    owner, _, leaf = name.rpartition(".")
    module.get_submodule(owner)._parameters[leaf] = value  # noqa: SLF001 (setattr refuses meta)
