"""`compress` from a folder into a folder: the network is read block by block."""

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
from torch import nn

from rabbet._stream import WORK, Saved
from rabbet.cli import tables, texts
from rabbet.cli.inputs import open_task
from rabbet.cli.judge import Judge, open_judge
from rabbet.cli.options import DEFAULT_BUDGET
from rabbet.cli.outcomes import unheard
from rabbet.cli.stored import writable
from rabbet.cli.terminal import bars, told, working
from rabbet.data.decoder import Estimate
from rabbet.errors import FileError, RabbetError
from rabbet.export import DECODERS, Written
from rabbet.export.decoders.genai import require_folder
from rabbet.export.folders import native_files
from rabbet.hf import compress_pretrained, export, from_pretrained, skeleton
from rabbet.methods import Method
from rabbet.methods.blockwise.method import Blockwise
from rabbet.report.facts import plan_facts
from rabbet.report.text import Part, times_smaller
from rabbet.runtime.decoding import open_decoder


def is_folder(output: Path) -> bool:
    """Whether an output is to be a folder: it is one, or its name has no ending."""
    return output.is_dir() or not output.suffix


def require_plain(given: dict[str, Any]) -> None:
    """A usage error for an option that a network that is read block by block does not take."""
    strange = next((name for name, value in given.items() if value is not None), None)
    if strange is not None:
        raise typer.BadParameter(
            "an --output that is a folder compresses block by block, which has no such option; "
            "leave it out, or name a file (.safetensors) to compress the network as a whole",
            param_hint=strange,
        )


def require_alone(given: dict[str, Any]) -> None:
    """A usage error for an option that a folder to export does not take."""
    strange = next((name for name, value in given.items() if value is not None), None)
    if strange is not None:
        raise typer.BadParameter(
            "a folder says which network it holds; leave out this option", param_hint=strange
        )


def export_folder(folder: Path, output: Path, target: str | None) -> tuple[int, Written]:
    """Write the decoder of a folder for a program that runs such; the bytes that it took, too.

    A usage error for another target; raises as `hf.from_pretrained` and `hf.export` do.
    """
    if target not in DECODERS:
        asked = "" if target is None else f"; found {target}"
        raise typer.BadParameter(
            f"a decoder in a folder is exported to one of {', '.join(DECODERS)}{asked}",
            param_hint="--target",
        )
    require_folder(output)
    writable(output / "file")
    files = native_files(folder) or sorted(folder.glob("*.safetensors"))
    network = from_pretrained(folder)
    with bars() as progress, unheard():
        progress(f"exporting to {target}", 0, 1)
        return sum(path.stat().st_size for path in files), export(network, output, target)


def opened_folder(folder: Path) -> nn.Module:
    """The decoder of a folder, compressed or not, or as it was exported, in its runtime.

    Raises FileError as `hf.from_pretrained` and `open_decoder` do.
    """
    if native_files(folder) or any(folder.glob("*.safetensors")):
        return from_pretrained(folder)
    return open_decoder(folder)


@dataclass(frozen=True)
class Folders:
    """What came of it. before, after: how good the network was, and is, if anything judges."""

    stored: Saved
    judge: Judge | None
    before: float | None
    after: float | None

    def facts(self, settings: dict[str, Any]) -> dict[str, Any]:
        """All of it for JSON; settings: what was asked for."""
        stored = self.stored
        found = plan_facts(
            stored.survey, stored.plan, stored.cost, stored.float_cost, stored.budget
        )
        files = {path.name: path.stat().st_size for path in stored.files}
        scores = {"before": self.before, "after": self.after}
        told = None if self.judge is None else {"quantity": self.judge.quantity} | scores
        said = {"expected_divergence": stored.expected, "evaluation": told}
        return {"output": str(stored.folder), "files": files} | settings | said | found

    def parts(self) -> list[Part]:
        """All of it for people."""
        stored, judge = self.stored, self.judge
        parts = stored.parts()
        if judge is not None and self.before is not None and self.after is not None:
            scores = f"{judge.show(self.before)} -> {judge.show(self.after)}"
            parts.append(f"{judge.quantity}: {scores}")
            if isinstance(self.before, Estimate) and isinstance(self.after, Estimate):
                ratio, error = self.after.ratio(self.before)
                sure = "" if error is None else f" ± {error:.2g}"
                parts.append(f"{ratio:.4g}{sure} times the float network's {judge.quantity}")
        return [*parts, times_smaller(stored.float_cost.bytes, stored.cost.bytes)]


