"""Tensor trains on ATIS: bytes against intent and slots, with a dense encoder of the same bytes.

    python benchmarks/atis.py --keep FOLDER [--seeds 0 1 2]
        [--parts dense sizes control starts orders speed step]

The dense model (2 blocks, width 768, 64 positions, words with digits as zeros) is trained by
sentences.py. Float bytes: every float32 parameter. Accuracy is that of the written file; intent and
slot F1 on dev and test together (1,393 sentences), on test alone after the slash. A tenth of the
training sentences chooses between epochs. FOLDER keeps trained dense models, decomposed layers and
the outcome of each setting with each seed, so that parts and seeds can be run one by one or side by
side, and a killed run resumes. Use a new folder after changing the code: old results are not
recognised as such.
"""

import argparse
import functools
import itertools
import math
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from common import head, known, machine, row
from sentences import (
    FIRST,
    Corpus,
    Recipe,
    Score,
    Sentences,
    Tagger,
    corpus,
    dense,
    loss,
    obscured,
    score,
    swapped,
)
from torch import Tensor, nn

import rabbet
from rabbet import TTQAT, Joint, Task
from rabbet.calibrate.ranges import calibrate_ranges
from rabbet.core.survey import Survey
from rabbet.export.onnx.write import write_float
from rabbet.methods import Method
from rabbet.methods.ttqat import Choices, Distillation
from rabbet.model.build import build
from rabbet.runtime.bench import time_files
from rabbet.train.loop import Course, run
from rabbet.train.tuning import Tuning

Named = dict[str, Tensor]
SWAPS = 0.5  # share of slot values that are exchanged in copies
LOOSE = "bytes <= 90%"  # where the method fixes the ranks
SMALL = {"width": 80, "inner": 320, "heads": 4}
HEADS = ("intent", "slots")
TABLES = ("encoder.embeddings.word_embeddings", "encoder.embeddings.position_embeddings")


def named(data: Sentences, size: int = 32) -> list[Named]:
    """Batches by name."""
    return [
        {"ids": ids, "attention_mask": mask, "slots": slots, "intents": intents}
        for ids, mask, slots, intents in data.batches(size)
    ]


def shown(data: Corpus, copies: int) -> list[Named]:
    """All training sentences but the held-back tenth, and copies of them with other slot values."""
    order = random.Random(0)
    more = [s for _ in range(copies) for s in swapped(data.train, order, SWAPS).items]
    return named(Sentences([*data.train.items, *more], data.train.tags))


def task_of(data: Corpus, copies: int) -> Task:
    """A task that trains on these sentences; held-back ones choose between epochs."""
    rates = data.rates(Recipe().words)
    return Task(
        shown(data, copies),
        forward=lambda m, b: m(b["ids"], b["attention_mask"]),
        loss=lambda out, b: loss(out, (b["ids"], b["attention_mask"], b["slots"], b["intents"])),
        evaluate=lambda m: score(m, data.held).mean,
        vary=lambda b, generator: dict(b, ids=obscured(b["ids"], rates, generator)),
        limit=10**6,
    )


@dataclass(frozen=True)
class Outcome:
    """The scores of a compressed model, the size of its file, and the seconds of an epoch."""

    held: Score
    pooled: Score
    test: Score
    bytes: int
    ratio: float
    seconds: float


