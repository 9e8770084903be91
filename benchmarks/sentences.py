"""ATIS: sentences, a BERT-style encoder with heads for intent and slots, its training and measures.

    # only trains the dense models
    python benchmarks/sentences.py --keep FOLDER [--seeds 0 1 2] [--only "seed 1"]
    # how settings are chosen
    python benchmarks/sentences.py --folds 0 1 2 3 4 --seeds 0 --width 240

A tenth of the training sentences is held back and chooses the epoch (`--folds`: another tenth). Dev
and test together are the measure; `--folds` does not use them.
"""

import argparse
import math
import random
import re
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from common import alike, head, machine, reader, row
from torch import Tensor, nn
from transformers import BertConfig, BertModel

PAD, UNKNOWN, FIRST = 0, 1, 2
IGNORED = -100
Batch = tuple[Tensor, Tensor, Tensor, Tensor]
"""Token ids [n, length], mask of real tokens, slot labels [n, length] (-100: none), intents [n]."""


@dataclass(frozen=True)
class Sentences:
    """Encoded sentences of a split: ids, slot labels, intent; labels not in training are -1."""

    items: list[tuple[list[int], list[int], int]]
    tags: list[str] = field(repr=False)

    def batches(self, size: int, order: random.Random | None = None) -> list[Batch]:
        """Batches of similar length, shuffled by `order`."""
        return [
            self._batch(chunk)
            for chunk in alike([len(ids) for ids, _, _ in self.items], size, order)
        ]

    def _batch(self, chunk: Sequence[int]) -> Batch:
        longest = max(len(self.items[j][0]) for j in chunk)
        ids = torch.full((len(chunk), longest), PAD)
        slots = torch.full((len(chunk), longest), IGNORED)
        for k, j in enumerate(chunk):
            words, labels, _ = self.items[j]
            ids[k, : len(words)] = torch.tensor(words)
            slots[k, : len(labels)] = torch.tensor(labels)
        return ids, (ids != PAD).long(), slots, torch.tensor([self.items[j][2] for j in chunk])


@dataclass(frozen=True)
class Corpus:
    """Train, the held-back tenth of it, dev and test, with the sizes of the model's ends."""

    train: Sentences
    held: Sentences
    dev: Sentences
    test: Sentences
    words: int
    intents: int
    slots: int

    def rates(self, words: float) -> Tensor:
        """How often each word is shown as unknown, [words], rare ones more (arXiv 1603.04351)."""
        counts = torch.bincount(
            torch.tensor([w for ids, _, _ in self.train.items for w in ids]), minlength=self.words
        )
        shares = words / (words + counts)
        shares[: FIRST + 1] = 0
        return shares


def shapes(words: Sequence[str]) -> list[str]:
    """Words with every digit as 0, as is usual for this corpus (and in arXiv 1603.01360)."""
    return [re.sub(r"\d", "0", w) for w in words]


def corpus(fold: int = 0) -> Corpus:
    """ATIS, words by their `shapes`, with this tenth of the training sentences held back.

    The vocabulary is that of the training sentences: held-back ones have unknown words, as test
    does.
    """
    load = reader("load")
    raw = {
        split: [(shapes(s), ts, y) for s, ts, y in load.atis(split)]
        for split in ("train", "dev", "test")
    }
    order = list(range(len(raw["train"])))
    random.Random(0).shuffle(order)
    tenth = len(order) // 10
    held = set(order[fold * tenth : (fold + 1) * tenth])
    known = {w for k, (s, _, _) in enumerate(raw["train"]) if k not in held for w in s}
    words = {w: k + 3 for k, w in enumerate(sorted(known))}
    tags = sorted({t for _, s, _ in raw["train"] for t in s})
    intents = sorted({y for _, _, y in raw["train"]})
    tag_of, intent_of = {t: k for k, t in enumerate(tags)}, {y: k for k, y in enumerate(intents)}
    encoded = {
        split: [
            ([FIRST, *(words.get(w, UNKNOWN) for w in s)],
             [IGNORED, *(tag_of.get(t, -1) for t in ts)],
             intent_of.get(y, -1))
            for s, ts, y in raw[split]
        ]
        for split in raw
    }  # fmt: skip
    parts = [
        [s for k, s in enumerate(encoded["train"]) if (k in held) == back] for back in (False, True)
    ]
    kept, back, dev, test = (Sentences(x, tags) for x in (*parts, encoded["dev"], encoded["test"]))
    return Corpus(kept, back, dev, test, len(words) + 3, len(intents), len(tags))


