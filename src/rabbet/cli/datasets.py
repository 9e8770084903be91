"""Batches from files: folders of images, numpy arrays, lines of text. Text for decoders: `corpora`.

`FOLDER size=224`, `arrays.npz batch=16`, `sentences.txt length=64`: what stands behind the name are
settings. How images are scaled and words are numbered is taken from the network where it says so
(timm, torchvision, a folder of Hugging Face's), else from the settings, and asked for where neither
says it.
"""

import os
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
from rabbet.data.batches import tensor_of
from rabbet.errors import DataError, FileError

BATCH = 32  # examples
LIMIT = 512  # examples to calibrate with, where no other number is given
LENGTH = 128  # tokens of a text, at most
LABELS = "labels"  # what the labels of an .npz are called
PREPARATION = "pretrained_cfg"  # where timm's networks say how images are prepared, and ours do
WAYS = ("nearest", "bilinear", "bicubic", "lanczos")
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

    def number(self, name: str, default: int | None) -> int | None:
        """A setting that is a whole number from 1, if it is given."""
        value = self.settings.get(name, default)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.wrong(f"{name}={value!r}: a whole number, at least 1")
        return value


@dataclass(frozen=True)
class Table:
    """Examples that are read when they are needed.

    join: the inputs of those at given places, as a network takes them. labels: the class of each,
    if they are known; classes: their names in order, where they have some.
    """

    count: int
    join: Callable[[range], Any]
    labels: Tensor | None = None
    classes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Batches:
    """The batches of a table, one after the other, read anew each time.

    limit: how many examples are used, at equal distances; None: all to judge, 512 to calibrate.
    """

    table: Table
    size: int
    limit: int | None

    def __iter__(self) -> Iterator[Any]:
        """Inputs alone."""
        for start in range(0, self.table.count, self.size):
            yield self.table.join(range(start, min(start + self.size, self.table.count)))

    def spread(self, most: int = LIMIT) -> "Batches":
        """At most `limit` examples, at equal distances: files lie sorted by class."""
        table, limit = self.table, self.limit or most
        step = -(-table.count // limit)
        places = range(0, table.count, step)
        labels = None if table.labels is None else table.labels[::step]

        def join(some: range) -> Any:
            return table.join(places[some.start : some.stop])

        return Batches(Table(len(places), join, labels, table.classes), self.size, limit)

    def labelled(self, classes: tuple[str, ...] = ()) -> "Labelled":
        """Pairs of (inputs, labels); classes: how they are numbered, if not by this folder alone.

        Raises DataError where there are no labels, or for a class that is not among those.
        """
        if self.limit is not None and self.table.count > self.limit:
            return self.spread().labelled(classes)
        own, labels, classes = self.table.classes, self.table.labels, classes or self.table.classes
        if own and labels is not None:
            strange = sorted(set(own) - set(classes))
            if strange:
                raise DataError(
                    f"the class {strange[0]!r} of the test is not among those of the data: "
                    f"{', '.join(classes)}"
                )
            labels = torch.tensor([classes.index(name) for name in own])[labels]
        if labels is None:
            raise DataError(
                "no labels to measure accuracy with: images lie in a folder for each class, an "
                f".npz holds {LABELS!r}, a .tsv a class behind each text"
            )
        return Labelled(self, labels, len(classes) or None)


@dataclass(frozen=True)
class Labelled:
    """Pairs of (inputs, labels), read anew each time; classes: how many, if folders say so."""

    batches: Batches
    labels: Tensor
    classes: int | None = None

    def __iter__(self) -> Iterator[tuple[Any, Tensor]]:
        """One batch after the other."""
        return zip(self.batches, self.labels.split(self.batches.size), strict=True)


def is_data(reference: str) -> bool:
    """Whether a reference names a file or folder that is read here."""
    path = Path(settings_of(reference)[0])
    return path.suffix.lower() in _READERS or (bool(reference) and path.is_dir())


def open_data(reference: str, network: nn.Module | None, option: str) -> Batches:
    """The batches of a file or folder that `is_data`.

    Raises FileError for what is not there or cannot be read, and a usage error, naming the option,
    for settings that are unknown or missing.
    """
    place, settings = settings_of(reference)
    asked = Asked(Path(place), settings, network, option)
    if not asked.path.exists():
        raise FileError(f"there is no file {asked.path}")
    size, limit = asked.number("batch", BATCH), asked.number("limit", None)
    read = _images if asked.path.is_dir() else _READERS[asked.path.suffix.lower()]
    table = read(asked)
    if not table.count:
        raise FileError(f"{asked.path} holds no example")
    return Batches(table, size or BATCH, limit)


def _images(asked: Asked) -> Table:
    """Images in a folder, or in a folder for each class; classes are numbered by name."""
    try:
        from PIL import Image
    except ImportError:
        raise FileError(
            f"images in {asked.path} are read with pillow; install rabbet[vision]"
        ) from None
    prepare = _preparation(asked)
    folders = sorted(p for p in asked.path.iterdir() if p.is_dir() and not p.name.startswith("."))
    by_class = [_pictures(folder) for folder in folders]
    loose = [p for p in sorted(asked.path.iterdir()) if _is_picture(p)]
    empty = [p.name for p, files in zip(folders, by_class, strict=True) if not files]
    if empty:
        raise FileError(
            f"the folder {asked.path / empty[0]} holds no image of {', '.join(sorted(PICTURES))}"
        )
    files = [*loose, *(file for some in by_class for file in some)]
    labels = torch.tensor([k for k, some in enumerate(by_class) for _ in some])

    def read(file: Path) -> Tensor:
        try:
            with Image.open(file) as image:
                return prepare(_in_colour(image))
        except Exception as e:  # pillow raises whatever its readers do
            raise FileError(f"{file} cannot be read as an image: {e}") from None

    return Table(
        len(files),
        lambda some: torch.stack([read(files[k]) for k in some]),
        None if loose else labels,
        tuple(folder.name for folder in folders),
    )


def _pictures(folder: Path) -> list[Path]:
    """The images in a folder and below, links followed, what is hidden left out."""
    found: list[Path] = []
    for at, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if name[0] != "."]
        found += filter(_is_picture, (Path(at) / name for name in names))
    return sorted(found)


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in PICTURES and path.name[0] != "." and path.is_file()


