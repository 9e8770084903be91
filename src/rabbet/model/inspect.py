"""Inspecting a network: which layers can be compressed, what each is, what is left alone and why.

Nothing is traced or compiled: hooks see every layer during one ordinary forward pass, and a
function mode sees who uses the output of a layer, which tells whether the BatchNorm behind it may
be folded into it.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrize import is_parametrized

from rabbet.core.survey import Survey
from rabbet.data.batches import Batch, tensors
from rabbet.data.state import Pass
from rabbet.data.task import Task, evaluating
from rabbet.errors import DataError, ModelError
from rabbet.layers import LayerKind, Site, kind_of, looks_up, shares_table
from rabbet.model.check import check
from rabbet.model.surgery import copied
from rabbet.model.tensors import (
    ELSEWHERE,
    float_bytes,
    left_of,
    stored_sites,
    stored_tensors,
)
from rabbet.model.watch import Watch


def inspect_network(model: nn.Module, batch: Batch, task: Task | None = None) -> Survey:
    """Run a copy of the model once on a batch and read the facts of its layers.

    batch: as the model takes it (tensor, tuple or mapping), or as `task.forward` takes it. Raises
    ModelError for a scripted or device-mixed model, for non-finite weights, or if there is nothing
    to compress; what the forward raises is passed on.
    """
    check(model)
    return survey_of(copied(model, {id(p): p for p in model.parameters()}), batch, task)


@dataclass(frozen=True)
class Beside:
    """What is known of a copy of a network before it is surveyed.

    original: what it is a copy of. elsewhere: names of parameters that are read from places where
    nothing can be put (`rabbet.model.elsewhere`).
    """

    original: nn.Module | None = None
    elsewhere: Set[str] = frozenset()


def survey_of(
    model: nn.Module, batch: Batch, task: Task | None = None, beside: Beside = Beside()
) -> Survey:
    """The same for a copy that was checked: run once, and afterwards as it was before.

    Raises ModelError for a copy that computes with tensors of the original.
    """
    theirs = {} if beside.original is None else stored_tensors(beside.original)
    watch = Watch(model, {id(t): name for name, t in theirs.items()})
    try:
        with evaluating(model), torch.no_grad(), watch:
            result, seen = (task or Task(())).watched(model, batch)
    finally:
        watch.remove()
    if watch.strange:
        raise ModelError(
            f"a copy of the network computes with {', '.join(sorted(watch.strange)[:3])} of the "
            "network itself, by a function that is set on it or that it keeps: nothing in a copy "
            "takes the place of that. Make it a method, or a function that takes its layers and "
            "weights from the object that it is given"
        )
    axes = (task or Task([batch])).examples
    returned = {id(t) for t in tensors(result)}
    survey = _assemble(model, watch, batch, (axes.count(batch), returned, beside.elsewhere))
    example = tuple(shape for _, shape in axes.shapes(batch))
    return replace(survey, notes=tuple(_remarks(model, seen)), example=example)


def _remarks(model: nn.Module, seen: Pass) -> Iterator[str]:
    """What a user should know of a network before it is compressed."""
    if seen.drew:
        yield (
            "the network draws random numbers in its forward: rabbet draws the same ones for the "
            "same batch, in the network and in its compressed copy, but a file for another runtime "
            "cannot be compared with it"
        )
    kinds = {
        str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.is_floating_point()
    }
    if kinds - {"float32"}:
        yield (
            f"the network is in {' and '.join(sorted(kinds))}, the compressed one computes in "
            "float32: give it inputs in float32"
        )


def has_hooks(module: nn.Module) -> bool:
    """Whether a layer has forward hooks; torch has no public way to ask."""
    return bool(module._forward_hooks or module._forward_pre_hooks)  # noqa: SLF001


def opens(module: nn.Module) -> TypeGuard[nn.MultiheadAttention]:
    """Whether this is torch's own attention: four linears and what lies between them, no more."""
    if type(module) is not nn.MultiheadAttention:
        return False
    if module.bias_k is not None or module.add_zero_attn:
        return False
    customised = len([*module.children()]) > 1 or "forward" in vars(module)
    if customised or not shares_table(module.out_proj):
        return False
    return not any(is_parametrized(m) or has_hooks(m) for m in (module, module.out_proj))


def _why_not(module: nn.Module) -> str | None:
    """Why a layer of a known kind cannot be compressed; None if it can."""
    if is_parametrized(module):
        return "its weight is parametrised; remove the parametrisation first"
    weight = module._parameters.get("weight")  # noqa: SLF001 (an attribute may be made of others)
    if weight is None:
        return (
            "its weight is made of other tensors in each pass (weight_norm, spectral_norm or "
            "pruning); make it a parameter first"
        )
    if not weight.numel():
        return "its weight has no entries"
    if has_hooks(module):
        return "it has forward hooks of its own, which a replacement would lose"
    kind = kind_of(module)
    return None if kind is None else kind.obstacle(module)