class Tagger(nn.Module):
    """A BERT encoder with two heads: intent from the first token, a slot from each."""

    def __init__(self, data: Corpus, width: int = 768, inner: int = 3072, heads: int = 12,
                 blocks: int = 2, dropout: float = 0.1) -> None:  # fmt: skip
        super().__init__()
        config = BertConfig(
            vocab_size=data.words, hidden_size=width, num_hidden_layers=blocks,
            num_attention_heads=heads, intermediate_size=inner, max_position_embeddings=64,
            type_vocab_size=1, hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout, initializer_range=0.7 / math.sqrt(width),
        )  # fmt: skip
        self.encoder = BertModel(config)
        self.dropout = nn.Dropout(dropout)
        self.intent = nn.Linear(width, data.intents)
        self.slots = nn.Linear(width, data.slots)

    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Scores of intents [n, intents] and of slots [n, length, slots]."""
        encoded = self.encoder(ids, attention_mask=mask)
        return self.intent(self.dropout(encoded.pooler_output)), self.slots(
            self.dropout(encoded.last_hidden_state)
        )


def loss(scores: tuple[Tensor, Tensor], batch: Batch, smoothing: float = 0.1) -> Tensor:
    """Cross entropies of intent and slots, smoothed as in the paper's code."""
    intent, slots = scores
    return F.cross_entropy(intent, batch[3], label_smoothing=smoothing) + F.cross_entropy(
        slots.flatten(0, 1), batch[2].flatten(), ignore_index=IGNORED, label_smoothing=smoothing
    )


@dataclass(frozen=True)
class Score:
    """In per cent: sentences with the right intent, and F1 of slots as whole spans."""

    intent: float
    slots: float

    @property
    def mean(self) -> float:
        """What chooses between epochs."""
        return (self.intent + self.slots) / 2


def score(model: nn.Module, *parts: Sentences) -> Score:
    """Both measures over some splits, pooled."""
    right = total = hits = found_spans = true_spans = 0
    model.eval()
    for part in parts:
        # labels not in training count as misses
        with torch.no_grad():
            for ids, mask, slots, intents in part.batches(64):
                intent, scores = model(ids, mask)[:2]
                right += int((intent.argmax(1) == intents).sum())
                total += len(ids)
                for row_found, row_true in zip(
                    scores.argmax(2).tolist(), slots.tolist(), strict=True
                ):
                    places = [k for k, label in enumerate(row_true) if label != IGNORED]
                    a = spans([part.tags[row_found[k]] for k in places])
                    b = spans(
                        [
                            part.tags[row_true[k]] if row_true[k] >= 0 else f"B-unseen{k}"
                            for k in places
                        ]
                    )
                    hits, found_spans, true_spans = (
                        hits + len(a & b),
                        found_spans + len(a),
                        true_spans + len(b),
                    )
    return Score(100 * right / total, 200 * hits / max(found_spans + true_spans, 1))


