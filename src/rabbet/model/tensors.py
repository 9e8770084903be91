"""The tensors of a network that belong to no layer: which can be stored small, which are left."""

from collections.abc import Iterator, Mapping, Sequence, Set

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from rabbet.core.survey import Left
from rabbet.layers import KINDS, Site
from rabbet.layers.stored import rows_of
from rabbet.model.check import MAGNITUDES

ENTRIES = 256  # of a tensor, from which a line of the plan for it is worth its bytes
VECTOR = 2**14  # entries from which that holds of a vector, too: short ones are biases and gains
BUFFER = 2**12  # and of a buffer
VALUES = 4  # different ones that a buffer may have and still be a mask
ELSEWHERE = (
    "it is read from a list, a closure or an attribute that holds it as well, where no other can "
    "take its place"
)
_SMALL = "tensors too small to be worth a line of the plan"


def stored_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and persistent buffer once, under its first name."""
    seen: dict[int, str] = {}
    tensors_by_name: dict[str, Tensor] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if isinstance(value, Tensor) and id(value) not in seen:
            seen[id(value)] = name
            tensors_by_name[name] = value
    return tensors_by_name


def float_bytes(model: nn.Module) -> int:
    """Bytes of a network whose floating tensors are in float32."""
    return sum(
        t.numel() * (4 if t.is_floating_point() else t.element_size())
        for t in stored_tensors(model).values()
    )


def own_tensors(site: Site) -> list[str]:
    """The names under which a network may hold a site's weight and bias."""
    if not site.runs:
        return [site.name]
    names = (*(f"{name}.weight" for name in (*site.names, *site.heads)), f"{site.name}.bias")
    return [name.lstrip(".") for name in names]


def stored_sites(
    model: nn.Module, sites: Sequence[Site], used: Set[str], elsewhere: Set[str] = frozenset()
) -> Iterator[Site]:
    """The other tensors of a network that can be stored small, as sites of their own.

    used: names of the buffers that the network was seen to compute with. elsewhere: names of what
    is read from places where nothing can be put.
    """
    gone = {name for s in sites for name in own_tensors(s)} | elsewhere
    norms = {s.norm for s in sites if s.norm is not None}
    rewritten = {
        f"{name}.weight" for name, m in model.named_modules() if getattr(m, "max_norm", None)
    }
    if any(not site.name for site in sites):
        return  # the network is one layer, and what replaces it has no other tensors
    for name, tensor in stored_tensors(model).items():
        known = name in gone or name in rewritten or name.rpartition(".")[0] in norms
        if not known and _storable(tensor, name in used):
            yield Site(name=name, kind=KINDS["stored"], shape=rows_of(tensor.shape))


def _storable(tensor: Tensor, used: bool) -> bool:
    """Whether a tensor can be rounded and is large enough to be.

    Other code may rely on what a buffer holds to the last digit, so one counts only if the network
    was seen to compute with it.
    """
    if not tensor.is_floating_point() or not _large(tensor):
        return False
    largest = float(tensor.detach().abs().max())
    if largest and not MAGNITUDES[0] <= largest <= MAGNITUDES[1]:
        return False
    if isinstance(tensor, nn.Parameter):
        return True
    return used and tensor.numel() >= BUFFER and len(tensor.unique()) > VALUES


def _large(tensor: Tensor) -> bool:
    """Whether a tensor is large enough for a line of the plan."""
    return tensor.numel() >= (ENTRIES if sum(n > 1 for n in tensor.shape) > 1 else VECTOR)


def left_of(model: nn.Module, sites: Sequence[Site], reasons: Mapping[str, str]) -> Iterator[Left]:
    """What stays as it is, by the module that holds it; reasons: what is known of some."""
    gone = {name for s in sites for name in own_tensors(s)}
    stored = {s.name for s in sites if not s.runs}
    norms = {s.norm for s in sites if s.norm is not None}
    modules = dict(model.named_modules())
    held: dict[str, list[Tensor]] = {}
    for name, tensor in stored_tensors(model).items():
        owner = name.rpartition(".")[0]
        if name not in gone and owner not in norms:
            held.setdefault(owner, []).append(tensor)
    for owner, tensors_left in held.items():
        # The tensors of which a weight is made lie in a module of their own.
        layer = owner.partition(".parametrizations.")[0]
        why = reasons.get(owner, reasons.get(layer))
        if why is None:
            why = _why_left(modules[owner], tensors_left)
        elif f"{owner}.weight".lstrip(".") in stored:
            why = f"{why}; so its weight is only stored"
        elif not any(map(_large, tensors_left)) and any(t.ndim > 1 for t in tensors_left):
            why = f"{why}; {_SMALL}"
        yield Left(owner, why, sum(t.numel() * t.element_size() for t in tensors_left))


def _why_left(module: nn.Module, held: Sequence[Tensor]) -> str:
    """Why tensors that belong to no site are left as they are."""
    if isinstance(module, _BatchNorm):
        return "a BatchNorm that alone reads the output of no layer cannot be folded into one"
    large = [t for t in held if _large(t)]
    if not large:
        return _SMALL
    if not any(t.is_floating_point() for t in large):
        return "whole numbers are kept as they are"
    if any(isinstance(t, nn.Parameter) for t in large):
        return "values that are infinite, or too small or large to be rounded"
    return "a buffer with few different values, or that the network was not seen to compute with"
