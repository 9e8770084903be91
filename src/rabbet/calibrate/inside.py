"""What stored weights are multiplied with, where that can be seen.

A recurrent layer multiplies its weights inside of one operator, so it is run again here, layer by
layer; `F.linear` with a stored weight is seen as it is called.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.overrides import TorchFunctionMode

from rabbet.layers import Site
from rabbet.layers.stored import tensor_of
from rabbet.model.hooks import Hook

RECURRENT = (nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell, nn.GRUCell, nn.RNNCell)
See = Callable[[str, Tensor], None]
"""Is told of a stored weight, by its name, what it is multiplied with: [..., columns]."""


class Products(TorchFunctionMode):
    """Tells what stored matrices are multiplied with by `F.linear`."""

    def __init__(self, model: nn.Module, sites: Sequence[Site], see: See) -> None:
        super().__init__()
        self.model, self.see = model, see
        self.names: dict[torch.Size, list[str]] = {}
        for name, shape in _met_whole(model, sites).items():
            self.names.setdefault(shape, []).append(name)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            given = dict(zip(("input", "weight"), args, strict=False)) | (kwargs or {})
            for name in self.names.get(given["weight"].shape, ()):
                # a pass computes with copies of buffers
                if tensor_of(self.model, name) is given["weight"]:
                    self.see(name, given["input"])
        return func(*args, **(kwargs or {}))


def _met_whole(model: nn.Module, sites: Sequence[Site]) -> dict[str, torch.Size]:
    """The shapes of stored matrices whose rows are those of the site: none folded or cut."""
    shapes = ((s, tensor_of(model, s.name).shape) for s in sites if not s.runs)
    return {s.name: shape for s, shape in shapes if len(shape) == 2 and shape[1] == s.columns}


def recurrent(model: nn.Module, sites: Sequence[Site], see: See) -> Iterator[Hook]:
    """Hooks that tell what the stored weights of recurrent layers are multiplied with."""
    wanted = _met_whole(model, sites).keys()
    for name, module in model.named_modules():
        names = {f"{name}.{leaf}".lstrip(".") for leaf, _ in module.named_parameters(recurse=False)}
        if _base(module) is not None and names & wanted:
            yield module, _hook(name, lambda n, x: see(n, x) if n in wanted else None)


def _base(module: nn.Module) -> type[nn.Module] | None:
    """Torch's own class of a recurrent layer that runs torch's own forward."""
    base = next((kind for kind in RECURRENT if isinstance(module, kind)), None)
    own = base is not None and type(module).forward is base.forward
    return base if own and "forward" not in vars(module) else None


def _hook(name: str, see: See) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = dict(zip(("input", "hx"), args, strict=False)) | kwargs
        cell = isinstance(module, nn.RNNCellBase)
        rows = _of_cell(given) if cell else _of_layers(cast(nn.RNNBase, module), given)
        for leaf, x in rows:
            see(f"{name}.{leaf}".lstrip("."), x)

    return hook


def _of_cell(given: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    yield "weight_ih", given["input"]
    state = given.get("hx")
    if state is not None:
        yield "weight_hh", state[0] if isinstance(state, tuple) else state


def _of_layers(module: nn.RNNBase, given: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """What each weight of each layer and direction meets; the outputs stand for the states."""
    x, state = given["input"], given.get("hx")
    ways = 2 if module.bidirectional else 1
    for k in range(module.num_layers):
        endings = [f"_l{k}", f"_l{k}_reverse"][:ways]
        out = _layer(module, k, endings, x)(x, _part(state, slice(k * ways, (k + 1) * ways)))[0]
        given_rows, out_rows = _rows(x), _rows(out)
        for ending, states in zip(endings, out_rows.chunk(ways, dim=-1), strict=True):
            yield f"weight_ih{ending}", given_rows
            yield f"weight_hh{ending}", states
        x = out


def _layer(module: nn.RNNBase, k: int, endings: Sequence[str], x: Any) -> nn.RNNBase:
    """One layer of several, with the same parameters."""
    kind = cast(Any, _base(module))
    more = {"proj_size": module.proj_size} if module.proj_size else {}
    if isinstance(module, nn.RNN):
        more["nonlinearity"] = module.nonlinearity
    with torch.device("meta"):  # its own parameters are not needed, and draw no random numbers
        single: nn.RNNBase = kind(
            _rows(x).shape[-1],
            module.hidden_size,
            bias=module.bias,
            batch_first=module.batch_first,
            bidirectional=module.bidirectional,
            **more,
        )
    for old, new in zip(endings, ("_l0", "_l0_reverse"), strict=False):
        for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr"):
            if hasattr(module, f"{part}{old}"):
                setattr(single, f"{part}{new}", getattr(module, f"{part}{old}"))
    return single.eval()


def _part(state: Any, own: slice) -> Any:
    """The initial states of one layer."""
    if isinstance(state, tuple):
        return tuple(t[own] for t in state)
    return None if state is None else state[own]


def _rows(x: Any) -> Tensor:
    """The numbers of a batch of sequences, padded or packed."""
    rows = x.data if isinstance(x, PackedSequence) else x
    assert isinstance(rows, Tensor)
    return rows.detach()
