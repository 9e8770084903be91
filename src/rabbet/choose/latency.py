"""How long layers take on this machine, so that milliseconds can be a budget like bytes.

A layer is timed as onnxruntime will run it: exported alone, with integers in and integers out, one
example at a time on all cores. What no choice changes (pools, additions, the runtime's own
overhead) is the time of the whole network with every layer dense in 8 bits, less what its layers
take alone. Bits cost no time, because a runtime unpacks them when it loads a file; forms and ranks
do. Each time is measured once a machine and kept in a folder.
"""

import functools
import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rabbet.calibrate.ranges import calibrate_ranges
from rabbet.choose.alone import chance, inputs, random_layer, runner
from rabbet.core.plan import LayerPlan, Plan, Term
from rabbet.data.batches import tensors
from rabbet.data.task import Task
from rabbet.export.onnx.write import assemble, assemble_alone, float_content
from rabbet.export.signature import unlabelled
from rabbet.forms import Dense
from rabbet.grids.grid import Grid
from rabbet.jobs import Jobs
from rabbet.layers import Site
from rabbet.model.build import build
from rabbet.model.compressed import Compressed, Head
from rabbet.runtime.bench import cpu, time_files
from rabbet.runtime.session import Session, require_onnx
from rabbet.workpiece import Workpiece

GRID = Grid.parse("8c")


def folder() -> Path:
    """Where times are kept: RABBET_CACHE, or the user's cache."""
    return Path(os.environ.get("RABBET_CACHE", Path.home() / ".cache" / "rabbet"))


class Stopwatch:
    """Times one network and its layers; see `rabbet.core.clocks.Clock`."""

    def __init__(self, piece: Workpiece) -> None:
        require_onnx()
        self.piece = piece
        self.task = unlabelled(piece.task, piece.model)[0]
        self.kept = Jobs(folder=folder())
        self.machine = {"machine": sorted(cpu().items())}
        self.inputs = inputs(piece)
        self._layers: dict[LayerPlan, int] = {}
        self._missing: set[str] = set()
        self._expected = 0

    @functools.cached_property
    def whole(self) -> int:
        """The float network, in nanoseconds."""
        return self._timed(
            lambda: float_content(self.piece.model, self.task),
            self._example,
            {"whole": "float"},
        )

    @functools.cached_property
    def rest(self) -> int:
        """The network in 8 bits without its layers."""
        lines = [_like(s, (Term(Dense(), GRID),), 8) for s in self.piece.survey]
        student = build(self.piece.model, Plan(tuple(lines)), self.piece.survey)
        calibrate_ranges(student, self.piece.task)
        time = self._timed(
            lambda: assemble(student, self.task).content, self._example, {"whole": "8 bits"}
        )
        return time - sum(
            self.layer(s, line) for s, line in zip(self.piece.survey, lines, strict=True)
        )

    def layer(self, site: Site, layer: LayerPlan | None) -> int:
        """One layer alone, in nanoseconds.

        A look-up in a table is taken to cost nothing; the table's heads cost what they take.
        """
        if site.name not in self.inputs:
            return 0
        alike = _like(
            site, () if layer is None else layer.terms, None if layer is None else layer.act
        )
        if alike not in self._layers:
            facts = self._facts(site, alike)
            module = (
                self.piece.model.get_submodule(runner(site))
                if layer is None
                else _random(facts["site"], alike)
            )
            given = torch.rand(self.inputs[site.name], generator=chance())
            task = Task([torch.cat([given, given])], axes=0)
            content = functools.partial(assemble_alone, module, task)
            self._layers[alike] = self._timed(content, [given], facts) * max(1, len(site.heads))
        return self._layers[alike]

    def expect(self, lines: Iterable[LayerPlan]) -> None:
        """Say how many of these layers are still to be timed, before any of them is.

        Layers that are alike, but for their bits, are timed once. How much longer it takes is told
        by the first ones.
        """
        multiply = {_like(self.piece.survey[x.name], x.terms, x.act) for x in lines}
        keys = {
            self._key(self._facts(self.piece.survey[x.name], x))
            for x in multiply
            if x.name in self.inputs
        }
        self._missing = {key for key in keys if self.kept.kept(key) is None}
        self._expected = len(self._missing)
        self._tell()

    def _tell(self) -> None:
        if self._expected:
            done = self._expected - len(self._missing)
            self.piece.jobs.progress("timing layers: distinct ones", done, self._expected)

    def _facts(self, site: Site, alike: LayerPlan) -> dict[str, Any]:
        """What the time of a layer depends on."""
        alone = replace(site, name="", tied=(), norm=None)
        if site.heads:
            alone = replace(alone, name="table", heads=("head",))
        return {"site": alone, "plan": alike.body, "input": self.inputs[site.name]}

    def network(self, model: nn.Module) -> int:
        """The exported file of a compressed network, in nanoseconds; always timed anew."""
        return _time(assemble(model, self.task).content, self._example)

    @property
    def _example(self) -> list[Tensor]:
        return tensors(self.task.examples.first(self.task.read()[0]))

    def _timed(
        self, content: Callable[[], bytes], given: list[Tensor], facts: dict[str, Any]
    ) -> int:
        key = self._key(facts)
        kept = self.kept.kept(key)
        if kept is None:
            kept = {"nanoseconds": torch.tensor([_time(content(), given)])}
            self.kept.keep(key, kept)
        if key in self._missing:
            self._missing.remove(key)
            self._tell()
        return int(kept["nanoseconds"].item())

    def _key(self, facts: dict[str, Any]) -> str:
        # a layer's time depends on its shapes alone
        weights = self._network if "whole" in facts else {}
        return self.kept.key("latency", weights, facts | self.machine)

    @property
    def _network(self) -> dict[str, Tensor]:
        """What the time of a whole network depends on: everything in it."""
        state = {k: v for k, v in self.piece.model.state_dict().items() if isinstance(v, Tensor)}
        return state | {f"in{k}": t for k, t in enumerate(self._example)}


def _time(content: bytes, given: list[Tensor]) -> int:
    if any(place.type == "tensor(uint8)" for place in Session(content).session.get_inputs()):
        given = [(t * 255).to(torch.uint8) for t in given]
    return round(1e6 * time_files({"": content}, given)[""].median)


def _like(site: Site, terms: tuple[Term, ...], act: int | None) -> LayerPlan:
    """A line of the same form and ranks on 8 bits: layers alike in that take the same time."""
    return LayerPlan(
        site.name, tuple(replace(t, grid=GRID) for t in terms), act if site.multiplies else None
    )


class _Multiplied(nn.Module):
    """A table with its head, which runs alone."""

    def __init__(self, table: Compressed) -> None:
        super().__init__()
        self.table, self.head = table, Head(table, None)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(x)
        return scores


def _random(site: Site, line: LayerPlan) -> nn.Module:
    """A layer with any numbers, as the whole of a network; of a table its head."""
    layer = random_layer(site, line)
    return (_Multiplied(layer) if site.heads else layer).eval()
