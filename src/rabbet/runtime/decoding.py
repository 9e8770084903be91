"""A decoder in onnxruntime, token after token, with its cache of keys and values."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rabbet.runtime.session import Session

Ids = NDArray[np.int64]


@dataclass
class Writing:
    """A text that grows: the cache of a session and what it was given so far.

    session: a file with inputs `input_ids`, `attention_mask`, `position_ids` and
    `past_key_values.N.key` and `.value`, and outputs `logits`, `present.N.key` and `.value`.
    """

    session: Session

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
        inputs = [i for i in self.session.session.get_inputs() if i.name.startswith("past")]
        shapes = {i.name: (batch, i.shape[1], 0, i.shape[3]) for i in inputs}
        return {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
