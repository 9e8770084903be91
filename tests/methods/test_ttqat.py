"""TTQAT on small transformers: plans, teaching, what is handed out, and what is refused."""

import copy
import itertools
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from networks import lasting, rand, settled
from torch import nn
from transformers import (
    AlbertConfig,
    AlbertModel,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

import rabbet
from rabbet import TTQAT, Jobs, Task
from rabbet.choose.scoring import scored
from rabbet.core.plan import Term
from rabbet.errors import BudgetError, DataError, ModelError, PlanError
from rabbet.grids.grid import Grid
from rabbet.jobs import silent
from rabbet.layers import Site
from rabbet.layers.embedding import Embedding
from rabbet.layers.linear import Linear
from rabbet.methods.ttqat import Choices
from rabbet.methods.ttqat.start import start_cores
from rabbet.model.compressed import compressed_layers
from rabbet.model.surgery import leave_fast_path
from rabbet.runtime.session import Session
from rabbet.train.distil import (
    Distillation,
    Recorder,
    Recording,
    Stage,
    Teacher,
    find_blocks,
    mask_of,
)
from rabbet.train.qat import Latent, rounded_together
from rabbet.workpiece import Workpiece

NUMBERS = Distillation(scores=False)  # outputs are no scores of classes
SHORT = {"rank": 6, "table_rank": 6, "epochs": 2, "finish": 1, "start": "plain", "distil": NUMBERS}


def bert(seed=0, **kwargs):
    torch.manual_seed(seed)
    config = BertConfig(vocab_size=90, hidden_size=48, num_hidden_layers=2, num_attention_heads=4,
                        intermediate_size=96, max_position_embeddings=16, **kwargs)  # fmt: skip
    return BertModel(config).eval()


def sentences(count=6, size=4):
    batches = []
    for k in range(count):
        generator = torch.Generator().manual_seed(k)
        ids = torch.randint(1, 90, (size, 10), generator=generator)
        mask = torch.ones(size, 10, dtype=torch.long)
        mask[0, 6:] = 0
        batches.append({"input_ids": ids, "attention_mask": mask})
    return batches


def forms(plan):
    return {line.name: line.terms[0].form.name for line in plan}


@pytest.fixture(scope="module")
def compressed():
    model, data = bert(), sentences()
    return model, data, rabbet.compress(model, "bytes <= 20%", data, TTQAT(**SHORT))


def test_latents_that_are_rounded_together_are_what_each_is_alone_and_learn_the_same():
    torch.manual_seed(0)
    grids = [Grid.parse(g) for g in ("4", "4", "2h", "4", "3c", "2h")]
    latents = [Latent(rand(3, 4, 5), grid) for grid in grids] + [
        Latent(rand(2, 4, 1), grids[0]),
        Latent(rand(2), grids[0]),
    ]
    for latent in latents[:-1]:  # the last stays in float
        latent.move_to_grid()
    for latent in latents:
        latent.requires_grad_()
        latent.scale.requires_grad_()
    weights = [rand(*x.value.shape) for x in latents]
    alone = [x() for x in latents]
    slopes = torch.autograd.grad(
        sum((a * w).sum() for a, w in zip(alone, weights, strict=True)), _learning(latents)
    )
    with rounded_together(latents):
        assert latents[0]() is latents[0]()
        shown = [x() for x in latents]
    assert latents[0]() is not latents[0]()
    assert all(torch.equal(a, b) for a, b in zip(alone, shown, strict=True))
    joint_slopes = torch.autograd.grad(
        sum((a * w).sum() for a, w in zip(shown, weights, strict=True)), _learning(latents)
    )
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(slopes, joint_slopes, strict=True))


def _learning(latents):
    return [x.value for x in latents] + [x.scale for x in latents if x.on_grid]


def test_linears_become_tensor_trains_and_the_words_a_tensor_train_matrix(compressed):
    model, _, result = compressed
    form_of = forms(result.plan)
    assert form_of["embeddings.word_embeddings"] == "ttm"
    assert {form_of[n] for n in form_of if n.startswith("encoder.")} == {"tt"}
    assert all(line.terms[0].grid.bits == 4 for line in result.plan if "encoder" in line.name)
    assert result.cost.bytes <= 0.2 * result.float_cost.bytes
    assert next(model.parameters()).requires_grad


def test_the_file_is_the_network(compressed, tmp_path):
    _, data, result = compressed
    path = tmp_path / "small.safetensors"
    assert result.save(path) == result.cost.bytes == path.stat().st_size
    again = rabbet.load(path, bert(seed=5))
    for batch in data:
        assert torch.equal(again(**batch)[0], result.model(**batch)[0])


def test_the_same_seed_gives_the_same_bytes_and_the_model_is_not_touched(compressed, tmp_path):
    _, data, result = compressed
    model = bert()
    before = copy.deepcopy(model.state_dict())
    again = rabbet.compress(model, "bytes <= 20%", data, TTQAT(**SHORT))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    result.save(tmp_path / "a")
    again.save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def apart(result, model, data):
    with torch.no_grad():
        pairs = [(result.model(**b)[0], model(**b)[0]) for b in data]
    return float(
        sum((a - b).square().sum() for a, b in pairs) / sum(b.square().sum() for _, b in pairs)
    )


