"""Networks that route, inspect, mask and freeze: methods take them, and the file is the result."""

import pytest
import torch
import torch.nn.functional as F
from networks import rand, settled, thinned, tokens
from torch import nn

from rabbet import CGMQ, TTQAT, CoRa, Joint, Task, compress, load, survey
from rabbet.data.batches import outputs
from rabbet.methods.cora.search import Ranking
from rabbet.methods.ttqat import Distillation
from rabbet.model.build import plan_of
from rabbet.train.tuning import Tuning


class Router(nn.Module):
    """Two experts, each shown the places that a gate sends it; the gate returns indices first."""

    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.score = nn.Linear(12, 2)

        def forward(self, x):
            scores = self.score(x)
            return scores.argmax(-1), scores

    def __init__(self):
        super().__init__()
        self.stem, self.gate, self.head = nn.Linear(6, 12), self.Gate(), nn.Linear(12, 4)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(12, 12), nn.ReLU()) for _ in range(2))

    def forward(self, x):
        x = F.relu(self.stem(x))
        chosen, scores = self.gate(x)
        out = torch.zeros_like(x)
        for k, expert in enumerate(self.experts):
            out[chosen == k] = (
                expert(x[chosen == k]) * scores[chosen == k].softmax(-1)[:, k : k + 1]
            )
        return self.head(out)


class Padded(nn.Module):
    """torch's own encoder: given a padding mask, it packs its input unless told not to."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(20, 16, padding_idx=0)
        layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(16, 4)

    def forward(self, ids):
        return self.head(self.encoder(self.table(ids), src_key_padding_mask=ids == 0)[:, 0])


class Asking(nn.Module):
    """Reads a layer's sizes, and multiplies by its weight itself."""

    def __init__(self):
        super().__init__()
        self.table, self.body = nn.Embedding(20, 12), nn.Linear(12, 12)

    def forward(self, ids):
        x = self.table(ids) * self.table.embedding_dim**-0.5
        x = F.relu(self.body(x)).view(len(ids), -1, self.body.out_features)
        return F.linear(x, self.table.weight)


class Backwards(nn.Module):
    """The last layer is defined first."""

    def __init__(self):
        super().__init__()
        self.head, self.body = nn.Linear(16, 4), nn.Linear(12, 16)

    def forward(self, x):
        return self.head(F.relu(self.body(x)))


class Frozen(nn.Module):
    """A backbone that no gradient reaches."""

    def __init__(self):
        super().__init__()
        self.body, self.more, self.head = nn.Linear(12, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x):
        with torch.no_grad():
            x = F.relu(self.more(F.relu(self.body(x))))
        return self.head(x)