@dataclass(frozen=True)
class Bench:
    """The corpus, and the folder of kept results."""

    data: Corpus
    folder: Path
    copies: int = 0
    longer: int = 1

    def teacher(self, seed: int) -> Tagger:
        """The dense model trained with a seed."""
        return dense(self.data, seed, self.folder)[0]

    def untrained(self) -> Tagger:
        """An untrained dense model, where only time counts."""
        torch.manual_seed(0)
        return Tagger(self.data).eval()

    def known(self, setting: str, seed: int, measure: Callable[[], Outcome]) -> Outcome:
        """The outcome of a setting and seed: read from the folder, or measured and kept there."""
        read = known(
            self.folder, f"{setting}, copies {self.copies}", seed, lambda: asdict(measure())
        )
        return Outcome(**read | {part: Score(**read[part]) for part in ("held", "pooled", "test")})

    def outcome(self, model: nn.Module, method: Method, seed: int, budget: str = LOOSE,
                whole: int = 0) -> Outcome:  # fmt: skip
        """Compress, write, load again, measure.

        whole: the float bytes that the ratio refers to, if not the model's.
        """
        marks: list[float] = []

        def seen(stage: str, done: int, total: int) -> None:
            if stage.startswith(("teaching", "tuning")):
                marks.append(time.perf_counter())

        jobs = rabbet.Jobs(folder=self.folder / "layers", progress=seen)
        result = rabbet.compress(
            model, budget, task_of(self.data, self.copies), method, seed=seed, jobs=jobs
        )
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "small.safetensors"
            result.save(path)
            small = rabbet.load(path, model)
        steps = (
            statistics.median(b - a for a, b in itertools.pairwise(marks))
            if len(marks) > 1
            else 0.0
        )
        ratio = (whole or result.float_cost.bytes) / result.cost.bytes
        return Outcome(
            *self.scores(small), result.cost.bytes, ratio, steps * len(named(self.data.train))
        )

    def scores(self, model: nn.Module) -> tuple[Score, Score, Score]:
        """On held-back sentences, on dev and test, on test alone."""
        return (
            score(model, self.data.held),
            score(model, self.data.dev, self.data.test),
            score(model, self.data.test),
        )

    def line(self, label: str, outcomes: list[Outcome], dense_: list[Score] | None) -> None:
        """A row: the mean over seeds, and the drop from the mean of the dense models."""
        intent, slots = ([getattr(f.pooled, k) for f in outcomes] for k in ("intent", "slots"))
        alone = [statistics.mean(getattr(f.test, k) for f in outcomes) for k in ("intent", "slots")]
        held = [
            f"{statistics.mean(getattr(f.held, k) for f in outcomes):.2f}"
            for k in ("intent", "slots")
        ]
        drops = ["-", "-"]
        if dense_ is not None:
            drops = [
                f"{statistics.mean(getattr(d, k) for d in dense_) - statistics.mean(x):.2f}"
                for k, x in (("intent", intent), ("slots", slots))
            ]
        size = round(statistics.mean(f.bytes for f in outcomes))
        row(label, len(outcomes), f"{size:,}", f"{statistics.mean(f.ratio for f in outcomes):.0f}",
            " / ".join(held), f"{statistics.mean(intent):.2f} / {alone[0]:.2f}",
            f"{statistics.mean(slots):.2f} / {alone[1]:.2f}", *drops,
            f"{statistics.mean(f.seconds for f in outcomes):.0f}")  # fmt: skip


COLUMNS = ("model", "seeds", "file bytes", "times smaller", "held-back intent / slots",
           "intent / test",
           "slot F1 / test", "intent drop", "slot drop", "seconds an epoch")  # fmt: skip

SIZES = {
    "rank 20, 4 bits, tables and heads as they are": TTQAT(
        4, 20, keep_dense=(*HEADS, *TABLES), rate=1e-2
    ),
    "rank 40, 8 bits, words at rank 60": TTQAT(8, 40, 60, keep_dense=HEADS),
    "rank 24, 4 bits, words at rank 40": TTQAT(4, 24, 40, keep_dense=HEADS),
    "rank 20, 4 bits, words at rank 30": TTQAT(4, 20, 30, keep_dense=HEADS),
    "rank 20, 4 bits, words at rank 40, heads 4 bits": TTQAT(
        4, 20, 40, keep_dense=HEADS, dense_bits=4
    ),
    "ranks chosen, 4 bits": TTQAT(
        4, None, None, Choices((12, 16, 20, 24, 28, 34, 42), grids=("3c", "4c"))
    ),
    "rank 24, 8 bits, words at rank 40": TTQAT(8, 24, 40, keep_dense=HEADS),
    "rank 24, 2 bits, words at rank 40": TTQAT(2, 24, 40, keep_dense=HEADS),
    "rank 20, 4 bits, everything a chain": TTQAT(4),
    "rank 24, 4 bits, words at rank 40, inputs 8 bits": TTQAT(4, 24, 40, keep_dense=HEADS, act=8),
}
BUDGETS = {"ranks chosen, 4 bits": "bytes <= 275090"}  # 225 times smaller
STARTS = {
    f"start: {start}": TTQAT(4, 24, 40, keep_dense=HEADS, start=start)
    for start in ("metric", "plain", "random")
}
ORDERS = {
    f"taught: {order}": TTQAT(4, 24, 40, keep_dense=HEADS, order=order)
    for order in ("all", "bottom", "top")
}


def tables(bench: Bench, methods: dict[str, TTQAT], seeds: list[int]) -> None:
    """A row for each setting, with the same number of steps however many copies are shown."""
    pace = bench.longer / (1 + bench.copies)
    paced = {
        k: {part: max(1, int(getattr(m, part) * pace)) for part in ("epochs", "finish")}
        for k, m in methods.items()
    }
    methods = {k: replace(m, **paced[k]) for k, m in methods.items()}
    teachers = [bench.teacher(s) for s in seeds]
    whole = [score(t, bench.data.dev, bench.data.test) for t in teachers]
    for label, method in methods.items():
        budget = BUDGETS.get(label, LOOSE)
        setting = repr(method) if budget == LOOSE else f"{method!r}, {budget}"
        runs = [
            (functools.partial(bench.outcome, t, method, s, budget), s)
            for t, s in zip(teachers, seeds, strict=True)
        ]
        bench.line(label, [bench.known(setting, s, measure) for measure, s in runs], whole)