@pytest.mark.slow
def test_teaching_brings_the_student_nearer():
    model, data = bert(), sentences()
    errors = []
    for epochs, finish in ((0, 0), (15, 10)):
        method = TTQAT(**SHORT | {"epochs": epochs, "finish": finish, "rate": 0.03})
        errors.append(apart(rabbet.compress(model, "bytes <= 20%", data, method), model, data))
    assert errors[1] < 0.8 * errors[0]


@pytest.mark.parametrize("act", [8, 4])
@pytest.mark.slow
def test_inputs_are_quantised_where_asked(act, tmp_path):
    model, data = bert(), sentences()
    result = rabbet.compress(model, "bytes <= 20%", data, TTQAT(**SHORT | {"act": act}))
    assert {line.act for line in result.plan if "embeddings" not in line.name} == {act}
    for layer in compressed_layers(result.model).values():
        widths = [q.grid.bits for q in layer.quantisers]
        assert widths == ([act, 8] if layer.forms[0].name == "tt" else [act] if widths else [])
    if act == 8:
        written = result.export(tmp_path / "small.onnx")
        assert lasting(written.notes) == ()
        session = Session((tmp_path / "small.onnx").read_bytes())
        answer = session.run(session.feed(list(data[1].values())))[0]
        assert torch.allclose(torch.from_numpy(answer), result.model(**data[1])[0], atol=0.3)


@pytest.mark.slow
def test_chains_of_floats_are_trained_stored_and_exported_as_floats(tmp_path):
    model, data = bert(), sentences(3)
    method = TTQAT(32, 6, 6, dense_bits=32, epochs=1, finish=1, start="plain", distil=NUMBERS)
    result = rabbet.compress(model, "bytes <= 90%", data, method)
    assert {str(line.terms[0].grid) for line in result.plan} == {"f32"}
    assert {"tt", "ttm"} <= set(forms(result.plan).values())
    path = tmp_path / "small.safetensors"
    assert result.save(path) == result.cost.bytes
    answer = result.model(**data[0])[0]
    assert torch.equal(rabbet.load(path, model)(**data[0])[0], answer)
    result.export(tmp_path / "small.onnx")
    session = Session((tmp_path / "small.onnx").read_bytes())
    exported = session.run(session.feed(list(data[0].values())))[0]
    assert torch.allclose(torch.from_numpy(exported), answer, atol=1e-4)


@pytest.mark.slow
def test_a_stopped_run_goes_on_and_ends_the_same(tmp_path):
    model, data = bert(), sentences()
    method = TTQAT(**SHORT | {"act": 8})
    whole = rabbet.compress(model, "bytes <= 20%", data, method)

    def stops(stage, done, _):
        if stage.startswith("teaching") and done == 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rabbet.compress(
            model, "bytes <= 20%", data, method, jobs=Jobs(folder=tmp_path, progress=stops)
        )
    steps = []

    def counted(stage, done, _):
        if stage.startswith("teaching"):
            steps.append(done)

    again = rabbet.compress(
        model, "bytes <= 20%", data, method, jobs=Jobs(folder=tmp_path, progress=counted)
    )
    assert steps[0] == 11  # batches are 6, one held back: a checkpoint every 5 steps
    whole.save(tmp_path / "a")
    again.save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize(
    ("order", "start"), [("bottom", "metric"), ("top", "plain"), ("all", "random")]
)
def test_every_order_and_start_runs(order, start):
    model, data = bert(), sentences(3)
    result = rabbet.compress(
        model, "bytes <= 20%", data, TTQAT(**SHORT | {"order": order, "start": start})
    )
    assert torch.isfinite(result.model(**data[0])[0]).all()


@pytest.mark.slow
def test_ranks_and_bits_are_chosen_under_the_budget():
    model, data = bert(), sentences()
    method = TTQAT(
        bits=(2, 4, 8),
        rank=None,
        table_rank=None,
        choices=Choices(ranks=(2, 6, 12)),
        epochs=1,
        finish=1,
        distil=NUMBERS,
    )
    jobs = Jobs()
    sizes, chosen = [], []
    for share in (12, 16, 30):
        result = rabbet.compress(model, f"bytes <= {share}%", data, method, jobs=jobs)
        sizes.append(result.cost.bytes / result.float_cost.bytes)
        assert sizes[-1] <= share / 100
        chosen.append({str(line.terms[0]) for line in result.plan})
    assert all(b > a for a, b in itertools.pairwise(sizes))
    assert len(chosen[1]) > 2


