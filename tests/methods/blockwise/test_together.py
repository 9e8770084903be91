"""Scales and biases of all blocks tuned together: gradients block by block, better or as before."""

import dataclasses

import pytest
import test_preparing
import torch
from networks import thinned
from texts import divergence, scores, task, words
from torch.nn.functional import cosine_similarity

import rabbet
from rabbet import Blockwise, Budget, Jobs, Task, compress, hf
from rabbet.methods.blockwise.fitting import fit_blocks
from rabbet.methods.blockwise.method import _bench
from rabbet.methods.blockwise.prepare import Ways
from rabbet.methods.blockwise.together import Together, _collected
from rabbet.methods.blockwise.tuning import Pacing
from rabbet.model.compressed import compressed_layers
from rabbet.workpiece import Workpiece

transformers = pytest.importorskip("transformers")

PLAIN = Blockwise(
    grids=("2g32z", "8c"),
    adapters=(),
    scale=False,
    permute=False,
    epochs=0,
    passes=0,
)
TOGETHER = dataclasses.replace(PLAIN, passes=3, together=3e-3)
BUDGET = "bpw <= 4.2"


def network(kind):
    torch.manual_seed(2)
    return test_preparing.network(kind)


def longer(count=16):
    return dataclasses.replace(task(), batches=words(count, seed=2))


@pytest.mark.parametrize("kind", thinned(["llama", "gpt2"]))
def test_gradients_taken_block_by_block_are_those_of_the_whole_network(kind):
    model = network(kind)
    piece = Workpiece.of(model, task(), Jobs())
    method = dataclasses.replace(PLAIN, adapters=(("2g32z", 0.1),))
    plan = method.plan(piece, Budget.parse(BUDGET))
    assert "lowrank" in str(plan)
    bench = _bench(piece, False)
    student = method.fit(piece, plan).model
    own = {}
    for name, layer in compressed_layers(student).items():
        for t, factors in enumerate(layer.factors):
            own |= {f"{name}/{t}.{f}.scale": x.scale for f, x in enumerate(factors)}
        own |= {} if layer.bias is None else {f"{name}/bias": layer.bias}
    for t in own.values():
        t.requires_grad_()
    batch = bench.batches[0]
    goal = scores(model, [batch]).log_softmax(-1)
    ours = student(**batch, use_cache=False).logits.flatten(0, 1).log_softmax(-1)
    whole = (goal.exp() * (goal - ours)).sum(-1).mean()
    slopes = torch.autograd.grad(whole, list(own.values()), allow_unused=True)
    wanted = {n: g for n, g in zip(own, slopes, strict=True) if g is not None}

    known = bench.known(method.menus(bench.survey), method.scored)
    plan = rabbet.Plan(tuple(line for line in plan if line.name in bench.survey))
    before = fit_blocks(bench, plan, Pacing(0, 0.01, 0.002), known, Ways(False, False))
    course = Together(bench, plan, *_collected(before), 1, 1e-3)
    divergence, found = course._felt(0)
    assert float(divergence) == pytest.approx(float(whole.detach()), rel=1e-2)
    assert found.keys() == wanted.keys()
    for name, slope in wanted.items():
        if float(slope.abs().max()) > 1e-6:  # hidden states are kept in half precision
            assert cosine_similarity(found[name].flatten(), slope.flatten(), 0) > 0.999, name


@pytest.mark.parametrize("kind", thinned(["llama", "gpt2", "opt"]))
def test_scores_come_nearer_to_the_float_networks_on_words_not_seen(kind):
    model, unseen = network(kind), words(8, seed=9)
    found = [
        divergence(model, compress(model, BUDGET, longer(), method).model, unseen)
        for method in (PLAIN, TOGETHER)
    ]
    assert found[1] < 0.98 * found[0]


def test_what_does_not_help_on_batches_held_back_is_undone():
    model = network("llama")
    plain, wild = (
        compress(model, BUDGET, longer(8), method)
        for method in (PLAIN, dataclasses.replace(PLAIN, passes=1, together=3.0))
    )
    assert torch.equal(scores(plain.model), scores(wild.model))
    assert "tuning of all blocks together undone" in str(wild)


@pytest.mark.slow
def test_values_are_tuned_for_by_their_error():
    model = network("llama")
    case = Task(words(16, seed=2), forward=lambda n, b: n.model(**b)[0], outputs="values")

    def error(student):
        with torch.no_grad():
            pairs = [(student.model(**b)[0], model.model(**b)[0]) for b in words(8, seed=9)]
        return sum(float((a - b).square().mean() / b.square().mean()) for a, b in pairs)

    found = [error(compress(model, "bpw <= 5", case, method).model) for method in (PLAIN, TOGETHER)]
    assert found[1] < found[0]


@pytest.mark.slow
def test_from_a_folder_comes_what_comes_from_memory(tmp_path):
    model, method = network("llama"), TOGETHER
    model.save_pretrained(tmp_path / "in", max_shard_size="50KB")
    result = compress(model, BUDGET, longer(8), method)
    stored = hf.compress_pretrained(
        tmp_path / "in", BUDGET, longer(8), tmp_path / "out", method=method
    )
    assert "all blocks tuned together: divergence on held-back batches" in str(stored)
    assert torch.equal(scores(hf.from_pretrained(tmp_path / "out")), scores(result.model))
    plain = compress(model, BUDGET, longer(8), PLAIN)
    assert not torch.equal(scores(plain.model), scores(result.model))