NOTHING_RAN = (
    "no conv, linear or embedding ran on the batch; what runs is a copy, so a forward that is set "
    "on the object must take its layers from the object that it is given"
)


def _uncalled(names: Mapping[nn.Module, list[str]], watch: Watch) -> dict[str, str]:
    """Why layers of known kinds, which nothing was seen to call, are left alone."""
    idle = [m for m in names if kind_of(m) is not None and m not in watch.calls]
    return {names[m][0]: _why_idle(m, watch) for m in idle}


def _why_idle(module: nn.Module, watch: Watch) -> str:
    own = None if is_parametrized(module) else module._parameters.get("weight")  # noqa: SLF001
    if own is not None and id(own) in watch.read:
        return "its weight is read and its forward never called: a replacement would never run"
    return _why_not(module) or f"{type(module).__name__} never ran on the batch"


def _assemble(
    model: nn.Module, watch: Watch, batch: Batch, rest: tuple[int, set[int], Set[str]]
) -> Survey:
    """rest: examples of the batch, ids of outputs, names of what is held elsewhere."""
    count, returned, elsewhere = rest
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    owners: dict[int, list[nn.Module]] = {}
    for module in names:
        if is_parametrized(module):
            continue
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(module)
    _join_tables(owners, names, watch)
    heads = _heads(owners, names, watch)
    of_tables = {head: table for table, linears in heads.items() for head in linears}
    norms = {
        id(given): m
        for m, calls in watch.calls.items()
        if isinstance(m, _BatchNorm)
        for given, _ in calls
    }
    sites: list[Site] = []
    reasons = {
        names[m][0]: "its input is passed by keyword; pass it by position" for m in watch.by_keyword
    }
    for module, calls in watch.calls.items():
        kind, name = kind_of(module), names[module][0]
        if kind is None:
            continue
        if module in of_tables:
            table = names[of_tables[module]][0]
            reasons[name] = f"the bias of a head that shares the table of {table}"
            continue
        own = heads.get(module, [])
        sharing = [
            names[m][0] or "the network itself"
            for m in owners.get(id(module._parameters.get("weight")), [])  # noqa: SLF001
            if m is not module and m not in own
        ]
        reason = _why_no_site(module, sharing, f"{name}.weight".lstrip(".") in elsewhere)
        if reason is not None:
            theirs = dict.fromkeys(sharing, f"its weight is shared with {name}")
            reasons = theirs | reasons | {name: reason}
            continue
        _with_batch_axis(name, kind, module, calls, None if sites else tensors(batch)[0])
        norm = _foldable(kind, module, calls, watch, norms, returned)
        # A norm under a second name would stay behind there.
        norm = None if norm is not None and len(names[norm]) > 1 else norm
        sites.append(_site(module, kind, names, watch, (norm, own, count)))
    sites += stored_sites(model, sites, watch.computed_with, elsewhere)
    reasons |= {name.rpartition(".")[0]: ELSEWHERE for name in elsewhere}
    if not sites:
        detail = "; ".join(f"{n}: {r}" for n, r in reasons.items())
        detail = detail or NOTHING_RAN
        raise ModelError(f"nothing in this network can be compressed ({detail})")
    left = tuple(left_of(model, sites, _uncalled(names, watch) | reasons))
    return Survey(tuple(sites), left, float_bytes(model))


def _why_no_site(module: nn.Module, sharing: Sequence[str], elsewhere: bool) -> str | None:
    if sharing:
        return f"its weight is shared with {', '.join(sharing)}"
    return _why_not(module) or (ELSEWHERE if elsewhere else None)


def _site(
    module: nn.Module,
    kind: LayerKind,
    names: Mapping[nn.Module, list[str]],
    watch: Watch,
    rest: tuple[nn.Module | None, list[nn.Module], int],
) -> Site:
    """The facts of one layer; rest: the BatchNorm behind it, its heads, examples of the batch."""
    norm, heads, batch = rest
    calls = watch.calls[module]
    positions, inputs = (_positions(kind, calls, batch, k) for k in (1, 0))
    at_heads = [_positions(kind.head, watch.calls[m], batch) for m in heads]
    return Site(
        name=names[module][0],
        kind=kind,
        shape=tuple(kind.weight(module).shape),
        bias=norm is not None or getattr(module, "bias", None) is not None,
        positions=max(1, positions),
        inputs=max(1, inputs),
        calls=len(calls),
        tied=tuple(names[module][1:]),
        norm=None if norm is None else names[norm][0],
        heads=tuple(names[m][0] for m in heads),
        head_positions=sum(max(1, n) for n in at_heads),
        **kind.facts(module),
    )


