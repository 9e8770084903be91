"""How many bytes the exported file takes under a plan, so that it can be a budget like the native.

A layer is exported alone, with any numbers, and its bytes are counted; where only a rank differs,
the difference of its tensors. What no choice changes is the file of the whole network under one
plan less its layers. What layers share, the function that unpacks weights and the constants of a
grid, is counted once. Before a plan is handed out its file is written, with any numbers, and what
it takes corrects the prediction.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from rabbet.choose.alone import Alone, inputs, stand_in
from rabbet.core.frame import Rows, Step
from rabbet.core.layout import factor_shapes
from rabbet.core.plan import LayerPlan, Plan, Term
from rabbet.data.task import Task
from rabbet.export.onnx.graph import Graph
from rabbet.export.onnx.merge import merged
from rabbet.export.onnx.size import Size, factors_of, file_size, size_of, traced
from rabbet.export.signature import exporting, unlabelled
from rabbet.forms import Dense
from rabbet.grids.grid import Grid
from rabbet.grids.pack import packed_bytes
from rabbet.layers import Site
from rabbet.model.build import build
from rabbet.model.compressed import all_layers
from rabbet.runtime.session import require_onnx
from rabbet.workpiece import Workpiece

USUAL = Term(Dense(), Grid.parse("3c"))  # of the file that is written first: packed, as most are
NAMES = 2  # bytes of each factor that are left for names: the first to be numbered are shorter
BY_LENGTH = "none."  # shared constants that are as long as a rank
KEPT = Term(Dense(), Grid.parse("8c"))


@dataclass(frozen=True)
class Known:
    """A line that was exported, its size, and the bytes of its tensors."""

    size: Size
    tensors: int


class FileGauge:
    """Predicts the file of one network for a runtime; see `rabbet.core.clocks.Gauge`.

    functions: whether the runtime reads functions in a file, as onnxruntime does.
    """

    def __init__(self, piece: Workpiece, functions: bool) -> None:
        require_onnx()
        self.piece, self.functions = piece, functions
        self.task = unlabelled(piece.task, piece.model)[0]
        self.inputs = inputs(piece)
        self._rest: int | None = None
        # Signs of a numbered name. A network of few names has short ones; those that a layer adds
        # may be longer, those that it does without are not.
        self._names: tuple[int, ...] = (1, 2)
        self._sizes: dict[tuple[Site, torch.Size | None, str], Size] = {}
        self._graphs: dict[tuple[object, ...], tuple[Graph, dict[str, int]]] = {}
        self._alike: dict[tuple[object, ...], Known] = {}
        self._missing: set[tuple[object, ...]] = set()
        self._expected = 0

    def layer(self, site: Site, layer: LayerPlan | None) -> int:
        """The bytes that a layer adds, without what it shares; None for one that stays float."""
        self._measure()
        return self._size(site, layer).own

    def expect(self, lines: Iterable[LayerPlan]) -> None:
        """Say how many of these layers are still to be exported; those alike are exported once."""
        sites = self.piece.survey
        each = (self._kind(*self._stand_in(sites[x.name]), x) for x in lines)
        self._missing = {kind for kind in each if kind not in self._alike}
        self._expected = len(self._missing)
        self._tell()

    def _tell(self) -> None:
        if self._expected:
            done = self._expected - len(self._missing)
            self.piece.jobs.progress("exporting layers: distinct ones", done, self._expected)

    def network(self, plan: Plan) -> int:
        """The predicted bytes of the file."""
        return self._measure() + self._layers(plan)

    def _measure(self) -> int:
        """What no choice changes, told by the file of a usual plan unless one was written."""
        if self._rest is None:
            self.written(Plan(tuple(map(_usual, self.piece.survey))))
        assert self._rest is not None
        return self._rest

    def written(self, plan: Plan) -> int:
        """The bytes of the file of this plan, written with any numbers; predictions follow it."""
        student = build(self.piece.model, plan, self.piece.survey)
        for compressed in all_layers(student).values():
            for act in compressed.quantisers:
                act.set_range(torch.tensor(1 / 255), torch.tensor(0.0))
        with exporting("ONNX", student, self.task):
            size, longest = file_size(student, self.task, self.functions)
        if self._rest is None:
            self._names = (longest,) if longest > 1 else (1, 2)
        self._rest = size - self._layers(plan)
        return size

    def steps(self, rows: Rows) -> list[Step]:
        """What several lines share, counted once: a step for each such part of the file."""
        self._measure()
        lines = [[self._size(self.piece.survey[x.name], x).shared for x in row] for row in rows]
        sizes = {name: size for row in lines for shared in row for name, size in shared.items()}
        always = {n for row in lines for n in set.intersection(*map(set, row))}
        steps = []
        for name in sorted(sizes.keys() - always):
            amounts = tuple(int(name in shared) for row in lines for shared in row)
            most = sum(any(name in shared for shared in row) for row in lines)
            steps.append(Step(amounts, 1, most, sizes[name]))
        return steps

    def _layers(self, plan: Plan) -> int:
        sizes = [self._size(site, plan.get(site.name)) for site in self.piece.survey]
        shared = {name: count for size in sizes for name, count in size.shared.items()}
        return sum(size.own for size in sizes) + sum(shared.values())

    def _size(self, site: Site, layer: LayerPlan | None) -> Size:
        if layer is None:  # at most: a float weight takes fewer nodes
            known = self._size(site, replace(_usual(site), terms=(KEPT,)))
            return replace(known, own=known.own + 3 * site.numel)
        alone, given = self._stand_in(site)
        key = (alone, given, layer.body)
        if key not in self._sizes:
            self._sizes[key] = self._alone(alone, given, layer)
        return self._sizes[key]

    def _stand_in(self, site: Site) -> tuple[Site, torch.Size | None]:
        """A site as it is exported alone, and what it is given."""
        return replace(site, name=stand_in(site), tied=(), norm=None), self.inputs.get(site.name)

    def _kind(self, site: Site, given: torch.Size | None, layer: LayerPlan) -> tuple[object, ...]:
        """What lines have in common of which one is exported."""
        return (site, given, _alike(layer) if _follows(layer) else layer.body)

    def _alone(self, site: Site, given: torch.Size | None, layer: LayerPlan) -> Size:
        """The size of one layer; of those that differ in ranks alone one is exported."""
        kind = alike = self._kind(site, given, layer)
        if alike not in self._alike:
            alike = (site, given, layer.body)
        tensors = sum(_bytes(site, term, self.functions) for term in layer.terms)
        if alike not in self._alike:
            sizes = self._exported(site, given, layer)
            size = sizes[0]
            if len(sizes) > 1:
                usual = self._exported(site, given, _usual(site))
                more = (new.own - old.own for new, old in zip(sizes, usual, strict=True))
                size = replace(size, own=usual[0].own + max(more))
            if layer.terms != (USUAL,):
                factors = sum(len(factor_shapes(site, term)) for term in layer.terms)
                size = replace(size, own=size.own + NAMES * (1 + factors))
            if _follows(layer) and not any(name.startswith(BY_LENGTH) for name in size.shared):
                alike = (site, given, _alike(layer))
            self._alike[alike] = Known(size, tensors)
            if kind in self._missing:
                self._missing.remove(kind)
                self._tell()
        known = self._alike[alike]
        return replace(known.size, own=known.size.own + tensors - known.tensors)

    def _exported(self, site: Site, given: torch.Size | None, layer: LayerPlan) -> list[Size]:
        """The sizes of one layer, with names of each length that counts."""
        network = Alone(site, layer).eval()
        whole = merged(network)
        forms = [str(f) for held in all_layers(whole).values() for f in held.forms]
        key = (site, given, *forms, layer.act)
        if key not in self._graphs:
            self._graphs[key] = traced(whole, Task([network.batch(given)], axes=0))
        factors = factors_of(whole)
        return [size_of(*self._graphs[key], factors, self.functions, n) for n in self._names]


def _usual(site: Site) -> LayerPlan:
    """The line of the file that is written first."""
    return LayerPlan(site.name, (USUAL,), 8 if site.multiplies else None)


def _follows(layer: LayerPlan) -> bool:
    """Whether other ranks only make its tensors longer.

    Not so where a runtime is given other matrices, or an index for each group of a scale.
    """
    plain = all(
        t.grid.scales.along_axis and t.grid.codebook.integers is not None for t in layer.terms
    )
    forms = [t.form for t in layer.terms]
    return plain and all(f.whole or (f.rank and not f.contracted) for f in forms)


def _alike(layer: LayerPlan) -> tuple[object, ...]:
    """What lines have in common that differ in ranks alone."""
    return (layer.act, *((t.form.name, t.grid) for t in layer.terms))


def _bytes(site: Site, term: Term, functions: bool) -> int:
    """The bytes of the codes and the scales of a term, as a runtime stores them."""
    total = 0
    for shape in factor_shapes(site, term):
        entries, scales = math.prod(shape), math.prod(term.grid.scale_shape(shape))
        total += _codes(entries, term.grid, functions) + 4 * scales
    return total


def _codes(entries: int, grid: Grid, functions: bool) -> int:
    """The bytes of codes; see `rabbet.export.onnx.packed`."""
    gain, offset = grid.codebook.integers or (1, 0)
    highest = gain * grid.high + offset
    unsigned = highest > 127 and gain == 1
    if unsigned or (grid.bits == 8 and gain == 1):
        return entries
    short = gain * grid.low + offset >= -8 and highest <= 7
    if short and (grid.bits == 4 or not functions):
        return -(-entries // 2)
    return packed_bytes(entries, grid.levels) if functions else entries