def test_a_chosen_rank_stands_beside_the_layer_itself_on_low_bits():
    method = TTQAT(
        bits=(2, 4), rank=None, table_rank=None, choices=Choices((2, 6)), keep_dense=("kept",)
    )
    table, linear = Site("x", Embedding(), (90, 48)), Site("x", Linear(), (48, 96))
    for site, form in ((table, "ttm"), (linear, "tt")):
        terms = {str(term) for (term,) in method.menu(site)}
        assert {"dense@tc", "dense@2hc", "dense@8c", f"{form}[2]@4", f"{form}[6]@2h"} <= terms
    matrices = TTQAT(rank=None, table_rank=None, choices=Choices(forms=("tt",), grids=("tc",)))
    assert [str(t) for (t,) in matrices.menu(table)] == ["dense@tc", "dense@8c"]
    assert "tt[6]@4" in {str(t) for (t,) in matrices.menu(linear)}
    assert [str(t) for (t,) in method.menu(Site("kept", Linear(), (48, 96)))] == ["dense@8c"]
    assert [str(t) for (t,) in TTQAT(bits=4, rank=6).menu(linear)] == ["tt[6]@4"]


def test_where_training_follows_an_error_counts_relative_to_what_is_left_of_the_layer():
    model, data = bert(), sentences(3)
    piece = Workpiece.of(model, Task(data), Jobs())
    menus = {
        s.name: tuple((Term.parse(t),) for t in ("dense@8c", "dense@1c")) for s in piece.survey
    }
    words, linear = "embeddings.word_embeddings", "encoder.layer.0.output.dense"
    menus[words] += ((Term.parse("ttm[1]@4"),),)
    menus[linear] += ((Term.parse("tt[1]@4"),),)
    alone, learns = (scored(piece, menus, learns=flag) for flag in (False, True))
    for site, a, b in zip(piece.survey, alone, learns, strict=True):
        ratios = [y / x for x, y in zip(a, b, strict=True) if x]
        assert all(1 <= r <= 1001 for r in ratios)
        if site.name in (words, linear):
            eight, one, chain = ratios
            assert eight < 1.001
            # a sign and a size keep 2 / pi of a normal weight, and more where inputs are alike
            assert 1.02 < one < 2
            assert chain > 5


def test_matrices_alone_are_trained_under_a_budget_as_well():
    model, data = bert(), sentences(3)
    method = TTQAT(
        rank=None, table_rank=None, choices=Choices(forms=()), epochs=1, finish=2, distil=NUMBERS
    )
    result = rabbet.compress(model, "bytes <= 15%", data, method)
    assert set(forms(result.plan).values()) == {"dense"}
    assert len({str(line.terms[0].grid) for line in result.plan}) > 1
    # no steps in float: they would lead nowhere
    assert f"taught {2 * (len(data) - 1)} steps" in result.notes[0]


def test_a_start_that_teaching_makes_worse_is_kept():
    model, data = bert(), sentences(4)
    plan = "encoder.layer.0.output.dense  tt[6]@4\nencoder.layer.1.output.dense  tt[6]@4 | act@8"
    bad = TTQAT(**SHORT | {"rate": 5.0})
    result = rabbet.fit(model, plan, data, bad)
    assert any("no epoch was better than the start" in note for note in result.notes)
    untaught = rabbet.fit(model, plan, data, replace(bad, epochs=0, finish=0))
    for name, value in untaught.model.state_dict().items():
        assert torch.equal(value, result.model.state_dict()[name]), name


def test_matrices_move_as_slowly_as_they_are_told():
    model, data = bert(), sentences(3)
    plan = "embeddings.word_embeddings  dense@8c\nencoder.layer.0.output.dense  tt[6]@4"
    scores = itertools.count()
    task = Task(data, evaluate=lambda _: next(scores))  # the last epoch is the best
    before = model.embeddings.word_embeddings.weight.detach()
    moved = []
    for share in (1.0, 0.0):
        result = rabbet.fit(
            model,
            plan,
            task,
            TTQAT(**SHORT | {"dense_rate": share, "rate": 0.2, "epochs": 3, "finish": 0}),
        )
        moved.append(float((result.model.embeddings.word_embeddings.weight - before).abs().max()))
    assert moved[1] < 0.01 * float(before.abs().max()) < moved[0]
    on_grid = rabbet.fit(
        model,
        plan,
        task,
        TTQAT(**SHORT | {"dense_rate": 0.0, "rate": 0.2, "epochs": 3, "finish": 3}),
    )
    assert torch.equal(
        on_grid.model.embeddings.word_embeddings.weight,
        result.model.embeddings.word_embeddings.weight,
    )


def test_scales_move_relative_to_themselves_however_small_they_are():
    model, data = bert(), sentences(3)
    method, plan = TTQAT(**SHORT | {"epochs": 0}), "encoder.layer.0.output.dense  dense@8c"
    scales = []
    for finish in (0, 4):
        judged = []  # longer each time, so that the last epoch is the best
        task = Task(data, evaluate=lambda m, seen=judged: seen.append(m) or len(seen))
        student = rabbet.fit(model, plan, task, replace(method, finish=finish)).model
        scales.append(student.encoder.layer[0].output.dense.factors[0][0].scale)
    apart = (scales[1] - scales[0]).abs() / scales[0].mean()
    assert 0 < float(apart.max()) < 4 * 3 * method.rate


