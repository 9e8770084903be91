"""Layers told by what they compute, not by their class.

Many libraries have convs, linears and norms of their own: with a weight that is made of another in
each pass, with an activation behind it, frozen, or the same as torch's but for what scripting
needs. A module that was seen to compute what torch's layer computes with some weight becomes that
layer, on a copy.
"""

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrize import is_parametrized
from torch.overrides import TorchFunctionMode

from rabbet.core.survey import Survey
from rabbet.data.batches import Batch, relative_error
from rabbet.data.task import Task, evaluating
from rabbet.layers import kind_of
from rabbet.model.hooks import hooked
from rabbet.model.surgery import replace_module

LAYERS: tuple[type[nn.Module], ...] = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
STATISTICS = ("running_mean", "running_var", "weight", "bias")
SAME = 1e-6  # relative error by which the same sums differ in another order


class BatchNorm(_BatchNorm):
    """Over any number of axes."""

    def _check_input_dim(self, input: Tensor) -> None:  # noqa: A002 (torch's own name)
        """Any will do."""


class NormThen(nn.Sequential):
    """A BatchNorm, and what followed it inside of a module of another library."""

    def __init__(self, norm: _BatchNorm, rest: Sequence[nn.Module]) -> None:
        super().__init__()
        self.norm = norm
        for k, module in enumerate(rest):
            self.add_module(str(k), module)


@dataclass
class _Seen:
    """How often one module ran, and what it multiplied with."""

    calls: int = 0
    weights: list[tuple[Tensor, Tensor | None]] = field(default_factory=list)
    strange: bool = False


def base_of(module: nn.Module) -> type[nn.Module] | None:
    """Torch's own layer that a module is of a subclass of, with a forward of its own."""
    base = next((b for b in LAYERS if isinstance(module, b)), None)
    own = base is not None and type(module).forward is not base.forward and kind_of(module) is None
    return base if own and "forward" not in vars(module) else None


def _is_norm(module: nn.Module) -> bool:
    """Whether a module holds what a BatchNorm holds, and may compute it in a way of its own."""
    if is_parametrized(module):  # what it holds is made anew each time
        return False
    if isinstance(module, _BatchNorm):
        return type(module).forward is not _BatchNorm.forward
    held = [getattr(module, name, None) for name in STATISTICS]
    tensors = [t for t in held if isinstance(t, Tensor) and t.ndim == 1]
    others = {*dict(module.named_parameters(recurse=False)), *dict(module.named_buffers())}
    alike = len(tensors) == len(STATISTICS) and len({t.shape for t in tensors}) == 1
    known = {*STATISTICS, "num_batches_tracked"}
    return alike and not others - known and isinstance(getattr(module, "eps", None), float)


def plain_layers(model: nn.Module, task: Task) -> nn.Module:
    """Make torch's layers of modules that compute the same, in place.

    The first and the last batch say what a module multiplies with, and that this is constant; that
    it answers the same is held against all.
    """
    watched = [m for m in model.modules() if base_of(m) is not None or _is_norm(m)]
    if not watched:
        return model
    seen = {module: _Seen() for module in watched}
    batches = task.read()
    with evaluating(model), torch.no_grad():
        for batch in (batches[0], batches[-1]):
            _watch(model, seen, task, batch)
        trials = {m: trial for m, s in seen.items() if (trial := _trial(m, s)) is not None}
        _hold(model, trials, task, batches)
        for name, module in list(model.named_modules(remove_duplicate=False)):
            if module not in trials:
                continue
            if base_of(module) is not None:
                _become(module, trials[module])
            elif _is_norm(module):
                model = replace_module(model, name, trials[module])
    return model


def _trial(module: nn.Module, seen: _Seen) -> nn.Module | None:
    """What may take the place of a module."""
    if not seen.calls or seen.strange:
        return None
    return _plain_of(module, seen) if base_of(module) is not None else _norm_of(module)