def _join_tables(
    owners: Mapping[int, list[nn.Module]], names: dict[nn.Module, list[str]], watch: Watch
) -> None:
    """Merge embeddings that share a table into the first of them, in place.

    A look-up is the same in each.
    """
    first: dict[nn.Module, nn.Module] = {}
    for modules in owners.values():
        tables = [m for m in modules if not shares_table(m)]
        if all(alike(tables[0], m) and m not in watch.by_keyword for m in tables):
            for other in tables[1:]:
                first[other] = tables[0]
                names[tables[0]] += names.pop(other)
                modules.remove(other)
    calls: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {}
    for module, own in watch.calls.items():
        calls.setdefault(first.get(module, module), []).extend(own)
    watch.calls = calls


def alike(table: nn.Module, other: nn.Module) -> bool:
    """Whether one embedding can stand in for another of the same table.

    Their public attributes must be equal too: other code may read them.
    """
    if not type(table) is type(other) is nn.Embedding:
        return False
    if table.weight is not other.weight or _why_not(other):
        return False
    own = [{k for k in vars(m) if not k.startswith("_")} for m in (table, other)]
    plain = not any([*m.buffers(), *m.children()] for m in (table, other))
    return plain and own[0] == own[1] and table.padding_idx == other.padding_idx


def _with_batch_axis(
    name: str,
    kind: LayerKind,
    module: nn.Module,
    calls: list[tuple[Tensor, Tensor]],
    first: Tensor | None,
) -> None:
    """Raise DataError for an input without a batch axis.

    first: the first tensor of the batch, for the layer that runs first; None for all others.
    """
    axes = kind.least_axes(module)
    # The entries of such a vector would count as examples.
    if first is not None and not kind.looks_up and calls[0][0].shape == first.shape[:1]:
        axes = max(axes, 2)
    bare = next((given for given, _ in calls if given.ndim < axes), None)
    if bare is not None:
        raise DataError(
            f"{name or 'the network'} is given {list(bare.shape)}, which has no batch axis; "
            f"batches for it have the shape [n, {', '.join(map(str, bare.shape))}]"
        )


def _heads(
    owners: Mapping[int, list[nn.Module]], names: Mapping[nn.Module, list[str]], watch: Watch
) -> dict[nn.Module, list[nn.Module]]:
    """Tables that linears share, with these linears: all ran and may be replaced."""
    heads = {}
    for modules in owners.values():
        tables = [m for m in modules if looks_up(m)]
        others = [m for m in modules if m not in tables]
        ready = all(m in watch.calls and _why_not(m) is None for m in modules)
        fit = all(shares_table(m) and len(names[m]) == 1 for m in others)
        if len(tables) == 1 and others and ready and fit:
            heads[tables[0]] = others
    return heads


def _positions(
    kind: LayerKind, calls: Sequence[tuple[Tensor, Tensor]], batch: int, part: int = 1
) -> int:
    """Places per example of a layer's outputs, or of its inputs (part 0), over all calls."""
    return sum(kind.places(call[part]) for call in calls) // batch


def _foldable(
    kind: LayerKind,
    module: nn.Module,
    calls: list[tuple[Tensor, Tensor]],
    watch: Watch,
    norms: Mapping[int, nn.Module],
    returned: set[int],
) -> nn.Module | None:
    """The BatchNorm that is the only user of this layer's only output, if there is one."""
    out = calls[0][1]
    norm = norms.get(id(out))
    if norm is None or len(calls) > 1 or id(out) in returned or watch.uses[id(out)] != 1:
        return None
    own = type(norm).forward is _BatchNorm.forward
    if len(watch.calls[norm]) > 1 or norm.running_mean is None or not own or has_hooks(norm):
        return None
    return norm if kind.foldable(module, out) else None


def unfolded(model: nn.Module, survey: Survey, names: Iterable[str]) -> Survey:
    """The survey with the BatchNorms behind the named sites left where they are."""
    reasons = {left.name: left.reason for left in survey.left}
    sites = []
    for site in survey:
        if site.name in names and site.norm is not None:
            reasons[site.norm] = (
                f"folded into {site.name} it would change what the network answers: more reads the "
                "output of that layer"
            )
            own = getattr(model.get_submodule(site.name), "bias", None) is not None
            sites.append(replace(site, norm=None, bias=own))
        else:
            sites.append(site)
    return replace(survey, sites=tuple(sites), left=tuple(left_of(model, sites, reasons)))
