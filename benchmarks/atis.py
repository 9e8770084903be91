"""Tensor trains on ATIS: bytes against intent and slots, with a dense encoder of the same bytes.

    python benchmarks/atis.py --keep FOLDER [--seeds 0 1 2]
        [--parts dense sizes control starts orders ladder distil speed step]

`ladder` goes from the dense model over tensor trains in float to those on 8, 4 and 2 bits: what the
rank costs, and what rounding. `distil` has a row for each kind of teaching, with the orders in
which blocks are taught beside one another.

The dense model (2 blocks, width 768 or `--width`, 64 positions, words with digits as zeros) is
trained by sentences.py. Float bytes: every float32 parameter. Accuracy is that of the written file;
intent and slot F1 on dev and test together (1,393 sentences), on test alone after the slash. A
tenth of the training sentences chooses between epochs. FOLDER keeps trained dense models,
decomposed layers and the outcome of each setting with each seed, so that parts and seeds can be run
one by one or side by side, and a killed run resumes. Outcomes of another commit are measured again;
dense models are not, and changes that are not committed are not recognised: use a new folder after
those.
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
from common import known, machine
from records import Group, Records, Table, Values, add_options, spread, told
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
    shape_of,
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
SMALL = 80  # the width of the dense encoder that tensor trains are held against
RECIPES = {768: Recipe(), 240: Recipe(20, rate=1e-3), SMALL: Recipe(40, rate=2e-3)}
"""How a dense model of each width is trained."""
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


@dataclass(frozen=True, eq=False)
class Bench:
    """The corpus, and the folder of kept results."""

    data: Corpus
    folder: Path
    copies: int = 0
    longer: float = 1
    width: int = 768

    def dense(self, seed: int, width: int) -> tuple[Tagger, float]:
        """The dense model of a width trained with a seed, and seconds of an epoch."""
        return dense(self.data, seed, self.folder, RECIPES[width], **shape_of(width))

    def teacher(self, seed: int) -> Tagger:
        """The dense model of this bench's width."""
        return self.dense(seed, self.width)[0]

    def untrained(self) -> Tagger:
        """An untrained dense model, where only time counts."""
        torch.manual_seed(0)
        return Tagger(self.data, **shape_of(self.width)).eval()

    def known(self, setting: str, seed: int, measure: Callable[[], Outcome]) -> Outcome:
        """The outcome of a setting and seed: read from the folder, or measured and kept there."""
        setting = f"{setting}, copies {self.copies}, width {self.width}"
        read = known(self.folder, setting, seed, lambda: asdict(measure()))
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


def means(outcomes: list[Outcome], whole: list[Score] | None) -> Values:
    """A row: means over seeds, and drops from the mean of the dense models."""
    scores = {
        ("held", "intent"): "held-back intent",
        ("held", "slots"): "held-back slots",
        ("pooled", "intent"): "intent",
        ("test", "intent"): "intent on test",
        ("pooled", "slots"): "slot F1",
        ("test", "slots"): "slot F1 on test",
    }
    values: Values = {
        "file bytes": round(statistics.mean(f.bytes for f in outcomes)),
        "times smaller": statistics.mean(f.ratio for f in outcomes),
        "seconds an epoch": statistics.mean(f.seconds for f in outcomes),
    } | {
        name: statistics.mean(getattr(getattr(f, part), k) for f in outcomes)
        for (part, k), name in scores.items()
    }
    if whole is not None:
        for k, name, drop in (
            ("intent", "intent", "intent drop"),
            ("slots", "slot F1", "slot drop"),
        ):
            values[drop] = statistics.mean(getattr(d, k) for d in whole) - values[name]
    return values


