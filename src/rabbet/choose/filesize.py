"""How many bytes the exported file takes under a plan, so that it can be a budget like the native.

A layer is exported alone, with any numbers, and its bytes are counted; where only a rank differs,
the difference of its tensors. What no choice changes is the file of the whole network under one
plan less its layers. What layers share, the function that unpacks weights and the constants of a
grid, is counted once. Before a plan is handed out its file is written, with any numbers, and what
it takes corrects the prediction.
"""

import math
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
KEPT = Term(Dense(), Grid.parse("8c"))
DIGITS = 2  # of a numbered name in all but the smallest and the largest networks


@dataclass(frozen=True)
class Known:
    """A line that was exported, its size, and the bytes of its tensors."""

    size: Size
    tensors: int


class FileGauge:
    """Predicts the file of one network for a runtime; see `rabbet.workpiece.Gauge`.

    functions: whether the runtime reads functions in a file, as onnxruntime does.
    """

    def __init__(self, piece: Workpiece, functions: bool) -> None:
        require_onnx()
        self.piece, self.functions = piece, functions
        self.task = unlabelled(piece.task, piece.model)[0]
        self.inputs = inputs(piece)
        self._rest: int | None = None
        self._sizes: dict[tuple[Site, torch.Size | None, str], Size] = {}
        self._graphs: dict[tuple[object, ...], tuple[Graph, dict[str, int]]] = {}
        self._alike: dict[tuple[object, ...], Known] = {}

    def layer(self, site: Site, layer: LayerPlan | None) -> int:
        """The bytes that a layer adds, without what it shares; None for one that stays float."""
        return self._size(site, layer).own

    def network(self, plan: Plan) -> int:
        """The predicted bytes of the file."""
        return self.rest + self._layers(plan)

    @property
    def rest(self) -> int:
        """What no choice changes."""
        if self._rest is None:
            acts = [8 if site.multiplies else None for site in self.piece.survey]
            lines = (
                LayerPlan(s.name, (USUAL,), a) for s, a in zip(self.piece.survey, acts, strict=True)
            )
            self.written(Plan(tuple(lines)))
        assert self._rest is not None
        return self._rest

    def written(self, plan: Plan) -> int:
        """The bytes of the file of this plan, written with any numbers; predictions follow it."""
        student = build(self.piece.model, plan, self.piece.survey)
        for compressed in all_layers(student).values():
            for act in compressed.quantisers:
                act.set_range(torch.tensor(1 / 255), torch.tensor(0.0))
        with exporting("ONNX", student, self.task):
            size = file_size(student, self.task, self.functions)
        self._rest = size - self._layers(plan)
        return size

    def steps(self, rows: Rows) -> list[Step]:
        """What several lines share, counted once: a step for each such part of the file."""
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
            usual = LayerPlan(site.name, (KEPT,), 8 if site.multiplies else None)
            return replace(known := self._size(site, usual), own=known.own + 3 * site.numel)
        given = self.inputs.get(site.name)
        alone = replace(site, name=stand_in(site), tied=(), norm=None)
        key = (alone, given, layer.body)
        if key not in self._sizes:
            self._sizes[key] = self._alone(alone, given, layer)
        return self._sizes[key]

    def _alone(self, site: Site, given: torch.Size | None, layer: LayerPlan) -> Size:
        """The size of one layer; of those that differ in ranks alone one is exported."""
        alike = (site, given, _alike(layer)) if _follows(layer) else (site, given, layer)
        tensors = sum(_bytes(site, term, self.functions) for term in layer.terms)
        if alike in self._alike:
            known = self._alike[alike]
            return replace(known.size, own=known.size.own + tensors - known.tensors)
        network = Alone(site, layer).eval()
        task = Task([network.batch(given)], axes=0)
        line = replace(layer, name=network.site.name)
        whole = merged(network)
        forms = [str(f) for held in all_layers(whole).values() for f in held.forms]
        key = (site, given, *forms, line.act)
        if key not in self._graphs:
            self._graphs[key] = traced(whole, task)
        graph, acts = self._graphs[key]
        size = size_of(graph, acts, factors_of(whole), self.functions, DIGITS)
        self._alike[alike] = Known(size, tensors)
        return size


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
