"""The work of bench on decoders: folders timed in turn, token after token."""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import typer

from rabbet.errors import FileError
from rabbet.report.text import Part, Table
from rabbet.runtime.bench import Speed, cpu, time_decoders
from rabbet.runtime.decoding import SETTINGS, open_runs

PROMPT, COUNT = 64, 20  # tokens at most that are read at once, and that are written behind them


@dataclass(frozen=True)
class DecoderBench:
    """What was measured: of every folder the bytes of its network, and its speed.

    base: the folder that others are held against. prompt: tokens that were read at once.
    """

    machine: dict[str, str]
    base: str
    prompt: int
    rounds: int
    sizes: dict[str, int]
    speeds: dict[str, Speed]

    def facts(self) -> dict[str, Any]:
        """All of it for JSON; speeds in tokens per second."""
        files = [
            {"file": name, "bytes": self.sizes[name], "tokens per second": asdict(speed)}
            for name, speed in self.speeds.items()
        ]
        told = {"prompt": self.prompt, "count": COUNT, "rounds": self.rounds}
        return {"machine": self.machine, "files": files} | told

    def parts(self) -> list[Part]:
        """All of it for people."""
        heads = (
            "folder",
            "prompt, tokens/s",
            "new tokens/s",
            f"speed against {self.base}",
            "bytes",
        )
        rows = [
            (
                name,
                f"{speed.prompt:,.1f}",
                f"{speed.new:,.1f}",
                f"{speed.new / self.speeds[self.base].new:.2f}x",
                f"{self.sizes[name]:,}",
            )
            for name, speed in self.speeds.items()
        ]
        machine = ", ".join(f"{name}: {value}" for name, value in self.machine.items())
        behind = f"{COUNT} tokens behind a prompt of {self.prompt} random ones"
        how = f"{behind}, {self.rounds} times in turn"
        return [machine, "", Table(heads, rows), how]


def measure_decoders(
    folders: list[Path], given: dict[str, Any], threads: int, runs: int
) -> DecoderBench:
    """Time decoders, each in its own runtime, so that each writes `runs` tokens at least.

    given: options that are for files, by name; a usage error for one that is there. Raises
    FileError as `open_runs`, and for a file among the folders.
    """
    for path in folders:
        if not path.exists():
            raise FileError(f"there is no folder {path}")
        if not path.is_dir():
            raise FileError(f"{path} is a file; a folder of a decoder is timed beside such folders")
        if any(path.glob("*.safetensors")):
            raise FileError(
                f"{path} is for no runtime; write one that is: rabbet export {path} --target genai "
                "--output FOLDER"
            )
    strange = next((name for name, value in given.items() if value is not None), None)
    if strange is not None:
        raise typer.BadParameter(
            "decoders are timed on one sequence of random tokens; leave out this option",
            param_hint=strange,
        )
    sessions = {str(folder): open_runs(folder, threads) for folder in folders}
    sizes = {
        str(folder): sum(path.stat().st_size for path in folder.glob("model.*"))
        for folder in folders
    }
    prompt = min(PROMPT, min(map(_context, folders)) - COUNT)
    if prompt < 1:
        raise FileError(f"a decoder of these takes no more than {prompt + COUNT} tokens in all")
    rounds = -(-runs // COUNT)
    speeds = time_decoders(sessions, prompt, COUNT, rounds)
    base = str(folders[1] if len(folders) > 1 else folders[0])
    machine = cpu() | {"threads": str(threads or "all")}
    return DecoderBench(machine, base, prompt, rounds, sizes, speeds)


def _context(folder: Path) -> int:
    """How many tokens a decoder takes in all, where its folder says that."""
    place = folder / SETTINGS
    if not place.is_file():
        return sys.maxsize
    try:
        return int(json.loads(place.read_text(encoding="utf-8"))["model"]["context_length"])
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise FileError(f"{place} cannot be read: {e!r}") from None
