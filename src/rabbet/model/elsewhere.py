"""Weights that a network reads from where they cannot be replaced.

A list of layers that are registered elsewhere, a closure or an attribute may hold a weight or a
layer beside the place that it is found by; what is put in that place would then never be computed
with, and a file would not bring it back.
"""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from rabbet.data.task import Task
from rabbet.layers import kind_of
from rabbet.model.proof import answers, same
from rabbet.model.surgery import copied
from rabbet.model.tensors import stored_tensors


def held_elsewhere(model: nn.Module, task: Task) -> set[str]:
    """The names of the parameters that a network also reads from elsewhere, on the first batch."""
    names = [
        name
        for name, t in stored_tensors(model).items()
        if isinstance(t, nn.Parameter) and t.is_floating_point() and t.numel()
    ]
    wanted = answers(copied(model), task)
    if not same(answers(copied(model), task), wanted):
        return set()  # no two passes agree: nothing can be told
    return set(_found(model, task, wanted, names))


def _found(
    model: nn.Module, task: Task, wanted: Sequence[Tensor], names: Sequence[str]
) -> Sequence[str]:
    """Halves are tried, down to one."""
    if not names or _answers_same(displaced(model, names), task, wanted):
        return []
    if len(names) == 1:
        return names
    middle = len(names) // 2
    return [
        *_found(model, task, wanted, names[:middle]),
        *_found(model, task, wanted, names[middle:]),
    ]


def _answers_same(trial: nn.Module, task: Task, wanted: Sequence[Tensor]) -> bool:
    try:
        return same(answers(trial, task), wanted)
    except Exception:  # code of the user's that refuses NaN
        return False


def displaced(model: nn.Module, names: Collection[str]) -> nn.Module:
    """A copy with other parameters, and other layers around them, of the same values.

    The old ones hold NaN: what still reads them shows it.
    """
    trial = copied(model)
    wanted = {id(t) for name, t in stored_tensors(trial).items() if name in names}
    layers: dict[nn.Module, nn.Module] = {}
    fresh: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
    for name, module in list(trial.named_modules(remove_duplicate=False)):
        own = {k: p for k, p in module.named_parameters(recurse=False) if id(p) in wanted}
        for p in own.values():
            fresh.setdefault(id(p), (p, nn.Parameter(p.detach().clone(), p.requires_grad)))
        if own and name and kind_of(module) is not None:
            parent, _, child = name.rpartition(".")
            setattr(trial.get_submodule(parent), child, layers.setdefault(module, _again(module)))
        target = layers.get(module, module)
        for leaf, p in own.items():
            setattr(target, leaf, fresh[id(p)][1])
    with torch.no_grad():
        for old, _ in fresh.values():
            old.fill_(torch.nan)
    return trial


def _again(module: nn.Module) -> nn.Module:
    """Another module that holds the same."""
    result = module.__class__.__new__(module.__class__)
    vars(result).update(vars(module))
    for held in ("_parameters", "_buffers", "_modules"):
        vars(result)[held] = dict(vars(module)[held])
    return result
