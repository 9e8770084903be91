"""What makes the inputs of a block's layers: found by watching a pass, proven by running the block.

Nothing is known of an architecture. What looks like a norm before some layers, or like a layer
whose outputs another one is given, is taken for it only if the block, written otherwise as if it
were so, answers the same.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rabbet.methods.blockwise.draft import Draft, Norm
from rabbet.methods.blockwise.stack import Call, Stack
from rabbet.model.hooks import Hook, hooked

NOISE = 1e-4  # of the largest value of a channel: what sums in another order may change
SPREAD = 0.5  # scales that are tried lie between e^-0.5 and e^0.5


@dataclass(frozen=True)
class Shared:
    """A norm, and the layers that are given what it makes."""

    norm: Norm
    readers: tuple[str, ...]

    def scaled(self, draft: Draft, block: nn.Module, scale: Tensor) -> Draft:
        """The block with scales, [channels], moved from the norm into the layers."""
        return draft.norm_scaled(block, self.norm, self.readers, scale)


@dataclass(frozen=True)
class Pair:
    """Two layers: to scale an output of the maker is to scale some inputs of the reader.

    source: which output, for each input of the reader; -1 where that cannot be told.
    """

    maker: str
    reader: str
    source: Tensor

    @property
    def readers(self) -> tuple[str, ...]:
        """The one."""
        return (self.reader,)

    def scaled(self, draft: Draft, block: nn.Module, scale: Tensor) -> Draft:
        """The block with scales, [inputs of the reader], moved from the maker into the reader.

        Inputs that come from the same output get their geometric mean.
        """
        del block
        count = len(draft.weights[self.maker])
        known = self.source >= 0
        place = self.source[known]
        logs, times = (torch.zeros(count, device=scale.device) for _ in range(2))
        logs.index_add_(0, place, scale.log()[known])
        times.index_add_(0, place, torch.ones_like(scale)[known])
        own = (logs / times.clamp_min(1)).exp()
        read = torch.ones_like(scale)
        read[known] = own[place]
        return draft.read_scaled(self.reader, read).made_scaled(self.maker, own)


@dataclass(frozen=True)
class Hidden:
    """Channels between layers that may come in any order: outputs of the makers, in step."""

    makers: tuple[str, ...]
    reader: str

    def ordered(self, draft: Draft, order: Tensor) -> Draft:
        """The block with its channels in an order: the first is what was `order[0]`."""
        for name in self.makers:
            draft = draft.made_ordered(name, order)
        return draft.read_ordered(self.reader, order)


class Wiring:
    """How the layers of one block hang together, as a pass of it shows.

    draft: the block as it is. All sites must have run in the pass, or nothing is found: what was
    not seen may depend on what is changed.
    """

    def __init__(
        self, block: nn.Module, draft: Draft, call: Call, hidden: Tensor, stack: Stack, k: int
    ) -> None:
        self.block, self.draft = block, draft
        self.stack, self.k = stack, k
        self._call, self._hidden = call, hidden
        self.made: dict[str, list[Tensor]] = {}
        norms = [
            (module, self._keeps(name))
            for name, module in block.named_modules()
            if name not in draft.sites and norm_like(module)
        ]
        self.inputs, self.out = self._run(norms)
        self.sound = set(self.inputs) == set(draft.sites)
        self.free = {n for n, s in draft.sites.items() if not s.tied and not s.heads and s.runs}
        self._order = [name for name in self.inputs if name in self.free]

    def _keeps(self, name: str) -> Callable[..., None]:
        def seen(_: nn.Module, __: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                self.made.setdefault(name, []).append(output.detach())

        return seen

    @torch.no_grad()
    def _run(self, after: Sequence[Hook] = ()) -> tuple[dict[str, list[Tensor]], Tensor]:
        """What each site is given, and what the block answers."""
        given: dict[str, list[Tensor]] = {}

        def keeps(name: str) -> Callable[..., None]:
            def seen(_: nn.Module, args: tuple[Tensor, ...], __: dict[str, Any]) -> None:
                given.setdefault(name, []).append(args[0].detach())

            return seen

        before = [(self.block.get_submodule(name), keeps(name)) for name in self.draft.sites]
        with hooked(after=after, before=before):
            return given, self._call(self.block, self._hidden)

    def proves(self, draft: Draft) -> bool:
        """Whether the block, written otherwise, answers the same to float noise."""
        with draft.worn(self.block), torch.no_grad():
            out = self._call(self.block, self._hidden)
        return same(out, self.out)

    def shared(self) -> Iterator[Shared]:
        """Norms whose outputs nothing but layers are given."""
        for name, outputs in self.made.items() if self.sound else ():
            places = {t.data_ptr(): t.numel() for t in outputs}
            readers = tuple(
                site
                for site, inputs in self.inputs.items()
                if site in self.free and all(places.get(t.data_ptr()) == t.numel() for t in inputs)
            )
            module: Any = self.block.get_submodule(name)
            parts = [n for n, _ in module.named_parameters()]
            full = [f"{self.stack.prefix(self.k)}{name}.{part}" for part in parts]
            if not readers or any(len(self.stack.names(n)) > 1 for n in full):
                continue
            bias = f"{name}.bias" if "bias" in parts else None
            kinds = tuple(self.stack.kind(n) for n in full)
            for offset in (0.0, 1.0) if bias is None else (0.0,):  # some count from one
                found = Shared(Norm(f"{name}.weight", bias, offset, kinds), readers)
                if self.proves(found.scaled(self.draft, self.block, self._some(readers[0]))):
                    yield found
                    break

    def pairs(self, taken: Sequence[str]) -> Iterator[Pair]:
        """Layers, each with the one that its outputs come to; but for readers that are taken."""
        used = set(taken)
        wide = {name: w.shape[1] for name, w in self.draft.weights.items()}
        for name in self._order if self.sound else ():
            count = len(self.draft.weights[name])
            behind = self._order[self._order.index(name) + 1 :]
            fits = [n for n in behind if n not in used and wide[n] % count == 0]
            if not fits:
                continue
            found = self._follows(name, count, fits)
            if found and self.proves(
                found.scaled(self.draft, self.block, self._some(found.reader))
            ):
                used.add(found.reader)
                yield found

    def _follows(self, maker: str, count: int, readers: Sequence[str]) -> Pair | None:
        """The first reader, if any, whose inputs are scaled with the outputs of a maker."""
        device = self.out.device
        factors = torch.linspace(-SPREAD, SPREAD, count, device=device).exp()
        factors = factors[torch.randperm(count, generator=torch.Generator().manual_seed(0))]
        given, _ = self._run([(self.block.get_submodule(maker), lambda _, __, out: out * factors)])
        for reader in readers:
            source = _sources(_rows(self.inputs[reader]), _rows(given[reader]), factors)
            if source is not None:
                return Pair(maker, reader, source)
        return None

    def hidden(self) -> Iterator[Hidden]:
        """Layers whose inputs may come in any order, with all those that make them."""
        for reader in self._order if self.sound else ():
            count = self.draft.weights[reader].shape[1]
            together: dict[int, list[str]] = {}  # those that share their input
            for name in self._order[: self._order.index(reader)]:
                if len(self.draft.weights[name]) == count:
                    place = self.inputs[name][0].data_ptr()
                    together.setdefault(place, []).append(name)
            for makers in together.values():
                found = Hidden(tuple(makers), reader)
                if self._moves(found, count):
                    yield found
                    break

    def _moves(self, hidden: Hidden, count: int) -> bool:
        order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
        order = order.to(self.out.device)
        turns = [
            (self.block.get_submodule(n), lambda _, __, y: y[..., order]) for n in hidden.makers
        ]
        given, _ = self._run(turns)
        before, after = _rows(self.inputs[hidden.reader]), _rows(given[hidden.reader])
        if before.shape != after.shape or not same(after, before[:, order]):
            return False
        return self.proves(hidden.ordered(self.draft, order))

    def _some(self, reader: str) -> Tensor:
        """Scales to try, [columns of a reader]."""
        count = self.draft.weights[reader].shape[1]
        drawn = torch.rand(count, generator=torch.Generator().manual_seed(1))
        return ((2 * drawn - 1) * SPREAD).exp().to(self.out.device)


def norm_like(module: nn.Module) -> bool:
    """Whether a module has no parts, a weight for each channel, and at most a bias beside."""
    own: Mapping[str, nn.Parameter] = dict(module.named_parameters())
    weight = own.get("weight")
    return (
        weight is not None
        and weight.ndim == 1
        and set(own) <= {"weight", "bias"}
        and all(p.shape == weight.shape for p in own.values())
        and next(module.children(), None) is None
    )


def _rows(given: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1, t.shape[-1]) for t in given]).float()


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors [..., channels] are the same in each channel, to float noise."""
    if one.shape != other.shape:
        return False
    one, other = one.float().flatten(0, -2), other.float().flatten(0, -2)
    off, size = (one - other).abs().amax(0), other.abs().amax(0)
    return bool((off <= NOISE * size).all())


def _sources(before: Tensor, after: Tensor, factors: Tensor) -> Tensor | None:
    """For each channel the factor that it was multiplied with; None if that is not what happened.

    Channels that are always zero tell nothing: -1, where channels are no fewer than factors.
    """
    if before.shape != after.shape:
        return None
    power = before.square().sum(0)
    ratio = (before * after).sum(0) / power.clamp_min(1e-30)
    values, order = factors.sort()
    place = torch.searchsorted(values, ratio).clamp(1, len(values) - 1)
    place = torch.where(ratio - values[place - 1] < values[place] - ratio, place - 1, place)
    dead = power == 0
    if not same(after, before * torch.where(dead, 1.0, values[place])):
        return None
    source = torch.where(dead, -1, order[place])
    clear = len(source[~dead].unique()) == int((~dead).sum()) or not dead.any()
    return source if clear else None