def test_a_bias_of_one_output_that_starts_at_zero_learns():
    torch.manual_seed(0)
    model = nn.Sequential(Encoder(), nn.Linear(5, 1)).eval()
    nn.init.zeros_(model[1].bias)
    data = [torch.randint(0, 40, (4, 7))] * 4  # what is held back is what is taught: it gets better
    method = TTQAT(rank=6, table_rank=4, epochs=4, finish=4, distil=NUMBERS)
    assert float(rabbet.compress(model, "bytes <= 90%", data, method).model[1].bias) != 0


@pytest.mark.parametrize("score", [0.5, -math.inf])
def test_a_score_may_be_any_number_and_leave_the_network_in_training_mode(score):
    model = bert(hidden_dropout_prob=0.5)

    def evaluate(m):
        assert not m.training
        m.train()
        return score

    result = rabbet.compress(
        model, "bytes <= 20%", Task(sentences(3), evaluate=evaluate), TTQAT(**SHORT)
    )
    assert not result.model.training
    assert not any(m.training for m in result.model.modules() if isinstance(m, nn.Dropout))
    assert result.notes[0].endswith(f"{score:.4g} -> {score:.4g}")


def test_random_starts_of_layers_of_one_shape_differ():
    method = TTQAT(**SHORT | {"start": "random", "epochs": 0, "finish": 0})
    student = rabbet.compress(bert(), "bytes <= 20%", sentences(2), method).model
    first, second = (block.attention.self.query.weight for block in student.encoder.layer)
    assert not torch.equal(first, second)
    assert not torch.equal(first, student.encoder.layer[0].attention.self.key.weight)


def test_parameters_that_are_whole_numbers_stay_as_they_are():
    model = bert()
    model.steps = nn.Parameter(torch.tensor([7]), requires_grad=False)
    assert rabbet.compress(
        model, "bytes <= 20%", sentences(2), TTQAT(**SHORT)
    ).model.steps.tolist() == [7]


def test_a_budget_below_the_uniform_rank_is_refused_at_once():
    def never(stage, *_):
        if stage != "looking at the network":
            raise AssertionError(stage)

    with pytest.raises(BudgetError, match="smallest reachable value"):
        rabbet.compress(
            bert(), "bytes <= 2%", sentences(), TTQAT(**SHORT), jobs=Jobs(progress=never)
        )


def test_layers_named_whole_stay_matrices():
    name = "encoder.layer.0.output.dense"
    plan = rabbet.plan(
        bert(), "bytes <= 30%", sentences(), TTQAT(**SHORT | {"keep_dense": (name,)})
    )
    assert str(plan[name]) == f"{name} dense@8c"


def test_a_decoder_is_taught():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=60, n_positions=16, n_embd=32, n_layer=2, n_head=4)
    ).eval()
    data = [{"input_ids": torch.randint(0, 60, (4, 9))} for _ in range(4)]
    task = Task(data, forward=lambda m, b: m(**b, use_cache=False).logits)
    result = rabbet.compress(model, "bytes <= 60%", task, TTQAT(rank=6, epochs=2, finish=2))
    form_of = forms(result.plan)
    assert form_of["transformer.h.0.attn.c_attn"] == "tt"
    assert result.survey["transformer.wte"].heads == ("lm_head",)
    assert form_of["transformer.wte"] == "ttm"
    assert result.notes[0].startswith("taught 12 steps")


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(40, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, 5)

    def forward(self, ids):
        return self.head(self.encoder(self.embed(ids)).mean(1))


@pytest.mark.parametrize("opened", [False, True])
def test_a_plain_torch_transformer_is_taught_attention_included(opened):
    torch.manual_seed(0)
    model = Encoder().eval()
    model = rabbet.open_attention(model) if opened else model
    data = [torch.randint(0, 40, (4, 7)) for _ in range(4)]
    look = Recorder(model, find_blocks(model, rabbet.survey(model, data)))
    with torch.no_grad():
        shown = look(lambda: model(data[0]))
        assert torch.allclose(shown.outputs[0], model(data[0]), atol=1e-5)
    assert [tuple(t.shape) for t in shown.hidden] == [(4, 7, 32)] * 3
    assert [tuple(t.shape) for t in shown.attention] == [(4, 4, 7, 7)] * 2
    assert all(torch.allclose(t.sum(-1), torch.ones(4, 4, 7)) for t in shown.attention)
    result = rabbet.compress(
        model, "bytes <= 35%", data, TTQAT(rank=6, table_rank=4, epochs=2, finish=2)
    )
    form_of = forms(result.plan)
    assert form_of["encoder.layers.0.linear1"] == "tt"
    assert form_of["encoder.layers.1.self_attn.k_proj"] == "tt"


