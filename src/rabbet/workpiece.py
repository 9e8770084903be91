"""What a method works on: the user's network, folded and measured."""

import functools
import secrets
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from rabbet.calibrate.moments import second_moments
from rabbet.core.clocks import Clock, Gauge
from rabbet.core.cost import Cost, float_cost, layer_cost, plan_cost
from rabbet.core.frame import Frame, Rows, Step
from rabbet.core.history import History
from rabbet.core.layout import RESERVED, TYPE_NAMES, TYPES, Rest
from rabbet.core.plan import LayerPlan, Plan
from rabbet.core.survey import Left, Survey
from rabbet.data.answers import Answers
from rabbet.data.batches import Batch, outputs
from rabbet.data.distance import Distance
from rabbet.data.task import Task
from rabbet.errors import ModelError, PlanError
from rabbet.fingerprint import Untold, fingerprint
from rabbet.jobs import ONCE, Jobs
from rabbet.layers import Site
from rabbet.model.bn_fold import norm_gain
from rabbet.model.check import check, check_magnitudes
from rabbet.model.elsewhere import held_elsewhere
from rabbet.model.independence import doubts, with_axes
from rabbet.model.inspect import Beside, survey_of
from rabbet.model.prepare import prepared
from rabbet.model.proof import proven
from rabbet.model.surgery import copied
from rabbet.model.tensors import float_bytes, own_tensors, stored_tensors

ANSWERS = 512  # examples whose outputs tell what outputs are
ENTRIES = 2**24  # of outputs that are looked at
UNKNOWN = (
    "on part of a batch the network answers otherwise, or not at all, so each batch counts as one "
    "example; if it holds several, say along which axis: Task(batches, axes=...)"
)
UNABLE = "the network does not run on some of its examples, or on many at once"


@dataclass(frozen=True, slots=True)
class Norm:
    """A folded BatchNorm: its gain, and the mean and deviation of its outputs, [out] each."""

    gain: Tensor
    mean: Tensor
    spread: Tensor

    @classmethod
    def of(cls, norm: nn.Module) -> "Norm":
        """Read from the module; one without weights gives mean 0 and deviation 1."""
        assert isinstance(norm, _BatchNorm)
        gain = norm_gain(norm).detach().float()
        ones = torch.ones_like(gain)
        mean = ones * 0 if norm.bias is None else norm.bias.detach().float()
        return cls(gain, mean, ones if norm.weight is None else norm.weight.detach().float().abs())


