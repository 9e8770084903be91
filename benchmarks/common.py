"""What the benchmarks share: the data folder, the machine, tables that are only printed."""

import hashlib
import importlib.util
import json
import os
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from records import code, processor

from rabbet.files import write_whole

DATA = Path(os.environ.get("RABBET_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


def reader(name: str) -> ModuleType:
    """The reader `load` or `nets` of the data folder."""
    path = DATA / f"{name}.py"
    if not path.exists():
        sys.exit(f"no data in {DATA}; set RABBET_DATA to the folder that holds load.py and nets.py")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def alike(lengths: Sequence[int], size: int, order: random.Random | None = None) -> list[list[int]]:
    """Indices of sentences in batches of similar length.

    With `order`, they are shuffled and sorted only within groups of 16 batches.
    """
    index = list(range(len(lengths)))
    if order is not None:
        order.shuffle(index)
    groups = (
        [index[k : k + 16 * size] for k in range(0, len(index), 16 * size)] if order else [index]
    )
    chunks = []
    for group in groups:
        group.sort(key=lambda j: lengths[j])
        chunks += [group[k : k + size] for k in range(0, len(group), size)]
    if order is not None:
        order.shuffle(chunks)
    return chunks


def known(
    folder: Path, setting: str, seed: int, measure: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """The outcome of a setting and seed: read from the folder, or measured and kept there.

    Outcomes of another commit are measured again.
    """
    commit, changed = code()
    setting = f"{setting}, code {commit}{' with changes' * changed}"
    path = (
        folder / "outcomes" / f"{hashlib.sha256(setting.encode()).hexdigest()[:16]}-seed{seed}.json"
    )
    if not path.exists():
        record = {"setting": setting, "outcome": measure()}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, [json.dumps(record).encode()])
    read: dict[str, Any] = json.loads(path.read_text())["outcome"]
    return read


def machine() -> str:
    """The machine that the figures were measured on."""
    facts = processor()
    return (
        f"{facts['processor']}, {facts['cores']} cores, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}"
    )


def row(*cells: object) -> None:
    """One line of a Markdown table, shown at once."""
    print("| " + " | ".join(str(c) for c in cells) + " |", flush=True)


def head(*names: str) -> None:
    """The head of a Markdown table."""
    row(*names)
    row(*("---" for _ in names))
