"""What the method works on: a stack with its survey, the user's batches, the jobs, the seed."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from rabbet.core.survey import Survey
from rabbet.data.answers import Answers
from rabbet.data.batches import Batch
from rabbet.data.task import Task
from rabbet.errors import FileError
from rabbet.jobs import Jobs, Tensors
from rabbet.layers import Site
from rabbet.methods.blockwise.looking import Look, by_block, placed
from rabbet.methods.blockwise.shelf import Shelf
from rabbet.methods.blockwise.stack import Call, Stack
from rabbet.reconstruct.candidates import Terms
from rabbet.reconstruct.network import FORETOLD, expected_seconds
from rabbet.reconstruct.prediction import predict_errors
from rabbet.spread import PARTS

Menus = Mapping[str, Sequence[Terms]]
"""What may become of each site."""


@dataclass(frozen=True)
class Known:
    """What choosing and fitting need of the float network.

    harms: of each entry of each site's menu, in nats a word; ratios: see `Seen`; ends: second
    moments of the sites outside of the blocks; key: of the work that found them.
    """

    harms: Mapping[str, list[float]]
    ratios: Mapping[str, float]
    ends: Mapping[str, Tensor]
    key: str


@dataclass
class Bench:
    """A float network, one block at a time.

    told: the fingerprint of all that results depend on. answers: what its outputs are; None: scores
    of words.
    """

    stack: Stack
    survey: Survey
    task: Task
    jobs: Jobs
    seed: int
    told: str
    answers: Answers | None = None
    notes: tuple[str, ...] = ()
    _known: dict[str, Known] = field(default_factory=dict, repr=False)

    @cached_property
    def batches(self) -> list[Batch]:
        """All batches of the task; of few that are large, parts, so that one can be held back."""
        batches, axes = self.task.read(), self.task.examples
        count = sum(map(axes.count, batches))
        if len(batches) >= PARTS or count < 2 or not axes.known:
            return batches
        return list(axes.portions(batches, max(1, count // (2 * PARTS))))

    @cached_property
    def begun(self) -> tuple[Shelf, list[list[Call]]]:
        """The hidden states before the first block, and what each block is given, by batch."""
        shelf, calls = Shelf(), list[list[Call]]()
        with self.stack.ends(), torch.no_grad():
            for i, batch in enumerate(self.batches):
                hidden, each = self.stack.enter(self.task, batch)
                shelf.put(i, hidden)
                calls.append(each)
        return shelf, calls

    def key(self, name: str, settings: Mapping[str, Any], given: Mapping[str, Tensor]) -> str:
        """The key of work on this network and its batches."""
        return self.jobs.key(name, given, {**settings, "told": self.told, "seed": self.seed})

    def numbers(self, keys: Sequence[str]) -> Tensors:
        """What the jobs keep under some keys; of numbers under several of them the last.

        Raises FileError if it has gone.
        """
        found: Tensors = {}
        for key in keys:
            kept = self.jobs.kept(key)
            if kept is None:
                raise FileError("finished work has gone meanwhile; run it again")
            found |= kept
        return found

    def known(self, menus: Menus, scored: int) -> Known:
        """What is measured of the float network; scored: examples that gradients are taken of.

        Kept in the jobs, so that a run that was stopped does not measure again.
        """
        shown = {
            name: [" + ".join(map(str, terms)) for terms in menu] for name, menu in menus.items()
        }
        key = self.key("blockwise.known", {"menus": shown, "scored": scored}, {})
        if key not in self._known:
            found = self.jobs.kept(key)
            if found is None:
                found = self._measured(menus, scored)
                self.jobs.keep(key, found)
            self._known[key] = Known(
                {
                    n.partition("/")[2]: t.tolist()
                    for n, t in found.items()
                    if n.startswith("harm/")
                },
                {n.partition("/")[2]: float(t) for n, t in found.items() if n.startswith("ratio/")},
                {n.partition("/")[2]: t for n, t in found.items() if n.startswith("end/")},
                key,
            )
        return self._known[key]

    def _measured(self, menus: Menus, scored: int) -> Tensors:
        counts = [self.task.examples.count(batch) for batch in self.batches]
        some = next((k for k in range(len(counts)) if sum(counts[:k]) >= scored), len(counts))
        look = Look(
            self.stack,
            self.survey,
            self.task,
            self.batches,
            scored=max(1, some),
            jobs=self.jobs,
            answers=self.answers,
        )
        seen = look(self.seed)
        outside, inside = by_block(self.stack, self.survey)
        ratios = _filled(seen.ratios)
        found: Tensors = {f"ratio/{n}": torch.tensor(r).double() for n, r in ratios.items()}

        def foretell(sites: Sequence[Site], weights: Mapping[str, Tensor], stage: str) -> None:
            jobs = []
            for site in sites:
                given = {"weight": weights[site.name]}
                if site.name in seen.moments:
                    given["second"] = seen.moments[site.name]
                jobs.append(
                    (predict_errors, given, {"site": site, "menu": tuple(menus[site.name])})
                )
            seconds = [FORETOLD * expected_seconds(s, len(menus[s.name])) for s in sites]
            for site, each in zip(sites, self.jobs.run(stage, jobs, seconds), strict=True):
                found[f"harm/{site.name}"] = ratios[site.name] * each["errors"]

        with self.stack.ends() as model:
            foretell(
                outside, {s.name: s.weight(model).detach() for s in outside}, "predicting ends"
            )
        for site in outside:
            if site.name in seen.moments:
                found[f"end/{site.name}"] = seen.moments[site.name].clone()  # some are one tensor
        for k, sites in enumerate(inside):
            with self.stack.block(k) as block:
                weights = {
                    s.name: s.kind.weight(module).detach()
                    for s, module in placed(self.stack, block, sites)
                }
                foretell(sites, weights, f"predicting block {k + 1} of {len(inside)}")
        return found


def _filled(ratios: Mapping[str, float]) -> dict[str, float]:
    """Ratios, with the median for sites that no gradient reached: not known is not harmless.

    Such as an expert that no word of the scored examples was sent to.
    """
    known = [r for r in ratios.values() if r > 0]
    usual = statistics.median(known) if known else 0.0
    return {name: r if r > 0 else usual for name, r in ratios.items()}
