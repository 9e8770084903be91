r"""Taggers on ATIS whose weights lie in no linear: what few bits in them cost.

    python benchmarks/recurrent.py --keep FOLDER

Embeddings of 128, heads for intent and slots, and between them a bidirectional LSTM or GRU of 128
units, four weight-normed convs with a dilation of 1, 2, 4 and 8 ("TCN"), or two layers of torch's
own Transformer; "EmbeddingBag" has bags of words and of the sentence in place of all that. Trained
by this script; a tenth of the training sentences chooses the epoch. Compressed by `Joint`, quality
"fast", from 1,024 training sentences without labels; weights of recurrent layers are stored ones.
Accuracy is that of the written file, loaded again, on dev and test together (1,393
sentences); drops are in points against float. "Other bytes": of the same network when the weights
of recurrent layers are left in float32, by their line taken out of the plan.
"""

import argparse
import functools
import random
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from common import machine
from records import Records, Table, Values, add_options
from sentences import Corpus, corpus, loss, obscured, score, swapped
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import rabbet
from rabbet import Task
from rabbet.core.plan import Plan

EPOCHS, RATE, BATCH = 20, 2e-3, 32
COLUMNS = {
    "network": "", "budget": "", "bits/weight": ".2f", "file bytes": ",", "times smaller": ".1f",
    "other bytes": ",", "intent": ".2f", "slot F1": ".2f", "intent drop": ".2f",
    "slot drop": ".2f",
}  # fmt: skip
KINDS = ("LSTM", "GRU", "TCN", "Transformer", "EmbeddingBag")
ATIS = "ATIS: 1,024 training sentences without labels to compress; dev and test to measure"


class Recurrent(nn.Module):
    """[batch, words, 128] -> [batch, words, 256]."""

    def __init__(self, kind: type[nn.RNNBase], words: int) -> None:
        super().__init__()
        self.words = nn.Embedding(words, 128)
        self.rnn = kind(128, 128, batch_first=True, bidirectional=True)  # type: ignore[arg-type]

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """[batch, words] -> [batch, words, 256]."""
        seen: Tensor = self.rnn(self.words(ids) * mask[..., None])[0]
        return seen


class Convs(nn.Module):
    """Weight-normed convs, each added to what it is given."""

    def __init__(self, words: int) -> None:
        super().__init__()
        self.words = nn.Embedding(words, 128)
        self.convs = nn.ModuleList(
            weight_norm(nn.Conv1d(128, 128, 3, padding=k, dilation=k)) for k in (1, 2, 4, 8)
        )
        self.last = weight_norm(nn.Conv1d(128, 256, 1))

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """[batch, words] -> [batch, words, 256]."""
        x = (self.words(ids) * mask[..., None]).mT
        for conv in self.convs:
            x = (x + torch.relu(conv(x))) * mask[:, None]
        seen: Tensor = self.last(x).mT
        return seen


