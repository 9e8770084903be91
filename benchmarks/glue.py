"""MiniLM on SST-2 and CoLA, 10 and 20 times smaller, without and with training.

    python benchmarks/glue.py --keep FOLDER [--tasks SST-2 CoLA] [--ratios 10 20]
        [--methods joint ttqat]

One integer program chooses ranks and bits.

The teacher is MiniLM with a head of two classes, fine-tuned on the training split only. A part of
that split is held back and chooses between epochs, both for the teacher and for what is trained
from it. The measure is GLUE's dev split: accuracy on SST-2 (872 sentences), Matthews correlation
times 100 on CoLA (1,043, of which 16 are in train up to capitals). The test split has no public
labels. Float bytes: every float32 parameter. A ratio of 10 is a budget of a tenth of them for the
whole file; activations are float; accuracy is that of the written file, loaded again. Held-back
sentences of SST-2 are mostly phrases of training sentences. `tt` is `ttqat` with tables of words as
matrices at low bits, `bits` the same with matrices alone. FOLDER keeps teachers, decomposed layers
and the outcome of each setting, so that rows can be run one by one. Outcomes of another commit are
measured again; teachers are not, and changes that are not committed are not recognised: use a new
folder after those.
"""

import functools
import math
import random
import sys
import tempfile
import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import DATA, alike, head, known, machine, reader, row
from records import Records, Table, Values, add_options, spread, told
from torch import Tensor, nn
from transformers import AutoTokenizer, BertForSequenceClassification

import rabbet
from rabbet import TTQAT, Joint, Task
from rabbet.errors import BudgetError
from rabbet.jobs import silent
from rabbet.methods import Method
from rabbet.methods.ttqat import Choices
from rabbet.train.tuning import Tuning

Batch = dict[str, Tensor]
"""`input_ids` and `attention_mask` [n, length], `labels` [n]."""
MOST = 1000  # sentences held back, at most a tenth
SHOWN = 1024  # sentences that methods without training see, without labels
RowOf = Callable[[float | None, Callable[[], Values]], Values | None]
COLUMNS = {
    "task": "", "method": "", "ratio": "g", "file bytes": ",", "times smaller": ".2f",
    "held back": ".2f", "dev": ".2f", "drop": ".2f", "seconds": "", "words": "", "layers": "",
    "notes": "",
}  # fmt: skip
MEASURE = "GLUE: a part of the training split chooses between epochs; the dev split to measure"
METHODS = ("joint", "ttqat", "tt", "bits")
WORDS = "bert.embeddings.word_embeddings"


@dataclass(frozen=True)
class Sentences:
    """Token ids and labels."""

    ids: list[list[int]]
    labels: list[int]

    def part(self, first: int, last: int | None = None) -> "Sentences":
        """Those from index `first` up to, but without, `last`."""
        return Sentences(self.ids[first:last], self.labels[first:last])

    def batches(self, size: int = 32, order: random.Random | None = None) -> list[Batch]:
        """Batches of similar length, padded to their longest sentence; shuffled by `order`."""
        return [self._batch(chunk) for chunk in alike([len(s) for s in self.ids], size, order)]

    def _batch(self, chunk: list[int]) -> Batch:
        rows = [torch.tensor(self.ids[k]) for k in chunk]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)  # [PAD] is 0
        lengths = torch.tensor([len(r) for r in rows])
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "labels": torch.tensor([self.labels[k] for k in chunk]),
        }


def matthews(guessed: Tensor, true: Tensor) -> float:
    """Matthews correlation of two classes, times 100; 0 if all is one class."""
    (a, b), (c, d) = torch.bincount(2 * true + guessed, minlength=4).view(2, 2).double().tolist()
    return 100 * (a * d - b * c) / math.sqrt(max((a + b) * (c + d) * (a + c) * (b + d), 1))


def accuracy(guessed: Tensor, true: Tensor) -> float:
    """Accuracy in per cent."""
    return 100 * float((guessed == true).double().mean())


def scores(model: nn.Module, batch: Batch) -> Tensor:
    """Scores of the two classes, [n, 2]."""
    logits: Tensor = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return logits


@dataclass(frozen=True)
class Recipe:
    """How a teacher is fine-tuned: AdamW, linear warm-up over a sixteenth, then linear to 0."""

    epochs: int
    rate: float = 5e-5
    batch: int = 32
    decay: float = 0.01


