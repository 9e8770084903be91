"""What is summed while a block runs: second moments of inputs, and what gradients say of errors."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from rabbet.errors import DataError
from rabbet.jobs import Job, Jobs, Tensors, silent
from rabbet.layers import Site
from rabbet.methods.blockwise.stack import Call
from rabbet.model.hooks import hooked
from rabbet.solve.metric import Metric
from rabbet.solve.shrinking import shrunk

Placed = Sequence[tuple[Site, nn.Module]]
"""Sites, each with the module that it is."""


def level(rows: Tensor) -> Tensor:
    """What inputs [groups, words, n] are multiplied by so that no word drowns the rest.

    Decoders give a few words, such as the first, hidden states hundreds of times as large as all
    others, behind which a norm stands: an error counts there by its share alone. So the square of
    a word counts `2 m / (its square + m)`, with m the median over the words of a batch: like all
    others up to about m, and no more than twice that however large it is.
    """
    squares = rows.square().sum((0, 2))
    if not len(squares):  # an expert that no word was sent to
        return rows.new_ones(1, 0, 1)
    middle = squares.median().clamp_min(torch.finfo(squares.dtype).tiny)
    return (2 * middle / (squares + middle)).sqrt()[None, :, None]


def mean_of(halves: Tensor, *, rows: Sequence[int]) -> Tensors:  # a job
    """See `shrunk`."""
    return {"mean": shrunk(halves, rows)}


class Gathering:
    """Sums x x^T over what sites are given; an input that several sites share is summed once.

    totals: over every second pass, [2, groups, n, n], in floats: each sum over a pass is.
    """

    def __init__(self) -> None:
        self.totals: dict[str, Tensor] = {}
        self.rows: dict[str, list[int]] = {}
        self.same: dict[str, str] = {}
        self.passes = 0
        self._last: tuple[Tensor, str] | None = None

    def hook(self, site: Site) -> Callable[..., None]:
        """A hook for the module of a site, or for a head of it."""
        role = site.head if site.heads else site

        def seen(_: nn.Module, args: tuple[Tensor, ...], __: dict[str, Any]) -> None:
            given = args[0]
            if self._last is not None and self._last[0] is given:
                self.same.setdefault(site.name, self._last[1])
                return
            self._last = (given, site.name)
            rows = role.patches(given.detach().float(), None, torch.Generator())
            rows = rows * level(rows)
            half = self.passes % 2
            if site.name not in self.totals:
                size = (2, len(rows), rows.shape[2], rows.shape[2])
                self.totals[site.name] = rows.new_zeros(size)
                self.rows[site.name] = [0, 0]
            total = self.totals[site.name][half].baddbmm_(rows.mT, rows)
            # no sum of products is larger than those of squares
            if not torch.isfinite(total.diagonal(dim1=1, dim2=2)).all():
                raise DataError(
                    f"the inputs of {site.name} hold NaN, infinite or far too large values"
                )
            self.rows[site.name][half] += rows.shape[1]

        return seen

    def means(self, jobs: Jobs, stage: str) -> Iterator[tuple[str, Tensor]]:
        """The second moments [groups, n, n] by site, see `shrunk`; none where no word came.

        Sums are let go of, for of a wide layer each is large: this gives them once.
        """
        totals, self.totals = self.totals, {}
        names = [name for name in totals if any(self.rows[name])]
        work: list[Job] = [
            (mean_of, {"halves": totals.pop(n)}, {"rows": tuple(self.rows[n])}) for n in names
        ]
        once = Jobs(jobs.executor, progress=silent)  # no mean is asked for again
        found = once.run(stage, work)
        del work  # the sums
        made = {name: each["mean"] for name, each in zip(names, found, strict=True)}
        yield from made.items()
        for name, other in self.same.items():
            if name not in made and other in made:
                yield name, made[other]

    def done(self) -> None:
        """Let go of the last input; to be called after each pass."""
        self._last = None
        self.passes += 1

    def add(self, other: "Gathering") -> None:
        """Take over what another summed over the next batches; that is of no more use then."""
        turn = self.passes % 2  # of what comes next, which half is which
        for name, total in other.totals.items():
            halves = total.flip(0) if turn else total
            self.totals[name] = self.totals[name].add_(halves) if name in self.totals else halves
            mine, theirs = self.rows.get(name, [0, 0]), other.rows[name]
            self.rows[name] = [mine[0] + theirs[turn], mine[1] + theirs[1 - turn]]
        other.totals.clear()
        self.same |= other.same
        self.passes += other.passes


Sites = list[tuple[Site, str]]
"""Sites of a block, with their names within it."""


@torch.no_grad()
def gathered(
    shared: tuple[nn.Module, Sites], part: Sequence[tuple[Tensor, Call]]
) -> tuple[list[Tensor], Gathering]:
    """The hidden states behind a block, and what its sites are given, summed."""
    block, sites = shared
    gathering, outs = Gathering(), []
    with hooked(before=[(block.get_submodule(n), gathering.hook(s)) for s, n in sites]):
        for hidden, call in part:
            outs.append(call(block, hidden))
            gathering.done()
    return outs, gathering


def met(
    shared: tuple[nn.Module, Sites], part: Sequence[tuple[Tensor, Tensor, Call]]
) -> tuple[list[Tensor], Gathering]:
    """The hidden states behind a float block, and what its sites are given behind compressed ones.

    part: hidden states before the block, of the float network and of the compressed one.
    """
    outs = behind(shared[0], [(theirs, call) for theirs, _, call in part])
    return outs, gathered(shared, [(ours, call) for _, ours, call in part])[1]


@torch.no_grad()
def behind(block: nn.Module, part: Sequence[tuple[Tensor, Call]]) -> list[Tensor]:
    """The hidden states behind a block."""
    return [call(block, hidden) for hidden, call in part]


class Felt:
    """Sums what errors of one site are worth, over gradients by its weight."""

    def __init__(self, site: Site, weight: Tensor, metric: Metric) -> None:
        self.site, self.metric, self.total = site, metric, 0.0
        rows = site.matrix(weight)
        self.sizes = rows.abs().amax(2).double().square()
        self.noise = float(self.sizes.sum()) * rows.shape[2]

    def add(self, slope: Tensor) -> None:
        """Take in a gradient by the canonical weight, of a sum over words."""
        spread = self.metric.whitened(self.site.matrix(slope))
        self.total += float((spread.square().sum(2).double() * self.sizes).sum())

    def ratio(self, words: int) -> float:
        """Divergence for each word over error, of noise such as rounding leaves."""
        return self.total / (2 * words * self.noise) if self.noise > 0 else 0.0


@contextlib.contextmanager
def learning(places: Placed) -> Iterator[Callable[[dict[str, Felt]], None]]:
    """Gradients by the weights of sites; what is given hands them on once they are there."""
    parameters = {site.name: module.weight for site, module in places}
    for p in parameters.values():
        assert isinstance(p, nn.Parameter)
        p.requires_grad_()

    def hand_on(felt: dict[str, Felt]) -> None:
        for site, _ in places:
            slope = parameters[site.name].grad
            if slope is not None:  # in the layout of the weight: so it can be read as one
                module: Any = SimpleNamespace(weight=slope)
                felt[site.name].add(site.kind.weight(module))

    try:
        with torch.enable_grad():
            yield hand_on
    finally:
        for p in parameters.values():
            p.requires_grad_(False)
            p.grad = None
