"""Functions that are called before and after modules run, and never stay behind."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

Hook = tuple[nn.Module, Callable[..., Any]]
"""A module and what is called when it runs."""


@contextlib.contextmanager
def hooked(after: Iterable[Hook] = (), before: Iterable[Hook] = ()) -> Iterator[None]:
    """While this lasts, every forward of a module calls its functions.

    before: `f(module, args, kwargs)`. after: `f(module, args, output)`; what one returns, if
    anything, takes the place of the output.
    """
    with contextlib.ExitStack() as stack:
        for module, function in before:
            handle = module.register_forward_pre_hook(_exact(function), with_kwargs=True)
            stack.callback(handle.remove)
        for module, function in after:
            stack.callback(module.register_forward_hook(_exact(function)).remove)
        yield


def _places() -> list[str]:
    """The kinds of devices that a network may run on."""
    accelerator = torch.accelerator.current_accelerator()
    return ["cpu"] if accelerator is None else ["cpu", accelerator.type]


def _exact(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function in full precision, and with tensors that live on, whatever a forward sets.

    A network may switch to half of the precision (autocast) or to inference mode inside.
    """

    def run(module: nn.Module, given: Any, last: Any) -> Any:
        kinds = [kind for kind in _places() if torch.is_autocast_enabled(kind)]
        inferring = torch.is_inference_mode_enabled()
        if not kinds and not inferring:
            return function(module, given, last)
        with contextlib.ExitStack() as stack:
            for kind in kinds:
                stack.enter_context(torch.autocast(kind, enabled=False))
            if inferring:
                stack.enter_context(torch.inference_mode(False))
                stack.enter_context(torch.no_grad())
            result = function(module, given, last)
        own = isinstance(result, Tensor) and isinstance(last, Tensor)
        return result.to(last.dtype) if own else result

    return run