COLUMNS = {
    "model": "", "longer": "", "file bytes": ",", "times smaller": ".0f",
    "held-back intent": ".2f", "held-back slots": ".2f", "intent": ".2f", "intent on test": ".2f",
    "slot F1": ".2f", "slot F1 on test": ".2f", "intent drop": ".2f", "slot drop": ".2f",
    "seconds an epoch": ".0f",
}  # fmt: skip
ORDERED = ("held-back intent", "held-back slots", "intent", "slot F1")
TAUGHT = {"taught": "", "longer": ""} | {
    f"{order}: {name}": ".2f" for order in ("all", "bottom", "top") for name in ORDERED
}
SPEED = {
    "places": "", "ms, dense float": ".2f", "dynamic int8": ".1f", "tt": ".1f",
    "tt, 8-bit inputs": ".1f", "tt over int8": ".1f",
}  # fmt: skip
STEP = {
    "model": "", "batch": "", "ms": ".0f", "times faster": ".1f", "MB for the backward pass": ".1f",
    "MB that learn": ".1f",
}  # fmt: skip
DATA = (
    "ATIS: a tenth of the training sentences chooses the epoch; dev and test (1,393 sentences) to "
    "measure"
)

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


LADDER = {
    f"rank 24, words at rank 40, {name}": TTQAT(
        bits, 24, 40, keep_dense=HEADS, dense_bits=max(8, bits)
    )
    for name, bits in (("float32", 32), ("8 bits", 8), ("4 bits", 4), ("2 bits", 2))
}
NONE = Distillation(hidden=0.0, attention=0.0, outputs=0.0)
KINDS = {
    "labels alone": NONE,
    "outputs": replace(NONE, outputs=1.0),
    "attention": replace(NONE, attention=1.0),
    "hidden states": replace(NONE, hidden=1.0),
    "contrast": replace(NONE, contrast=1.0),
    "attention, hidden states, outputs": Distillation(),
    "all of them": Distillation(contrast=1.0),
}


def trained(bench: Bench, table: Table, method: TTQAT, budget: str = LOOSE) -> Values:
    """The means of a setting, with the same number of steps however many copies are shown."""
    teachers, whole = _teachers(bench, tuple(_seeds(table)))
    pace = bench.longer / (1 + bench.copies)
    paced = {k: max(1, int(getattr(method, k) * pace)) for k in ("epochs", "finish")}
    method = replace(method, **paced)
    setting = repr(method) if budget == LOOSE else f"{method!r}, {budget}"
    runs = [
        bench.known(setting, s, functools.partial(bench.outcome, t, method, s, budget))
        for t, s in zip(teachers, _seeds(table), strict=True)
    ]
    return means(runs, whole)


def tables(bench: Bench, part: str, methods: dict[str, TTQAT], table: Table, own: Values) -> None:
    """A row for each setting."""
    for label, method in methods.items():
        settings = {"part": part, "model": label, "longer": bench.longer} | own
        budget = BUDGETS.get(label, LOOSE)
        table.row(settings, functools.partial(trained, bench, table, method, budget), label)


def kinds(bench: Bench, table: Table, own: Values) -> None:
    """A row for each kind of teaching; the order of blocks matters where these are taught."""

    def measured(kind: Distillation) -> Values:
        values: Values = {}
        of_blocks = kind.hidden or kind.attention or kind.contrast
        for order in ("all", "bottom", "top") if of_blocks else ("all",):
            method = TTQAT(4, 24, 40, keep_dense=HEADS, order=order, distil=kind)
            found = trained(bench, table, method)
            values |= {f"{order}: {name}": found[name] for name in ORDERED}
        return values

    for label, kind in KINDS.items():
        settings = {"taught": label, "longer": bench.longer} | own
        table.row(settings, functools.partial(measured, kind), label)


def _seeds(table: Table) -> list[int]:
    assert isinstance(table.seed, list)
    return table.seed


@functools.cache
def _teachers(bench: Bench, seeds: tuple[int, ...]) -> tuple[list[Tagger], list[Score]]:
    """The dense models of these seeds, and their scores on dev and test."""
    teachers = [bench.teacher(s) for s in seeds]
    return teachers, [score(t, bench.data.dev, bench.data.test) for t in teachers]


def float_rows(bench: Bench, table: Table) -> None:
    """The dense models themselves."""

    def measured(width: int) -> Values:
        outcomes = []
        for seed in _seeds(table):
            model, seconds = bench.dense(seed, width)
            size = sum(p.numel() * 4 for p in model.parameters())
            outcomes.append(Outcome(*bench.scores(model), size, 1, seconds))
        return means(outcomes, None)

    for width in (bench.width, SMALL):
        label = f"dense float32, width {width}"
        settings = {"part": "dense", "model": label, "longer": None}
        table.row(settings, functools.partial(measured, width), label)


