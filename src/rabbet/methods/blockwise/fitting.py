"""Blocks fitted one after the other, each for what the compressed blocks before it leave.

Its layers are solved in the metric of the inputs that they meet there, then all codes and scales of
the block are tuned so that it answers as the float block does (`tuning`). No labels are needed, and
gradients reach through one block.
"""

import contextlib
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rabbet.core.plan import LayerPlan, Plan
from rabbet.jobs import Job, Jobs, Tensors
from rabbet.layers import Site
from rabbet.methods.blockwise.bench import Bench, Known
from rabbet.methods.blockwise.draft import Draft, rest_among, wearing
from rabbet.methods.blockwise.gathering import Gathering, behind, met
from rabbet.methods.blockwise.looking import by_block, placed
from rabbet.methods.blockwise.prepare import Choosing, Ways, prepared
from rabbet.methods.blockwise.shelf import Shelf
from rabbet.methods.blockwise.stack import Call, Stack
from rabbet.methods.blockwise.tuning import BlockCourse, Given, Pacing, tuned
from rabbet.methods.blockwise.wiring import Wiring
from rabbet.model.compressed import Compressed, Head, Numbers
from rabbet.model.surgery import replace_module
from rabbet.reconstruct.candidates import forget_metrics, read_numbers, solve_site
from rabbet.reconstruct.network import expected_seconds
from rabbet.spread import portions, spread


@dataclass(frozen=True)
class Finished:
    """Some sites whose numbers are found: see `numbers_of`. keys: see `Bench.numbers`."""

    keys: tuple[str, ...]
    names: tuple[str, ...]
    numbers: Tensors


def fit_blocks(
    bench: Bench, plan: Plan, pacing: Pacing, known: Known, ways: Ways
) -> Generator[Finished, None, Shelf]:
    """The numbers of the ends, then of each block, as they are found.

    What is finished is kept in the jobs. Sites without a line stay as they are. Returns the float
    network's hidden states behind the last block.
    """
    forget_metrics()  # of the float network's inputs, which nothing is solved in from here on
    outside, inside = by_block(bench.stack, bench.survey)
    settings = {"pacing": pacing, "plan": str(plan), "ways": ways, "known": known.key}
    planned = [[s for s in sites if plan.get(s.name)] for sites in (outside, *inside)]
    ends = _solved_ends(bench, plan, planned[0], settings, known)
    yield ends
    theirs, calls = bench.begun
    ours, count, now = _begun(bench, plan, planned[0], ends.numbers), len(inside), Shelf()
    key = bench.key("blockwise.block", {**settings, "block": 0}, ends.numbers)
    del ends  # as large as the network's table and head
    for i in range(len(bench.batches)):
        now.put(i, theirs[i])
    for k, sites in enumerate(planned[1:]):
        bench.jobs.progress("fitting blocks", k, count)
        found = bench.jobs.kept(key)
        work = _Block(bench, plan, k, sites, [each[k] for each in calls], known, ways)
        with bench.stack.block(k) as block:
            if found is None:
                found, now = work.fitted(block, now, ours, pacing)
                bench.jobs.keep(key, found)
            else:
                work.run(block, now, now)
            work.go_on(block, found, ours)
        yield Finished((key,), tuple(s.name for s in sites), found)
        key = bench.key("blockwise.block", {**settings, "block": k + 1}, found)
    bench.jobs.progress("fitting blocks", count, count)
    return now


def numbers_of(found: Tensors, line: LayerPlan) -> Numbers:
    """The factors of one site among the numbers that `fit_blocks` gives."""
    own = {
        f"0.{name.removeprefix(f'{line.name}/')}": t
        for name, t in found.items()
        if name.startswith(f"{line.name}/")
    }
    return read_numbers(own, [line.terms], 0)


def _kept(site: Site, given: Mapping[str, Tensor], result: Tensors) -> Tensors:
    """The numbers of the only entry of a menu under the name of its site; see `errors_of`.

    given: what it was solved from.
    """
    found = {f"{site.name}/{key.removeprefix('0.')}": t for key, t in result.items()}
    rows, second = site.matrix(given["weight"]).float(), given.get("second")
    whole = ((rows if second is None else rows @ second) * rows).sum(dtype=torch.float64)
    error = result["0.error"].double() / whole.clamp_min(1e-30)
    return found | {f"{site.name}/error": error.sqrt().float()}


def _unkept(jobs: Jobs) -> Jobs:
    """The same executor for work that is kept as part of a block, and not by itself."""
    return Jobs(jobs.executor, None, jobs.progress)


def errors_of(found: Tensors) -> dict[str, float]:
    """The error of each layer's output when it was solved, relative to what was wanted of it.

    Inputs are those that it meets behind compressed blocks; a layer that is written otherwise is
    compared with what it is then.
    """
    return {
        name.removesuffix("/error"): float(t)
        for name, t in found.items()
        if name.endswith("/error")
    }


