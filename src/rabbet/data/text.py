"""Text as windows of tokens, as a decoder is calibrated and measured on it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from rabbet.errors import DataError, FileError

Text = str | Path | Sequence[str]
"""A text, a file of it, or several documents."""

FILES = (".txt", ".jsonl")
PADDED = 0.9, 128  # a network knows at most so many words more than its tokenizer: rounded up


@dataclass(frozen=True)
class Tokens:
    """The tokens of a text, [n].

    begin: the token that the tokenizer puts in front of a text, and so in front of every window;
    None if it puts none. fewest: how many words a network of this tokenizer knows at least. most:
    how many the tokenizer knows; None if it does not say.
    """

    ids: Tensor
    begin: int | None
    fewest: int
    most: int | None

    @classmethod
    def of(cls, text: Text, tokenizer: Any) -> Self:
        """The tokens of all documents in a row, the end-of-text token behind each of several.

        tokenizer: of transformers, or one that encodes and decodes likewise. Where it has no such
        token, an empty line is between documents. Raises DataError for what is no tokenizer, and as
        `documents` does.
        """
        if not (callable(getattr(tokenizer, "encode", None)) and hasattr(tokenizer, "decode")):
            raise DataError(
                "the tokenizer is that of the network, such as "
                "transformers.AutoTokenizer.from_pretrained(folder); "
                f"found {type(tokenizer).__name__}"
            )
        parts, end = documents(text), getattr(tokenizer, "eos_token_id", None)
        if end is None or len(parts) == 1:
            ids = _encoded(tokenizer, "\n\n".join(parts))
        else:
            ids = [token for part in parts for token in (*_encoded(tokenizer, part), end)]
        fewest = max(max(ids, default=-1) + 1, getattr(tokenizer, "vocab_size", None) or 0)
        found = torch.tensor(ids, dtype=torch.long)
        return cls(found, _begin(tokenizer), fewest, _size(tokenizer))

    def windows(self, length: int, stride: int | None = None, limit: int | None = None) -> Tensor:
        """Windows of so many tokens, [windows, length]; the tokens behind the last are left out.

        stride: tokens from the start of one to that of the next; None: they do not overlap. limit:
        so many of them, at equal distances; None: all. Raises DataError for a text that is shorter
        than a window, and for numbers that make none.
        """
        least = 2 if self.begin is None else 3  # a token has to be foretold from another
        require_whole("length", length, least, "the tokens of a window")
        inner = length if self.begin is None else length - 1
        step = inner if stride is None else stride
        require_whole("stride", step, 1, "the tokens from one window to the next")
        if step > inner:
            raise DataError(
                f"stride is at most the tokens of a window, {inner}, or some would be left out; "
                f"found {step}"
            )
        if limit is not None:
            require_whole("the number of windows", limit, 1, "how many windows are used")
        if len(self.ids) < inner:
            raise DataError(
                f"the text has {len(self.ids):,} tokens, fewer than a window of {length:,}: give "
                "more text, or a smaller length"
            )
        rows = self.ids.unfold(0, inner, step)
        if limit is not None and limit < len(rows):
            rows = rows[[k * len(rows) // limit for k in range(limit)]]
        if self.begin is None:
            return rows.contiguous()
        return torch.cat([rows.new_full((len(rows), 1), self.begin), rows], 1)

    def require_known(self, model: nn.Module, length: int) -> None:
        """Raise DataError for a network that has another vocabulary, or takes shorter windows.

        What a network knows is read from the config of transformers; of others nothing is known.
        """
        config = getattr(model, "config", None)
        known = getattr(config, "vocab_size", None)
        share, room = PADDED
        words = self.fewest if self.most is None else self.most
        few = self.most is not None and isinstance(known, int) and words < share * known - room
        if isinstance(known, int) and (few or self.fewest > known):
            raise DataError(
                f"the tokenizer has {words:,} words, the network {known:,}: take the network's own "
                "tokenizer"
            )
        most = getattr(config, "max_position_embeddings", None)
        if isinstance(most, int) and length > most:
            raise DataError(
                f"a window has {length:,} tokens, and the network takes {most:,}: give a smaller "
                "length"
            )


def documents(text: Text) -> list[str]:
    """The documents of a text: a string is one, a `.txt` file is one, of a `.jsonl` each line.

    A string of one line that ends in .txt or .jsonl names a file. A line of a .jsonl is a string,
    or an object whose "text" is one. Raises FileError for a file that is not there or cannot be
    read so, DataError for anything else.
    """
    if isinstance(text, str) and (not text.endswith(FILES) or "\n" in text):
        found = [text]
    elif isinstance(text, str | Path):
        found = _read(Path(text))
    elif isinstance(text, Sequence) and all(isinstance(part, str) for part in text):
        found = list(text)
    else:
        raise DataError(
            "a text is a string, the path of a .txt or .jsonl file, or a list of strings; "
            f"found {type(text).__name__}"
        )
    for part in found:
        try:
            part.encode()
        except UnicodeEncodeError as e:
            raise DataError(
                f"a document holds {part[e.start]!r} at character {e.start:,}, half of a surrogate "
                "pair, which is no character: decode it with errors='replace'"
            ) from None
    return [part for part in found if part.strip()]


def _read(path: Path) -> list[str]:
    if path.suffix not in FILES:
        raise FileError(f"{path}: a text lies in a .txt or a .jsonl file")
    if not path.is_file():
        raise FileError(f"there is no file {path}")
    try:
        content = path.read_text(encoding="utf-8-sig")  # with or without a mark of bytes
    except (OSError, UnicodeDecodeError) as e:
        raise FileError(f"{path} cannot be read as text: {e}") from None
    if path.suffix == ".txt":
        return [content]
    lines = enumerate(content.split("\n"), 1)
    return [_document(path, number, line) for number, line in lines if line.strip()]


def _document(path: Path, number: int, line: str) -> str:
    try:
        found = json.loads(line)
    except ValueError as e:
        raise FileError(f"line {number} of {path} is no JSON: {e}") from None
    part = found.get("text") if isinstance(found, dict) else found
    if not isinstance(part, str):
        raise FileError(
            f'line {number} of {path} is neither a string nor an object with a string as its "text"'
        )
    return part


def _encoded(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text alone."""
    # a text is longer than what the network takes at once, of which transformers would warn
    quiet = {"verbose": False} if hasattr(tokenizer, "eos_token_id") else {}
    found = tokenizer.encode(text, add_special_tokens=False, **quiet)
    return list(getattr(found, "ids", found))


def _size(tokenizer: Any) -> int | None:
    """How many words a tokenizer knows; of the package tokenizers one says so by a method."""
    if hasattr(tokenizer, "__len__"):
        return len(tokenizer)
    return tokenizer.get_vocab_size() if hasattr(tokenizer, "get_vocab_size") else None


def _begin(tokenizer: Any) -> int | None:
    """The token in front of a text."""
    token = getattr(tokenizer, "bos_token_id", None)
    if token is None:
        return None
    first = tokenizer.encode("a")[:1]
    return token if first == [token] and _encoded(tokenizer, "a")[:1] != [token] else None


def require_whole(name: str, value: object, least: int, what: str, most: int | None = None) -> None:
    """Raise DataError unless a setting is a whole number between these two."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not (whole and least <= value and (most is None or value <= most)):  # type: ignore[operator]
        ends = f"at least {least}" if most is None else f"from {least} to {most}"
        raise DataError(f"{name} is {what}, a whole number, {ends}; found {value!r}")
