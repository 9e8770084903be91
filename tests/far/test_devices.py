"""A network on an accelerator is compressed there, and what comes out is what the CPU makes.

The accelerator is a pretended one (`far_device`), which refuses what a real one refuses. It has the
arithmetic of the CPU, so that even the bytes are the same.
"""

import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from networks import Case, images, rand, settled, tokens
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import rabbet
from rabbet import ADMM, CGMQ, TTQAT, CoRa, Jobs, Joint, Task
from rabbet.errors import ModelError
from rabbet.export import DECODERS, EXPORTS
from rabbet.methods import METHODS
from rabbet.methods.blockwise.method import Blockwise
from rabbet.methods.cora.search import Ranking
from rabbet.train import loop, tuning
from rabbet.train.tuning import Tuning


@pytest.fixture(autouse=True)
def far(monkeypatch):
    """The device; imported late, since from then on it is torch's accelerator in this process."""
    from far_device import FAR

    monkeypatch.setattr(loop, "FUSED", (*loop.FUSED, "far"))
    before = torch.__future__.get_swap_module_params_on_conversion()
    # `Module.to` then keeps shared parameters shared, as it does for devices built into torch.
    torch.__future__.set_swap_module_params_on_conversion(True)
    with sdpa_kernel(SDPBackend.MATH):  # the CPU has a kernel of its own, which sums otherwise
        yield FAR
    torch.__future__.set_swap_module_params_on_conversion(before)