def _of_layer(name: str, layer: Compressed) -> Tensors:
    """The numbers of a layer as `numbers_of` reads them."""
    found: Tensors = {}
    for t, factors in enumerate(layer.factors):
        for f, factor in enumerate(factors):
            codes = factor.codes.detach()
            floats = factor.grid.codebook.floats
            found[f"{name}/{t}.{f}.codes"] = codes.clone() if floats else codes.to(torch.int8)
            found[f"{name}/{t}.{f}.scale"] = factor.scale.detach().clone()
            if factor.zero is not None:
                found[f"{name}/{t}.{f}.zero"] = factor.zero.detach().clone()
    if layer.bias is not None:
        found[f"{name}/bias"] = layer.bias.detach().clone()
    return found


def compressed(site: Site, plan: Plan, found: Tensors, bias: Tensor | None) -> Compressed:
    """The layer of a site with the numbers that were found; bias: the float layer's."""
    line, bias = plan[site.name], found.get(f"{site.name}/bias", bias)
    return Compressed(site, line, numbers_of(found, line), bias).eval()


def _standing_for(module: Any, site: Site, plan: Plan, found: Tensors) -> Compressed:
    """The layer that takes the place of a module."""
    made = compressed(site, plan, found, getattr(module, "bias", None))
    return made.to(site.kind.weight(module).device)


def _layers_of(
    stack: Stack, block: nn.Module, sites: Sequence[Site], plan: Plan, found: Tensors
) -> dict[str, Compressed]:
    """The compressed layers of a block, by their names within it."""
    return {
        stack.within(s.name): _standing_for(module, s, plan, found)
        for s, module in placed(stack, block, sites)
    }


def _solved_ends(
    bench: Bench, plan: Plan, sites: Sequence[Site], settings: Mapping[str, Any], known: Known
) -> Finished:
    """The sites outside of the blocks, each for the float network's inputs."""
    key = bench.key("blockwise.ends", dict(settings), {})
    names = tuple(site.name for site in sites)
    kept = bench.jobs.kept(key)
    if kept is not None:
        return Finished((key,), names, kept)
    found: Tensors = {}
    with bench.stack.ends() as model:
        jobs: list[Job] = []
        for site in sites:
            weight = site.weight(model).detach()
            given = {"weight": weight}
            if site.name in known.ends:
                given["second"] = known.ends[site.name].to(weight.device)
            jobs.append((solve_site, given, {"site": site, "menu": (plan[site.name].terms,)}))
        times = [expected_seconds(site, 1) for site in sites]
        results = _unkept(bench.jobs).run("solving ends", jobs, times)
        for site, job, result in zip(sites, jobs, results, strict=True):
            found |= _kept(site, job[1], result)
    bench.jobs.keep(key, found)
    return Finished((key,), names, found)


def _begun(bench: Bench, plan: Plan, sites: Sequence[Site], ends: Tensors) -> Shelf:
    """The hidden states before the first block with the ends compressed."""
    shelf = Shelf()
    with bench.stack.ends() as model, torch.no_grad(), swapped_ends(model, sites, plan, ends):
        for i, batch in enumerate(bench.batches):
            shelf.put(i, bench.stack.enter(bench.task, batch)[0])
    return shelf


@contextlib.contextmanager
def swapped_ends(
    model: nn.Module, sites: Sequence[Site], plan: Plan, found: Tensors
) -> Iterator[list[Compressed]]:
    """A network whose ends are compressed, for as long as this lasts; gives the layers."""
    others: dict[str, nn.Module] = {}
    layers: list[Compressed] = []
    for site in sites:
        layer = _standing_for(model.get_submodule(site.name), site, plan, found)
        layers.append(layer)
        others |= dict.fromkeys(site.names, layer)
        for head in site.heads:
            bias: Any = model.get_submodule(head).bias
            others[head] = Head(layer, bias).eval()
    with swapped(model, others):
        yield layers


@contextlib.contextmanager
def swapped_block(
    stack: Stack, block: nn.Module, sites: Sequence[Site], plan: Plan, found: Tensors
) -> Iterator[list[Compressed]]:
    """A block that is compressed, for as long as this lasts; gives the layers of its sites."""
    rest = {stack.within(n): t for n, t in rest_among(found).items()}
    layers = _layers_of(stack, block, sites, plan, found)
    with wearing(block, rest), swapped(block, layers):
        yield list(layers.values())


@contextlib.contextmanager
def swapped(model: nn.Module, others: Mapping[str, nn.Module]) -> Iterator[None]:
    """A module some of whose parts are others, for as long as this lasts."""
    before = {name: model.get_submodule(name) for name in others}
    for name, module in others.items():
        replace_module(model, name, module)
    try:
        yield
    finally:
        for name, module in before.items():
            replace_module(model, name, module)


