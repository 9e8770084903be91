"""Statistics of BatchNorms on a changed network: made anew (arXiv 2308.04595), or of a batch."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rabbet.errors import DataError
from rabbet.grids.grid import stored
from rabbet.model.compressed import Compressed, compressed_layers
from rabbet.model.hooks import Hook, hooked
from rabbet.reconstruct.matching import Statistics, gained, matcher
from rabbet.reconstruct.sequential import affordable
from rabbet.workpiece import Norm, Workpiece


def recalibrate_norms(student: nn.Module, piece: Workpiece, limit: int = 1024) -> None:
    """Re-estimate the statistics of folded BatchNorms in place, on the network's own activations.

    What arXiv 2308.04595 does after factorising: each output gets the mean and deviation that its
    BatchNorm was trained to give, layer by layer in one pass. Of at most `limit` examples, as many
    as fit into memory go through together, and what each such part asks for is averaged. It saves
    broken networks and harms healthy ones (docs/architecture.md).
    """
    layers, axes = compressed_layers(student), piece.task.examples
    sites = [s for s in piece.survey if s.name in layers and s.name in piece.norms and s.calls == 1]
    matchers: list[Hook] = []
    scales: list[Tensor] = []
    biases: list[Tensor] = []
    for site in sites:
        layer, norm = layers[site.name], piece.norms[site.name]
        if gained(layer):
            wanted = Statistics(norm.mean[None], norm.spread[None])
            matchers.append((layer, matcher(wanted, (0.0, math.inf))))
            scales += [factors[-1].scale for factors in layer.factors]
            biases += [] if layer.bias is None else [layer.bias]
    batches, seen = piece.task.read(), 0
    total = min(limit, sum(map(axes.count, batches)))
    size = math.ceil(total / math.ceil(total / affordable(sites)))  # no small one at the end
    changed = [*scales, *biases]
    before = means = [tensor.clone() for tensor in changed]
    with torch.no_grad():
        for portion in axes.portions(batches, size):
            if seen >= limit:
                break
            batch = axes.first(portion, limit - seen)
            _copy(changed, before)
            with hooked(matchers):
                piece.task.run(student, batch)
            seen += axes.count(batch)
            share = axes.count(batch) / seen
            means = [m.lerp(t, share) for m, t in zip(means, changed, strict=True)]
        _copy(changed, means)
        _copy(scales, [stored(scale) for scale in scales])


def _copy(tensors: list[Tensor], values: list[Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)


def on_batch(norm: Norm) -> Callable[[Compressed, object, Tensor], Tensor]:
    """A hook that applies a folded BatchNorm's mean and spread in place of the batch's own.

    It raises DataError for a batch of a single value a channel.
    """

    def hook(layer: Compressed, _: object, out: Tensor) -> Tensor:
        last = layer.site.channels_last(out)
        flat = last.reshape(-1, last.shape[-1])
        if len(flat) < 2:
            raise DataError(
                f"the BatchNorm behind {layer.site.name!r} has one value a channel in a batch, and "
                "cannot run on the statistics of the batch: give batches of several examples, or "
                'Ranking(norm="frozen")'
            )
        normed = F.batch_norm(flat, None, None, norm.spread, norm.mean, training=True)
        return layer.site.channels_back(normed.view(last.shape))

    return hook