def test_labels_teach_and_the_users_score_chooses():
    torch.manual_seed(0)
    model = Encoder().eval()
    data = [(torch.randint(0, 40, (4, 7)), torch.randint(0, 5, (4,))) for _ in range(4)]
    judged = []

    def evaluate(m):
        judged.append(m)
        # best is the second epoch on the grid, after the start and the first
        return float(len(judged) == 3)

    seen = []

    def loss(out, batch):
        seen.append(batch[1])
        return F.cross_entropy(out, batch[1])

    task = Task(data, forward=lambda m, b: m(b[0]), evaluate=evaluate, loss=loss)
    result = rabbet.compress(
        model, "bytes <= 70%", task, TTQAT(rank=6, table_rank=4, epochs=1, finish=3)
    )
    assert len(judged) == 4
    assert len(seen) == 16
    assert result.notes == ("taught 16 steps; held-back score 0 -> 1",)


def test_the_student_is_shown_what_varies_and_the_teacher_the_batch():
    torch.manual_seed(0)
    model = Encoder().eval()
    data = [torch.randint(1, 40, (4, 7)) for _ in range(4)]
    shown = {True: [], False: []}

    def forward(m, ids):
        shown[bool(compressed_layers(m))].append(int((ids == 0).sum()))
        return m(ids)

    def vary(ids, generator):
        return ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.5, 0)

    task = Task(data, forward=forward, vary=vary)
    rabbet.compress(model, "bytes <= 70%", task, TTQAT(rank=6, table_rank=4, epochs=1, finish=1))
    assert set(shown[False]) == {0}
    # the steps; held-back batches are shown as they are
    assert sum(n > 0 for n in shown[True]) == 6
    assert len({n for n in shown[True] if n}) > 1


# What is taught


def shown(seed, hidden=3):
    return Recording(
        [rand(2, 4, 6, seed=seed + k) for k in range(hidden)],
        [rand(2, 3, 4, 4, seed=seed + k).softmax(-1) for k in range(hidden - 1)],
        [rand(2, 5, seed=seed)],
    )


def test_the_loss_is_zero_for_the_same_and_positive_otherwise():
    for distil in (Distillation(), NUMBERS):
        for stage in (Stage(), Stage(1), Stage(2, top=True), Stage(outputs=False)):
            assert float(distil.loss(shown(1), shown(1), None, stage).abs()) < 1e-5
            assert float(distil.loss(shown(1), shown(9), None, stage)) > 0.01


@pytest.mark.slow
def test_another_teacher_does_not_go_on_from_the_checkpoint_of_the_first(tmp_path):
    data, method = sentences(3), TTQAT(**SHORT | {"start": "random"})
    first, second = bert(), bert()
    with torch.no_grad():
        for layer in second.modules():
            if isinstance(layer, nn.Linear):
                layer.weight.mul_(2)
    jobs = Jobs(folder=tmp_path)
    rabbet.compress(first, "bytes <= 20%", data, method, jobs=jobs)
    result = rabbet.compress(second, "bytes <= 20%", data, method, jobs=jobs)
    assert result.notes == rabbet.compress(second, "bytes <= 20%", data, method).notes


@pytest.mark.parametrize("act", [None, 8])
def test_the_reported_score_is_that_of_what_is_handed_out(act, tmp_path):
    model, data = bert(), sentences(3)

    def evaluate(m):
        return -float((m(**data[0])[0] - model(**data[0])[0]).square().mean())

    task = Task(data, evaluate=evaluate)
    result = rabbet.compress(model, "bytes <= 20%", task, TTQAT(**SHORT, act=act))
    result.save(tmp_path / "small.safetensors")
    with torch.no_grad():
        score = evaluate(rabbet.load(tmp_path / "small.safetensors", model))
    assert result.notes[0].endswith(f" -> {score:.4g}")


@pytest.mark.parametrize(
    ("stage", "places"), [(Stage(1), [0]), (Stage(2), [0, 1]), (Stage(1, top=True), [2])]
)
def test_only_the_chosen_depth_counts(stage, places):
    distil, ours, theirs = Distillation(), shown(1), shown(9)
    before = float(distil.loss(ours, theirs, None, stage))
    for k in range(3):
        hidden = [t + 1 if j == k else t for j, t in enumerate(ours.hidden)]
        changed = (
            float(distil.loss(Recording(hidden, ours.attention, ours.outputs), theirs, None, stage))
            != before
        )
        assert changed == (k in places)


def test_places_that_the_mask_excludes_do_not_count():
    ours, theirs = shown(1), shown(9)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    distil = Distillation()
    before = float(distil.loss(ours, theirs, mask))
    hidden = [t + 5 * (1 - mask)[..., None] for t in ours.hidden]
    assert float(
        distil.loss(Recording(hidden, ours.attention, ours.outputs), theirs, mask)
    ) == pytest.approx(before)
    assert float(
        distil.loss(Recording(hidden, ours.attention, ours.outputs), theirs, None)
    ) != pytest.approx(before)


