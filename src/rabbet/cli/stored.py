"""Files on disk: where one can be written, and how any of them is run.

A native file says a lot of itself without the network.
"""

import os
from dataclasses import dataclass, replace
from pathlib import Path

import typer
from torch import nn

from rabbet._api import load
from rabbet.cli.references import settings_of
from rabbet.core.budget import FILES
from rabbet.core.cost import Cost, float_cost, plan_cost
from rabbet.core.plan import Plan
from rabbet.core.survey import Survey
from rabbet.errors import FileError
from rabbet.export import DECODERS, ENDINGS, target_of
from rabbet.export.folders import native_paths
from rabbet.export.native import read_contents
from rabbet.export.signature import quiet
from rabbet.export.torch import read_program
from rabbet.files import require_regular
from rabbet.runtime.session import Session


@dataclass(frozen=True)
class Stored:
    """A native file, or those of a folder: facts, plan, and costs; `cost.bytes` is on disk."""

    path: Path
    survey: Survey
    plan: Plan
    cost: Cost
    float_cost: Cost

    @classmethod
    def read(cls, path: Path) -> "Stored":
        """Read a file or a folder. FileError for what is missing, damaged, or of another format."""
        if path.suffix in ENDINGS and ENDINGS[path.suffix] != "safetensors":
            raise FileError(
                f"{path} is written for a runtime and does not say what its plan is; name the "
                "native file that it was exported from (.safetensors)"
            )
        contents = read_contents(path)
        survey, plan = contents.survey, contents.plan
        cost = replace(plan_cost(survey, plan, contents.kept), bytes=size_of(path))
        return cls(path, survey, plan, cost, float_cost(survey))


def size_of(path: Path) -> int:
    """The bytes of a native file, or of those of a folder."""
    return sum(file.stat().st_size for file in native_paths(path))


def ready(output: Path, target: str | None = None) -> str:
    """The target of a file to write.

    An unknown ending, or a place that is no folder, is refused before any work.
    """
    if target is None and output.suffix not in ENDINGS:
        raise typer.BadParameter(
            f"{output} must end in one of {', '.join(ENDINGS)}", param_hint="--output"
        )
    known = target_of(output, target)
    if known in DECODERS:
        writable(output / "file")
    else:
        writable(output)
    return known


def agreed(ending: str, output: Path, target: str | None) -> str:
    """The target of a file; a usage error if it is not of the kind that its ending asks for."""
    if target is None or target == ending or (ending == "onnx" and target in FILES):
        return target or ending
    raise typer.BadParameter(
        f"{output} is a file for {ending} by its ending, not for {target}", param_hint="--target"
    )


def require_other(output: Path, *references: str | Path | None, option: str = "--output") -> None:
    """Refuse, before any work, to write over the network or the data that a command reads."""
    for reference in references:
        if reference is None or not output.exists():
            continue
        path = Path(settings_of(str(reference))[0].removeprefix("hf:"))
        inside = path.is_dir() and output.resolve().is_relative_to(path.resolve())
        if inside or path.resolve() == output.resolve():
            raise FileError(
                f"{output} is read by this command ({reference}): name another {option}"
            )


def writable(output: Path) -> None:
    """Refuse, before any work, a file that cannot be written.

    There is no folder that can be written to, or something else than a file lies there.
    """
    there = next(parent for parent in output.absolute().parents if parent.exists())
    if not there.is_dir():
        raise FileError(f"cannot write {output}: {there} is not a folder")
    if not os.access(there, os.W_OK):
        raise FileError(f"cannot write {output}: {there} cannot be written to")
    require_regular(output)


def opened(path: Path, network: nn.Module) -> nn.Module:
    """Any file that is written here as a network that runs.

    Native ones, a folder's, too, run in a copy of the network, others in their runtime.
    """
    require_there(path)
    if path.suffix == ".onnx":
        return Session(path)
    if path.suffix == ".pt2":
        program = read_program(path)
        with quiet():
            return program.module()
    return load(path, network)


def require_there(path: Path) -> None:
    """Raise FileError if there is neither a file nor a folder."""
    if not path.is_file() and not path.is_dir():
        raise FileError(f"there is no file or folder {path}")
