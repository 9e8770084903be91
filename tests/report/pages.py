"""Reports to be looked at: results of small networks, and frontiers of plans made by hand."""

import itertools
from dataclasses import dataclass, replace

import torch
from networks import network, rand, settled
from torch import nn

import rabbet
from rabbet import demo
from rabbet._sweep import Row, Sweep
from rabbet.core.cost import Cost
from rabbet.core.plan import LayerPlan, Plan, Term
from rabbet.core.survey import Survey
from rabbet.reconstruct.network import solved
from rabbet.report.content import Score
from rabbet.report.looking import look
from rabbet.train.tuning import Tuning
from rabbet.workpiece import Workpiece

METHOD = rabbet.Joint(tuning=Tuning(steps=12))
WIDTHS = (8, 7, 6, 5, 4, 3)
HOSTILE = (
    "<script>hacked=1</script>",
    "</script><script>hacked=1</script>",
    "<!--",
    '"><img src=x onerror="hacked=1">',
    "' onmouseover='hacked=1' ]]>",
    "&lt;b&gt; ${hacked} {{hacked}} \u2028 \\u003c",
    "x" * 200,
)


@dataclass(frozen=True)
class Point:
    """A plan of a frontier."""

    plan: Plan
    cost: Cost
    harm: float
    accuracy: tuple[float, float, float] | None
    measured: bool


@dataclass(frozen=True)
class Frontier:
    """Plans from the loosest to the tightest."""

    axis: str
    points: tuple[Point, ...]
    survey: Survey
    float_cost: Cost
    quantity: str = "accuracy"
    reference: float | None = 93.5


class Two(nn.Module):
    """Scores of classes and a box."""

    def __init__(self):
        super().__init__()
        self.body, self.classes, self.box = nn.Linear(20, 24), nn.Linear(24, 5), nn.Linear(24, 4)

    def forward(self, x):
        x = torch.relu(self.body(x))
        return {"scores": 4 * self.classes(x), "box": 100 * self.box(x)}


class Hostile(nn.Module):
    """Layers whose names are written to break a page; the first is left alone, as it is small."""

    def __init__(self):
        super().__init__()
        self.add_module("<b onclick=hacked=1>norm", nn.LayerNorm(12))
        for name in HOSTILE:
            self.add_module(name, nn.Linear(12, 12))

    def forward(self, x):
        for layer in self.children():
            x = torch.tanh(layer(x))
        return x


def case(name):
    """A network and its data by name."""
    if name == "two outputs":
        batches = [rand(16, 20, seed=k) for k in range(2)]
        return settled(Two()), rabbet.Task(batches, outputs=["scores", "values"])
    if name == "hostile names":
        return settled(Hostile()), rabbet.Task([rand(16, 12, seed=k) for k in range(2)])
    known = network({"convnet": "residual", "transformer": "tokens"}[name])
    return known.model, rabbet.Task(known.batches)


def uniform(survey, bits, first=None):
    """A plan of one width, the first layer of another one."""
    lines = []
    for k, site in enumerate(survey):
        width = bits if k or first is None else first
        act = 8 if site.multiplies else None
        lines.append(LayerPlan(site.name, (Term.parse(f"dense@{width}c"),), act))
    return Plan(tuple(lines))


def frontier_of(model, task, known=True):
    """Plans of one or two widths with costs that are counted; harms and accuracies are made up."""
    piece = Workpiece.of(model, task, rabbet.Jobs())
    points = []
    for k, bits in enumerate(WIDTHS):
        for first in (8, bits):
            plan = uniform(piece.survey, bits, first)
            value = 90 - 2.0**k
            accuracy = (value, value - 1, value + 0.5) if known else None
            points.append(Point(plan, piece.cost(plan), 1e-3 * 3**k, accuracy, first == 8))
    points = {point.plan: point for point in points}.values()
    ranked = tuple(sorted(points, key=lambda point: -point.cost.bytes))
    return Frontier("bytes", ranked, piece.survey, piece.float_cost)


def reported(name, path):
    """Write the page of a network by name, fitted at 4 bits; gives the result and the frontier."""
    model, task = case(name)
    frontier = frontier_of(model, task)
    plan = uniform(frontier.survey, 4)
    budget = rabbet.Budget.parse("bits <= 5, bytes <= 60%")
    result = replace(rabbet.fit(model, plan, task, METHOD), budget=budget)
    result.report(path, model, title=name, frontier=frontier, files={f"{name}.onnx": 9000})
    return result, frontier


def swept(path, budgets, settings, measures, name="convnet"):
    """Write the page of a sweep of plans of one width, whose measures are made up."""
    model, task = case(name)
    piece = Workpiece.of(model, task, rabbet.Jobs())
    names, values = list(settings), list(itertools.product(budgets, *settings.values()))
    rows = []
    for (budget, *chosen), measure in zip(values, measures, strict=True):
        bits = dict(zip(names, chosen, strict=True))
        asked = rabbet.Budget.parse(budget)
        if measure == "refused":
            rows.append(Row(asked, bits, error=f"{budget!r} <b>cannot be met</b>"))
            continue
        plan = uniform(piece.survey, next((b for b in chosen if isinstance(b, int)), 4))
        rows.append(Row(asked, bits, plan, piece.cost(plan), measure))
    whole = None if all(row.measure is None for row in rows) else 99.0
    sweep = Sweep(tuple(rows), piece.float_cost, whole)
    sweep.report(path, title="<i>sweep</i>")
    return sweep


def digits(path):
    """The page of the demo network at a tenth of its bytes, on a frontier of chosen plans.

    The divergence of a plan is the sum of what its layers, solved, alone do to the outputs.
    """
    model, task, jobs = demo.model(), rabbet.Task(demo.calibration()), rabbet.Jobs()
    piece = Workpiece.of(model, task, jobs)
    result = rabbet.compress(model, "bytes <= 10%", task, quality="fast", jobs=jobs)
    shares = (24, 21, 18, 15, 12, 8, 7, 6)
    plans = [rabbet.plan(model, f"bytes <= {s}%", task, jobs=jobs) for s in shares]
    points = []
    for plan in (*plans, result.plan):
        harm = sum(look(piece, solved(piece, plan)[0]).harms.values())
        points.append(Point(plan, piece.cost(plan), harm, None, False))
    ranked = tuple(sorted(points, key=lambda point: -point.cost.bytes))
    frontier = Frontier("bytes", ranked, piece.survey, piece.float_cost)
    before, after = (f"{rabbet.accuracy(m, demo.test()):.2f}%" for m in (model, result.model))
    score = Score("accuracy", before, after, sum(len(y) for _, y in demo.test()))
    files = {"digits.safetensors": result.save(path.with_name("digits.safetensors"))}
    result.report(
        path, model, title="digits.safetensors", frontier=frontier, files=files, score=score
    )
