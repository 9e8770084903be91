"""How much a change of one weight harms the network's output, for all candidates in one pass.

The score of a change D of one weight is the expected error of the outputs to first order,
`E ||J D||^2`, with J the Jacobian by that weight, one example at a time, of the outputs in units in
which every channel has a variance of one. For a random sign vector v, `E (v . J D)^2 = ||J D||^2`,
and `v . J D` is the inner product of the gradient of `v . y` by the layer's output with what the
layer makes of its input with D as its weight: one backward pass gives the gradients of all layers,
and then every candidate costs one run of its layer. Unlike a Fisher-weighted
error of the layer's output this keeps what different places and channels do together.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rabbet.calibrate.ranges import input_ranges
from rabbet.data.answers import Answers
from rabbet.data.batches import Batch, outputs
from rabbet.data.examples import Axes
from rabbet.errors import DataError, ModelError, RabbetError
from rabbet.layers import Site
from rabbet.layers.stored import tensor_of
from rabbet.model.hooks import hooked
from rabbet.workpiece import Workpiece

ENTRIES = 2**26  # of inputs and outputs of all layers that are held at once
TOGETHER = 8  # examples that one gradient by a stored weight is of, at most


Changes = Tensor | Sequence[Tensor]
"""Differences of one weight, each in its shape: a sequence of them, or one tensor of all."""

Met = tuple[Site, Tensor, Tensor | None]
"""One call of a layer: as what it ran (a table or its head), its input, its output or gradient."""


def output_errors(
    piece: Workpiece, changes: Mapping[str, Changes], limit: int = 256
) -> dict[str, Tensor]:
    """Error of the outputs for each change of one site alone, {name: [candidates]}.

    It is the squared error relative to the variance of each channel, summed over the outputs by
    what each counts (`Answers`).

    changes: differences of canonical weights, [out, in / groups, *kernel] for each candidate. About
    `limit` examples are used. A layer that no gradient reaches (it runs under `torch.no_grad`, or
    what follows rounds) counts with the relative error of its own output.
    Raises DataError if the outputs of the network are not finite.
    """
    total = {name: torch.zeros(len(d), dtype=torch.float64) for name, d in changes.items()}
    sites = [s for s in piece.survey if s.name in changes]
    count, axes = 0, piece.task.examples
    for size, weights, met in _passes(piece, sites, limit):
        for site, slope in weights:
            total[site.name] += _projected_weight(
                piece.weight(site), slope, changes[site.name], size
            )
        for site, calls in met:
            if _reached(calls):
                total[site.name] += _projected(site, calls, changes[site.name], axes, size)
            else:
                total[site.name] += size * _own_error(piece.weight(site), calls, changes[site.name])
        count += size
    return {name: t / count for name, t in total.items()}


def input_errors(
    piece: Workpiece, widths: Sequence[int], limit: int = 256
) -> dict[str, dict[int, float]]:
    """Error of the outputs, as `output_errors` gives it, for the input of one site at few bits.

    {name: {bits: error}}, of every site that multiplies with an input. Each range is that of least
    squared error at its width, as `calibrate_ranges` chooses it. Where no gradient reaches it is
    the relative error of the site's own output.
    """
    sites = [s for s in piece.survey if s.multiplies]
    ranges = input_ranges(piece.model, sites, piece.task, widths, seed=piece.seed)
    found = {s.name: dict.fromkeys(widths, 0.0) for s in sites}
    count, axes = 0, piece.task.examples
    for size, _, met in _passes(piece, sites, limit):
        for site, calls in met:
            weight = piece.weight(site)[None]
            for bits, act in ranges[site.name].items():
                moved = [(role, act(x) - x, g) for role, x, g in calls if not role.looks_up]
                if not moved:
                    continue
                if _reached(moved):
                    error = float(_projected(site, moved, weight, axes, size))
                else:
                    whole = [(role, x, g) for role, x, g in calls if not role.looks_up]
                    error = size * _relative(weight[0], moved, whole)
                found[site.name][bits] += error
        count += size
    return {name: {b: e / count for b, e in each.items()} for name, each in found.items()}


def _relative(weight: Tensor, moved: Sequence[Met], whole: Sequence[Met]) -> float:
    """The energy that a layer makes of some inputs, over that which it makes of others."""

    def energy(calls: Sequence[Met]) -> float:
        outs = (role.run(x, weight.float().to(x.device), None) for role, x, _ in calls)
        return sum(float(out.double().square().sum()) for out in outs)

    with torch.no_grad():
        return energy(moved) / max(energy(whole), 1e-30)


def _reached(calls: Sequence[Met]) -> bool:
    """Whether a gradient reaches a layer.

    Rounding in the forward passes a gradient of zeros, which says as little as none.
    """
    return any(g is not None and bool(g.any()) for _, _, g in calls)


def _passes(
    piece: Workpiece, sites: Sequence[Site], limit: int
) -> Iterator[tuple[int, list[tuple[Site, Tensor | None]], list[tuple[Site, list[Met]]]]]:
    """Passes forth and back over about `limit` examples: how many, and what each site met in it.

    Of stored weights the gradient, of layers that run their calls.
    """
    generator = torch.Generator().manual_seed(piece.seed)
    count, axes = 0, piece.task.examples
    batches = piece.task.read()
    wanted = min(limit, sum(map(axes.count, batches)))
    piece.jobs.progress("scoring", 0, wanted)
    for batch in _slices(batches, axes, sites):
        calls, reached = _slopes(piece, sites, batch, generator)
        slopes = iter(reached)
        weights = [(site, next(slopes)) for site in sites if not site.runs]
        met = [
            (
                site,
                [(role, x, g) for (role, x, _), g in zip(calls[site.name], slopes, strict=False)],
            )
            for site in sites
            if site.runs
        ]
        size = axes.count(batch)
        yield size, weights, met
        count += size
        piece.jobs.progress("scoring", min(count, wanted), wanted)
        if count >= limit:
            return


def _slices(batches: Sequence[Batch], axes: Axes, sites: Sequence[Site]) -> Iterator[Batch]:
    """All examples, so few at a time that the inputs and outputs of all sites fit into memory."""
    running = [s for s in sites if s.runs]
    each = sum(s.entries for s in running)
    step = max(1, ENTRIES // max(1, each))
    if len(running) < len(sites):  # a stored weight's gradient tells of all examples but the sum
        step = min(step, TOGETHER)
    for batch in batches:
        size = axes.count(batch)
        for start in range(0, size, step):
            yield batch if step >= size else axes.cut(batch, slice(start, start + step))


def _signed(
    answers: Answers, values: Sequence[Tensor], count: int, generator: torch.Generator
) -> Tensor:
    """The sum of all outputs of `count` examples with random signs, each element as it counts."""
    total = []
    for place, answer in enumerate(values):
        signs = torch.randint(0, 2, answer.shape, generator=generator).to(answer) * 2 - 1
        roots = answers.element_weights(place, answer.detach(), count).sqrt()
        total.append((signs * roots * answer).sum().float())
    return torch.stack(total).sum()


def require_gradients(piece: Workpiece) -> None:
    """Try the pass that scores layers on one example, before anything long is done.

    Raises ModelError if no gradient can be taken, though the network runs.
    """
    batch = piece.task.read()[0]
    _ = piece.answers  # what the network itself does on all batches is not the gradient's fault
    try:
        _slopes(piece, list(piece.survey), piece.task.examples.first(batch), torch.Generator())
    except Exception:  # it may need the others of the batch
        try:
            _slopes(piece, list(piece.survey), batch, torch.Generator())
        except RabbetError:
            raise
        except Exception as e:
            raise ModelError(
                f"no gradient can be taken through the network: {type(e).__name__}: {e}. Layers "
                "are scored by gradients; the network itself runs, so look for operations in place "
                "and functions without a derivative in its forward"
            ) from e


def _slopes(
    piece: Workpiece, sites: Sequence[Site], batch: Batch, generator: torch.Generator
) -> tuple[dict[str, list[Any]], Sequence[Tensor | None]]:
    """What each site was, and the gradient of the network's outputs with random signs.

    The gradient is that by every stored weight, then that by every output of every other site in
    turn, None where none reaches.
    """
    stored = [site for site in sites if not site.runs]
    own = [tensor_of(piece.model, site.name) for site in stored]
    with _asked(own), _lent(piece.model, stored) as lent:
        calls, result = _recorded(piece, [site for site in sites if site.runs], batch)
    weights = lent or own
    answers = outputs(result)
    if not all(torch.isfinite(t).all() for t in answers):
        raise DataError("the network's outputs hold NaN or infinite values on the given batches")
    objective = _signed(piece.answers, answers, piece.task.examples.count(batch), generator)
    flat = [out for site in sites if site.runs for _, _, out in calls[site.name]]
    inner = [out for out in flat if out.requires_grad]
    if not (inner or weights) or not objective.requires_grad:
        return calls, [None] * (len(weights) + len(flat))
    with _asked(own):
        slopes = torch.autograd.grad(objective, [*weights, *inner], allow_unused=True)
    behind = iter(slopes[len(weights) :])
    of_outputs = [next(behind) if out.requires_grad else None for out in flat]
    return calls, [*slopes[: len(weights)], *of_outputs]


@contextlib.contextmanager
def _lent(model: nn.Module, stored: Sequence[Site]) -> Iterator[list[Tensor]]:
    """The tensors that a pass within this computes with: of buffers it is lent copies.

    None of them if no module is called in the pass.
    """
    lent: list[Tensor] = []

    def seen(*_: object) -> None:
        if not lent:
            lent.extend(tensor_of(model, site.name) for site in stored)

    with hooked(before=[(module, seen) for module in model.modules()] if stored else ()):
        yield lent


@contextlib.contextmanager
def _asked(weights: Sequence[Tensor]) -> Iterator[None]:
    """Gradients by these tensors of a network, for a while."""
    try:
        for weight in weights:
            weight.requires_grad_(True)
        yield
    finally:
        for weight in weights:
            weight.requires_grad_(False)


def _recorded(
    piece: Workpiece, sites: Sequence[Site], batch: object
) -> tuple[dict[str, list[Any]], object]:
    """Every call of each site with its input and output, and the network's result.

    The outputs are part of the graph of the result.
    """
    calls: dict[str, list[Any]] = {s.name: [] for s in sites}

    def hook(role: Site) -> Callable[..., Tensor]:
        def seen(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
            if out.is_inference():  # no gradient reaches it, and none can be asked for
                calls[role.name].append((role, _exact(args[0].clone()), out))
                return out
            out = out if out.requires_grad else out.requires_grad_()
            calls[role.name].append((role, _exact(args[0].detach()), out))
            return out.clone()  # what follows may work in place

        return seen

    roles = [(s.name, s) for s in sites] + [(head, s.head) for s in sites for head in s.heads]
    hooks = [(piece.model.get_submodule(name), hook(role)) for name, role in roles]
    with torch.enable_grad(), hooked(hooks):
        return calls, piece.task.run(piece.model, batch)


def _exact(x: Tensor) -> Tensor:
    """An input in the type of the weights, whatever autocast has made of it."""
    return x.float() if x.is_floating_point() else x


def _projected_weight(weight: Tensor, slope: Tensor | None, changes: Changes, count: int) -> Tensor:
    """Sum over examples of (gradient . change)^2 for a stored weight, [candidates].

    The signs of the examples are independent, so the square of the sum has that expectation. Where
    no gradient reaches it is the relative error of the weight, for each example.
    """
    if slope is None or not bool(slope.any()):
        whole = weight.double().square().sum().clamp_min(1e-30)
        felt = [count * change.double().square().sum() / whole for change in changes]
    else:
        flat = slope.double().flatten()  # in the tensor's own shape, not in that of its matrix
        felt = [(change.double().flatten() @ flat).square() for change in changes]
    return torch.stack(felt).cpu()


def _own_error(weight: Tensor, met: Sequence[Met], changes: Changes) -> Tensor:
    """Relative error of a layer's own output, [candidates]."""

    def energy(w: Tensor) -> float:
        outs = (role.run(x, w.float().to(x.device), None) for role, x, _ in met)
        return sum(float(out.double().square().sum()) for out in outs)

    with torch.no_grad():
        return torch.tensor([energy(d) for d in changes], dtype=torch.float64) / max(
            energy(weight), 1e-30
        )


