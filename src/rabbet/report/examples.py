"""Some examples of a task as they can be looked at, with what two networks answer."""

import base64
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from rabbet.data.answers import Answers, class_axis
from rabbet.data.batches import Batch, outputs, tensors
from rabbet.data.task import Task
from rabbet.workpiece import Workpiece

SHOWN = 6  # examples
SIDE = 224  # pixels of a picture, at most: every second, third, ... one is taken of a larger one
NUMBERS = 16  # of a tensor that are written out
TOP = 3  # classes of an answer
SIGNAL = 400  # points of a line


@dataclass(frozen=True)
class Seen:
    """One tensor of an example: as a picture (PNG), a line of numbers, or a text; and its shape."""

    form: Literal["picture", "line", "text"]
    about: str
    content: str | tuple[float, ...]


@dataclass(frozen=True)
class Answered:
    """One output for an example: rows of what it is of, the float network's, the compressed one's.

    agree: in words, how near the two are. prose: whether the answers are texts to be read.
    """

    heads: tuple[str, str, str]
    rows: tuple[tuple[str, str, str], ...]
    agree: str
    prose: bool = False


@dataclass(frozen=True)
class Example:
    """What went in, and for each output what came out."""

    inputs: tuple[Seen, ...]
    answers: tuple[Answered, ...]


def examples_of(piece: Workpiece, student: nn.Module, count: int = SHOWN) -> tuple[Example, ...]:
    """The first examples of the first batch, with the answers of the float and another network.

    Of a task with a `sample` what that gives, instead: its prompts, and what comes behind them.
    Where it is not known along which axis examples lie, the batch is one. Networks run on the whole
    batch, as they may need the others in it. Raises what the forward of the user raises.
    """
    if piece.task.sample is not None:
        return sampled(piece.task, piece.model, student)
    task, batch = piece.task, piece.task.first()
    with torch.no_grad():
        theirs = outputs(task.run(piece.model, batch))
        ours = outputs(task.run(student, batch))
    size = task.examples.count(batch)
    axes = [task.examples.of_layer(t, size) if task.examples.known else None for t in theirs]
    return tuple(
        Example(
            tuple(seen(t) for t in _inputs(task, batch, k)),
            tuple(
                answered(
                    piece.answers, place, _at(a, axis, k, size), _at(b, axis, k, size), len(theirs)
                )
                # lists that depend on values may be of different lengths
                for place, (a, b, axis) in enumerate(zip(theirs, ours, axes, strict=False))
            ),
        )
        for k in range(min(count, size))
    )


def sampled(task: Task, network: nn.Module, student: nn.Module) -> tuple[Example, ...]:
    """What two networks make of the prompts of a task."""
    theirs, ours = task.sampled(network), task.sampled(student)
    return tuple(
        Example((Seen("text", "prompt", prompt),), (_texts(text, ours.get(prompt, "")),))
        for prompt, text in theirs.items()
    )


def _texts(theirs: str, ours: str) -> Answered:
    """Two texts side by side, and up to where they are the same."""
    heads, rows = ("what follows", "float", "compressed"), (("text", theirs, ours),)
    if theirs == ours:
        return Answered(heads, rows, "the same text", True)
    pairs = enumerate(zip(theirs, ours, strict=False))
    same = next((k for k, (a, b) in pairs if a != b), min(len(theirs), len(ours)))
    agree = f"the same for {same:,} of {len(theirs):,} letters and signs"
    return Answered(heads, rows, agree, True)


def _inputs(task: Task, batch: Batch, number: int) -> list[Tensor]:
    """The tensors of one example, without the axis along which examples lie."""
    axes = task.examples
    if not axes.known:
        return tensors(batch)
    alone = axes.cut(batch, slice(number, number + 1))
    each = zip(tensors(alone), (axis for axis, _ in axes.shapes(batch)), strict=True)
    return [t if axis is None else t.select(axis, 0) for t, axis in each]


def _at(answer: Tensor, axis: int | None, number: int, count: int) -> Tensor:
    """The part of an output that is of one of `count` examples; all where that cannot be told."""
    answer = answer.detach().float().cpu()
    if axis is None or answer.shape[axis] % count:
        return answer
    rows = answer.movedim(axis, 0)
    rows = rows.reshape(count, -1, *rows.shape[1:])[number]  # an example may have several rows
    return rows[0] if len(rows) == 1 else rows


