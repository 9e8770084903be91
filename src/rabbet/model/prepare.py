"""A copy of a network whose weights are parameters of layers that are called.

Weights that are made of other tensors in each pass are made once, torch's attention becomes four
linears, and a bag of embeddings a table. All are exact, and none is believed: the copy is held
against the network.
"""

import functools
from collections.abc import Callable, Collection, Iterator
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm, remove_spectral_norm
from torch.nn.utils.weight_norm import WeightNorm, remove_weight_norm

from rabbet.core.survey import Survey
from rabbet.data.state import clean_pass
from rabbet.data.task import Task
from rabbet.model.attention import opened
from rabbet.model.bags import bags_opened
from rabbet.model.plain import plain_by_names, plain_layers
from rabbet.model.proof import PADDING, answers, same
from rabbet.model.surgery import copied, leave_fast_path
from rabbet.model.tensors import own_tensors, stored_tensors


def prepared(model: nn.Module, task: Task) -> tuple[nn.Module, tuple[str, ...]]:
    """A copy of a network for compression, and notes of what is not as in the network.

    What would change the answer on the first batch is left as it is.
    """
    plain = copied(model)
    wanted: list[Tensor] | None = None
    notes: tuple[str, ...] = ()
    plain_ones = functools.partial(plain_layers, task=task)
    for change in (with_made_weights, plain_ones, bags_opened, opened):
        before = _structure(plain)
        changed = change(copied(plain))
        if _structure(changed) == before:
            continue
        wanted = answers(copied(plain).float(), task) if wanted is None else wanted
        try:
            found = answers(copied(changed).float(), task)
        except Exception:
            continue
        if not same(found, wanted):
            eager = copied(plain).float()
            leave_fast_path(eager)
            if not same(found, answers(eager, task)):
                continue
            wanted, notes = found, (PADDING,)
        plain = changed
    return plain, notes


def _structure(model: nn.Module) -> list[tuple[str, type]]:
    """The names and classes of all modules and tensors."""
    tensors = ((name, type(t)) for name, t in stored_tensors(model).items())
    return [*((name, type(m)) for name, m in model.named_modules()), *tensors]


def like_a_file(model: nn.Module, survey: Survey, rest: Collection[str]) -> nn.Module:
    """A copy of a network whose weights lie where a file has them.

    rest: the names of the tensors that the file holds as they are.
    """
    names = {*rest, *(name for site in survey for name in own_tensors(site))}
    result = with_made_weights(copied(model), lambda name: name in names)
    result = plain_by_names(result, survey, rest)
    result = bags_opened(result, lambda name: f"{name}.words.weight".lstrip(".") in names)
    return opened(result, lambda name: f"{name}.q_proj.weight".lstrip(".") in names)


def with_made_weights(model: nn.Module, kept: Callable[[str], bool] = lambda _: False) -> nn.Module:
    """Weight norm, spectral norm, pruning and other parametrisations applied once, in place.

    They are constant in a network that is not trained any more; one that is not stays. kept: says
    of a tensor's name whether it is to stay, and what is made of it with it.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    for name, parts, make in list(_made(model)):
        if not any(kept(f"{name}.{part}".lstrip(".")) for part in parts):
            make()
    for module in training:
        module.training = True
    return model


Made = tuple[str, tuple[str, ...], Callable[[], object]]
"""The name of a module, the tensors that a weight of it is made of, and what makes it once."""


def _made(model: nn.Module) -> Iterator[Made]:
    for name, module in model.named_modules():
        for hook in list(module._forward_pre_hooks.values()):  # noqa: SLF001 (no public way)
            found = _by_hook(module, hook)
            if found is not None:
                yield (name, *found)
        if parametrize.is_parametrized(module) and _constant(module):
            yield name, _originals(module), functools.partial(_apply_once, module)


def _by_hook(
    module: nn.Module, hook: object
) -> tuple[tuple[str, ...], Callable[[], object]] | None:
    if isinstance(hook, WeightNorm):
        leaf = hook.name
        return (f"{leaf}_g", f"{leaf}_v"), lambda: remove_weight_norm(module, leaf)
    if isinstance(hook, SpectralNorm):
        leaf = hook.name
        return (f"{leaf}_orig",), lambda: remove_spectral_norm(module, leaf)
    if isinstance(hook, prune.BasePruningMethod):
        leaf = hook._tensor_name  # noqa: SLF001 (no public way)
        return (f"{leaf}_orig",), lambda: prune.remove(module, leaf)
    return None


def _leaves(module: nn.Module) -> list[str]:
    """The parametrised tensors of a module."""
    return list(cast(nn.ModuleDict, module.parametrizations))


def _originals(module: nn.Module) -> tuple[str, ...]:
    inner = cast(nn.ModuleDict, module.parametrizations)
    return tuple(f"parametrizations.{name}" for name, _ in inner.named_parameters())


def _apply_once(module: nn.Module) -> None:
    """Make parameters of all parametrised tensors of a module.

    torch's own way changes the class of the module, which all its copies share.
    """
    values = {leaf: getattr(module, leaf).detach().clone() for leaf in _leaves(module)}
    inner = cast(nn.ModuleDict, module.parametrizations)
    trained = {leaf for leaf in values if [*inner[leaf].parameters(recurse=False)]}
    module.__class__ = parametrize.type_before_parametrizations(module)
    del module.parametrizations
    for leaf, value in values.items():
        if leaf in trained:
            module.register_parameter(leaf, nn.Parameter(value))
        else:
            module.register_buffer(leaf, value)


@torch.no_grad()
def _constant(module: nn.Module) -> bool:
    """Whether all parametrised tensors of a module have the same values each time."""
    with clean_pass(module, torch.zeros(1)):  # it may draw random numbers, or count its calls
        pairs = [(getattr(module, leaf), getattr(module, leaf)) for leaf in _leaves(module)]
    return all(isinstance(one, Tensor) and torch.equal(one, other) for one, other in pairs)