def _projected(site: Site, met: Sequence[Met], changes: Changes, axes: Axes, batch: int) -> Tensor:
    """Sum over a batch's examples of (gradient . change)^2, [candidates].

    The inner product is that of the slopes with what the layer does with the change as its weight.
    A first axis of several rows an example (windows, frames or tokens flattened into it) is split
    evenly. Where a layer's input does not tell where its examples lie, all count as one: their
    signs are independent, so the expectation is the same.
    """
    used = [(role, x, g) for role, x, g in met if g is not None]
    places = {0 if site.space else axes.of_layer(x, batch) for _, x, _ in used}
    place = places.pop() if len(places) == 1 else None
    if place is not None:
        used = [(role, x.movedim(place, 0), g.movedim(place, 0)) for role, x, g in used]
    told = place is not None and all(g.ndim > 1 and len(x) % batch == 0 for _, x, g in used)
    count = batch if told else 1

    def felt(change: Tensor) -> Tensor:
        """The inner product for each example, [count]."""
        parts = []
        for role, x, slope in used:
            moved = role.run(x, change.to(x.device).float(), None) * slope.float()
            parts.append(moved.reshape(count, -1).sum(1))
        return torch.stack(parts).sum(0)

    with torch.no_grad():
        return torch.stack([felt(change).double().square().sum().cpu() for change in changes])
