"""A decoder in a runtime, token after token, with its cache of keys and values."""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]


class Runs(Protocol):
    """A file in a runtime, such as `Session` or `Compiled`."""

    @property
    def shapes(self) -> dict[str, tuple[Any, ...]]:
        """Of each input the sizes; what a free axis has is left open."""

    def run(self, feed: dict[str, NDArray[Any]]) -> list[Any]:
        """The outputs, in order, for input arrays by name."""


@dataclass
class Writing:
    """A text that grows: the cache of a session and what it was given so far.

    session: a file with inputs `input_ids`, `attention_mask`, `position_ids` and
    `past_key_values.N.key` and `.value`, and outputs `logits`, `present.N.key` and `.value`.
    """

    session: Runs

    def __post_init__(self) -> None:
        self.cache: dict[str, Any] = {}
        self.mask: Ids = np.zeros((0, 0), np.int64)

    def read(self, ids: Ids, mask: Ids | None = None) -> NDArray[Any]:
        """Scores of what follows each of more tokens, [batch, length] -> [batch, length, words].

        mask: 0 for padding on the left, [batch, length]; default: none is.
        """
        more = np.ones_like(ids) if mask is None else mask
        self.mask = np.concatenate([self.mask.reshape(len(ids), -1), more], 1)
        places = np.maximum(self.mask.cumsum(1) - 1, 0)[:, -ids.shape[1] :]
        given = {"input_ids": ids, "attention_mask": self.mask, "position_ids": places}
        if not self.cache:
            self.cache = self._empty(len(ids))
        logits, *present = self.session.run(given | self.cache)
        self.cache = dict(zip(self.cache, present, strict=True))
        return np.asarray(logits)

    def greedy(self, ids: Ids, count: int, mask: Ids | None = None) -> Ids:
        """The `count` tokens of the highest scores behind a prompt, [batch, count]."""
        found = [self.read(ids, mask)[:, -1:].argmax(-1)]
        while len(found) < count:
            found.append(self.read(found[-1])[:, -1:].argmax(-1))
        return np.concatenate(found, 1)

    def _empty(self, batch: int) -> dict[str, Any]:
        past = {name: s for name, s in self.session.shapes.items() if name.startswith("past")}
        return {name: np.zeros((batch, s[1], 0, s[3]), np.float32) for name, s in past.items()}