def control(bench: Bench, table: Table, own: Values) -> None:
    """A dense encoder of the same bytes: trained, taught by the large one's scores, then 8 bits."""

    def small(teacher: Tagger, seed: int) -> Outcome:
        model, _ = bench.dense(seed, SMALL)
        epochs = int(40 * bench.longer // (1 + bench.copies))
        taught = _Answers(bench.data, model, teacher, shown(bench.data, bench.copies), epochs)
        run(taught, rabbet.Jobs(), "control", "teaching")
        model.load_state_dict(taught.best)
        method = Joint(adapters=(), forms=(), grids=("8c",), act=None, tuning=Tuning(steps=0))
        size = sum(p.numel() * 4 for p in teacher.parameters())
        return bench.outcome(model, method, seed, whole=size)

    def measured() -> Values:
        teachers, whole = _teachers(bench, tuple(_seeds(table)))
        setting = f"control, longer {bench.longer}"
        runs = [
            bench.known(setting, s, functools.partial(small, t, s))
            for t, s in zip(teachers, _seeds(table), strict=True)
        ]
        return means(runs, whole)

    label = "control: dense, width 80, 8 bits"
    settings = {"part": "control", "model": label, "longer": bench.longer} | own
    table.row(settings, measured, label)


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


def speed(bench: Bench, table: Table) -> None:
    """Latency of one sentence on one thread: the export against dense float and dynamic int8."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    teacher = bench.untrained()

    def measured(places: int) -> Values:
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
        times = {name: timing.median for name, timing in timings.items()}
        return {
            "ms, dense float": times["float"],
            "dynamic int8": times["float"] / times["int8"],
            "tt": times["float"] / times["tt"],
            "tt, 8-bit inputs": times["float"] / times["tt8"],
            "tt over int8": times["int8"] / min(times["tt"], times["tt8"]),
        }

    for places in (16, 64):
        table.row({"places": places}, functools.partial(measured, places))


def _export(model: nn.Module, plan: rabbet.Plan, survey: Survey, task: Task, path: Path) -> None:
    from rabbet.export.base import Parcel
    from rabbet.export.onnx.write import write_onnx

    write_onnx(Parcel(model, plan, survey, (), task), path)


def step(bench: Bench) -> Group:
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

    found: Group = []
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
        values = {
            "ms": median,
            "times faster": dense_ms / median,
            "MB for the backward pass": sum(kept.values()) / 1e6,
            "MB that learn": 16 * sum(p.numel() for p in parameters) / 1e6,
        }
        found.append(({"model": name, "batch": " x ".join(map(str, batch["ids"].shape))}, values))
    return found


PARTS = ("dense", "sizes", "control", "starts", "orders", "ladder", "distil", "speed", "step")


def steps(text: str) -> float:
    """A number, as a whole one if it is."""
    return int(text) if text.isdecimal() else float(text)


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
    parser.add_argument("--longer", type=steps, default=1, help="times as many steps of teaching")
    parser.add_argument("--width", type=int, choices=RECIPES, default=768, help="of the encoder")
    add_options(parser, jobs=True)
    args = parser.parse_args()
    spread(args)
    bench = Bench(corpus(), args.keep, args.copies, args.longer, args.width)
    print(f"{machine()}")
    records = Records("atis", args, packages=("transformers", "onnxruntime"))
    own = told(parser, args, "copies", "width")
    noise = "random tokens; untrained weights, for speed alone"
    for part in args.parts:
        print(f"\n{part}")
        table = Table(records, "models", COLUMNS, DATA, args.seeds)
        if part == "speed":
            speed(bench, Table(records, "speed", SPEED, noise))
        elif part == "step":
            Table(records, "step", STEP, DATA).rows({}, functools.partial(step, bench))
        elif part == "dense":
            float_rows(bench, table)
        elif part == "control":
            control(bench, table, own)
        elif part == "distil":
            kinds(bench, Table(records, "distil", TAUGHT, DATA, args.seeds), own)
        else:
            chosen = {"sizes": SIZES, "starts": STARTS, "orders": ORDERS, "ladder": LADDER}[part]
            tables(bench, part, chosen, table, own)


if __name__ == "__main__":
    main()