def _hold(
    model: nn.Module, trials: dict[nn.Module, nn.Module], task: Task, batches: Sequence[Batch]
) -> None:
    """Drop the trials that answer otherwise than their modules."""

    def compared(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        alone = len(args) == 1 and isinstance(output, Tensor)
        if module in trials and not (alone and _same(trials[module].forward(args[0]), output)):
            del trials[module]

    for batch in batches:
        if not trials:
            return
        with hooked([(module, compared) for module in list(trials)]):
            task.run(model, batch)


def plain_by_names(model: nn.Module, survey: Survey, rest: Collection[str]) -> nn.Module:
    """The same, in place, for a network that a file is read into: layers lie where the file says.

    rest: the names of the tensors that the file holds as they are.
    """
    layers = {name for site in survey if site.runs for name in site.names}
    norms = {site.norm for site in survey} | {name.rpartition(".")[0] for name in rest}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        base = base_of(module)
        if base is not None and name in layers:
            _take_class(module, base, _weight_of(module), getattr(module, "bias", None))
        elif _is_norm(module) and f"{name}.norm".lstrip(".") in norms:
            whole = NormThen(_plain_norm(module), list(module.children()))
            model = replace_module(model, name, whole)
    return model


def _weight_of(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


class _Products(TorchFunctionMode):
    """What the module that runs multiplies its own input with."""

    def __init__(self) -> None:
        super().__init__()
        self.running: list[tuple[_Seen, Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.running and getattr(func, "__name__", "") in PRODUCTS:
            seen, given = self.running[-1]
            if args and args[0] is given and len(args) > 1:
                bias = args[2] if len(args) > 2 else (kwargs or {}).get("bias")
                seen.weights.append((args[1].detach().clone(), bias))
            else:
                seen.strange = True
        return result


PRODUCTS = {"linear", *(f"conv{t}{k}d" for t in ("", "_transpose") for k in (1, 2, 3))}


def _watch(model: nn.Module, seen: Mapping[nn.Module, _Seen], task: Task, batch: Batch) -> None:
    products = _Products()

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        alone = len(args) == 1 and isinstance(args[0], Tensor) and not kwargs
        seen[module].strange |= not alone
        given = args[0] if alone else torch.empty(0)
        seen[module].calls += 1
        products.running.append((seen[module], given))

    def after(module: nn.Module, _: Any, output: Any) -> None:
        products.running.pop()
        seen[module].strange |= not isinstance(output, Tensor)

    hooks = [(module, after) for module in seen]
    with hooked(after=hooks, before=[(module, before) for module in seen]), products:
        task.run(model, batch)


def _plain_of(module: nn.Module, seen: _Seen) -> nn.Module | None:
    """A layer of torch's with what a module multiplied with, if that is constant."""
    base, weights = base_of(module), seen.weights
    if base is None or len(weights) != seen.calls:
        return None
    weight, bias = weights[0]
    own = _weight_of(module)
    constant = all(torch.equal(w, weight) and b is bias for w, b in weights)
    if not constant or weight.shape != own.shape or not (bias is None or bias is module.bias):
        return None
    trial = copy.copy(module)
    vars(trial)["_parameters"] = dict(module._parameters)  # noqa: SLF001 (no public way)
    _take_class(trial, base, own if torch.equal(own, weight) else weight, bias)
    return trial


def _become(module: nn.Module, trial: nn.Module) -> None:
    """Make a layer of torch's of a module, in place: others may hold it, too."""
    _take_class(module, type(trial), _weight_of(trial), trial.bias)


def _take_class(module: nn.Module, base: type[nn.Module], weight: Tensor, bias: Any) -> None:
    """Turn a module into torch's layer with this weight, in place, and drop its other tensors."""
    module.__class__ = base
    module._buffers = {}  # noqa: SLF001 (no public way)
    kept = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight.detach())
    module._parameters = {"weight": kept, "bias": bias}  # noqa: SLF001


def _norm_of(module: nn.Module) -> nn.Module | None:
    """A BatchNorm, and the children of a module behind it."""
    if getattr(module, "running_mean", None) is None:
        return None
    return NormThen(_plain_norm(module), list(module.children())).eval()


def _plain_norm(module: nn.Module) -> _BatchNorm:
    """A BatchNorm of torch's with the tensors of a module."""
    mean = module.running_mean
    assert isinstance(mean, Tensor)
    eps = float(cast(float, module.eps))
    norm = BatchNorm(len(mean), eps, affine=getattr(module, "weight", None) is not None)
    norm.eval().to(mean.device, mean.dtype)
    for name in STATISTICS:
        value = getattr(module, name, None)
        if isinstance(value, nn.Parameter):
            setattr(norm, name, value)
        elif isinstance(value, Tensor):
            held = nn.Parameter(value) if name in norm._parameters else value  # noqa: SLF001
            setattr(norm, name, held)
    if getattr(module, "num_batches_tracked", None) is None:
        norm.num_batches_tracked = None
    else:
        norm.num_batches_tracked = module.num_batches_tracked  # type: ignore[assignment]
    return norm


def _same(ours: Tensor, theirs: Tensor) -> bool:
    return ours.shape == theirs.shape and relative_error(ours, theirs) <= SAME