def _sentences():
    batches = tokens(batches=3)
    for ids in batches:
        ids.clamp_(min=1)
        ids[: len(ids) // 2, 5:] = 0
    return batches


NETWORKS = {
    "router": (Router, lambda: [rand(20, 6, seed=k) for k in range(3)]),
    "padded": (Padded, _sentences),
    "asking": (Asking, lambda: tokens(batches=3)),
    "backwards": (Backwards, lambda: [rand(6, 12, seed=k) for k in range(3)]),
    "frozen": (Frozen, lambda: [rand(6, 12, seed=k) for k in range(3)]),
}
METHODS = {
    "joint": Joint(grids=("3c", "8c"), tuning=Tuning(steps=3, batch=4)),
    "cora": CoRa(bits=3, ranking=Ranking(steps=3, batch=4), tuning=Tuning(steps=2, batch=4)),
    "cgmq": CGMQ(epochs=1, finish=1, steps=2, batch=4),
    "ttqat": TTQAT(4, rank=2, table_rank=2, epochs=1, finish=1),
}
BUDGETS = {
    "cora": "bits <= 6",
    "cgmq": "bops <= 3%",
    "joint": "bits <= 5",
    "ttqat": "bytes <= 100%",
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", thinned(NETWORKS))
def test_a_method_takes_the_network_and_its_file_answers_as_it_does(name, method, tmp_path):
    make, data = NETWORKS[name]
    model, batches = settled(make()), data()
    chosen = METHODS[method]
    if method == "ttqat" and name not in ("padded",):  # no stack of blocks: they are named
        named = {"router": ("stem", "gate"), "asking": ("table", "body")}
        chosen = TTQAT(
            4,
            rank=2,
            table_rank=2,
            epochs=1,
            finish=1,
            distil=Distillation(blocks=named.get(name, ("body", "head"))),
        )
    result = compress(model, BUDGETS[method], Task(batches), chosen)
    assert result.save(tmp_path / "a.safetensors") == result.cost.bytes
    again = load(tmp_path / "a.safetensors", model)
    assert plan_of(result.model, survey(model, batches)) == result.plan
    with torch.no_grad():
        for batch in batches:
            ours, theirs = outputs(result.model(batch))[0], outputs(again(batch))[0]
            assert torch.isfinite(ours).all()
            assert torch.equal(ours, theirs)


class Sparing(nn.Module):
    """Runs its second layer only where the output of the first is large."""

    def __init__(self):
        super().__init__()
        self.body, self.rare, self.head = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        hidden, large = F.relu(self.body(x)), x[:, 0] > 10
        if large.any():
            hidden = torch.where(large[:, None], F.relu(self.rare(hidden)), hidden)
        return self.head(hidden)


@pytest.mark.parametrize(
    "method",
    [Joint(adapters=(), tuning=Tuning(steps=0)), CGMQ(finish=1, steps=1)],
    ids=["joint", "cgmq"],
)
def test_a_layer_that_only_later_examples_reach_is_compressed_too(method):
    x = rand(1500, 4)
    x[-1, 0] = 20.0  # layers are solved on the first 1,024
    result = compress(settled(Sparing()), "bops <= 5%", [x], method)
    assert result.plan.get("rare") is not None


class Looked(nn.Module):
    """BatchNorm directly after a table, as in recommenders."""

    def __init__(self):
        super().__init__()
        self.table, self.norm, self.head = nn.Embedding(30, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, ids):
        return self.head(self.norm(self.table(ids)))


def test_a_norm_behind_a_table_stays_where_it_is(tmp_path):
    ids = torch.randint(30, (64,), generator=torch.Generator().manual_seed(0))
    model = settled(Looked())
    result = compress(model, "bits <= 6", [ids], Joint(adapters=(), tuning=Tuning(steps=0)))
    result.save(tmp_path / "a.safetensors")
    assert torch.equal(load(tmp_path / "a.safetensors", model)(ids), result.model(ids))
    with torch.no_grad():
        assert float((result.model(ids) - model(ids)).norm() / model(ids).norm()) < 0.2


class Keeping(nn.Module):
    """Keeps an activation for a picture, as many networks do."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x):
        self.features = {"a": [F.relu(self.a(x))]}
        return self.b(self.features["a"][0])


class Autocast(nn.Sequential):
    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(x).float()


class Inferring(nn.Sequential):
    @torch.inference_mode()
    def forward(self, x):
        return super().forward(x)


def _layers():
    return nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)


def _kept():
    net = Keeping()
    net(rand(4, 8))  # the graph of this pass is still there
    return net


def _made_in_inference_mode():
    with torch.inference_mode():
        return nn.Sequential(*_layers())


def _spare():
    """A layer without outputs, as pruning leaves behind."""

    class Spare(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.none, self.b = nn.Linear(8, 8), nn.Linear(8, 0), nn.Linear(8, 4)

        def forward(self, x):
            return self.b(torch.cat([self.a(x), self.none(x)], 1))

    return Spare()


ODD = {
    "keeps activations": _kept,
    "autocast": lambda: Autocast(*_layers()),
    "inference mode inside": lambda: Inferring(*_layers()),
    "made in inference mode": _made_in_inference_mode,
    "a layer without outputs": _spare,
    "data parallel": lambda: nn.DataParallel(nn.Sequential(*_layers())),
    "data parallel inside": lambda: nn.Sequential(nn.DataParallel(nn.Sequential(*_layers()))),
}


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("name", ODD)
def test_what_a_forward_may_do_is_taken_and_the_file_loads_again(name, steps, tmp_path):
    net, x = ODD[name]().eval(), rand(16, 8)
    method = Joint(("4c", "8c"), (), forms=(), tuning=Tuning(steps=steps, batch=8))
    result = compress(net, "bits <= 8", [x], method)
    result.save(tmp_path / "a.safetensors")
    again = load(tmp_path / "a.safetensors", net)
    with torch.no_grad():
        assert torch.equal(result.model(x), again(x))
        assert (again(x) - net(x)).norm() < 0.1 * net(x).norm()


def test_a_call_in_inference_mode_works():
    with torch.inference_mode():
        result = compress(nn.Sequential(*_layers()).eval(), "bits <= 8", [rand(16, 8)], JOINT)
    assert not result.model(rand(4, 8)).is_inference()


def test_a_network_of_half_the_precision_is_told_that_its_copy_is_not():
    net = nn.Sequential(*_layers()).eval().bfloat16()
    result = compress(net, "bits <= 8", [rand(16, 8)], JOINT)
    assert "in bfloat16, the compressed one computes in float32" in str(result)
    assert result.model(rand(4, 8)).dtype == torch.float32


JOINT = Joint(("4c", "8c"), (), forms=(), tuning=Tuning(steps=0))


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_reasons_are_the_true_ones():
    class Reading(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.head, self.idle = nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(8, 4)
            self.old = nn.utils.weight_norm(nn.Linear(8, 8))
            self.new = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))

        def forward(self, x):
            return self.head(self.new(self.old(F.linear(x, self.qkv.weight, self.qkv.bias))))

    surveyed = survey(Reading().eval(), [rand(4, 8)])
    assert {site.name for site in surveyed} == {"head", "old", "new"}
    reasons = {left.name: left.reason for left in surveyed.left}
    assert "read and its forward never called" in reasons["qkv"]
    assert reasons["idle"].startswith("Linear never ran on the batch; tensors too small")

    wide = nn.ModuleList([nn.Linear(8, 40), nn.Linear(40, 4)]).eval()
    task = Task([rand(4, 8)], lambda m, x: m[1](F.linear(x, m[0].weight, m[0].bias)))
    surveyed = survey(wide, task)
    assert {site.name for site in surveyed} == {"1", "0.weight"}
    assert surveyed.left[0].reason.endswith("never run; so its weight is only stored")


@pytest.mark.parametrize("size", [0.0, 1e-42, 1e-38])
def test_inputs_that_are_next_to_nothing_have_a_range(size):
    class Faint(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 4)

        def forward(self, x):
            return self.b(self.a(x) * size) + self.b(x)

    model = Faint().eval()
    result = compress(model, "bits <= 8", [rand(16, 8)], JOINT)
    assert result.model(rand(4, 8)).isfinite().all()
    task = Task([rand(16, 8) * size], lambda m, x: m.b(x))
    assert compress(model, "bits <= 9", task, JOINT).model.b(rand(4, 8)).isfinite().all()


def test_the_linears_of_falcon_are_linears(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.FalconConfig(
        vocab_size=96, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, bias=True
    )
    torch.manual_seed(0)
    model = transformers.FalconForCausalLM(config).eval()
    task = Task(tokens(96, 8, 2), lambda m, x: m(x, use_cache=False).logits)
    kinds = {site.kind.name for site in survey(model, task)}
    assert kinds == {"linear", "embedding"}
    for name, module in model.named_modules():
        if type(module).__name__ == "FalconLinear":  # with and without a bias
            x = rand(3, module.in_features)
            assert torch.allclose(module(x), F.linear(x, module.weight, module.bias)), name
    result = compress(model, "bits <= 6", task, Joint(act=None, tuning=Tuning(steps=0)))
    result.save(tmp_path / "a.safetensors")
    again = load(tmp_path / "a.safetensors", model)
    x = tokens(96, 8, 2)[0]
    assert torch.equal(again(x).logits, result.model(x).logits)
