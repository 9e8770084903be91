"""What the cores of a tensor train start from."""

import math

import torch
from torch import Tensor

from rabbet.core.plan import Term
from rabbet.forms import Aim
from rabbet.jobs import Tensors
from rabbet.layers import Site

STEPS = 60  # evaluations of the error of one decomposition


def start_cores(
    weight: Tensor, second: Tensor | None = None, *, site: Site, term: Term, start: str, seed: int
) -> Tensors:
    """Float factors that a layer starts from, by their place: a job for an jobs.

    Random ones are normal, the variance of the weight that they make 1 / (inputs + outputs), of a
    table 1 / columns.
    """
    form = term.form
    if start == "random" and form.contracted:
        shapes = form.shapes(site)
        # each bond is summed over once, and is an end of two cores
        paths = math.sqrt(math.prod(s[0] * s[-1] for s in shapes))
        variance = 1 / (site.shape[1] if site.looks_up else site.columns + site.shape[0])
        deviation = (variance / paths) ** (0.5 / len(shapes))
        generator = torch.Generator().manual_seed(seed)
        return {
            str(k): deviation * torch.randn(s, generator=generator) for k, s in enumerate(shapes)
        }
    metric = second if start == "metric" else None
    return {str(k): f for k, f in enumerate(form.decompose(site, weight, metric, Aim(steps=STEPS)))}