class Encoder(nn.Module):
    """Two layers of torch's own Transformer."""

    def __init__(self, words: int) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(words, 128), nn.Embedding(64, 128)
        layer = nn.TransformerEncoderLayer(128, 4, 256, 0.1, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.last = nn.Linear(128, 256)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """[batch, words] -> [batch, words, 256]."""
        places = self.places(torch.arange(ids.shape[1]))
        x = self.layers(self.words(ids) + places, src_key_padding_mask=mask == 0)
        seen: Tensor = self.last(x)
        return seen


class Bags(nn.Module):
    """Each word with its neighbours, and the mean of the sentence."""

    def __init__(self, words: int) -> None:
        super().__init__()
        self.words = nn.EmbeddingBag(words, 128, padding_idx=0)
        self.near = nn.EmbeddingBag(words, 128, padding_idx=0, mode="sum")

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """[batch, words] -> [batch, words, 256]."""
        whole = self.words(ids)[:, None].expand(-1, ids.shape[1], -1)
        padded = nn.functional.pad(ids, (1, 1))
        near = self.near(padded.unfold(1, 3, 1).reshape(-1, 3)).view(*ids.shape, 128)
        return torch.cat([near, whole], -1)


def body(kind: str, words: int) -> nn.Module:
    """What is between words and heads."""
    if kind in ("LSTM", "GRU"):
        return Recurrent(getattr(nn, kind), words)
    return {"TCN": Convs, "Transformer": Encoder, "EmbeddingBag": Bags}[kind](words)


class Tagger(nn.Module):
    """Words in, scores of the intent and of a slot for each word out."""

    def __init__(self, kind: str, data: Corpus) -> None:
        super().__init__()
        self.body = body(kind, data.words)
        self.dropout = nn.Dropout(0.3)
        self.intent, self.slots = nn.Linear(256, data.intents), nn.Linear(256, data.slots)

    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """[batch, words] -> [batch, intents], [batch, words, slots]."""
        seen = self.body(ids, mask)
        mean = (seen * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return self.intent(self.dropout(mean)), self.slots(self.dropout(seen))


def train(kind: str, data: Corpus, seed: int) -> nn.Module:
    """A tagger at its best epoch by held-back sentences."""
    torch.manual_seed(seed)
    order, rates = random.Random(seed), data.rates(0.25)
    model = Tagger(kind, data)
    adam = torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.01)
    each = torch.optim.lr_scheduler.CosineAnnealingLR(adam, EPOCHS)
    best, kept = -1.0, {}
    for _ in range(EPOCHS):
        model.train()
        for batch in swapped(data.train, order, 0.3).batches(BATCH, order):
            adam.zero_grad()
            loss(model(obscured(batch[0], rates), batch[1]), batch).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            adam.step()
        each.step()
        current = score(model, data.held).mean
        if current > best:
            best, kept = current, {k: v.clone() for k, v in model.state_dict().items()}
    model.load_state_dict(kept)
    return model.eval()


def trained(kind: str, data: Corpus, seed: int, folder: Path) -> nn.Module:
    """The same from the folder, if it is there."""
    path = folder / f"{kind}-seed{seed}.pt"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(train(kind, data, seed).state_dict(), path)
    model = Tagger(kind, data)
    model.load_state_dict(torch.load(path, weights_only=True))
    return model.eval()


def size_of(model: nn.Module) -> int:
    """Bytes of its float32 parameters."""
    return 4 * sum(p.numel() for p in model.parameters())


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--keep", type=Path, required=True, help="folder for trained networks")
    parser.add_argument("--budgets", nargs="+", default=["bits <= 8", "bits <= 4", "bits <= 3"])
    parser.add_argument("--seed", type=int, default=0)
    add_options(parser)
    args = parser.parse_args()
    print(f"seed {args.seed}; {machine()}")
    data, table = corpus(), Table(Records("recurrent", args), "taggers", COLUMNS, ATIS, args.seed)
    shown = [(ids, mask) for ids, mask, *_ in data.train.batches(32, random.Random(0))[:32]]
    for kind in KINDS:
        network = functools.cache(functools.partial(trained, kind, data, args.seed, args.keep))

        def in_float(network: Callable[[], nn.Module] = network) -> Values:
            whole, plain = score(network(), data.dev, data.test), size_of(network())
            return {
                "bits/weight": 32, "file bytes": plain, "times smaller": 1,
                "intent": whole.intent, "slot F1": whole.slots,
            }  # fmt: skip

        def compressed(budget: str, network: Callable[[], nn.Module] = network) -> Values:
            model, plain = network(), size_of(network())
            task = Task(shown, outputs="scores")
            result = rabbet.compress(model, budget, task, quality="fast", seed=args.seed)
            running = [line for line in result.plan if result.survey[line.name].runs]
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "small.safetensors"
                size = result.save(path)
                found = score(rabbet.load(path, model), data.dev, data.test)
            whole = score(model, data.dev, data.test)
            return {
                "bits/weight": result.cost.bits,
                "file bytes": size,
                "times smaller": plain / size,
                "other bytes": rabbet.price(model, Plan(tuple(running)), task).bytes,
                "intent": found.intent,
                "slot F1": found.slots,
                "intent drop": whole.intent - found.intent,
                "slot drop": whole.slots - found.slots,
                "plan": str(result.plan),
            }

        table.row({"network": kind, "budget": "float32"}, in_float)
        for budget in args.budgets:
            table.row({"network": kind, "budget": budget}, functools.partial(compressed, budget))


if __name__ == "__main__":
    main()