@dataclass(frozen=True)
class Problem:
    """A task of GLUE: its sentences, its measure, and how its teacher is trained."""

    name: str
    train: Sentences
    held: Sentences
    dev: Sentences
    measure: Callable[[Tensor, Tensor], float]
    recipe: Recipe

    def score(self, model: nn.Module, part: Sentences) -> float:
        """The measure on some sentences."""
        model.eval()
        with torch.no_grad():
            pairs = [(scores(model, b).argmax(1), b["labels"]) for b in part.batches(64)]
        return self.measure(torch.cat([f for f, _ in pairs]), torch.cat([y for _, y in pairs]))

    def task(self, seed: int) -> Task:
        """The training sentences with labels; held-back ones choose between epochs."""
        return Task(
            self.train.batches(self.recipe.batch, random.Random(seed)),
            forward=scores,
            loss=lambda out, b: F.cross_entropy(out, b["labels"]),
            evaluate=lambda m: self.score(m, self.held),
            limit=10**9,
        )

    def unlabelled(self, seed: int) -> Task:
        """A few of the training sentences, without labels."""
        batches = self.train.part(0, SHOWN).batches(self.recipe.batch, random.Random(seed))
        return Task(
            [{k: b[k] for k in ("input_ids", "attention_mask")} for b in batches], forward=scores
        )


PROBLEMS = {"SST-2": (accuracy, Recipe(3)), "CoLA": (matthews, Recipe(8))}


