"""How much the network's output suffers from a change of one weight, for every candidate at the price of one pass.

The score of a change D of one weight is the expected relative error of the outputs to first order,
`E ||J D||^2 / E ||y||^2`, with J the Jacobian of the outputs by that weight, one example at a time. For a random sign
vector v, `E (v . J D)^2 = ||J D||^2`, and `v . J D` is the inner product of D with the gradient of `v . y`: one
backward pass gives the gradients of all layers, and then every candidate costs one inner product. Unlike a
Fisher-weighted error of the layer's output this keeps what different places and channels do together.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from rabbet.errors import DataError
from rabbet.site import Site, patches
from rabbet.task import examples, outputs
from rabbet.workpiece import Workpiece

ENTRIES = 2**25  # gradient entries held at once


def output_errors(piece: Workpiece, changes: Mapping[str, Tensor], limit: int = 256) -> dict[str, Tensor]:
    """Relative squared error of the outputs for each change of each site alone, {name: [candidates]}.

    changes: differences of canonical weights, {name: [candidates, out, in / groups, *kernel]}. About `limit` examples
    are used. Raises DataError if the outputs of the network are not finite.
    """
    generator = torch.Generator().manual_seed(piece.seed)
    total = {name: torch.zeros(len(d), dtype=torch.float64) for name, d in changes.items()}
    power, count = 0.0, 0
    sites = [s for s in piece.survey if s.name in changes]
    for batch in piece.task.read():
        calls, result = _recorded(piece, sites, batch)
        found = outputs(result)
        signs = [torch.randint(0, 2, t.shape, generator=generator).to(t.device, t.dtype) * 2 - 1 for t in found]
        if not all(torch.isfinite(t).all() for t in found):
            raise DataError("the network's outputs hold NaN or infinite values on the given batches")
        objective = torch.stack([(s * t).sum() for s, t in zip(signs, found, strict=True)]).sum()
        flat = [out for site in sites for _, out in calls[site.name]]
        slopes = iter(torch.autograd.grad(objective, flat, allow_unused=True))
        for site in sites:
            pairs = [(x, g) for (x, _), g in zip(calls[site.name], slopes, strict=False)]
            total[site.name] += _projected(site, pairs, changes[site.name], examples(batch))
        power += sum(float(t.detach().double().square().sum()) for t in found)
        count += examples(batch)
        piece.engine.progress("scoring", min(count, limit), limit)
        if count >= limit:
            break
    return {name: t / max(power, 1e-30) for name, t in total.items()}


def _recorded(
    piece: Workpiece, sites: Sequence[Site], batch: object
) -> tuple[dict[str, list[tuple[Tensor, Tensor]]], object]:
    """Inputs and outputs of every call of every site, the outputs inside the graph of the result."""
    calls: dict[str, list[tuple[Tensor, Tensor]]] = {s.name: [] for s in sites}

    def hook(name: str) -> object:
        def seen(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
            out = out if out.requires_grad else out.requires_grad_()
            calls[name].append((args[0].detach(), out))
            return out.clone()  # what follows may work in place

        return seen

    hooks = [piece.model.get_submodule(s.name).register_forward_hook(hook(s.name)) for s in sites]  # type: ignore[arg-type]
    try:
        with torch.enable_grad():
            return calls, piece.task.run(piece.model, batch)
    finally:
        for h in hooks:
            h.remove()


def _projected(site: Site, pairs: Sequence[tuple[Tensor, Tensor | None]], changes: Tensor, batch: int) -> Tensor:
    """Sum over examples of (gradient . change)^2, [candidates]."""
    used = [(x, g) for x, g in pairs if g is not None]
    step = max(1, min(batch, ENTRIES // site.numel))
    total = torch.zeros(len(changes), dtype=torch.float64)
    flat = changes.flatten(1)  # [candidates, numel]
    for start in range(0, batch if used else 0, step):
        parts = [_gradients(site, x[start : start + step], g[start : start + step]) for x, g in used]
        inner = torch.stack(parts).sum(0) @ flat.to(parts[0].device).T  # [examples, candidates]
        total += inner.double().square().sum(0).cpu()
    return total


def _gradients(site: Site, x: Tensor, slope: Tensor) -> Tensor:
    """The gradient by the weight for each example, [examples, numel]."""
    n = len(x)
    if site.kind == "embedding":
        table = slope.new_zeros(n, *site.shape)
        index = x.reshape(n, -1, 1).expand(-1, -1, site.shape[1])
        return table.scatter_add_(1, index, slope.reshape(n, -1, site.shape[1])).flatten(1)
    rows = patches(site, x, site.positions * max(1, n), torch.Generator())  # [groups, examples * places, columns]
    rows = rows.view(site.groups, n, -1, site.columns)
    if site.stride:
        slope = slope.reshape(n, site.groups, site.shape[0] // site.groups, -1).permute(1, 0, 2, 3)
    else:
        slope = slope.reshape(1, n, -1, site.shape[0]).mT
    return (slope @ rows).transpose(0, 1).reshape(n, -1)
