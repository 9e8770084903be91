"""One forward pass, watched: what each layer is called with, and who uses its output."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from rabbet.data.batches import tensors
from rabbet.layers import kind_of


class Watch(TorchFunctionMode):
    """Counts the uses of every conv and linear output, and the calls and shapes of every layer."""

    def __init__(self, model: nn.Module, foreign: Mapping[int, str] | None = None) -> None:
        super().__init__()
        # Names, by their ids, of tensors that this network has no business with; those it used.
        self.foreign = foreign or {}
        self.strange: set[str] = set()
        # module -> (input, output) of each call
        self.calls: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {}
        self.uses: dict[int, int] = {}
        self.read: set[int] = set()  # ids of all tensors that a function was given
        # A pass computes with copies of the buffers: their names by the ids of the copies.
        self.lent: dict[int, str] = {}
        self.computed_with: set[str] = set()  # names of the buffers that a function was given
        self.by_keyword: set[nn.Module] = set()
        self.hooks = [
            m.register_forward_hook(self._seen, with_kwargs=True)
            for m in model.modules()
            if _watched(m)
        ]
        self.hooks.append(model.register_forward_pre_hook(self._begins))

    def _begins(self, model: nn.Module, _: tuple[Any, ...]) -> None:
        self.lent = {id(buffer): name for name, buffer in model.named_buffers()}

    def _seen(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        given = next(iter(tensors(args)), None)
        if given is None and tensors(kwargs):
            self.by_keyword.add(module)
        if isinstance(output, Tensor) and given is not None:
            # Both are kept alive, so that ids stay unique.
            self.calls.setdefault(module, []).append((given, output))
            self.uses.setdefault(id(output), 0)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if tensors(result):
            for tensor in tensors([args, kwargs or {}]):
                self.read.add(id(tensor))
                if id(tensor) in self.foreign:
                    self.strange.add(self.foreign[id(tensor)])
                if id(tensor) in self.lent:
                    self.computed_with.add(self.lent[id(tensor)])
                if id(tensor) in self.uses:
                    self.uses[id(tensor)] += 1
        return result

    def remove(self) -> None:
        """Take all hooks away."""
        for hook in self.hooks:
            hook.remove()


def _watched(module: nn.Module) -> bool:
    return kind_of(module) is not None or isinstance(module, _BatchNorm)