def _in_colour(image: Any) -> Any:
    """An image as red, green and blue of 8 bits each."""
    from PIL import Image

    if image.mode.startswith("I;16"):  # pillow would cut what is above 255
        image = Image.fromarray((np.asarray(image) / 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"mode {image.mode} has no known range; save it with 8 or 16 bits")
    return image.convert("RGB")


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
    assert size is not None
    for name in ("mean", "std"):
        value = given[name]
        three = isinstance(value, Sequence) and len(value) == 3 and all(map(_is_number, value))
        if not three or (name == "std" and not all(value)):
            raise asked.wrong(f"{name}={value!r}: three numbers, one for each colour")
    if not _is_number(given["crop"]) or not 0 < given["crop"] <= 1:
        raise asked.wrong(f"crop={given['crop']!r}: the share of a side that is kept, up to 1")
    if given["interpolation"] not in WAYS:
        raise asked.wrong(f"interpolation={given['interpolation']!r}: one of {', '.join(WAYS)}")
    return _scaled(size, given["crop"], given["interpolation"], given["mean"], given["std"])


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


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
        named = {name: tensor_of(a) for name, a in parts.items()}
    except (OSError, ValueError, DataError, EOFError, BadZipFile) as e:
        raise FileError(f"{asked.path} cannot be read as arrays: {e}") from None
    counts = {len(t) if t.ndim else 0 for t in named.values()}
    labels = named.pop(LABELS, None)
    if not named:
        raise FileError(f"{asked.path} holds no inputs")
    if len(counts) > 1:
        raise FileError(f"the arrays in {asked.path} differ in length: {sorted(counts)}")

    # Arrays without names of their own are arguments in order.
    ordered = len(named) == 1 or set(named) == {f"arr_{k}" for k in range(len(named))}

    def join(some: range) -> Any:
        cut = {name: t[some.start : some.stop : some.step] for name, t in named.items()}
        if not ordered:
            return cut
        if len(cut) == 1:
            return cut.popitem()[1]
        return tuple(cut[f"arr_{k}"] for k in range(len(cut)))

    return Table(counts.pop(), join, labels)


def _lines(asked: Asked) -> Table:
    """`.txt`: a text a line. `.tsv`: a text, a tab and the number of its class."""
    asked.require("length")
    tokenizer, length = tokenizer_of(asked), asked.number("length", LENGTH)
    assert length is not None
    try:
        text = asked.path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise FileError(f"{asked.path} cannot be read as text: {e}") from None
    texts = [line for line in text.split("\n") if line.strip()]
    labels = None
    if asked.path.suffix.lower() == ".tsv":
        parts = [line.rpartition("\t") for line in texts]
        if not all(text and number.strip().isdecimal() for text, _, number in parts):
            raise FileError(f"in {asked.path} a line is a text, a tab and the number of its class")
        texts = [text for text, _, _ in parts]
        labels = torch.tensor([int(number) for _, _, number in parts])

    def join(some: range) -> Any:
        rows = [texts[k] for k in some]
        settings = {"padding": True, "truncation": True, "max_length": length}
        return dict(tokenizer(rows, return_tensors="pt", **settings))

    return Table(len(texts), join, labels)


def tokenizer_of(asked: Asked) -> Any:
    """The tokenizer that lies beside a network of transformers."""
    name = str(getattr(asked.network, "name_or_path", "") or "")
    folder = Path(name)
    if not name or not (folder / "tokenizer_config.json").is_file():
        raise asked.wrong(
            f"the words in {asked.path} are numbered by a tokenizer, and the network brings none: "
            "name a folder of Hugging Face's that holds one"
        )
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as e:  # transformers raises whatever it likes
        raise FileError(f"the tokenizer in {folder} cannot be read: {e}") from e


def _documents(asked: Asked) -> Table:
    raise asked.wrong(
        f"{asked.path} holds documents, which are text for a decoder: a network of transformers "
        "that says the next word, read from its folder; for others write a text a line into a .txt"
    )


_READERS: Mapping[str, Callable[[Asked], Table]] = {
    ".npy": _arrays,
    ".npz": _arrays,
    ".txt": _lines,
    ".tsv": _lines,
    ".jsonl": _documents,
}