@dataclass(frozen=True)
class Asked:
    """What a command is to compress, as it stands on the command line.

    others: options that are not for folders, by name.
    """

    model: str
    data: str | None
    test: str | None
    budget: str | None
    output: Path
    others: dict[str, Any]


@dataclass(frozen=True)
class How:
    """And how."""

    method: str | None
    quality: str
    seed: int
    resume: Path | None
    processes: int
    as_json: bool

    @property
    def worker(self) -> Method | None:
        """The method; None for that of folders."""
        return None if self.method is None else texts.worker_of(self.method, self.quality)


def run(asked: Asked, how: How) -> None:
    """Compress, and print what came of it."""
    tuned = how.method is not None or how.quality == "default"  # what folders do by themselves
    require_plain(asked.others | {"--quality": None if tuned else how.quality})
    found = compress_folder(asked, how)
    settings = {"seed": how.seed, "method": how.method}
    tables.tell(how.as_json, lambda: found.facts(settings), found.parts)


def compress_folder(asked: Asked, how: How) -> Folders:
    """Compress the network of a folder into another; what is finished lies there until all is.

    Raises as `hf.compress_pretrained` does; a usage error for another method than Blockwise.
    """
    worker, output = how.worker, asked.output
    limits = texts.budget_of(asked.budget or DEFAULT_BUDGET, None)
    if worker is not None and not isinstance(worker, Blockwise):
        raise typer.BadParameter(
            "an --output that is a folder is the method blockwise's; name a file (.safetensors) "
            "for other methods",
            param_hint="--method",
        )
    folder = _network_folder(asked)
    if asked.data is None:
        raise typer.BadParameter(
            f"{asked.model} needs batches: a .txt or .jsonl of text, or a module:callable that "
            "gives them",
            param_hint="--data",
        )
    network = skeleton(folder)
    task = open_task(asked.data, network)
    judge = open_judge(asked.test, task, network)
    work = how.resume or output / WORK
    with _tidy(work), working(work, how.processes, how.as_json) as jobs:
        stored = compress_pretrained(
            folder, limits, task, output, method=worker, seed=how.seed, jobs=jobs
        )
        before = after = None
        if judge is not None:
            with told(jobs, "judging the network"):
                before = judge(from_pretrained(folder))
            with told(jobs, "judging the files"):
                after = judge(from_pretrained(output))
    if how.resume is None:
        shutil.rmtree(work, ignore_errors=True)
    return Folders(stored, judge, before, after)


def _network_folder(asked: Asked) -> Path:
    """The folder that a reference names; FileError for any other, or one that holds the output."""
    folder, output = Path(asked.model.removeprefix("hf:")), asked.output
    if not folder.is_dir():
        raise FileError(
            f"{asked.model} is no folder of save_pretrained, from which alone a network is read "
            f"block by block; to compress it as a whole, name a file: --output {output}.safetensors"
        )
    if output.resolve().is_relative_to(folder.resolve()):
        raise FileError(f"{output} lies in the network's own folder; name another --output")
    return folder


@contextlib.contextmanager
def _tidy(work: Path) -> Iterator[None]:
    """Leave no empty folders behind where a run was refused."""
    try:
        yield
    except RabbetError:
        for folder in (work, work.parent):
            with contextlib.suppress(OSError):  # it holds something
                folder.rmdir()
        raise
