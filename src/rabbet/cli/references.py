"""Finds what a reference names: `module:callable`, or `path/to/file.py:callable`."""

import ast
import contextlib
import importlib
import importlib.util
import pkgutil
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import typer
from torch import nn

from rabbet.errors import RabbetError, near


def resolve(reference: str, option: str) -> Any:
    """What the callable of a reference returns; a value or a network stands for itself.

    A usage error, naming the option, for what is not there or fails.
    """
    return resolve_value(attribute(reference, option), reference, option)


def resolve_value(named: Any, reference: str, option: str) -> Any:
    """What the callable that a reference names returns; a value or a network stands for itself."""
    if not callable(named) or isinstance(named, nn.Module):
        return named
    with reporting(reference, option):
        return named()


def settings_of(reference: str) -> tuple[str, dict[str, Any]]:
    """What a reference names, and the settings behind it: `timm:resnet18 pretrained=False`."""
    words, settings = reference.split(" "), dict[str, Any]()
    while len(words) > 1 and ("=" in words[-1] or not words[-1]):
        name, _, value = words.pop().partition("=")
        if name:
            settings.setdefault(name, literal(value))  # the last of two counts
    return " ".join(words).strip(), dict(reversed(settings.items()))


def literal(text: str) -> Any:
    """The value that a text writes down; what is none is a word."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text


def attribute(reference: str, option: str) -> Any:
    """The attribute that a reference names.

    A usage error, naming the option and what is near, if there is none.
    """
    place, _, path = reference.rpartition(":")
    if not place or not path:
        library = option == "MODEL" and reference.isidentifier()
        hint = f"; of a library: timm:{reference} or torchvision:{reference}" if library else ""
        raise typer.BadParameter(
            f"{reference!r} is not of the form module:callable, and there is no such file or folder"
            f"{hint}",
            param_hint=option,
        )
    with reporting(reference, option):
        named: Any = (
            _from_file(Path(place), option) if place.endswith(".py") else _from_name(place, option)
        )
    at = place
    for name in path.split("."):
        if not hasattr(named, name):
            known = [n for n in dir(named) if not n.startswith("_")]
            raise typer.BadParameter(f"{at} has no {name!r}{near(name, known)}", param_hint=option)
        named, at = getattr(named, name), f"{at}:{name}" if at == place else f"{at}.{name}"
    return named


@contextlib.contextmanager
def reporting(reference: str, option: str) -> Iterator[None]:
    """Make one line of whatever goes wrong in code that is not ours.

    It says what was asked, what the error is, and where it arose.
    """
    try:
        yield
    except (RabbetError, typer.Exit, typer.BadParameter):
        raise
    except (Exception, SystemExit) as e:
        frames = [
            f
            for f in traceback.extract_tb(e.__traceback__)
            if not f.filename.startswith(("<", __file__))
        ]
        where = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
        raise typer.BadParameter(
            f"{reference} failed: {type(e).__name__}: {e}{where}", param_hint=option
        ) from None


def _from_file(path: Path, option: str) -> ModuleType:
    if not path.is_file():
        hint = near(path.name, [p.name for p in path.parent.glob("*.py")])
        raise typer.BadParameter(f"there is no file {path}{hint}", param_hint=option)
    _importable(path.resolve().parent)
    # the file may be named by several options, and is run once
    name = path.stem
    known = sys.modules.get(name)
    if (
        known is not None
        and Path(getattr(known, "__file__", None) or "").resolve() == path.resolve()
    ):
        return known
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # dataclasses and pickle look their module up while it is being run
    if known is None:
        sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _from_name(name: str, option: str) -> ModuleType:
    _importable(Path.cwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as e:
        missing = e.name or ""
        if name != missing and not name.startswith(f"{missing}."):
            raise  # it is there, but something that it imports is not
        parent, _, last = missing.rpartition(".")
        folders = (
            list(getattr(sys.modules.get(parent), "__path__", [])) if parent else [str(Path.cwd())]
        )
        hint = near(last, [m.name for m in pkgutil.iter_modules(folders)])
        where = parent or "the current folder or the installed packages"
        raise typer.BadParameter(
            f"there is no module {missing!r} in {where}{hint}", param_hint=option
        ) from None


def _importable(folder: Path) -> None:
    """As `python -m` does for the current folder."""
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
