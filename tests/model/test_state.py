"""A network is handed out, and left behind, in the state that it was in; so are generators."""

import copy
import random

import numpy as np
import pytest
import torch
from networks import rand, settled
from torch import nn

from rabbet import Joint, Task, accuracy, compress, fit, load, plan, price, survey
from rabbet.data.state import clean_pass, seed_of, state_kept
from rabbet.methods import QUALITY
from rabbet.train.tuning import Tuning

FAST = QUALITY["fast"]
QUICK = Joint(grids=("4c", "8c"), adapters=(), forms=(), tuning=Tuning(steps=0))
LINES = "a dense@8c | act@8\nb dense@8c | act@8"


class Recording(nn.Module):
    """Writes to all that a module can hold: buffers, attributes, lists, numbers."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 4)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("past", torch.zeros(16))
        self.register_buffer("hidden", torch.zeros(16), persistent=False)
        self.features, self.plain, self.count, self.seen = None, torch.zeros(16), 0, []

    def forward(self, x):
        self.calls += 1
        self.past = self.past + 1
        self.hidden.add_(1)
        self.plain.add_(1)
        self.count += 1
        self.features = torch.relu(self.a(x))
        self.seen.append(self.features)
        return self.b(self.features + self.past - self.past) + 0 * self.calls


def _net():
    net = settled(Recording()).train()
    net.a.eval()
    net.b.weight.grad = torch.ones_like(net.b.weight)
    net.a.bias.requires_grad_(False)
    net.handle = net.a.register_forward_pre_hook(_nothing)
    return net


def _nothing(*_):
    return None


def _state(net):
    """Everything that a call could change: modes, hooks, buffers, gradients, attributes, chance."""
    parts = []
    for name, module in net.named_modules():
        held = {k: v for k, v in vars(module).items() if not k.startswith("_")}
        parts += [name, held, len(module._forward_hooks), len(module._forward_pre_hooks)]
        parts += [dict(module._buffers), [id(t) for t in module._buffers.values()]]
    parts += [(n, p, p.grad, p.requires_grad) for n, p in net.named_parameters()]
    parts += [torch.get_rng_state(), random.getstate(), repr(np.random.get_state())]
    handle = net.handle
    del net.handle
    values = copy.deepcopy([p for p in parts if p is not handle])
    net.handle = handle
    return values


def _same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return not isinstance(one, int | float | str | bool) or one == other


X = [rand(16, 8), rand(16, 8, seed=1)]
LABELLED = [(x, torch.zeros(16, dtype=torch.long)) for x in X]
CALLS = {
    "survey": lambda net, _: survey(net, X),
    "plan": lambda net, _: plan(net, "bits <= 6", X, QUICK),
    "price": lambda net, _: price(net, LINES.replace("a ", "b ", 1).splitlines()[1], X),
    "compress": lambda net, _: compress(net, "bits <= 32", X, FAST),
    "score": lambda net, _: Task(X, evaluate=lambda m: float(m(X[0]).sum())).score(net),
    "accuracy": lambda net, _: accuracy(net, LABELLED),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_leaves_the_whole_state_of_the_network_as_it_was(name, tmp_path):
    net = _net()
    del net.handle
    net.handle = None
    before = _state(net)
    CALLS[name](net, tmp_path)
    assert _same(_state(net), before)


def test_what_is_handed_out_loaded_and_exported_has_the_state_of_the_network(tmp_path):
    net = settled(Recording())
    net.past += 3
    before = copy.deepcopy(net)
    result = fit(net, LINES, X, FAST)
    print(result)
    result.save(tmp_path / "a.safetensors")
    result.export(tmp_path / "a.pt2")
    again = load(tmp_path / "a.safetensors", net)
    for other in (net, result.model, again):
        for name in ("calls", "past", "hidden", "plain"):
            assert torch.equal(getattr(other, name), getattr(before, name)), name
        assert (other.count, other.seen, other.features) == (0, [], None)
    assert torch.equal(result.model(X[0]), again(X[0]))


def test_a_pass_is_undone_without_a_write_to_what_was_there():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            own = torch.zeros(2)
            self.register_buffer("one", own)
            self.two, self.kept = own, {"deep": [own, (own, 3)]}
            self.draws = torch.Generator().manual_seed(3)
            self.table = nn.Embedding(4, 2, max_norm=0.1)

        def forward(self, x):
            self.one += torch.rand(2, generator=self.draws)
            self.kept["deep"].append(self.two)  # the same tensor under another name
            self.new = 1
            return self.kept["deep"][0] + self.one + self.table(x).sum()

    net, given = Odd(), torch.tensor([1, 2])
    own, weight = net.one, net.table.weight.clone()
    first, second = (Task(()).run(net, given) for _ in range(2))
    assert torch.equal(first, second)
    assert first.abs().sum() > 0
    assert net.one is own is net.two is net.kept["deep"][0]
    assert own._version == 0
    assert len(net.kept["deep"]) == 2
    assert not hasattr(net, "new")
    assert torch.equal(net.table.weight, weight)


def test_an_output_that_is_a_buffer_keeps_its_numbers_and_its_gradient():
    class Counter(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            return self.calls, self.scale * self.calls

    net = Counter()
    calls, product = Task(()).run(net, torch.zeros(1))
    product.backward()
    assert (float(calls), float(net.calls), float(net.scale.grad)) == (1, 0, 1)


def test_a_pass_that_fails_is_undone_too():
    net = settled(Recording())
    with pytest.raises(RuntimeError), state_kept(net):
        net(rand(3, 9))
    assert (net.count, float(net.calls)) == (0, 0)


@pytest.mark.parametrize(
    "draw", [torch.rand, lambda _: np.random.rand(), lambda _: random.random()]
)
def test_a_pass_draws_the_same_for_the_same_batch_and_takes_nothing_from_others(draw):
    net, drawn = nn.Linear(2, 2), []
    before = [torch.get_rng_state(), random.getstate(), repr(np.random.get_state())]
    for batch in (X[0], X[0], X[1]):
        with clean_pass(net, batch) as seen:
            drawn.append(float(draw(1)))
        assert seen.drew
    assert drawn[0] == drawn[1] != drawn[2]
    after = [torch.get_rng_state(), random.getstate(), repr(np.random.get_state())]
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]
    with clean_pass(net, X[0]) as seen:
        net(rand(2, 2))
    assert not seen.drew


class Noisy(nn.Module):
    """A variational autoencoder, which draws in eval mode, too."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        y = self.a(x)
        return self.b(y + torch.randn_like(y))


def test_a_network_that_draws_is_told_of_and_gives_the_same_bytes(tmp_path):
    net, written = settled(Noisy()), []
    for k in range(2):
        torch.manual_seed(k)
        result = compress(net, "bits <= 32", X, FAST)
        result.save(tmp_path / "a.safetensors")
        written.append((tmp_path / "a.safetensors").read_bytes())
    assert written[0] == written[1]
    assert "draws random numbers" in survey(net, X).notes[0]
    assert "draws random numbers" in str(result)
    assert not survey(settled(Recording()), X).notes


def test_batches_that_begin_alike_draw_different_numbers():
    dark = torch.zeros(3, 8, 1, 28, 28)
    dark[..., 9:20, 9:20] = torch.rand(3, 8, 1, 11, 11)
    labels = torch.arange(3)
    seeds = {seed_of(batch) for batch in dark} | {seed_of((dark[0], k)) for k in labels}
    assert len(seeds) == 6