def test_contrast_is_least_where_every_example_is_most_like_its_own():
    theirs, mask = shown(9), torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    distil = Distillation(hidden=0, attention=0, outputs=0, contrast=1)
    own = float(distil.loss(theirs, theirs, mask))
    swapped = Recording([h.flip(0) for h in theirs.hidden], theirs.attention, theirs.outputs)
    assert 0 < own < math.log(2) < float(distil.loss(swapped, theirs, mask.flip(0)))
    larger = Recording([3 * h for h in theirs.hidden], theirs.attention, theirs.outputs)
    assert float(distil.loss(larger, theirs, mask)) == pytest.approx(own)
    alone = Recording([h[:1] for h in theirs.hidden], [], theirs.outputs)
    assert float(distil.loss(alone, alone, None)) == 0


@pytest.mark.slow
def test_training_by_contrast_alone_lowers_it():
    model, data = bert(), sentences(1, size=8) * 6  # the batch that is held back is taught as well
    distil = Distillation(hidden=0, attention=0, outputs=0, contrast=1, scores=False)
    method = TTQAT(**SHORT | {"distil": distil, "epochs": 10, "finish": 5, "start": "random"})
    result = rabbet.compress(model, "bytes <= 20%", data, method)
    before, after = (float(x) for x in result.notes[0].rpartition(" loss ")[2].split(" -> "))
    assert after < 0.7 * before


def test_contrast_needs_examples_to_tell_apart():
    distil = Distillation(contrast=1, scores=False)
    with pytest.raises(DataError, match="larger than one example"):
        rabbet.compress(
            bert(), "bytes <= 20%", sentences(3, size=1), TTQAT(**SHORT | {"distil": distil})
        )

    class First(nn.Module):  # time first
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 16)])

        def forward(self, x):
            x = x.transpose(0, 1)
            for block in self.blocks:
                x = block(x)
            return x.transpose(0, 1)

    with pytest.raises(ModelError, match=r"\[examples, ...\], of 2 examples here"):
        rabbet.compress(
            First().eval(), "bytes <= 90%", [rand(2, 5, 16)] * 2, TTQAT(rank=2, distil=distil)
        )


def test_scores_of_as_many_classes_as_places_are_not_places():
    ours, theirs, mask = shown(1), shown(9), torch.ones(2, 5)
    distil = Distillation(hidden=0, attention=0)
    assert torch.equal(distil.loss(ours, theirs, mask), distil.loss(ours, theirs, None))
    mask[0, 3:] = 0
    assert torch.equal(distil.loss(ours, theirs, mask), distil.loss(ours, theirs, None))


def test_one_number_per_example_or_place_is_compared_as_a_number():
    for shape in ((4, 1), (4, 3, 1), (4,)):
        ours, theirs = (
            Recording([], [], [rand(shape, seed=s) if len(shape) == 1 else rand(*shape, seed=s)])
            for s in (1, 2)
        )
        assert float(Distillation().loss(ours, theirs, None)) > 0.01


def test_the_mask_is_found_in_any_kind_of_batch_and_is_that_of_the_places_compared():
    mask, other = torch.ones(2, 3), torch.zeros(2, 3)
    named = {"input_ids": torch.ones(2, 3), "attention_mask": mask}
    for batch in (named, (named, torch.ones(2)), [torch.ones(2), {"x": mask}, named]):
        assert mask_of(batch) is mask
        assert mask_of(batch, decodes=True) is None
    assert mask_of(named | {"decoder_attention_mask": other}, decodes=True) is other
    assert mask_of((torch.ones(2, 3), mask)) is None
    assert mask_of({"attention_mask": torch.ones(2, 1, 3, 3)}) is None


@pytest.mark.slow
def test_a_sequence_that_is_decoded_is_taught_whatever_the_mask_of_the_first_says():
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 60,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 64,
        "num_layers": 2,
        "num_heads": 4,
    }
    model = T5ForConditionalGeneration(
        T5Config(**sizes, decoder_start_token_id=0, use_cache=False)
    ).eval()
    ids = torch.randint(1, 60, (2, 8), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones(2, 8), "decoder_input_ids": ids}
    batch["attention_mask"][0, 3:] = 0
    grads = []
    method = TTQAT(
        rank=6, table_rank=4, epochs=1, finish=0, distil=Distillation(hidden=0, attention=0)
    )

    def forward(m, b):
        logits = m(**b).logits
        if logits.requires_grad:
            logits.register_hook(lambda g: grads.append(g.abs().sum(-1)))
        return logits

    rabbet.compress(model, "bytes <= 95%", Task([batch, batch], forward=forward), method)
    assert grads
    assert all((g > 0).all() for g in grads)


def test_a_block_that_runs_several_times_is_matched_each_time():
    class Again(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(4, 4)] * 3)

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    model, x = settled(Again()), rand(2, 5, 4)
    hidden = Recorder(model, ["layers.0"])(lambda: model(x)).hidden
    wanted = [x]
    for layer in model.layers:
        wanted.append(layer(wanted[-1]))
    assert all(torch.equal(a, b) for a, b in zip(hidden, wanted, strict=True))