def float_rows(bench: Bench, seeds: list[int]) -> None:
    """The dense models themselves."""
    for label, shape in (("dense float32, width 768", {}), ("dense float32, width 80", SMALL)):
        outcomes = []
        for seed in seeds:
            model, seconds = dense(bench.data, seed, bench.folder, _recipe(shape), **shape)
            size = sum(p.numel() * 4 for p in model.parameters())
            outcomes.append(Outcome(*bench.scores(model), size, 1, seconds))
        bench.line(label, outcomes, None)


def _recipe(shape: dict[str, int]) -> Recipe:
    return Recipe() if not shape else replace(Recipe(), rate=2e-3, epochs=40)


def control(bench: Bench, seeds: list[int]) -> None:
    """A dense encoder of the same bytes: trained, taught by the large one's scores, then 8 bits."""
    teachers = [bench.teacher(s) for s in seeds]
    whole = [score(t, bench.data.dev, bench.data.test) for t in teachers]
    size = sum(p.numel() * 4 for p in teachers[0].parameters())

    def small(teacher: Tagger, seed: int) -> Outcome:
        model, _ = dense(bench.data, seed, bench.folder, _recipe(SMALL), **SMALL)
        epochs = 40 * bench.longer // (1 + bench.copies)
        taught = _Answers(bench.data, model, teacher, shown(bench.data, bench.copies), epochs)
        run(taught, rabbet.Jobs(), "control", "teaching")
        model.load_state_dict(taught.best)
        method = Joint(adapters=(), forms=(), grids=("8c",), act=None, tuning=Tuning(steps=0))
        return bench.outcome(model, method, seed, whole=size)

    runs = [(functools.partial(small, t, s), s) for t, s in zip(teachers, seeds, strict=True)]
    outcomes = [bench.known(f"control, longer {bench.longer}", s, measure) for measure, s in runs]
    bench.line("control: dense, width 80, 8 bits", outcomes, whole)


class _Answers(Course):
    """A small dense model learns from labels and a large one's scores; the best epoch is kept."""

    def __init__(
        self, data: Corpus, model: Tagger, teacher: Tagger, batches: list[Named], epochs: int
    ) -> None:
        self.data, self.model, self.batches, self.rates = (
            data,
            model,
            batches,
            data.rates(Recipe().words),
        )
        self.steps = epochs * len(self.batches)
        self.groups = [{"params": list(model.parameters()), "base": 1e-3}]
        with torch.no_grad():
            self.goals = [teacher(b["ids"], b["attention_mask"]) for b in self.batches]
        self.best, self.most = (
            {k: v.clone() for k, v in model.state_dict().items()},
            score(model, data.held).mean,
        )

    def loss(self, step: int) -> Tensor:
        epoch, place = divmod(step, len(self.batches))
        order = torch.randperm(len(self.batches), generator=torch.Generator().manual_seed(epoch))
        k = int(order[place])
        b = self.batches[k]
        ids = obscured(b["ids"], self.rates, torch.Generator().manual_seed(step))
        answers = self.model(ids, b["attention_mask"])
        total = loss(answers, (b["ids"], b["attention_mask"], b["slots"], b["intents"]))
        for ours, theirs in zip(answers, self.goals[k], strict=True):
            real = b["attention_mask"].bool()
            a, g = (ours, theirs) if ours.ndim == 2 else (ours[real], theirs[real])
            total = total + nn.functional.kl_div(
                a.log_softmax(-1), g.log_softmax(-1), log_target=True, reduction="batchmean"
            )
        return total

    def after_step(self, step: int) -> None:
        if (step + 1) % len(self.batches) == 0:
            current = score(self.model, self.data.held).mean
            if current > self.most:
                self.most, self.best = (
                    current,
                    {k: v.clone() for k, v in self.model.state_dict().items()},
                )


