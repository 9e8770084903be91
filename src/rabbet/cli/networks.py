"""The network that a command names: a callable, a library's name, a folder, or a saved program."""

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import typer
from torch import nn

from rabbet.cli.datasets import PREPARATION
from rabbet.cli.references import reporting, resolve, settings_of
from rabbet.errors import FileError, near
from rabbet.export.signature import quiet
from rabbet.export.torch import read_program
from rabbet.hf import from_pretrained
from rabbet.model.program import layers_of

PROGRAM = ".pt2"
VISION = "install 'rabbet[vision]'"


def open_network(reference: str) -> nn.Module:
    """The network that a reference names, in eval mode.

    `module:callable` and `file.py:callable`; `timm:NAME` and `torchvision:NAME` with settings of
    theirs behind (`timm:resnet18 pretrained=False`); `hf:FOLDER`, or the folder alone, that
    `save_pretrained` wrote; `FILE.pt2`, which `torch.export.save` wrote. A usage error for what is
    not there, FileError for a folder or a program that cannot be read.
    """
    place, settings = settings_of(reference)
    library, _, name = place.partition(":")
    if library in _LIBRARIES and name:
        with reporting(reference, "MODEL"):
            return _LIBRARIES[library](name, settings).eval()
    if reference and Path(reference).is_dir():
        return from_pretrained(reference)
    if Path(reference).suffix == PROGRAM:
        return _program(Path(reference))
    network = resolve(reference, "MODEL")
    if not isinstance(network, nn.Module):
        raise typer.BadParameter(
            f"{reference} gives {type(network).__name__}, not a torch.nn.Module", param_hint="MODEL"
        )
    return network.eval()


def _timm(name: str, settings: Mapping[str, Any]) -> nn.Module:
    """A network of timm, with its published weights unless `pretrained=False`."""
    timm = _imported("timm", f"timm:{name}")
    _require_known(name, timm.list_models(), "timm")
    network: nn.Module = timm.create_model(name, **{"pretrained": True, **settings})
    return network


def _torchvision(name: str, settings: Mapping[str, Any]) -> nn.Module:
    """A network of torchvision, with its best published weights unless `weights=None`."""
    models = _imported("torchvision", f"torchvision:{name}").models
    _require_known(name, models.list_models(), "torchvision")
    network: nn.Module = models.get_model(name, **{"weights": "DEFAULT", **settings})
    asked = str(settings.get("weights") or "DEFAULT").rpartition(".")[2]
    preset = getattr(models.get_model_weights(name), asked).transforms()
    if hasattr(preset, "crop_size"):
        size, scaled = preset.crop_size[0], preset.resize_size[0]
        told = {"input_size": (3, size, size), "crop_pct": size / scaled}
        told |= {"mean": preset.mean, "std": preset.std}
        told["interpolation"] = preset.interpolation.value
        setattr(network, PREPARATION, told)
    return network


def _imported(library: str, reference: str) -> Any:
    """Timm or torchvision; FileError, saying what to do, where it cannot be imported."""
    made = f"{reference} is made by {library}"
    try:
        return importlib.import_module(library)
    except ModuleNotFoundError as e:
        other = "" if e.name == library else f" needs {e.name}, which"
        raise FileError(f"{made}, which{other} is not installed; {VISION}") from None
    except Exception as e:  # what a build for another torch raises
        raise FileError(
            f"{made}, which cannot be imported: {e}. The torchvision that is installed is "
            f"built for another torch than {torch.__version__}: install both anew, from one index"
        ) from None


def _require_known(name: str, known: list[str], library: str) -> None:
    if name.partition(".")[0] not in known:  # timm names weights behind a point
        raise typer.BadParameter(
            f"{library} has no network {name!r}{near(name, known)}", param_hint="MODEL"
        )


def _folder(name: str, settings: Mapping[str, Any]) -> nn.Module:
    if settings:
        raise typer.BadParameter(
            f"a folder takes no settings, found {', '.join(settings)}", param_hint="MODEL"
        )
    if not Path(name).is_dir():
        raise FileError(
            f"there is no folder {name}; nothing is downloaded: fetch the network first, with "
            f"`hf download {name} --local-dir FOLDER`, and pass hf:FOLDER"
        )
    return from_pretrained(name)


def _program(path: Path) -> nn.Module:
    """The layers of a program that `torch.export.save` wrote."""
    program = read_program(path)
    with reporting(str(path), "MODEL"), quiet():
        return layers_of(program)


_LIBRARIES: Mapping[str, Callable[[str, Mapping[str, Any]], nn.Module]] = {
    "timm": _timm,
    "torchvision": _torchvision,
    "hf": _folder,
}