@dataclass
class Workpiece:
    """A float network on the bench: folded copy, survey, the user's task, the jobs, the seed.

    types: the original types of the network's tensors, for those that are not compressed: a
    half-precision embedding that is left alone is stored in half precision again. norms: by site,
    the BatchNorms that were folded. clock: times layers, if a budget is about latency. gauges: by
    target, what predicts the exported files that a budget is about. told: the
    fingerprint of network, batches and functions as they are before anything runs; one of this
    piece alone if they cannot be told from others. histories: of what was searched and trained.
    """

    model: nn.Module
    survey: Survey
    task: Task
    jobs: Jobs
    seed: int
    types: dict[str, str]
    norms: dict[str, Norm] = field(default_factory=dict)
    clock: Clock | None = None
    gauges: dict[str, Gauge] = field(default_factory=dict)
    told: str = ""
    histories: list[History] = field(default_factory=list, repr=False)
    _moments: Mapping[str, Tensor] | None = field(default=None, repr=False)

    @classmethod
    def of(cls, model: nn.Module, task: Task, jobs: Jobs, seed: int = 0) -> "Workpiece":
        """Survey and fold a copy of a model; the model itself is not touched."""
        if not isinstance(seed, int) or not 0 <= seed < 2**32:
            raise PlanError(f"seed is a whole number from 0 to {2**32 - 1}; found {seed!r}")
        parts = ("forward", "loss", "vary", "outputs", "weights", "axes")
        calls = {part: getattr(task, part) for part in parts}
        check(model)
        jobs.progress("looking at the network", 0, 1)
        original = model
        task = with_axes(copied(model), task)
        model, notes = prepared(model, task)
        told = _told({**calls, "batches": task.read(), "network": original}, jobs)
        beside = Beside(original, held_elsewhere(model, task))
        survey = survey_of(model, task.read()[0], task, beside)
        # what is made of a weight that layers share may take more than the network itself
        survey = replace(survey, float_bytes=min(survey.float_bytes, float_bytes(original)))
        folded, survey = proven(model, survey, task)
        check_magnitudes(folded, survey)
        survey = replace(survey, notes=(*survey.notes, *notes))
        if calls["axes"] is None and not task.examples.known:
            survey = replace(survey, notes=(*survey.notes, UNKNOWN))
        if calls["axes"] is not None:
            survey = replace(survey, notes=(*survey.notes, *doubts(model, task)))
        types = {
            name: TYPE_NAMES[t.dtype]
            for name, t in stored_tensors(model).items()
            if t.dtype in TYPE_NAMES
        }
        modules = dict(model.named_modules())
        norms = {
            s.name: Norm.of(m)
            for s in survey
            if s.norm and isinstance(m := modules[s.norm], _BatchNorm)
        }
        jobs.progress("looking at the network", 1, 1)
        return cls(folded, survey, task, jobs, seed, types, norms, told=told)

    def weight(self, site: Site) -> Tensor:
        """The canonical float weight of a site, where the network lies: there it is solved."""
        return site.weight(self.model).detach()

    def key(
        self,
        name: str,
        given: Mapping[str, Tensor],
        settings: Mapping[str, Any],
        judge: Callable[[nn.Module], float] | None = None,
    ) -> str:
        """The key of work on this task: `content_key` of network, seed, batches and functions, too.

        Functions, and the network's own code, count by what they compute (`fingerprint`). judge:
        what measures networks, if that has a say in it.
        """
        network = {f"net.{name}": t for name, t in stored_tensors(self.model).items()}
        told = [self.told]
        if judge is not None:
            told.append(_told({"evaluate": judge}, self.jobs))
        key = self.jobs.key(
            name, {**given, **network}, {**settings, "seed": self.seed, "told": told}
        )
        return f"{ONCE}{key}" if any(part.startswith(ONCE) for part in told) else key

    def held(self, name: str, tensor: Tensor) -> Tensor:
        """An uncompressed tensor of the network, rounded to the type that a file stores it in."""
        kind = self.types.get(name)
        return tensor if kind is None else tensor.to(TYPES[kind]).to(tensor.dtype)

    @property
    def left(self) -> tuple[Left, ...]:
        """What is left alone."""
        return self.survey.left

    @property
    def dead(self) -> tuple[str, ...]:
        """Sites whose inputs were zero in all batches, as far as they were measured."""
        return tuple(
            name for name, second in (self._moments or {}).items() if not bool(second.any())
        )

    def rest(self, plan: Plan) -> tuple[Rest, ...]:
        """The tensors that a file holds uncompressed under a plan."""
        return rest_of(self.model, self.survey, plan, self.types)

    def cost(self, plan: Plan) -> Cost:
        """The exact cost of a plan."""
        cost = plan_cost(self.survey, plan, self.rest(plan))
        cost = replace(cost, **{name: g.network(plan) for name, g in self.gauges.items()})
        if self.clock is None:
            return cost
        clock = self.clock
        time = clock.rest + sum(clock.layer(s, plan.get(s.name)) for s in self.survey)
        return replace(cost, time=time)

    def expect(self, lines: Iterable[LayerPlan]) -> None:
        """Say beforehand that these layers will be priced: to time or export them takes long."""
        priced = list(lines)
        for each in (self.clock, *self.gauges.values()):
            if each is not None:
                each.expect(priced)

    def layer_cost(self, site: Site, layer: LayerPlan) -> Cost:
        """What one layer costs as planned; its time and exported bytes, too, if they are asked."""
        cost = layer_cost(site, layer)
        cost = replace(cost, **{name: g.layer(site, layer) for name, g in self.gauges.items()})
        return cost if self.clock is None else replace(cost, time=self.clock.layer(site, layer))

    def frame(self, rows: Rows) -> Frame:
        """The header of every plan that takes one line of each row."""
        first = Plan(tuple(row[0] for row in rows))
        return Frame.of(self.survey, self.rest(first), rows)

    def steps(self, metric: str, rows: Rows) -> Sequence[Step]:
        """What the lines of an exported file share, which is counted once."""
        return self.gauges[metric].steps(rows)

    def moments(self) -> Mapping[str, Tensor]:
        """Second moments of the inputs of every site, measured once."""
        if self._moments is None:
            self._moments = second_moments(
                self.model, self.survey, self.task, self.seed, self.jobs.progress
            )
        return self._moments

    def problem(self, site: Site) -> Mapping[str, Tensor]:
        """What a layer is solved from: its `weight`, and the `second` moment if inputs have one."""
        self.moments()
        return _Problem(self, site)

    @functools.cached_property
    def answers(self) -> Answers:
        """What the outputs are, as the task declares it or the float network's answers tell."""
        axes, told = self.task.examples, list[list[Tensor]]()
        seen = size = 0
        with torch.no_grad():
            for batch in self.task.read():
                told.append(outputs(self.task.run(self.model, batch)))
                seen += axes.count(batch)
                size += sum(t.numel() for t in told[-1])
                if seen >= ANSWERS or size >= ENTRIES:
                    break
        count = axes.count(self.task.read()[0])
        places = [axes.of_layer(answer, count) for answer in told[0]]
        return Answers.of(told, self.task.outputs, self.task.weights, places)

    def distance(self, student: nn.Module, parts: Sequence[Sequence[Batch]]) -> Distance:
        """How far a compressed network is from the float one on each part of some examples.

        A part is one or more batches, which count alike (see `judging_parts`).
        """
        divergences: list[float] = []
        errors: list[float] = []
        with torch.no_grad():
            for part in parts:
                pairs = [
                    (outputs(self.task.run(student, b)), outputs(self.task.run(self.model, b)))
                    for b in part
                ]
                for kept, measure in (
                    (divergences, self.answers.divergence),
                    (errors, self.answers.error),
                ):
                    kept.append(statistics.mean(float(measure(*pair)) for pair in pairs))
        kinds, declared = self.answers.kinds, self.answers.declared
        return Distance(torch.tensor(divergences), torch.tensor(errors), kinds, declared)

    @property
    def float_cost(self) -> Cost:
        """What the float32 network costs."""
        cost = float_cost(self.survey)
        cost = replace(cost, **dict.fromkeys(self.gauges, cost.bytes))
        return cost if self.clock is None else replace(cost, time=self.clock.whole)