def speed(bench: Bench) -> None:
    """Latency of one sentence on one thread: the export against dense float and dynamic int8."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    teacher = bench.untrained()
    for places in (16, 64):
        batch = {
            "ids": torch.randint(FIRST, bench.data.words, (2, places)),
            "attention_mask": torch.ones(2, places, dtype=torch.long),
        }
        task = Task([batch], forward=lambda m, b: m(b["ids"], b["attention_mask"]))
        with tempfile.TemporaryDirectory() as folder:
            files = {name: Path(folder) / f"{name}.onnx" for name in ("float", "int8", "tt", "tt8")}
            write_float(teacher, task, files["float"])
            # onnxruntime's quantisers do not know the attention of opset 23
            older = Path(folder) / "older.onnx"
            write_float(teacher, task, older, 21)
            quantize_dynamic(older, files["int8"], per_channel=True, weight_type=QuantType.QInt8)
            for name, act in (("tt", None), ("tt8", 8)):
                method = TTQAT(4, keep_dense=HEADS, act=act, epochs=0, finish=0, start="random")
                plan = rabbet.plan(teacher, "bytes <= 90%", task, method)
                survey = rabbet.survey(teacher, task)
                student = build(teacher, plan, survey)
                if act:
                    calibrate_ranges(student, task)
                _export(student, plan, survey, task, files[name])
            timings = time_files(files, [t[:1] for t in batch.values()], runs=200, threads=1)
        base = timings["float"].median
        row(
            places,
            f"{base:.2f}",
            *(f"{base / timings[n].median:.1f}" for n in ("int8", "tt", "tt8")),
            f"{timings['int8'].median / min(timings['tt'].median, timings['tt8'].median):.1f}",
        )


def _export(model: nn.Module, plan: rabbet.Plan, survey: Survey, task: Task, path: Path) -> None:
    from rabbet.export.base import Parcel
    from rabbet.export.onnx.write import write_onnx

    write_onnx(Parcel(model, plan, survey, (), task), path)


def step(bench: Bench) -> None:
    """The cost of a training step of 32 sentences: dense, as tensor trains, and those on 4 bits.

    Memory: what is kept for the backward pass; and the parameters with their gradients and both
    moments of Adam.
    """
    from rabbet.methods.ttqat.course import Teaching
    from rabbet.train.qat import rounded_together
    from rabbet.workpiece import Workpiece

    teacher, task = bench.untrained(), task_of(bench.data, 0)
    method = TTQAT(4, keep_dense=HEADS, start="random", distil=Distillation(0.0, 0.0, 0.0))
    piece = Workpiece.of(teacher, task, rabbet.Jobs())
    course = Teaching(method, piece, method.plan(piece, rabbet.Budget.parse("bytes <= 90%")))
    batch = task.read()[len(task.read()) // 2]
    # no public call gives one step alone
    ours, latents = course._trained(), course._latents()  # noqa: SLF001

    def once(model: nn.Module) -> None:
        assert task.loss is not None
        with rounded_together(latents):
            answers = task.run(model, batch)
        task.loss(answers, batch).backward()

    dense_ms = math.nan
    for name, parameters in (
        ("dense", list(teacher.parameters())),
        ("tensor trains", ours),
        ("on 4 bits", ours),
    ):
        for p in parameters:
            p.requires_grad_()
        if name == "on 4 bits":
            course._move_to_grids()  # noqa: SLF001
        model = teacher if name == "dense" else course.student
        ms, kept = list[float](), dict[int, int]()
        for _ in range(22):
            start = time.perf_counter()
            once(model)
            ms.append(1e3 * (time.perf_counter() - start))

        def keep(t: Tensor, kept: dict[int, int] = kept) -> Tensor:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            once(model)
        for p in parameters:  # these are stored anyway
            kept.pop(p.untyped_storage().data_ptr(), None)
        median = statistics.median(ms[2:])
        dense_ms = median if name == "dense" else dense_ms
        row(name, tuple(batch["ids"].shape), f"{median:.0f}", f"{dense_ms / median:.1f}",
            f"{sum(kept.values()) / 1e6:.1f}",
            f"{16 * sum(p.numel() for p in parameters) / 1e6:.1f}")  # fmt: skip


PARTS = ("dense", "sizes", "control", "starts", "orders", "speed", "step")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--keep", type=Path, required=True)
    parser.add_argument(
        "--copies", type=int, default=3, help="of the sentences that what is compressed learns from"
    )
    parser.add_argument("--longer", type=int, default=1, help="times as many steps of teaching")
    parser.add_argument(
        "--only", nargs="+", default=(), help="settings of which the label holds one of these"
    )
    args = parser.parse_args()
    bench = Bench(corpus(), args.keep, args.copies, args.longer)
    print(f"{machine()}")
    for part in args.parts:
        print(f"\n{part}\n")
        if part == "speed":
            head(
                "places",
                "ms, dense float",
                "times faster: dynamic int8",
                "tt",
                "tt, 8-bit inputs",
                "tt over int8",
            )
            speed(bench)
            continue
        if part == "step":
            head(
                "model", "batch", "ms", "times faster", "MB for the backward pass", "MB that learn"
            )
            step(bench)
            continue
        head(*COLUMNS)
        if part == "dense":
            float_rows(bench, args.seeds)
        elif part == "control":
            control(bench, args.seeds)
        else:
            chosen = {"sizes": SIZES, "starts": STARTS, "orders": ORDERS}[part]
            wanted = {
                k: v for k, v in chosen.items() if not args.only or any(o in k for o in args.only)
            }
            tables(bench, wanted, args.seeds)


if __name__ == "__main__":
    main()
