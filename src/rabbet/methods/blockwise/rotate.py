"""A network whose hidden states are turned by an orthogonal matrix: it answers the same.

A norm without a mean (RMSNorm) commutes with a turn once its weight is folded into the linears
behind it. What writes to the hidden states is turned, what reads them is turned back, so that no
channel is much larger than others (QuaRot, arXiv 2404.00456; SpinQuant, arXiv 2405.16406).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from rabbet.layers import Site
from rabbet.methods.blockwise.bench import Bench
from rabbet.methods.blockwise.draft import wearing
from rabbet.methods.blockwise.looking import by_block
from rabbet.methods.blockwise.stack import Call, Stack
from rabbet.methods.blockwise.wiring import norm_like, same
from rabbet.model.hooks import Hook, hooked
from rabbet.model.surgery import copied

STRAIGHT = "rotate: {why}, so that a turn of its hidden states would change its answers: left out"


def turn(width: int, seed: int) -> Tensor:
    """A random orthogonal matrix [width, width], float32, of Hadamard blocks.

    It is a Hadamard matrix of the largest power of two in the width, times a random orthogonal one
    of what is left, with random signs.
    """
    power = width & -width
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    while len(hadamard) < power:
        hadamard = torch.cat(
            [torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)]
        )
    g = torch.Generator().manual_seed(seed)
    small, _ = torch.linalg.qr(torch.randn(width // power, width // power, generator=g).double())
    signs = torch.randint(0, 2, (width,), generator=g).double() * 2 - 1
    return (signs[:, None] * torch.kron(hadamard / power**0.5, small.contiguous())).float()


@dataclass(frozen=True)
class Rotation:
    """Which parameters of a network change with a turn of its hidden states, and how.

    readers: sites that are given hidden states behind a norm, with the parameter of the norm that
    is folded into them; None: none is. writers: sites, and tables, that make hidden states.
    """

    turn: Tensor
    readers: Mapping[str, str | None]
    writers: Sequence[str]
    sites: Mapping[str, Site]

    @property
    def names(self) -> Iterator[str]:
        """Of all parameters that change."""
        for name in (*self.readers, *self.writers):
            yield f"{name}.weight"
            if name in self.writers and self.sites[name].bias:
                yield f"{name}.bias"
        yield from dict.fromkeys(norm for norm in self.readers.values() if norm is not None)

    def value(self, stack: Stack, name: str) -> Tensor:
        """A parameter that changes, of the network as it was, in the layout of its module."""
        site = self.sites.get(name.rpartition(".")[0])
        if site is None:  # a norm
            return torch.ones_like(stack.read(name))
        held: Any = nn.Module()
        held.weight = stack.read(name)
        about = self.turn.to(held.weight.device)
        if name.endswith(".bias"):
            bias: Tensor = held.weight.double() @ about.double()
            return bias.float()
        weight = site.kind.weight(held).double()
        if site.name in self.readers:
            norm = self.readers[site.name]
            gain = 1.0 if norm is None else stack.read(norm).double()
            weight = weight * gain @ about.double()
        else:
            weight = weight @ about.double() if site.looks_up else about.double().T @ weight
        return site.native(weight.float())


class Rotated(Mapping[str, Tensor]):
    """The tensors of a folder as those of the turned network."""

    def __init__(self, stack: Stack, rotation: Rotation) -> None:
        """stack: of the network as it is, with tensors."""
        assert stack.tensors is not None
        self._plain, self._straight, self._rotation = stack.tensors, stack, rotation
        self._names = {each: name for name in rotation.names for each in stack.names(name)}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            return self._plain[name]
        value, kind = (
            self._rotation.value(self._straight, self._names[name]),
            self._plain[name].dtype,
        )
        exact = value.to(kind).float()  # as norms of ones are, in any type
        return value.to(kind) if torch.equal(exact, value) else value

    def __contains__(self, name: object) -> bool:
        return name in self._plain

    def __iter__(self) -> Iterator[str]:
        return iter(self._plain)

    def __len__(self) -> int:
        return len(self._plain)


def turned(bench: Bench) -> Bench:
    """A bench whose network has its hidden states turned; a note says why, if it has not.

    What a folder holds is turned as it is read, what is in memory is a copy.
    """
    looking = Turning(bench)
    about, stack = looking(), bench.stack
    if about is None:
        return replace(bench, notes=(*bench.notes, STRAIGHT.format(why=looking.why)))
    if stack.tensors is not None:
        other = Stack(stack.model, Rotated(stack, about))
    else:
        model = copied(stack.model)
        with torch.no_grad():
            for name in about.names:
                model.get_parameter(name).copy_(about.value(stack, name))
        other = Stack(model, types=stack.types)
    return replace(bench, stack=other, told=f"{bench.told} turned")


class Turning:
    """Looks for a rotation of a network, and proves it part by part."""

    def __init__(self, bench: Bench) -> None:
        self.stack, self.task, self.seed = bench.stack, bench.task, bench.seed
        self.batch = bench.batches[0]
        self.outside, self.inside = by_block(bench.stack, bench.survey)
        self.why = ""

    @torch.no_grad()
    def __call__(self) -> Rotation | None:
        """The rotation; None if it would change answers, and `why` says what shows it."""
        with self.stack.ends() as model:
            hidden, calls = self.stack.enter(self.task, self.batch)
            width = hidden.shape[-1]
            tables = [s.name for s in self.outside if s.looks_up and s.columns == width]
            sites = {s.name: s for s in self.outside}
            heads = {h: s.name for s in self.outside for h in s.heads}
            heads |= {s.name: s.name for s in self.outside if not s.looks_up}
            norms = self._norms(
                model, "", list(heads), lambda: self.stack.leave(self.task, self.batch, hidden)
            )
            readers: dict[str, str | None] = {}
            for head, norm in norms.items():
                weight = self.stack.read(norm)
                if heads[head] not in tables:
                    readers[heads[head]] = norm
                elif not bool(torch.allclose(weight, weight[:1], rtol=1e-6, atol=0)):
                    self.why = f"{head} shares the table of words, behind a norm with weights"
                    return None
            about = Rotation(turn(width, self.seed), readers, tables, sites)
            if not self._ends_agree(model, about, hidden):
                return None
        for k, own in enumerate(self.inside):
            found = self._block(k, own, calls[k], hidden, about)
            if found is None:
                return None
            part, hidden = found
            about = Rotation(
                about.turn,
                {**about.readers, **part.readers},
                (*about.writers, *part.writers),
                {**about.sites, **part.sites},
            )
        return about

    def _ends_agree(self, model: nn.Module, about: Rotation, hidden: Tensor) -> bool:
        before = self.stack.leave(self.task, self.batch, hidden)
        turned = hidden @ about.turn.to(hidden)
        with wearing(model, self._values(about, about.names)):
            entered, _ = self.stack.enter(self.task, self.batch)
            after = self.stack.leave(self.task, self.batch, turned)
        if not same(entered, turned):
            self.why = "what its blocks begin with is not made by tables alone"
        elif not same(after, before):
            self.why = "what is behind its last block is no norm without a mean and a linear"
        return not self.why

    def _block(
        self, k: int, sites: Sequence[Site], call: Call, hidden: Tensor, about: Rotation
    ) -> tuple[Rotation, Tensor] | None:
        """The part of one block, and the hidden states behind it."""
        within = {self.stack.within(s.name): s for s in sites}
        with self.stack.block(k) as block:
            prefix = self.stack.prefix(k)
            norms = self._norms(block, prefix, list(within), lambda: call(block, hidden))
            readers: dict[str, str | None] = {within[n].name: norm for n, norm in norms.items()}
            width = hidden.shape[-1]
            writers = [s.name for s in sites if s.name not in readers and s.shape[0] == width]
            part = Rotation(about.turn, readers, writers, {s.name: s for s in sites})
            before = call(block, hidden)
            about_here = part.turn.to(hidden)
            values = self._values(part, part.names)
            with wearing(block, {self.stack.within(n): t for n, t in values.items()}):
                after = call(block, hidden @ about_here)
        if not same(after, before @ about_here):
            self.why = f"block {k} has norms with a mean, or mixes hidden states otherwise"
            return None
        return part, before

    def _values(self, about: Rotation, names: Iterator[str]) -> dict[str, Tensor]:
        """Changed parameters under all their names."""
        made = {name: about.value(self.stack, name) for name in names}
        return {each: t for name, t in made.items() for each in self.stack.names(name)}

    def _norms(
        self, module: nn.Module, prefix: str, readers: Sequence[str], run: Any
    ) -> dict[str, str]:
        """By the layers that are given what a norm makes, the name of the weight of that norm."""
        made: dict[int, tuple[str, Tensor]] = {}
        found: dict[str, str] = {}

        def makes(name: str) -> Any:
            def seen(_: nn.Module, __: Any, out: Tensor) -> None:
                made[out.data_ptr()] = name, out

            return seen

        def reads(name: str) -> Any:
            def seen(_: nn.Module, args: tuple[Tensor, ...], __: Any) -> None:
                if args[0].data_ptr() in made:
                    found[name] = f"{prefix}{made[args[0].data_ptr()][0]}.weight"

            return seen

        after: list[Hook] = [(m, makes(n)) for n, m in module.named_modules() if norm_like(m)]
        before: list[Hook] = [(module.get_submodule(n), reads(n)) for n in readers]
        with hooked(after=after, before=before):
            run()
        return found