def problem(name: str, seed: int, sentences: int | None, epochs: int | None) -> Problem:
    """A task of GLUE, with this many training sentences, drawn by the seed.

    epochs: those of the teacher.
    """
    load, tokens = reader("load"), AutoTokenizer.from_pretrained(DATA / "minilm")
    measure, recipe = PROBLEMS[name]

    def read(split: str) -> Sentences:
        rows = load.glue(name, split)
        if split == "train":
            random.Random(seed).shuffle(rows)
        return Sentences(
            tokens([r["sentence"] for r in rows])["input_ids"], [int(r["label"]) for r in rows]
        )

    train = read("train")
    back = min(MOST, len(train.ids) // 10)
    used = train.part(back, None if sentences is None else back + sentences)
    recipe = recipe if epochs is None else replace(recipe, epochs=epochs)
    return Problem(name, used, train.part(0, back), read("dev"), measure, recipe)


def fine_tuned(given: Problem, seed: int, report: bool) -> nn.Module:
    """MiniLM with a head, at its best epoch by the held-back sentences."""
    torch.manual_seed(seed)
    order, recipe = random.Random(seed), given.recipe
    model = BertForSequenceClassification.from_pretrained(
        DATA / "minilm", num_labels=2, dtype=torch.float32
    )
    adam = torch.optim.AdamW(model.parameters(), recipe.rate, weight_decay=recipe.decay)
    total = recipe.epochs * math.ceil(len(given.train.ids) / recipe.batch)
    best, kept, start, step = -math.inf, {}, time.perf_counter(), 0
    for epoch in range(recipe.epochs):
        model.train()
        for batch in given.train.batches(recipe.batch, order):
            for group in adam.param_groups:
                group["lr"] = recipe.rate * min(
                    (step + 1) / (total / 16), (total - step) / (total * 15 / 16)
                )
            adam.zero_grad()
            F.cross_entropy(scores(model, batch), batch["labels"]).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            adam.step()
            step += 1
        current = given.score(model, given.held)
        if current > best:
            best, kept = current, {k: v.clone() for k, v in model.state_dict().items()}
        if report:
            row(given.name, epoch + 1, f"{current:.2f}", f"{time.perf_counter() - start:.0f}")
    model.load_state_dict(kept)
    return model.eval()


def teacher(given: Problem, seed: int, folder: Path) -> nn.Module:
    """The fine-tuned network, from the folder if it is there."""
    path = (
        folder / f"glue-{given.name}-seed{seed}-sentences{len(given.train.ids)}"
        f"-epochs{given.recipe.epochs}"
    )
    if not path.exists():
        head("teacher", "epoch", "held back", "seconds")
        fine_tuned(given, seed, report=True).save_pretrained(path)
        print(flush=True)
    model: nn.Module = BertForSequenceClassification.from_pretrained(path).eval()
    return model


def lines(given: Problem, model: nn.Module, row_of: RowOf, method: Method, args: Namespace) -> None:
    """A row for each ratio: compress, write, load again, measure."""

    def measured(ratio: float) -> Values:
        setting = f"{given.name}, {len(given.train.ids)}, {given.recipe}, {ratio:g}, {method}"
        measure = functools.partial(outcome, given, model, method, ratio, args)
        values = known(args.keep, setting, args.seed, measure)
        if "refused" in values:  # not every method reaches every ratio
            return {"seconds": values["seconds"], "notes": values["refused"]}
        whole = given.score(model, given.dev)
        renamed = {"file bytes": values["bytes"], "times smaller": values["ratio"],
                   "held back": values["held"], "drop": whole - values["dev"]}  # fmt: skip
        return renamed | {k: values[k] for k in ("dev", "seconds", "words", "layers", "notes")}

    for ratio in args.ratios:
        row_of(ratio, functools.partial(measured, ratio))


def outcome(
    given: Problem, model: nn.Module, method: Method, ratio: float, args: Namespace
) -> dict[str, Any]:
    """What a row shows, or why there is none."""
    size = sum(p.numel() * 4 for p in model.parameters())
    task = given.task(args.seed) if isinstance(method, TTQAT) else given.unlabelled(args.seed)
    jobs = rabbet.Jobs(folder=args.keep / "layers", progress=watched if args.watch else silent)
    start = time.perf_counter()
    try:
        result = rabbet.compress(
            model, f"bytes <= {int(size / ratio)}", task, method, seed=args.seed, jobs=jobs
        )
    except BudgetError as e:
        return {"refused": str(e), "seconds": round(time.perf_counter() - start)}
    seconds = round(time.perf_counter() - start)
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "small.safetensors"
        written = result.save(path)
        small = rabbet.load(path, model)
    return {
        "bytes": written, "ratio": size / written, "seconds": seconds,
        "held": given.score(small, given.held), "dev": given.score(small, given.dev),
        "words": str(result.plan[WORDS].body), "layers": forms(result.plan),
        "notes": "; ".join(result.notes),
    }  # fmt: skip


def watched(stage: str, done: int, total: int) -> None:
    """The state of things, with the time of day."""
    print(f"{time.strftime('%H:%M:%S')} {stage} {done}/{total}", file=sys.stderr, flush=True)


def forms(plan: rabbet.Plan) -> str:
    """How many layers have which form, on which grid."""
    counts = Counter(" + ".join(f"{t.form}@{t.grid}" for t in each.terms) for each in plan)
    return ", ".join(f"{n} {form}" for form, n in counts.most_common())


def main() -> None:
    """Print the table."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument("--ratios", nargs="+", type=float, default=[10, 20])
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=["joint", "ttqat"])
    parser.add_argument("--keep", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--sentences", type=int, help="train on the first so many of a seeded shuffle; default: all"
    )
    parser.add_argument(
        "--teaching", type=int, help="epochs of the teacher; default: 3 on SST-2, 8 on CoLA"
    )
    parser.add_argument(
        "--epochs", type=int, default=0, help="of TTQAT, in float, where the plan has chains"
    )
    parser.add_argument("--finish", type=int, default=2, help="epochs of TTQAT on the grid")
    parser.add_argument(
        "--ranks", nargs="+", type=int, default=[24, 48, 80, 128], help="that TTQAT chooses from"
    )
    parser.add_argument("--rate", type=float, default=1e-2, help="of TTQAT")
    parser.add_argument(
        "--matrices", type=float, default=0.1, help="of TTQAT: share of the rate for matrices"
    )
    parser.add_argument(
        "--tuning", type=int, default=200, help="steps of tuning after Joint, without labels"
    )
    parser.add_argument("--watch", action="store_true", help="tell every step, on standard error")
    add_options(parser, jobs=True)
    args = parser.parse_args()
    spread(args)
    trained = TTQAT(
        (2, 3, 4), None, None, Choices(tuple(args.ranks), grids=("1c", "tc", "2hc", "3c", "4c")),
        epochs=args.epochs, finish=args.finish, rate=args.rate, dense_rate=args.matrices,
    )  # fmt: skip
    methods: dict[str, Method] = {
        "joint": Joint(act=None, tuning=Tuning(steps=args.tuning, batch=32)),
        "ttqat": trained,
        "tt": replace(trained, choices=replace(trained.choices, forms=("tt",))),
        "bits": replace(trained, choices=replace(trained.choices, forms=())),
    }
    print(f"{machine()}")
    records = Records("glue", args, packages=("transformers",))
    data = told(parser, args, "sentences", "teaching")
    trains = data | told(parser, args, "epochs", "finish", "ranks", "rate", "matrices")
    for name in args.tasks:
        given = problem(name, args.seed, args.sentences, args.teaching)
        model = teacher(given, args.seed, args.keep)
        trained_on, held = len(given.train.ids), len(given.held.ids)
        print(f"\n{trained_on:,} sentences are trained on, {held:,} held back")
        table = Table(records, "models", COLUMNS, MEASURE, args.seed)

        def row_of(
            label: str,
            own: Values,
            ratio: float | None,
            measure: Callable[[], Values],
            table: Table = table,
            name: str = name,
        ) -> Values | None:
            settings = {"task": name, "method": label, "ratio": ratio} | own
            text = f"{name}, {label}" + ("" if ratio is None else f", {ratio:g}x")
            return table.row(settings, measure, text)

        row_of("float32", data, None, functools.partial(whole, given, model))
        for label in args.methods:
            own = data | told(parser, args, "tuning") if label == "joint" else trains
            lines(given, model, functools.partial(row_of, label, own), methods[label], args)


def whole(given: Problem, model: nn.Module) -> Values:
    """What the row of the float network shows."""
    return {
        "file bytes": sum(p.numel() * 4 for p in model.parameters()),
        "times smaller": 1,
        "held back": given.score(model, given.held),
        "dev": given.score(model, given.dev),
    }


if __name__ == "__main__":
    main()
