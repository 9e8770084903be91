"""Random words for tiny decoders, and how far the scores of two of them lie apart."""

import torch

from rabbet import Task

WORDS = 50


def words(batches=3, seed=1):
    g = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(WORDS, (2, 16), generator=g)} for _ in range(batches)]


def task():
    return Task(words(), forward=lambda n, b: n(b["input_ids"], use_cache=False).logits)


def scores(model, given=None):
    given = words() if given is None else given
    with torch.no_grad():
        return torch.cat([model(**b, use_cache=False).logits.flatten(0, 1) for b in given])


def divergence(one, other, given=None):
    p, q = (scores(model, given).log_softmax(-1) for model in (one, other))
    return float((p.exp() * (p - q)).sum(-1).mean())