def test_an_encoder_of_one_block_that_runs_twice_is_found_and_taught():
    torch.manual_seed(0)
    sizes = {"vocab_size": 60, "embedding_size": 16, "hidden_size": 32, "intermediate_size": 64}
    config = AlbertConfig(**sizes, num_hidden_layers=2, num_attention_heads=4)
    model, ids = AlbertModel(config).eval(), torch.randint(60, (2, 6))
    blocks = find_blocks(model, rabbet.survey(model, [{"input_ids": ids}]))
    assert blocks == ["encoder.albert_layer_groups.0"]
    with torch.no_grad():
        shown = Recorder(model, blocks)(lambda: model(ids))
        wanted = model(ids, output_hidden_states=True).hidden_states
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(shown.hidden, wanted, strict=True))
    assert rabbet.compress(
        model,
        "bytes <= 95%",
        [{"input_ids": ids}] * 2,
        TTQAT(rank=4, table_rank=4, epochs=1, finish=1),
    )


def test_a_list_of_blocks_is_preferred_to_a_block_that_runs_several_times():
    class Siamese(nn.Module):
        def __init__(self):
            super().__init__()
            self.tower = nn.Sequential(nn.Sequential(*(nn.Linear(4, 4) for _ in range(3))))

        def forward(self, x):
            return self.tower(x) - self.tower(x.flip(0))

    model = Siamese().eval()
    assert find_blocks(model, rabbet.survey(model, [rand(2, 4)])) == [
        "tower.0.0",
        "tower.0.1",
        "tower.0.2",
    ]


def test_padding_on_the_left_of_a_causal_torch_transformer_is_handled():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    leave_fast_path(model)
    x, padded = rand(2, 5, 16), torch.zeros(2, 5, dtype=torch.bool)
    padded[0, :2] = True
    causal = torch.ones(5, 5, dtype=torch.bool).triu(1)

    def run():
        return model(x, mask=causal, src_key_padding_mask=padded)

    seen = Recorder(model, ["layers.0", "layers.1"])(run)
    assert torch.equal(seen.outputs[0], run())
    assert [tuple(t.shape) for t in seen.attention] == [(2, 2, 5, 5)] * 2
    sum(t.square().sum() for t in (*seen.hidden, *seen.attention)).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("causal", [False, True])
def test_attention_is_seen_in_fused_calls_as_in_plain_ones(causal):
    q, k, v = (rand(2, 3, 5, 4, seed=s) for s in (1, 2, 3))
    bias = (
        torch.zeros(5, 5).masked_fill(~torch.ones(5, 5, dtype=torch.bool).tril(), -torch.inf)
        if causal
        else 0
    )

    class Fused(nn.Module):
        def forward(self, x):
            return F.scaled_dot_product_attention(x, k, v, is_causal=causal)

    class Plain(nn.Module):
        def forward(self, x):
            return (x @ k.mT / 2 + bias).softmax(-1) @ v

    attention = [Recorder(nn.Module(), [])(lambda m=m: m(q)).attention for m in (Fused(), Plain())]
    assert torch.allclose(attention[0][0], attention[1][0], atol=1e-6)


def test_places_that_may_look_at_nothing_look_everywhere_equally():
    q, k, v = (rand(2, 3, 5, 4, seed=s) for s in (1, 2, 3))
    mask = torch.ones(5, 5, dtype=torch.bool).tril()
    mask[0] = False  # padding on the left of a decoder

    class Fused(nn.Module):
        def forward(self, x):
            return F.scaled_dot_product_attention(x, k, v, attn_mask=mask)

    attention = Recorder(nn.Module(), [])(lambda: Fused()(q)).attention[0]
    assert torch.isfinite(attention).all()
    assert torch.allclose(attention[:, :, 0], torch.full((2, 3, 5), 0.2))
    assert torch.allclose(attention[:, :, 1, :2].sum(-1), torch.ones(2, 3))


