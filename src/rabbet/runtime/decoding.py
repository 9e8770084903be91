"""A decoder in a runtime, token after token, with its cache of keys and values."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rabbet.errors import FileError
from rabbet.runtime.openvino import Compiled, openvino_known
from rabbet.runtime.session import Session

Ids = NDArray[np.int64]
MODEL, SETTINGS, GGUF = "model.onnx", "genai_config.json", "model.gguf"
"""Files of a decoder's folder: the network, what makes it one for onnxruntime, llama.cpp's."""


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


class Reader(nn.Module):
    """A decoder's file as a network, without its cache: tokens [n, length] -> scores of each."""

    def __init__(self, session: Runs) -> None:
        super().__init__()
        self.session = session

    def forward(self, input_ids: Tensor) -> Tensor:
        """Scores of the token behind each, [n, length, words]."""
        return torch.from_numpy(Writing(self.session).read(input_ids.cpu().numpy()))


def open_decoder(folder: Path) -> Reader:
    """The decoder of a folder that was exported, as a network; raises as `open_runs`."""
    return Reader(open_runs(folder))


def open_runs(folder: Path, threads: int = 0) -> Runs:
    """The decoder of a folder that was exported, in its own runtime.

    threads: 0 for as many as the runtime likes. Raises FileError for a folder of llama.cpp, which
    is not run here, or of nothing that is known, and where its runtime is not installed.
    """
    file = folder / MODEL
    if file.is_file() and (folder / SETTINGS).is_file():
        return Session(file, threads)
    if file.is_file():
        if not openvino_known():
            raise FileError(f"{folder} runs in OpenVINO, which is not installed: rabbet[openvino]")
        return Compiled(file.read_bytes(), threads)
    if (folder / GGUF).is_file():
        raise FileError(
            f"{folder} is for llama.cpp, which is not run here; its weights are those of the "
            "native file, so judge that one"
        )
    raise FileError(
        f"{folder} holds neither a native file (rabbet*.safetensors) nor a decoder's {MODEL}"
    )
