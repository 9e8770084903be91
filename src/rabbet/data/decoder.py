"""Decoders: what they answer to windows of tokens, how good that is, and what they write.

A decoder takes numbers of tokens [n, length] and gives scores of the token behind each, [n, length,
words]. Networks of transformers are asked for some places alone where they know how: the scores of
all take 200 MB for 1,024 tokens and 49,152 words.
"""

import contextlib
import inspect
import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rabbet.data.batches import outputs, suited
from rabbet.data.measure import standard_error
from rabbet.data.state import clean_pass
from rabbet.data.task import evaluating
from rabbet.data.text import Text, Tokens
from rabbet.errors import DataError

ENTRIES = 2**23  # scores that are held at once while losses are added up
TOGETHER = 2048  # tokens that run at once while a perplexity is measured
PROMPTS = 2  # that are gone on with
PROMPT = 32  # tokens of a prompt, at most

_ALONE = threading.RLock()
"""Who has it may have a network answer from memory."""


def next_scores(model: nn.Module, ids: Tensor, places: Tensor | None = None) -> Tensor:
    """Scores of the token behind each, [n, places, words], of tokens [n, length].

    places: those alone behind the tokens of these numbers, in order. Raises DataError for a network
    that gives anything else.
    """
    known = inspect.signature(model.forward).parameters
    cut = places is not None and "logits_to_keep" in known
    settings: dict[str, Any] = {"logits_to_keep": places} if cut else {}
    if "use_cache" in known:  # keys and values are no output to compare
        settings["use_cache"] = False
    named = "input_ids" in known or any(p.kind == p.VAR_KEYWORD for p in known.values())
    result = model(input_ids=ids, **settings) if named else model(ids)
    scores = getattr(result, "logits", None)
    scores = scores if isinstance(scores, Tensor) else outputs(result)[0]
    wanted = ids.shape[1] if places is None or not cut else len(places)
    if scores.ndim != 3 or scores.shape[:2] != (ids.shape[0], wanted):
        raise DataError(
            "a decoder gives scores [n, length, words] of the next token for tokens [n, length]; "
            f"for {list(ids.shape)} this network gave {list(scores.shape)}"
        )
    return scores if cut or places is None else scores[:, places]