class Answers(nn.Module):
    """A table as the first block; the network returns a loss and one number per example."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(
            nn.Embedding(20, 16), nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16)
        )
        self.head = nn.Linear(16, 1)

    def forward(self, ids):
        scores = self.head(self.blocks(ids).mean(1)).squeeze(-1)
        return scores.square().mean(), scores


def test_numbers_and_a_loss_among_the_outputs_are_handled():
    torch.manual_seed(0)
    data = [torch.randint(20, (4, 6)) for _ in range(12)]
    result = rabbet.compress(
        Answers().eval(), "bytes <= 100%", data, TTQAT(8, 8, 8, epochs=12, finish=6, rate=5e-3)
    )
    before, after = (float(x) for x in result.notes[0].rpartition(" loss ")[2].split(" -> "))
    assert after < before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_trained_in_half_precision_is_what_the_file_holds(dtype, tmp_path):
    torch.manual_seed(0)
    model, data = Encoder().eval().to(dtype), [torch.randint(40, (4, 7)) for _ in range(4)]
    result = rabbet.compress(model, "bytes <= 100%", data, TTQAT(rank=4, epochs=1, finish=1))
    result.save(tmp_path / "a.safetensors")
    again = rabbet.load(tmp_path / "a.safetensors", model)
    ours, theirs = result.model.state_dict(), again.state_dict()
    assert all(torch.equal(ours[k].float(), theirs[k].float()) for k in ours)


def _one_of_two(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    result = rabbet.compress(bert(), "bytes <= 20%", sentences(), TTQAT(**SHORT))
    result.save(Path(folder) / f"{rank}.safetensors")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_choose_the_same_epoch(tmp_path):
    mp.spawn(_one_of_two, (str(tmp_path),), nprocs=2)
    files = [(tmp_path / f"{rank}.safetensors").read_bytes() for rank in range(2)]
    assert files[0] == files[1]


def test_a_teacher_keeps_what_fits():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    calls = []

    def run(k):
        calls.append(k)
        return model(rand(2, 4, seed=k))

    size = 4 * 3 * 2 * 4 + 4 * 2 * 4  # hidden states and the output, once each
    teacher = Teacher(Recorder(model, ["0", "1"]), most=size + 1)
    for k in (0, 1, 0, 1):
        teacher.record(k, lambda k=k: run(k))
    assert calls == [0, 1, 1]


@pytest.mark.parametrize(("form", "shape"), [("tt", (24, 30)), ("ttm", (90, 48))])
def test_random_cores_make_weights_of_the_stated_deviation(form, shape):
    site = Site("x", Embedding() if form == "ttm" else Linear(), shape)
    term = Term.parse(f"{form}[8]@4")
    weights = []
    for seed in range(20):
        cores = start_cores(torch.zeros(shape), site=site, term=term, start="random", seed=seed)
        weights.append(term.form.contract(site, [cores[str(k)] for k in range(len(cores))]))
    wanted = 1 / shape[1] if form == "ttm" else 1 / sum(shape)
    assert float(torch.stack(weights).var()) == pytest.approx(wanted, rel=0.4)


# What is refused


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"bits": 9}, "use 2 to 8 bits"),
        ({"bits": (4, 1)}, "does not exist"),
        ({"rank": 0}, "rank is at least 1"),
        ({"bits": ()}, "found none"),
        ({"epochs": -1}, "at least 0"),
        ({"rate": -1.0}, "rate is at least 0"),
        ({"rank": 2.5}, "rank is a whole number or None; found 2.5"),
        ({"bits": None}, "bits is a whole number or"),
        ({"order": "sideways"}, "order"),
        ({"start": "warm"}, "start"),
    ],
)
def test_bad_settings_are_refused(settings, words):
    with pytest.raises(PlanError, match=words):
        TTQAT(**settings)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"ranks": ()}, "ranks are numbers of at least 1"),
        ({"ranks": 6}, "ranks is .a whole number, ....; found 6"),
        ({"grids": ("9c",)}, "is not a grid"),
        ({"forms": ("cp",)}, "forms are 'tt' and 'ttm'"),
    ],
)
def test_bad_choices_are_refused(settings, words):
    with pytest.raises(PlanError, match=words):
        Choices(**settings)


def test_a_part_of_the_lesson_cannot_count_less_than_nothing():
    with pytest.raises(PlanError, match="hidden is at least 0"):
        Distillation(hidden=-1.0)
    with pytest.raises(PlanError, match="contrast is at least 0"):
        Distillation(contrast=-1.0)


def test_a_network_without_blocks_is_refused():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(32, 16), nn.Linear(16, 4)

        def forward(self, x):
            return self.second(self.first(x).relu())

    model, data = Two().eval(), [rand(4, 32), rand(4, 32)]
    with pytest.raises(ModelError, match="no stack of blocks"):
        rabbet.compress(model, "bytes <= 90%", data, TTQAT(rank=2))
    with pytest.raises(ModelError, match="no block 'nine'"):
        rabbet.compress(
            model, "bytes <= 90%", data, TTQAT(rank=2, distil=Distillation(blocks=("nine",)))
        )
    distil = Distillation(blocks=("first", "second"))
    result = rabbet.compress(model, "bytes <= 90%", data, TTQAT(rank=2, distil=distil))
    assert result.notes[0].startswith("taught 24 steps")


def test_a_layer_to_stay_whole_must_be_there():
    with pytest.raises(PlanError, match="'nine' is not a layer that can be compressed"):
        rabbet.plan(bert(), "bytes <= 30%", sentences(), TTQAT(**SHORT | {"keep_dense": ("nine",)}))


def test_one_batch_is_not_enough():
    with pytest.raises(DataError, match="at least two batches"):
        rabbet.compress(bert(), "bytes <= 20%", sentences(1), TTQAT(**SHORT))


def test_a_plan_with_adapters_is_refused():
    plan = "pooler.dense dense@4c + lowrank[2]@8c"
    with pytest.raises(PlanError, match="one term"):
        rabbet.fit(bert(), plan, sentences(), TTQAT(**SHORT), jobs=Jobs(progress=silent))
