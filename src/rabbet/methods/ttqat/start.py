"""The cores that a tensor train starts from."""

import math

import torch
from torch import Tensor

from rabbet.core.plan import Term
from rabbet.forms import Aim
from rabbet.jobs import Tensors
from rabbet.layers import Site

STEPS = 60  # evaluations of the error in one decomposition


def start_cores(
    weight: Tensor, second: Tensor | None = None, *, site: Site, term: Term, start: str, seed: int
) -> Tensors:
    """The float factors that a layer starts from, by their position: a job.

    Random factors are normal, such that the variance of their product, the weight, is 1 / (inputs +
    outputs), or 1 / columns for a table.
    """
    form = term.form
    if start == "random" and form.contracted:
        shapes = form.shapes(site)
        # Every bond is an axis of two cores, and is summed over once.
        paths = math.sqrt(math.prod(s[0] * s[-1] for s in shapes))
        variance = 1 / (site.shape[1] if site.looks_up else site.columns + site.shape[0])
        deviation = (variance / paths) ** (0.5 / len(shapes))
        generator = torch.Generator().manual_seed(seed)
        drawn = (deviation * torch.randn(shape, generator=generator) for shape in shapes)
        return {str(k): core.to(weight.device) for k, core in enumerate(drawn)}
    metric = second if start == "metric" else None
    return {str(k): f for k, f in enumerate(form.decompose(site, weight, metric, Aim(steps=STEPS)))}
