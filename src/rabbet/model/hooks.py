"""Functions that are called before and after modules run, and never stay behind."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn

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
            handle = module.register_forward_pre_hook(function, with_kwargs=True)
            stack.callback(handle.remove)
        for module, function in after:
            stack.callback(module.register_forward_hook(function).remove)
        yield