def seen(values: Tensor) -> Seen:
    """A tensor of one example as it can be looked at.

    Three channels, one, or a plane of numbers are a picture, scaled from the smallest to the
    largest number; many numbers in a row are a line, few of them, and indices, are written out.
    """
    values = values.detach().cpu()
    about = f"{_type(values)} {list(values.shape)}" if values.ndim else _type(values)
    pixels = _pixels(values)
    if pixels is not None:
        return Seen("picture", about, _png(pixels))
    flat = values.flatten()
    if values.is_floating_point() and values.ndim == 1 and len(flat) > NUMBERS:
        step = -(-len(flat) // SIGNAL)
        return Seen("line", about, tuple(flat[::step].float().nan_to_num(0.0).tolist()))
    few = ", ".join(f"{x:.4g}" for x in flat[:NUMBERS].tolist())
    return Seen("text", about, few + (", …" if len(flat) > NUMBERS else ""))


def _type(values: Tensor) -> str:
    return str(values.dtype).removeprefix("torch.")


def _pixels(values: Tensor) -> Tensor | None:
    """Bytes [height, width, 1 or 3] if a tensor can be a picture."""
    if values.ndim == 2 and values.is_floating_point():
        values = values[None]
    if values.ndim != 3 or values.shape[0] not in (1, 3) or min(values.shape[1:]) < 4:
        return None
    step = -(-max(values.shape[1:]) // SIDE)
    values = values[:, ::step, ::step].double().nan_to_num(0.0)
    low, high = values.min(), values.max()
    return (255 * (values - low) / (high - low).clamp_min(1e-30)).round().byte().movedim(0, -1)


def _png(pixels: Tensor) -> str:
    """A PNG as the address of its own content (PNG specification, RFC 2083)."""
    height, width, channels = pixels.shape
    plain = torch.zeros(height, 1 + width * channels, dtype=torch.uint8)
    plain[:, 1:] = pixels.reshape(height, -1)  # filter 0 in front of each row
    colour = 2 if channels == 3 else 0
    header = struct.pack(">2I5B", width, height, 8, colour, 0, 0, 0)
    chunks = (
        (b"IHDR", header),
        (b"IDAT", zlib.compress(plain.numpy().tobytes(), 9)),
        (b"IEND", b""),
    )
    content = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def answered(answers: Answers, place: int, theirs: Tensor, ours: Tensor, count: int) -> Answered:
    """What two networks answer to one example, side by side.

    theirs, ours: one output of the float and of the compressed network, without the axis of
    examples. Raises nothing: outputs of other shapes are said to be that.
    """
    name = f"output {place + 1} of {count}" if count > 1 else "output"
    heads = (name, "float", "compressed")
    if theirs.shape != ours.shape:
        return Answered(
            heads, (("shape", str([*theirs.shape]), str([*ours.shape])),), "other shape"
        )
    scores = answers.kinds[min(place, len(answers.kinds) - 1)] == "scores"
    if scores and theirs.ndim:
        axis = class_axis(theirs[None]) - 1
        rows = [t.movedim(axis, -1).reshape(-1, t.shape[axis]) for t in (theirs, ours)]
        return _classes(heads, *rows)
    far = float((ours - theirs).norm() / theirs.norm().clamp_min(1e-30))
    flat = zip(theirs.flatten()[:5].tolist(), ours.flatten()[:5].tolist(), strict=True)
    values = tuple((f"value {k + 1}", f"{a:.4g}", f"{b:.4g}") for k, (a, b) in enumerate(flat))
    return Answered(heads, values, f"{100 * far:.2g} % apart, over {theirs.numel():,} values")


def _classes(heads: tuple[str, str, str], theirs: Tensor, ours: Tensor) -> Answered:
    """Scores [places, classes] of two networks."""
    same = theirs.argmax(1) == ours.argmax(1)
    if len(theirs) > 1:
        first = [
            (f"place {k + 1}", f"class {int(a)}", f"class {int(b)}")
            for k, (a, b) in enumerate(
                zip(theirs.argmax(1)[:TOP], ours.argmax(1)[:TOP], strict=True)
            )
        ]
        agree = f"{int(same.sum()):,} of {len(same):,} places have the same class"
        return Answered(heads, tuple(first), agree)
    pairs = [_top(rows[0]) for rows in (theirs, ours)]
    rows = [(f"{k + 1}.", a, b) for k, (a, b) in enumerate(zip(*pairs, strict=True))]
    return Answered(heads, tuple(rows), "same class" if bool(same) else "another class")


def _top(scores: Tensor) -> Sequence[str]:
    """The classes of the highest probability in words."""
    chances, classes = scores.softmax(-1).topk(min(TOP, len(scores)))
    return [
        f"class {k}: {100 * p:.1f} %"
        for p, k in zip(chances.tolist(), classes.tolist(), strict=True)
    ]