@dataclass(frozen=True)
class _Block:
    """One block being fitted. calls: what it is given besides the hidden states, by batch."""

    bench: Bench
    plan: Plan
    k: int
    sites: Sequence[Site]
    calls: Sequence[Call]
    known: Known
    ways: Ways

    def fitted(
        self, block: nn.Module, theirs: Shelf, ours: Shelf, pacing: Pacing
    ) -> tuple[Tensors, Shelf]:
        """Numbers for the layers of a float block, and the hidden states behind it.

        theirs, ours: the hidden states before it, of the float network and of the compressed one.
        """
        moments, wanted = self._met(block, theirs, ours)
        if not self.sites:
            return {}, wanted
        draft = self._draft(block, moments, theirs[0])
        found = self._solved(draft) | draft.kept(self.bench.stack.prefix(self.k))
        if not pacing.epochs:
            return found, wanted
        with draft.worn(block):
            return self._tuned(block, found, ours, wanted, pacing), wanted

    def _met(self, block: nn.Module, theirs: Shelf, ours: Shelf) -> tuple[Tensors, Shelf]:
        """Second moments of the inputs of all sites, and the hidden states behind the block."""
        jobs, count = self.bench.jobs, len(self.calls)
        sites = [(s, self.bench.stack.within(s.name)) for s in self.sites]
        given = ((theirs[i], ours[i], call) for i, call in enumerate(self.calls))
        gathering, wanted = Gathering(), Shelf()
        stage = f"measuring block {self.k + 1} of {len(self.bench.stack)}"
        for outs, part in spread(jobs, stage, met, (block, sites), portions(given, count)):
            gathering.add(part)
            for out in outs:
                wanted.put(len(wanted), out)
        return dict(gathering.means(jobs, stage)), wanted

    def _draft(self, block: nn.Module, moments: Mapping[str, Tensor], hidden: Tensor) -> Draft:
        """The block as its layers are solved: written otherwise where that pays.

        moments: of inputs, by site. hidden: some hidden states before it.
        """
        within = self.bench.stack.within
        sites = {within(s.name): s for s in self.sites}
        seconds = {n: moments[s.name] for n, s in sites.items() if s.name in moments}
        draft = Draft.of(block, sites, seconds)
        if not self.ways.any:
            return draft
        wiring = Wiring(block, draft, self.calls[0], hidden, self.bench.stack, self.k)
        ratios = {n: self.known.ratios[s.name] for n, s in sites.items()}
        stage = f"preparing block {self.k + 1} of {len(self.bench.stack)}"
        choosing = Choosing(self.ways, ratios, self.bench.jobs, stage)
        lines = {n: self.plan[s.name] for n, s in sites.items()}
        return prepared(block, wiring, lines, choosing)

    def _solved(self, draft: Draft) -> Tensors:
        """The numbers of all layers, each for the inputs that it meets."""
        jobs: list[Job] = []
        for name, site in draft.sites.items():
            given = {"weight": draft.weights[name]}
            if name in draft.moments:
                given["second"] = draft.moments[name]
            jobs.append((solve_site, given, {"site": site, "menu": (self.plan[site.name].terms,)}))
        stage = f"fitting block {self.k + 1} of {len(self.bench.stack)}"
        seconds = [expected_seconds(site, 1) for site in self.sites]
        found: Tensors = {}
        results = _unkept(self.bench.jobs).run(stage, jobs, seconds)
        for site, job, result in zip(self.sites, jobs, results, strict=True):
            found |= _kept(site, job[1], result)
        return found

    def _tuned(
        self, block: nn.Module, found: Tensors, ours: Shelf, wanted: Shelf, pacing: Pacing
    ) -> Tensors:
        """The numbers tuned, if the batches that are held back agree."""
        layers = _layers_of(self.bench.stack, block, self.sites, self.plan, found)
        within = self.bench.stack.within
        places = placed(self.bench.stack, block, self.sites)
        weights = {within(s.name): s.kind.weight(module).detach() for s, module in places}
        given = Given(self.calls, ours, wanted)
        stage = f"tuning block {self.k + 1} of {len(self.bench.stack)}"
        with swapped(block, layers):
            course = BlockCourse(block, layers, weights, given, pacing)
            if not tuned(course, self.bench.jobs, stage):
                return found
        own = {s.name: layers[within(s.name)] for s in self.sites}
        return found | {
            part: t for name, layer in own.items() for part, t in _of_layer(name, layer).items()
        }

    def go_on(self, block: nn.Module, found: Tensors, ours: Shelf) -> None:
        """Put the hidden states behind the compressed block in place of those before it."""
        with swapped_block(self.bench.stack, block, self.sites, self.plan, found):
            self.run(block, ours, ours)

    def run(self, block: nn.Module, before: Shelf, after: Shelf) -> None:
        """Run a block on the hidden states before it, which may be replaced by those after it."""
        stage = f"running block {self.k + 1} of {len(self.bench.stack)}"
        given = ((before[i], call) for i, call in enumerate(self.calls))
        done = 0
        for outs in spread(self.bench.jobs, stage, behind, block, portions(given, len(self.calls))):
            for out in outs:
                after.put(done, out)
                done += 1
