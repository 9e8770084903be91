"""Batches from files: folders of images, numpy arrays, lines of text.

`FOLDER size=224`, `arrays.npz batch=16`, `sentences.txt length=64`: what stands behind the name are
settings. How images are scaled and words are numbered is taken from the network where it says so
(timm, torchvision, a folder of Hugging Face's), else from the settings, and asked for where neither
says it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
import typer
from torch import Tensor, nn

from rabbet.cli.references import settings_of
from rabbet.errors import DataError, FileError

BATCH = 32  # examples
LIMIT = 512  # examples to calibrate with, where no other number is given
LENGTH = 128  # tokens of a text, at most
LABELS = "labels"  # what the labels of an .npz are called
PREPARATION = "pretrained_cfg"  # where timm's networks say how images are prepared, and ours do
PICTURES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff"}


@dataclass(frozen=True)
class Asked:
    """Files that an option names, with the settings behind them, and the network they are for."""

    path: Path
    settings: dict[str, Any]
    network: nn.Module | None
    option: str

    def wrong(self, message: str) -> typer.BadParameter:
        """A usage error that names the option."""
        return typer.BadParameter(message, param_hint=self.option)

    def require(self, *known: str) -> None:
        """Raise a usage error for a setting that there is not."""
        names = sorted({*known, "batch", "limit"})
        for name in self.settings.keys() - names:
            raise self.wrong(f"{name!r} is no setting here; there are {', '.join(names)}")

    def number(self, name: str, default: int) -> int:
        """A setting that is a whole number from 1."""
        value = self.settings.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.wrong(f"{name}={value!r}: a whole number, at least 1")
        return value


@dataclass(frozen=True)
class Table:
    """Examples that are read when they are needed.

    join: the inputs of those at given places, as a network takes them. labels: the class of each,
    if they are known.
    """

    count: int
    join: Callable[[range], Any]
    labels: Tensor | None = None


@dataclass(frozen=True)
class Batches:
    """The batches of a table, one after the other, read anew each time.

    limit: how many examples are enough to calibrate with.
    """

    table: Table
    size: int
    limit: int

    def __iter__(self) -> Iterator[Any]:
        """Inputs alone."""
        for start in range(0, self.table.count, self.size):
            yield self.table.join(range(start, min(start + self.size, self.table.count)))

    def spread(self) -> "Batches":
        """At most `limit` examples, at equal distances: files lie sorted by class."""
        table = self.table
        places = range(0, table.count, -(-table.count // self.limit))
        chosen = Table(len(places), lambda some: table.join(places[some.start : some.stop]))
        return Batches(chosen, self.size, self.limit)

    def labelled(self) -> "Labelled":
        """Pairs of (inputs, labels); raises DataError where there are no labels."""
        if self.table.labels is None:
            raise DataError(
                "no labels to judge with: images lie in a folder for each class, an .npz holds "
                f"{LABELS!r}, a .tsv a class behind each text"
            )
        return Labelled(self, self.table.labels)


@dataclass(frozen=True)
class Labelled:
    """Pairs of (inputs, labels), read anew each time."""

    batches: Batches
    labels: Tensor

    def __iter__(self) -> Iterator[tuple[Any, Tensor]]:
        """One batch after the other."""
        return zip(self.batches, self.labels.split(self.batches.size), strict=True)


def is_data(reference: str) -> bool:
    """Whether a reference names a file or folder that is read here."""
    path = Path(settings_of(reference)[0])
    return path.suffix in _READERS or (bool(reference) and path.is_dir())


def open_data(reference: str, network: nn.Module | None, option: str) -> Batches:
    """The batches of a file or folder that `is_data`.

    Raises FileError for what is not there or cannot be read, and a usage error, naming the option,
    for settings that are unknown or missing.
    """
    place, settings = settings_of(reference)
    asked = Asked(Path(place), settings, network, option)
    if not asked.path.exists():
        raise FileError(f"there is no file {asked.path}")
    size, limit = asked.number("batch", BATCH), asked.number("limit", LIMIT)
    table = (_images if asked.path.is_dir() else _READERS[asked.path.suffix])(asked)
    if not table.count:
        raise FileError(f"{asked.path} holds no example")
    return Batches(table, size, limit)


def _images(asked: Asked) -> Table:
    """Images in a folder, or in a folder for each class; classes are numbered by name."""
    try:
        from PIL import Image
    except ImportError:
        raise FileError(
            f"images in {asked.path} are read with pillow; install rabbet[vision]"
        ) from None
    prepare = _preparation(asked)
    files = sorted(p for p in asked.path.rglob("*") if p.suffix.lower() in PICTURES)
    classes = [p.relative_to(asked.path).parts[0] for p in files if p.parent != asked.path]
    number = {name: k for k, name in enumerate(sorted(set(classes)))}
    labels = torch.tensor([number[c] for c in classes]) if len(classes) == len(files) else None

    def read(file: Path) -> Tensor:
        try:
            with Image.open(file) as image:
                return prepare(image.convert("RGB"))
        except OSError as e:
            raise FileError(f"{file} cannot be read as an image: {e}") from None

    return Table(len(files), lambda some: torch.stack([read(files[k]) for k in some]), labels)


def _preparation(asked: Asked) -> Callable[[Any], Tensor]:
    """From an image to what the network takes, [3, size, size]."""
    own: Any = getattr(asked.network, PREPARATION, None)
    known: dict[str, Any] = {"crop": 1.0, "interpolation": "bilinear"}
    if isinstance(own, Mapping) and own.get("input_size"):
        known |= {"size": own["input_size"][-1], "mean": own["mean"], "std": own["std"]}
        known["crop"] = own.get("crop_pct") or known["crop"]
        known["interpolation"] = own.get("interpolation") or known["interpolation"]
    asked.require(*known, "size", "mean", "std")
    given = known | asked.settings
    for name in ("size", "mean", "std"):
        if name not in given:
            raise asked.wrong(
                f"the network does not say how images are scaled: write {name}=..., as in "
                f"'{asked.path} size=224 mean=0.485,0.456,0.406 std=0.229,0.224,0.225'"
            )
    size = asked.number("size", given["size"])
    for name in ("mean", "std"):
        if not isinstance(given[name], Sequence) or len(given[name]) != 3:
            raise asked.wrong(f"{name}={given[name]!r}: three numbers, one for each colour")
    return _scaled(size, given["crop"], given["interpolation"], given["mean"], given["std"])


def _scaled(
    size: int, crop: float, interpolation: str, mean: Sequence[float], std: Sequence[float]
) -> Callable[[Any], Tensor]:
    """The shorter side scaled to size / crop, the middle cut out, channels centred and divided."""
    from PIL import Image

    way = Image.Resampling[interpolation.upper()]
    shift, spread = (torch.tensor(v).view(3, 1, 1) for v in (mean, std))

    def prepare(image: Any) -> Tensor:
        scale = size / crop / min(image.size)
        width, height = (max(size, round(scale * side)) for side in image.size)
        left, top = (width - size) // 2, (height - size) // 2
        image = image.resize((width, height), way).crop((left, top, left + size, top + size))
        pixels = torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1)
        return (pixels / 255 - shift) / spread

    return prepare


def _arrays(asked: Asked) -> Table:
    """`.npy`: one array, examples on its first axis. `.npz`: arguments by name, and labels."""
    asked.require()
    try:
        content: Any = np.load(asked.path, allow_pickle=False)
        parts = {"": content} if isinstance(content, np.ndarray) else dict(content)
        named = {name: torch.from_numpy(np.ascontiguousarray(a)) for name, a in parts.items()}
    except (OSError, ValueError, TypeError, EOFError, BadZipFile) as e:
        raise FileError(f"{asked.path} cannot be read as arrays: {e}") from None
    counts = {len(t) if t.ndim else 0 for t in named.values()}
    labels = named.pop(LABELS, None)
    if not named:
        raise FileError(f"{asked.path} holds no inputs")
    if len(counts) > 1:
        raise FileError(f"the arrays in {asked.path} differ in length: {sorted(counts)}")

    def join(some: range) -> Any:
        cut = {name: t[some.start : some.stop : some.step] for name, t in named.items()}
        return cut.get("", cut)

    return Table(counts.pop(), join, labels)


def _lines(asked: Asked) -> Table:
    """`.txt`: a text a line. `.tsv`: a text, a tab and the number of its class."""
    asked.require("length")
    tokenizer, length = _tokenizer(asked), asked.number("length", LENGTH)
    try:
        text = asked.path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise FileError(f"{asked.path} cannot be read as text: {e}") from None
    texts = [line for line in text.splitlines() if line.strip()]
    labels = None
    if asked.path.suffix == ".tsv":
        parts = [line.rpartition("\t") for line in texts]
        if not all(text and number.strip().isdigit() for text, _, number in parts):
            raise FileError(f"in {asked.path} a line is a text, a tab and the number of its class")
        texts = [text for text, _, _ in parts]
        labels = torch.tensor([int(number) for _, _, number in parts])

    def join(some: range) -> Any:
        rows = [texts[k] for k in some]
        settings = {"padding": True, "truncation": True, "max_length": length}
        return dict(tokenizer(rows, return_tensors="pt", **settings))

    return Table(len(texts), join, labels)


def _tokenizer(asked: Asked) -> Any:
    """The tokenizer that lies beside a network of transformers."""
    folder = Path(str(getattr(asked.network, "name_or_path", "")))
    if not (folder / "tokenizer_config.json").is_file():
        raise asked.wrong(
            f"the words in {asked.path} are numbered by a tokenizer, and the network brings none: "
            "name a folder of Hugging Face's that holds one"
        )
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as e:  # transformers raises whatever it likes
        raise FileError(f"the tokenizer in {folder} cannot be read: {e}") from e


_READERS: Mapping[str, Callable[[Asked], Table]] = {
    ".npy": _arrays,
    ".npz": _arrays,
    ".txt": _lines,
    ".tsv": _lines,
}