def spans(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """Kind, first and last index of every span of B- and I- tags, as conlleval counts them."""
    result, kind, first = set(), "", 0
    for k, tag in enumerate([*tags, "O"]):
        mark, _, name = tag.partition("-")
        if kind and (mark != "I" or name != kind):
            result.add((kind, first, k - 1))
            kind = ""
        if mark != "O" and not kind:
            kind, first = name, k
    return result


def swapped(data: Sentences, order: random.Random, share: float) -> Sentences:
    """Sentences with slot values exchanged, with probability `share`, for others of their kind.

    Kinds are what tags end with: `toloc.city_name` and `fromloc.city_name` are both city names.
    """
    place = {tag: k for k, tag in enumerate(data.tags)}
    read = [[data.tags[k] if k >= 0 else "O" for k in labels] for _, labels, _ in data.items]
    slots = [sorted(spans(tags), key=lambda s: s[1]) for tags in read]
    values: dict[str, list[list[int]]] = {}
    for (ids, _, _), each in zip(data.items, slots, strict=True):
        for kind, first, last in each:
            values.setdefault(kind.rpartition(".")[2], []).append(ids[first : last + 1])
    items = []
    for (ids, labels, intent), each in zip(data.items, slots, strict=True):
        words, marks, done = list[int](), list[int](), 0
        for kind, first, last in each:
            value = ids[first : last + 1]
            if order.random() < share:
                other = order.choice(values[kind.rpartition(".")[2]])
                value = other if len(other) == 1 or f"I-{kind}" in place else value
            words += [*ids[done:first], *value]
            marks += [
                *labels[done:first],
                place[f"B-{kind}"],
                *[place.get(f"I-{kind}", -1)] * (len(value) - 1),
            ]
            done = last + 1
        items.append(([*words, *ids[done:]], [*marks, *labels[done:]], intent))
    return Sentences(items, data.tags)


def obscured(ids: Tensor, rates: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Token ids, each replaced by the unknown word at the rate of its word."""
    return ids.masked_fill(torch.rand(ids.shape, generator=generator) < rates[ids], UNKNOWN)


@dataclass(frozen=True)
class Recipe:
    """How a dense model is trained: Adam, linear warm-up over a twentieth, a cosine.

    words: w; a word that occurs n times is shown as unknown with probability w / (w + n). swaps:
    how often a slot value is exchanged for another, drawn again in every epoch.
    """

    epochs: int = 16
    batch: int = 32
    rate: float = 4e-4
    decay: float = 0.01
    words: float = 0.25
    swaps: float = 0.3
    dropout: float = 0.1


def train(
    data: Corpus, recipe: Recipe, seed: int, report: bool = False, last: bool = False, **shape: int
) -> tuple[Tagger, float]:
    """A dense model at its best epoch by held-back data, or its last, and seconds per epoch."""
    torch.manual_seed(seed)
    order = random.Random(seed)
    model = Tagger(data, dropout=recipe.dropout, **shape)
    adam = torch.optim.AdamW(
        model.parameters(), recipe.rate, weight_decay=recipe.decay, betas=(0.9, 0.98)
    )
    total, rates = (
        recipe.epochs * math.ceil(len(data.train.items) / recipe.batch),
        data.rates(recipe.words),
    )
    best, kept, start, step = -1.0, {}, time.perf_counter(), 0
    for epoch in range(recipe.epochs):
        model.train()
        shown = swapped(data.train, order, recipe.swaps) if recipe.swaps else data.train
        for batch in shown.batches(recipe.batch, order):
            ids, mask = batch[:2]
            warm = min(1.0, (step + 1) / (0.05 * total))
            for group in adam.param_groups:
                group["lr"] = recipe.rate * warm * 0.5 * (1 + math.cos(math.pi * step / total))
            adam.zero_grad()
            loss(model(obscured(ids, rates), mask), batch).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            adam.step()
            step += 1
        current = score(model, data.held)
        if current.mean > best or last:
            best, kept = current.mean, {k: v.clone() for k, v in model.state_dict().items()}
        if report:
            row(
                epoch + 1,
                f"{current.intent:.2f}",
                f"{current.slots:.2f}",
                f"{time.perf_counter() - start:.0f}",
            )
    seconds = (time.perf_counter() - start) / recipe.epochs
    model.load_state_dict(kept)
    return model.eval(), seconds


def dense(
    data: Corpus, seed: int, folder: Path | None, recipe: Recipe = Recipe(), **shape: int
) -> tuple[Tagger, float]:
    """A trained dense model, from the folder if it is there, and seconds per epoch.

    The seconds are 0 if it was not trained now.
    """
    path = None if folder is None else folder / _file(seed, recipe, shape)
    if path is not None and path.exists():
        model = Tagger(data, dropout=recipe.dropout, **shape)
        model.load_state_dict(torch.load(path, weights_only=True))
        return model.eval(), 0.0
    model, seconds = train(data, recipe, seed, **shape)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), path)
    return model, seconds


def _file(seed: int, recipe: Recipe, shape: dict[str, int]) -> str:
    """A file name that other settings do not share."""
    return (
        "-".join(["atis", f"seed{seed}", *(f"{k}{v}" for k, v in (vars(recipe) | shape).items())])
        + ".pt"
    )


def shape_of(width: int) -> dict[str, int]:
    """Sizes of a `Tagger` of another width than its own; its heads have 20 entries each."""
    own = width == 768
    return {} if own else {"width": width, "inner": 4 * width, "heads": width // 20}


def folds(runs: Sequence[tuple[int, int]], recipe: Recipe, shape: dict[str, int]) -> None:
    """Train with a tenth held back by a seed, for each of both, and print their mean score on it.

    The score is that after the last epoch.
    """
    parts = {tenth: corpus(tenth) for tenth, _ in runs}
    scores = [
        score(train(parts[tenth], recipe, seed, last=True, **shape)[0], parts[tenth].held)
        for tenth, seed in runs
    ]
    head("held-back intent", "slots", "trained")
    row(
        *(f"{statistics.mean(getattr(f, k) for f in scores):.2f}" for k in ("intent", "slots")),
        len(scores),
    )


def chosen(seeds: list[int], tenths: list[int], only: list[str]) -> list[tuple[int, int]]:
    """The tenth that is held back and the seed of every run whose label `--only` leaves in."""
    runs = {
        (tenth, seed): f"tenth {tenth}, seed {seed}" if tenths else f"seed {seed}"
        for tenth in tenths or [0]
        for seed in seeds
    }
    return [run for run, name in runs.items() if not only or any(part in name for part in only)]


def main() -> None:
    """Train and print each epoch."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument(
        "--folds",
        nargs="+",
        type=int,
        default=[],
        help="tenths to hold back, instead of the measure",
    )
    parser.add_argument("--keep", type=Path)
    for name, value in vars(Recipe()).items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="NAME",
        help="runs whose label, 'seed 0' or 'tenth 3, seed 0', holds one of these",
    )
    args = parser.parse_args()
    runs = chosen(args.seeds, args.folds, args.only)
    if not runs:
        parser.error(f"no run is called {' or '.join(args.only)}: see the help of --only")
    recipe = Recipe(**{name: getattr(args, name) for name in vars(Recipe())})
    shape = shape_of(args.width)
    print(f"{machine()} {recipe}\n")
    if args.folds:
        folds(runs, recipe, shape)
        return
    data = corpus()
    for _, seed in runs:
        head("epoch", "held-back intent", "slots", "seconds")
        model, _ = train(data, recipe, seed, True, **shape)
        both, alone = score(model, data.dev, data.test), score(model, data.test)
        print(f"\nseed {seed}: dev and test {both.intent:.2f} / {both.slots:.2f}, "
              f"test {alone.intent:.2f} / {alone.slots:.2f}\n", flush=True)  # fmt: skip
        if args.keep:
            args.keep.mkdir(parents=True, exist_ok=True)
            torch.save(model.state_dict(), args.keep / _file(seed, recipe, shape))


if __name__ == "__main__":
    main()
