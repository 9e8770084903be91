"""Tasks of common kinds, made of plain data in a line."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from rabbet.data.decoder import Continuations, Decoding, Estimate, Perplexity
from rabbet.data.pictures import PSNR
from rabbet.data.task import Task
from rabbet.data.text import Text, Tokens, require_whole

SCORES = 2**22  # of a window, that are compared where nothing else is said


def perplexity(  # noqa: PLR0913 (those behind the star are options, given by name)
    text: Text,
    tokenizer: Any,
    length: int = 512,
    *,
    windows: int = 128,
    held: Text | None = None,
    held_windows: int | None = None,
    stride: int | None = None,
    places: int | None = None,
    batch: int = 1,
) -> Task:
    """A task for a decoder (a language model): calibrated on one text, judged by another.

    text: a string, the path of a .txt file (one document) or of a .jsonl file (one a line: a
    string, or an object with a "text"), or a list of strings. tokenizer: the network's own, of
    transformers. length: tokens of a window. windows: how many are used, at equal distances over
    the text. held: another text, of the same kinds; the task's `evaluate` is the perplexity on it,
    smaller is better, with a standard error over windows (`Estimate`). Without it nothing judges.
    held_windows: of how many windows; None: all. stride: tokens from one of them to the next; each
    foretells those alone that none before it has. None: they do not overlap. places: behind how
    many tokens of a window, at equal distances, the scores are compared and the `loss` (the
    cross-entropy of the next token, in nats) is taken; None: as many as make at most 2^22 scores,
    all of them in a file that is written. batch: windows in a batch.

    The network takes tokens [n, length], as `input_ids` if it has such an argument, and gives
    scores [n, length, words]. Where the tokenizer puts a token in front of a text, every window
    begins with it. A report shows what both networks write behind two prompts of the held text.

    Raises DataError for what is no tokenizer, a text of fewer tokens than a window, and, as soon as
    it runs, for a network of another vocabulary; FileError for a file that cannot be read.
    """
    tokens = Tokens.of(text, tokenizer)
    chosen = tokens.windows(length, limit=windows)
    require_whole("batch", batch, 1, "the windows in a batch")
    if places is not None:
        require_whole("places", places, 1, "how many scores of a window are used", length - 1)
    evaluate = sample = None
    if held is not None:
        evaluate = Perplexity.of(held, tokenizer, length, stride, held_windows)
        sample = Continuations.of(evaluate, tokenizer)
    count = max(1, SCORES // (tokens.most or tokens.fewest)) if places is None else places
    forward = Decoding(tokens, _spread(length - 1, count))
    return Task(
        [{"input_ids": part} for part in chosen.split(batch)],
        forward,
        evaluate,
        limit=len(chosen),
        loss=forward.loss,
        outputs="scores",
        axes=0,
        sample=sample,
    )


def super_resolution(
    images: Iterable[Tensor],
    held: Iterable[tuple[Tensor, Tensor]] | None = None,
    *,
    peak: float = 1.0,
    border: int = 0,
) -> Task:
    """A task for a network that makes pictures of pictures: larger, sharper, cleaner ones.

    images: batches of what it is given, [n, channels, height, width], to calibrate with; no labels.
    held: other batches, each with the pictures that should come out; the task's `evaluate` is the
    mean peak signal-to-noise ratio on them in dB, larger is better. Without it nothing judges.
    peak: the largest value of a pixel, to which answers are cut, as they are to 0 from below;
    border: pixels at each edge of an answer that do not count.

    Raises DataError for a peak that is not positive or a border that is not a whole number, and,
    as soon as it runs, for answers of another shape than the pictures.
    """
    evaluate = None if held is None else PSNR.of(held, peak, border)
    return Task(images, evaluate=evaluate, outputs="values", axes=0)


def _spread(total: int, count: int) -> tuple[int, ...] | None:
    """So many of the numbers from 0 below a total, at equal distances, the last among them.

    None, for all, if there are no more.
    """
    if count >= total:
        return None
    return tuple((k + 1) * total // count - 1 for k in range(count))


__all__ = ["PSNR", "Estimate", "Perplexity", "perplexity", "super_resolution"]
