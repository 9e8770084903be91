"""What a plan costs.

Bytes are those of the whole native file, header included. MACs are multiply-accumulates of the
layers in the survey, for one example as in the first batch. A bit operation (BOP) is a MAC times
the bits of the weight times the bits of the input (Bayesian Bits, arXiv 2005.07093); a float counts
32 bits. Bits are the mean bits of the codes per weight, over all weights. Latency is that of the
exported file for a batch of one, predicted from layers that were timed on this machine
(`rabbet.choose.latency`); it is zero where nothing was measured. Bytes of exported files are
predicted in the same way, and held against a file that is written (`rabbet.choose.filesize`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from rabbet.core.layout import (
    BETWEEN,
    FINISHED,
    Rest,
    file_bytes,
    layer_lengths,
    line_bytes,
    term_lengths,
)
from rabbet.core.plan import LayerPlan, Plan
from rabbet.core.survey import Survey
from rabbet.layers import Site

FLOAT_BITS = 32
SCALE_BITS = 16


@dataclass(frozen=True, slots=True)
class Cost:
    """What a layer or a network costs, in whole numbers.

    bytes: of the file. macs, bops: per example. code_bits, scale_bits: of all weight codes, and of
    their scales. weights: entries of all weights. time: nanoseconds of one example. onnx, openvino:
    bytes of the file that is exported for that target. These three are zero if no budget asked.
    """

    bytes: int = 0
    macs: int = 0
    bops: int = 0
    code_bits: int = 0
    weights: int = 0
    time: int = 0
    scale_bits: int = 0
    onnx: int = 0
    openvino: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(*(getattr(self, f) + getattr(other, f) for f in Cost.__dataclass_fields__))

    @property
    def bits(self) -> float:
        """Mean bits of the codes per weight."""
        return self.code_bits / self.weights if self.weights else 0.0


@dataclass(frozen=True)
class Latencies:
    """How long the parts of a compressed network take, in nanoseconds for one example.

    layers: each alone, by its name. rest: what no layer's choice changes. measured: the exported
    file, whole.
    """

    layers: Mapping[str, int]
    rest: int
    measured: int


def layer_cost(site: Site, layer: LayerPlan) -> Cost:
    """What one compressed layer costs: its numbers and its line of the plan, and its arithmetic."""
    macs = bops = code_bits = scale_bits = 0
    act = layer.act or FLOAT_BITS
    for term in layer.terms:
        first, *later = term.form.macs(site)
        macs += first + sum(later)
        # Cores are contracted once, and the result runs on 8 bits, that of floats in float32.
        finished = FLOAT_BITS if term.grid.codebook.floats else FINISHED
        bits = finished if term.form.contracted else term.grid.bits
        bops += bits * (first * act + sum(later) * (FLOAT_BITS if layer.act is None else BETWEEN))
        lengths = term_lengths(site, term)
        code_bits += 8 * lengths.codes
        scale_bits += SCALE_BITS * lengths.scales + 8 * lengths.zeros
    size = layer_lengths(site, layer).bytes + line_bytes(layer)
    return Cost(size, macs, bops, code_bits, site.numel, scale_bits=scale_bits)


def float_cost(survey: Survey) -> Cost:
    """The float32 network: bytes of every stored tensor, MACs, BOPs at 32 x 32 bits."""
    macs = sum(s.macs for s in survey)
    return Cost(
        survey.float_bytes, macs, macs * FLOAT_BITS**2, survey.weights * FLOAT_BITS, survey.weights
    )


def kept_cost(site: Site) -> Cost:
    """The arithmetic of a site that is not compressed; its bytes are counted with the rest."""
    return Cost(0, site.macs, site.macs * FLOAT_BITS**2, site.numel * FLOAT_BITS, site.numel)


def plan_cost(survey: Survey, plan: Plan, rest: tuple[Rest, ...]) -> Cost:
    """What the network costs under a plan; `bytes` is the exact length of its native file."""
    total = Cost()
    for site in survey:
        layer = plan.get(site.name)
        total += kept_cost(site) if layer is None else layer_cost(site, layer)
    return replace(total, bytes=file_bytes(survey, plan, rest))