def token_losses(model: nn.Module, ids: Tensor) -> Tensor:
    """The cross-entropy of every token but the first, given those before it, [n, length - 1].

    In nats, in float32. No more than 2^23 scores are held at once where the network can be asked
    for some of them (see `next_scores`).
    """
    places = torch.arange(ids.shape[1] - 1, device=ids.device)
    with _body_once(model) as words:
        step = max(1, ENTRIES // (len(ids) * words)) if words else len(places)
        losses = [_losses(next_scores(model, ids, part), ids, part) for part in places.split(step)]
    return torch.cat(losses, 1)


def _losses(scores: Tensor, ids: Tensor, places: Tensor) -> Tensor:
    """The cross-entropy of the tokens behind these places, [n, places]."""
    targets = ids[:, places + 1]
    step = max(1, ENTRIES // (len(ids) * scores.shape[2]))
    parts = zip(scores.split(step, 1), targets.split(step, 1), strict=True)
    return torch.cat([F.cross_entropy(s.mT.float(), t, reduction="none") for s, t in parts], 1)


@contextlib.contextmanager
def _body_once(model: nn.Module) -> Iterator[int]:
    """Within this the part of a network before its scores runs once, and then answers as it did.

    So scores can be asked for a slice at a time. Gives the number of words; 0 for a network that
    does not say which part that is, or cannot be asked for slices. Only for one input, and only in
    this thread: others are answered as ever.
    """
    body = getattr(model, "base_model", None)
    words = getattr(getattr(model, "config", None), "vocab_size", 0)
    asked = "logits_to_keep" in inspect.signature(model.forward).parameters
    if not asked or not isinstance(body, nn.Module) or body is model or not words:
        yield 0
        return
    kept: list[Any] = []
    owner = threading.get_ident()
    with _ALONE:
        forward, own = body.forward, vars(body).get("forward")

        def answer(*args: Any, **named: Any) -> Any:
            if threading.get_ident() != owner:
                return forward(*args, **named)
            if not kept:
                kept.append(forward(*args, **named))
            return kept[0]

        vars(body)["forward"] = answer
        try:
            yield words
        finally:
            vars(body).pop("forward")
            if own is not None:
                vars(body)["forward"] = own


class Estimate(float):
    """The perplexity of some windows, which knows how sure it is.

    sums: the summed loss of each window in nats; counts: of how many tokens.
    """

    sums: tuple[float, ...]
    counts: tuple[int, ...]

    def __new__(cls, sums: Sequence[float], counts: Sequence[int]) -> Self:
        """From the losses of windows; at least one token must be foretold."""
        found = super().__new__(cls, _exp(sum(sums) / sum(counts)))
        found.sums, found.counts = tuple(sums), tuple(counts)
        return found

    def __getnewargs__(self) -> tuple[Any, ...]:
        return self.sums, self.counts

    @property
    def error(self) -> float | None:
        """The standard error of the perplexity, windows drawn anew; None for a single one.

        By the deviations of the windows' losses, and the slope of the exponential.
        """
        return _times(float(self), _spread(self.sums, self.counts))

    def ratio(self, other: "Estimate") -> tuple[float, float | None]:
        """This over another perplexity of the same windows, and the standard error of that.

        It is far smaller than those of the two: windows that are hard are so for both. Raises
        DataError for other windows.
        """
        if self.counts != other.counts:
            raise DataError("perplexities are of other windows, and cannot be divided")
        apart = [a - b for a, b in zip(self.sums, other.sums, strict=True)]
        ratio = _exp(sum(apart) / sum(self.counts))
        return ratio, _times(ratio, _spread(apart, self.counts))


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf


def _spread(sums: Sequence[float], counts: Sequence[int]) -> float | None:
    """The standard error of a mean loss; None for a single window."""
    return standard_error(sums, counts) if len(sums) > 1 else None


def _times(value: float, share: float | None) -> float | None:
    return None if share is None else value * share


@dataclass(frozen=True)
class Perplexity:
    """The perplexity of a decoder on a text: e to the mean cross-entropy of a token.

    A measure, of which smaller is better. tokens: of the text. windows: [windows, length]. counts:
    how many tokens at the end of each window are foretold; those before them are only read.
    """

    tokens: Tokens
    windows: Tensor
    counts: tuple[int, ...]

    smaller_is_better: ClassVar[bool] = True
    quantity: ClassVar[str] = "perplexity"

    @classmethod
    def of(
        cls,
        text: Text,
        tokenizer: Any,
        length: int = 512,
        stride: int | None = None,
        limit: int | None = None,
    ) -> Self:
        """On a text: see `rabbet.tasks.perplexity`, which says what they are and raises."""
        tokens = Tokens.of(text, tokenizer)
        windows = tokens.windows(length, stride, limit)
        inner = length - 1
        fresh = inner if stride is None else min(stride, inner)
        # No window before the first one has foretold its tokens.
        return cls(tokens, windows, (inner, *[fresh] * (len(windows) - 1)))

    def __call__(self, model: nn.Module) -> Estimate:
        """Run the network on all windows. Raises DataError for a network of other tokens."""
        length = self.windows.shape[1]
        self.tokens.require_known(model, length)
        sums: list[float] = []
        with evaluating(model), torch.no_grad():
            for part in self.windows.split(max(1, TOGETHER // length)):
                ids = suited(part, model)
                with clean_pass(model, ids):
                    losses = token_losses(model, ids).double().cpu()
                rows = zip(losses, self.counts[len(sums) :], strict=False)
                sums += [float(row[len(row) - count :].sum()) for row, count in rows]
        return Estimate(sums, self.counts)


@dataclass(frozen=True)
class Decoding:
    """The forward of a decoder's task: {"input_ids": [n, length]} to scores [n, places, words].

    places: behind which tokens scores are given; None: all.
    """

    tokens: Tokens
    places: tuple[int, ...] | None = None

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Run a decoder on a batch. Raises DataError for one of another vocabulary."""
        ids = batch["input_ids"]
        self.tokens.require_known(model, ids.shape[1])
        return next_scores(model, ids, self._places(ids))

    def _places(self, ids: Tensor) -> Tensor | None:
        return None if self.places is None else torch.tensor(self.places, device=ids.device)

    @property
    def whole(self) -> "Decoding":
        """The same for all places, as files are written."""
        return Decoding(self.tokens)

    def loss(self, scores: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """The mean cross-entropy of the tokens behind these places, in nats."""
        ids = batch["input_ids"]
        places = self._places(ids)
        places = torch.arange(ids.shape[1], device=ids.device) if places is None else places
        known = places < ids.shape[1] - 1  # behind the last one nobody knows what comes
        return _losses(scores[:, known], ids, places[known]).mean()


@dataclass(frozen=True)
class Continuations:
    """What a decoder writes behind some prompts: the likeliest token, again and again.

    prompts: tokens [n, length]. count: how many tokens are written.
    """

    prompts: Tensor
    tokenizer: Any
    count: int = 40

    @classmethod
    def of(cls, judge: Perplexity, tokenizer: Any) -> Self:
        """Behind the beginnings of two windows of a text that a network is judged on."""
        windows = judge.windows[:: max(1, len(judge.windows) // PROMPTS)][:PROMPTS]
        return cls(windows[:, : min(PROMPT, windows.shape[1] // 2)], tokenizer)

    def __call__(self, model: nn.Module) -> dict[str, str]:
        """The continuation of each prompt, by the prompt; shorter where the network ends before."""
        ids, start = suited(self.prompts, model), self.prompts.shape[1]
        room = getattr(getattr(model, "config", None), "max_position_embeddings", None)
        end = min(start + self.count, room or math.inf)
        with evaluating(model), torch.no_grad(), clean_pass(model, ids):
            while ids.shape[1] < end:
                last = torch.tensor([ids.shape[1] - 1], device=ids.device)
                ids = torch.cat([ids, next_scores(model, ids, last).argmax(2)], 1)
        return {self._shown(row[:start]): self._shown(row[start:]) for row in ids.cpu()}

    def _shown(self, ids: Tensor) -> str:
        return str(self.tokenizer.decode(ids.tolist()))