@dataclass(frozen=True)
class _Problem(Mapping[str, Tensor]):
    """Tensors that are taken when they are asked for, so that no list of jobs holds them all."""

    piece: Workpiece
    site: Site

    def __getitem__(self, name: str) -> Tensor:
        if name == "weight":
            return self.piece.weight(self.site)
        if name == "second":
            return self.piece.moments()[self.site.name]
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        yield "weight"
        if self.site.name in self.piece.moments():
            yield "second"

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _told(parts: Mapping[str, Any], jobs: Jobs) -> str:
    """The fingerprint of what work depends on; if a part cannot be told, one of no other run."""
    told = {}
    for name, part in parts.items():
        try:
            told[name] = fingerprint(part)
        except Untold as e:
            jobs.say_untold(f"the task's {name}" if name != "network" else "the network", e)
            return f"{ONCE}{secrets.token_hex(20)}"
    return fingerprint(told)


def rest_of(
    model: nn.Module, survey: Survey, plan: Plan, types: dict[str, str]
) -> tuple[Rest, ...]:
    """Tensors of a folded network that no line of the plan covers.

    They belong to layers left alone and to sites without a line.
    """
    covered = {name for layer in plan for name in own_tensors(survey[layer.name])}
    folded = {
        f"{s.name}.{part}" for s in survey if s.norm is not None for part in ("weight", "bias")
    }
    # A bias that was shared has no type of its own in the original.
    biases = {f"{s.name}.bias" for s in survey}
    rest = []
    for name, tensor in stored_tensors(model).items():
        if name in covered:
            continue
        if name.startswith(RESERVED):
            raise ModelError(
                f"the tensor {name!r} bears a name that the file keeps for itself; rename it"
            )
        dtype = "F32" if name in folded else types.get(name, "F32" if name in biases else None)
        if dtype is None:
            raise ModelError(f"{name} is of type {tensor.dtype}, which a file cannot hold")
        rest.append(Rest(name, dtype, tuple(tensor.shape)))
    return tuple(rest)