class Words(nn.Module):
    """A table that is also the head, and two blocks between."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(20, 4)
        layer = nn.TransformerEncoderLayer(4, 2, 6, batch_first=True)
        self.blocks = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(4, 20)
        self.head.weight = self.table.weight

    def forward(self, x):
        return self.head(self.blocks(self.table(x))[:, -1])


def pictures():
    layers = [
        nn.Conv2d(2, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 6, (1, 3), stride=2, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 5),
    ]
    return Case(settled(nn.Sequential(*layers)), images(2))


def words():
    return Case(settled(Words()), tokens(count=8))


NETWORKS = {"pictures": pictures, "words": words}
SHORT = Joint(("tc", "8c"), (("2hc", 0.2),), forms=("cp",), shares=(0.5,), factor_grids=("8c",),
              tuning=Tuning(steps=2, batch=8))  # fmt: skip
BITS = Joint(("2hc", "8c"), (), forms=(), tuning=Tuning(steps=2, batch=8))
RANDOM = TTQAT(4, epochs=1, finish=1, start="random")
TRIALS = {
    "joint": (SHORT, "bits <= 5"),
    "admm": (ADMM(sweeps=1, inner=2), "bits <= 9"),
    "cora": (CoRa(3, ranking=Ranking(steps=2), tuning=Tuning(steps=1)), "bits <= 5"),
    "cgmq": (CGMQ(epochs=2, steps=1, finish=1), "bops <= 1%"),
    "ttqat": (TTQAT(4, epochs=1, finish=1), "bits <= 10"),
    "blockwise": (Blockwise(("3g4", "4c", "8c"), (), epochs=1, passes=1), "bits <= 5"),
}
OTHERS = {
    "admm from random factors": (ADMM(start="random", sweeps=1, inner=1), "bits <= 9"),
    "cora of the paper": (
        CoRa(base="clipped", svd="plain", ranking=Ranking(2, 8, norm="batch", steering="hinge")),
        "bits <= 9",
    ),
    "ttqat from random cores": (RANDOM, "bits <= 10"),
}
LONG = {("words", "cora"), ("words", "cgmq")}
UNLIKE = {("pictures", "blockwise")}  # no stack of blocks
PLANS = {
    "pictures": """0 ttconv[2]@8c | act@8
        3 dense@2hc + lowrank[2]@8c | act@8
        8 dense[0-2]@4c + dense[3-4]@tc""",
    "words": """table ttm[3]@8c | act@8
        blocks.layers.0.linear1 tt[2]@4 | act@8
        blocks.layers.0.linear2 dense@4g4z | act@4
        blocks.layers.1.linear1 lowrank[2]@6c | act@8""",
}
UNTUNED = Joint(tuning=Tuning(steps=0))


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def answers(model, case):
    task = Task(case.batches)
    with torch.no_grad():
        return [task.run(model, batch) for batch in case.batches]


def require_same(here, there, path, far):
    """What comes of the two devices is the same, and lies where the network did."""
    assert all(t.device == far for t in there.model.state_dict().values())
    assert there.plan == here.plan
    assert there.notes == here.notes
    assert here.save(path / "here.safetensors") == there.save(path / "there.safetensors")
    assert (path / "here.safetensors").read_bytes() == (path / "there.safetensors").read_bytes()


def test_every_method_is_tried():
    assert TRIALS.keys() == METHODS.keys()


@pytest.mark.parametrize(
    ("network", "name"),
    [
        pytest.param(*pair, marks=pytest.mark.slow if pair in LONG else ())
        for pair in itertools.product(NETWORKS, [*TRIALS, *OTHERS])
        if pair not in UNLIKE
    ],
)
def test_a_network_is_compressed_where_it_lies(network, name, far, tmp_path):
    method, budget = (TRIALS | OTHERS)[name]
    case, other = NETWORKS[network](), NETWORKS[network]()
    here = rabbet.compress(case.model, budget, case.batches, method)
    there = rabbet.compress(other.model.to(far), budget, other.batches, method)
    require_same(here, there, tmp_path, far)
    assert all(p.device == far for p in other.model.parameters())
    again = rabbet.load(tmp_path / "there.safetensors", other.model)
    for a, b, c in zip(*(answers(m, case) for m in (again, there.model, here.model)), strict=True):
        assert a.device == b.device == far
        assert torch.equal(a, b)
        assert torch.equal(a.cpu(), c)


@pytest.mark.parametrize("network", ["pictures", pytest.param("words", marks=pytest.mark.slow)])
def test_every_export_is_made_of_a_network_on_a_device(network, far, tmp_path):
    case, other = NETWORKS[network](), NETWORKS[network]()
    here = rabbet.fit(case.model, PLANS[network], case.batches, UNTUNED)
    there = rabbet.fit(other.model.to(far), PLANS[network], other.batches, UNTUNED)
    require_same(here, there, tmp_path, far)
    for target in [t for t in EXPORTS if t not in DECODERS]:
        written = there.export(tmp_path / target, target)
        assert written.bytes == (tmp_path / target).stat().st_size
    program = torch.export.load(tmp_path / "torch").module()
    for batch, answer in zip(case.batches, answers(there.model, case), strict=True):
        assert torch.allclose(program(batch), answer.cpu(), atol=1e-4)
    assert all(t.device == far for t in there.model.state_dict().values())


def test_a_report_shows_of_both_networks_what_it_shows_on_the_cpu(far, tmp_path):
    pages = []
    for place in ("cpu", far):
        case = NETWORKS["pictures"]()
        model = case.model.to(place)
        result = rabbet.fit(model, PLANS["pictures"], case.batches, UNTUNED)
        result.report(tmp_path / "a.html", model)
        pages.append((tmp_path / "a.html").read_bytes())
    assert pages[0] == pages[1]
    with pytest.raises(ModelError, match=r"lies on cpu, .* on far"):
        result.report(tmp_path / "b.html", NETWORKS["pictures"]().model)


def test_what_is_asked_before_is_answered_there(far):
    case, other = pictures(), pictures()
    there, batches = other.model.to(far), [batch.to(far) for batch in other.batches]
    assert rabbet.survey(there, batches) == rabbet.survey(case.model, case.batches)
    chosen = rabbet.plan(there, "bits <= 5", batches, BITS)
    assert chosen == rabbet.plan(case.model, "bits <= 5", case.batches, BITS)
    assert rabbet.price(there, chosen, batches) == rabbet.price(case.model, chosen, case.batches)
    labelled = [(batch, torch.zeros(len(batch), dtype=torch.long)) for batch in case.batches]
    assert rabbet.accuracy(there, labelled) == rabbet.accuracy(case.model, labelled)


@pytest.mark.parametrize("begin", ["cpu", "far"])
def test_a_folder_gives_what_was_done_there_or_on_the_cpu(begin, far, tmp_path, monkeypatch):
    def run(device, name):
        case = pictures()
        jobs = Jobs(folder=tmp_path / "work")
        result = rabbet.compress(case.model.to(device), "bits <= 5", case.batches, BITS, jobs=jobs)
        result.save(tmp_path / f"{name}.safetensors")
        return result

    def never(*_, **__):
        raise AssertionError("this was done before")

    first, kept = run(begin, "first"), files(tmp_path / "work")
    with monkeypatch.context() as patch:
        patch.setattr("rabbet.jobs._call", never)
        if begin == "far":  # a pretended tensor is no `torch.Tensor`: its training has another key
            patch.setattr(tuning._Loop, "losses_of", never)
        again = run(far, "again")
    assert kept.items() <= files(tmp_path / "work").items()
    assert all(t.device == far for t in again.model.state_dict().values())
    assert again.notes == first.notes
    assert (tmp_path / "first.safetensors").read_bytes() == (
        tmp_path / "again.safetensors"
    ).read_bytes()


def test_executors_work_on_the_cpu_and_what_they_find_comes_back(far, tmp_path):
    case, other = pictures(), pictures()
    here = rabbet.compress(case.model, "bits <= 5", case.batches, BITS)
    with ThreadPoolExecutor(1) as executor:
        there = rabbet.compress(
            other.model.to(far), "bits <= 5", other.batches, BITS, jobs=Jobs(executor)
        )
    require_same(here, there, tmp_path, far)


@pytest.mark.slow
def test_the_loss_of_a_task_gets_batches_where_the_network_lies(far, tmp_path):
    def task(case):
        labels = torch.arange(len(case.batches[0])) % 5
        return Task(
            [(batch, labels) for batch in case.batches],
            forward=lambda model, batch: model(batch[0]),
            loss=lambda result, batch: nn.functional.cross_entropy(result, batch[1]),
        )

    case, other = pictures(), pictures()
    method = CoRa(3, ranking=Ranking(2, 8, loss="labels"), tuning=Tuning(steps=1))
    here = rabbet.compress(case.model, "bits <= 5", task(case), method)
    there = rabbet.compress(other.model.to(far), "bits <= 5", task(other), method)
    require_same(here, there, tmp_path, far)


@pytest.mark.slow
def test_layers_of_a_network_on_a_device_are_timed_on_the_cpu(far, tmp_path, monkeypatch):
    monkeypatch.setenv("RABBET_CACHE", str(tmp_path))
    model = settled(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))).to(far)
    result = rabbet.compress(model, "latency <= 1000%", [rand(8, 8)], UNTUNED)
    assert result.cost.time
    assert all(t.device == far for t in result.model.state_dict().values())


@pytest.mark.slow
def test_a_network_of_transformers_is_compressed_where_it_lies(far, tmp_path):
    from transformers import BertConfig, BertForSequenceClassification

    def bert():
        torch.manual_seed(0)
        config = BertConfig(vocab_size=60, hidden_size=16, num_hidden_layers=1,
                            num_attention_heads=2, intermediate_size=32)  # fmt: skip
        return BertForSequenceClassification(config).eval()

    batches = [
        {"input_ids": torch.randint(1, 60, (4, 9)), "attention_mask": torch.ones(4, 9).long()}
    ]
    method = Joint(("2hc", "8c"), forms=(), adapters=(), tuning=Tuning(steps=2))
    here = rabbet.compress(bert(), "bits <= 4", batches, method)
    there = rabbet.compress(bert().to(far), "bits <= 4", batches, method)
    require_same(here, there, tmp_path, far)
    assert there.export(tmp_path / "small.onnx").bytes


def test_a_network_on_two_devices_is_refused_by_name(far):
    case = pictures()
    case.model[0].to(far)
    with pytest.raises(
        ModelError, match=r"several devices \(0.weight on far:0 and 1.weight on cpu"
    ):
        rabbet.survey(case.model, case.batches)


def test_a_device_without_double_precision_is_refused(far, monkeypatch):
    zeros = torch.zeros

    def single(*size, dtype=None, **given):
        if dtype == torch.float64:  # as torch says it of Apple's
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        return zeros(*size, dtype=dtype, **given)

    case = pictures()
    case.model.to(far)
    monkeypatch.setattr(torch, "zeros", single)
    with pytest.raises(ModelError, match="far:0, which has no double precision"):
        rabbet.survey(case.model, case.batches)


@pytest.mark.parametrize(
    "mistake",
    [
        lambda here, there: here + there,
        lambda here, there: there @ here.mT,
        lambda here, there: torch.where(there > 0, there, here),
        lambda here, there: torch.stack([here, there]),
        torch.equal,
        lambda here, there: there.clamp_(torch.tensor(0.0), torch.tensor(1.0)),
        lambda here, there: here[there.long()],
        lambda here, there: there.index_select(0, torch.tensor([0])),
        lambda here, there: nn.functional.embedding(torch.tensor([0]), there),
        lambda here, there: there.normal_(generator=torch.Generator()),
        lambda here, there: torch.randn(2, generator=torch.Generator(), device=there.device),
        lambda here, there: there.numpy(),
    ],
)
def test_the_pretended_device_refuses_what_a_real_one_refuses(mistake, far):
    with pytest.raises((RuntimeError, TypeError), match=r"device|generator"):
        mistake(torch.ones(2, 2), torch.ones(2, 2, device=far))


def test_the_pretended_device_takes_what_a_real_one_takes(far):
    there = torch.tensor([[1.0, 2.0], [3.0, 4.0]], device=far)
    assert (there * torch.tensor(2.0))[torch.tensor([1])].tolist() == [[6.0, 8.0]]
    assert torch.where(there > 2, there, torch.tensor(0.0)).tolist() == [[0.0, 0.0], [3.0, 4.0]]
    there.view(4)[0] = 9.0
    assert there.copy_(there.cpu()).tolist() == [[9.0, 2.0], [3.0, 4.0]]
    assert torch.arange(3, device=far).sum().item() == 3
