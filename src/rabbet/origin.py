"""Where code comes from: what is installed counts by its name, what is the user's does not."""

import dis
import functools
import importlib.metadata
import importlib.util
import sys
from pathlib import Path
from typing import Any

OWN = Path(__file__).parent.name  # this package: its version is in every key
MAIN = {"__main__", "__mp_main__"}


def installed(file: str) -> bool:
    """Whether a file of Python belongs to the language or to a package that was installed."""
    parts = Path(file).parts
    standard = Path(dis.__file__).parent
    return (
        bool({"site-packages", "dist-packages"} & {*parts})
        or standard in Path(file).parents
        or file.startswith("<frozen ")
    )


def known(name: str, module: Any = None) -> bool:
    """Whether a module, or what says that it is of it, counts by its name.

    Where a module lies decides, so a user's `queue.py` is the user's. Only one that lies nowhere
    goes by its package, or by its name. module: the module itself, where it is at hand.
    """
    top = name.partition(".")[0]
    if top in MAIN:  # under a profiler it is the profiler's, and its functions are the user's
        return False
    if top == OWN:
        return True
    own = sys.modules.get(name) if module is None else module
    for at in (own, sys.modules.get(top)):
        file = getattr(at, "__file__", None)
        if file is not None:
            return installed(file)
    return top in sys.stdlib_module_names


def known_late(name: str) -> bool:
    """Whether what code will import under a name is installed, whether it is loaded yet or not."""
    top = name.partition(".")[0]
    for loaded in (name, top):
        if loaded in sys.modules:
            return known(loaded)
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        return False
    places = [spec.origin] if spec.origin else [*(spec.submodule_search_locations or ())]
    return places in (["built-in"], ["frozen"]) or (places != [] and all(map(installed, places)))


@functools.cache
def version(top: str) -> str:
    """The version of what a package was installed with; none for the language's own."""
    if top in sys.stdlib_module_names:
        return ""
    try:
        return importlib.metadata.version(top)
    except importlib.metadata.PackageNotFoundError:  # it goes by another name
        names = sorted({*importlib.metadata.packages_distributions().get(top, ())})
        return " ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
