"""Networks, batches, plans and budgets that cannot be used: one clear error, nothing is touched."""

import re
import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from networks import NETWORKS, Residual, network, rand, settled, thinned
from torch import nn

import rabbet
from rabbet import (
    ADMM,
    CGMQ,
    TTQAT,
    CoRa,
    Jobs,
    Joint,
    RabbetError,
    Task,
    accuracy,
    compress,
    fit,
    load,
    plan,
    survey,
)
from rabbet.calibrate.ranges import calibrate_ranges
from rabbet.core.budget import MEASURED, METRICS
from rabbet.data.batches import relative_error, tensors
from rabbet.errors import BudgetError, DataError, FileError, ModelError, PlanError
from rabbet.methods.ttqat import Distillation
from rabbet.model.build import build
from rabbet.train.tuning import Tuning

QUICK = Joint(
    grids=("tc", "4c", "8c"),
    adapters=(("4c", 0.3),),
    forms=("cp",),
    shares=(0.5,),
    factor_grids=("4c",),
    tuning=Tuning(steps=0),
)


class Idle(Jobs):
    """Jobs that must not be asked for anything."""

    def run(self, stage, jobs, seconds=()):
        raise AssertionError(f"work was done: {stage}")


def _net():
    return settled(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 5)))


X = rand(4, 3, 6, 6)


def _facts(model):
    return [
        (n, m.training, len(m._forward_hooks), len(m._forward_pre_hooks))
        for n, m in model.named_modules()
    ]


def test_images_without_a_batch_axis_are_named():
    model = settled(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)))
    with pytest.raises(DataError, match=r"0 is given \[3, 8, 8\], which has no batch axis"):
        compress(model, "bits <= 4", [rand(3, 8, 8)], QUICK)


# Budgets


# some take work to measure: export/test_latency.py, export/test_file_budget.py
# each network with one of the others, so that each metric meets several networks
LIMITED = [m for m in METRICS if m not in MEASURED]
LIMITS = [(n, LIMITED[k % len(LIMITED)]) for k, n in enumerate(NETWORKS)]


@pytest.mark.parametrize(("name", "metric"), thinned(LIMITS))
def test_an_impossible_budget_is_refused_before_any_work_and_names_what_can_be_reached(
    name, metric
):
    case = network(name)
    surveyed = survey(case.model, case.batches)
    for method in (
        QUICK,
        Joint(grids=("8c",), adapters=(), forms=(), act=None, tuning=Tuning(steps=0)),
    ):
        with pytest.raises(BudgetError, match="smallest reachable value") as caught:
            compress(case.model, f"{metric} <= 0.001", case.batches, method, jobs=Idle())
        least = re.search(r"smallest reachable value is ([\d,.]+) ", str(caught.value))[1].replace(
            ",", ""
        )
        assert any(s.name in str(caught.value) for s in surveyed)
        means = metric in ("bits", "bpw")  # these are shown rounded
        slack = 0.001 if means else 0
        result = compress(
            case.model, f"{metric} <= {float(least) + slack:.3f}", case.batches, method
        )
        less = float(least) * 0.99 - 0.01 if means else int(least) - 1
        with pytest.raises(BudgetError, match="smallest reachable value"):
            compress(
                case.model, f"{metric} <= {max(less, 0.001):.3f}", case.batches, method, jobs=Idle()
            )
        assert METRICS[metric].amount(result.cost) > 0


def test_limits_that_can_be_met_but_not_at_once_are_refused_before_any_work():
    # 2 bits in fewer MACs than the layer has: one of the two candidates has too many bits, the
    # other too many MACs
    method = Joint(
        ("8c",), (("1c", 0.1),), adapter_grid="2", forms=(), act=None, tuning=Tuning(steps=0)
    )
    model, data = (
        settled(nn.Sequential(nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 40))),
        [rand(4, 40)],
    )
    for budget in ("bits <= 2", "macs <= 100%"):
        compress(model, budget, data, method)
    with pytest.raises(BudgetError, match="but not all at once"):
        compress(model, "bits <= 2, macs <= 100%", data, method, jobs=Idle())


@pytest.mark.parametrize(
    "budget", ["size <= 10%", "bytes <= 10 kilo", "bytes", "", "bits <= four", None, 0.1]
)
def test_a_budget_that_cannot_be_read_is_refused_before_the_data_is(budget):
    def batches():
        raise AssertionError("the data was read")
        yield

    with pytest.raises(BudgetError):
        compress(_net(), budget, batches(), QUICK, jobs=Idle())


# Networks


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    ("name", "index"), [("0.weight", (0, 1, 2, 0)), ("3.bias", (2,)), ("3.weight", (0, 0))]
)
def test_a_weight_that_is_not_finite_is_refused_by_name(name, index, value):
    model = _net()
    with torch.no_grad():
        model.get_parameter(name)[index] = value
    with pytest.raises(ModelError, match=re.escape(name)):
        compress(model, "bits <= 4", [X], QUICK, jobs=Idle())


@pytest.mark.parametrize("size", [1e-16, 1e-30, 1e18, 1e30])
def test_a_weight_too_small_or_large_to_be_solved_for_is_refused_by_name(size):
    model = _net()
    with torch.no_grad():
        model[3].weight.mul_(size)
    with pytest.raises(ModelError, match=r"3: the largest of its weights, .* is "):
        compress(model, "bits <= 4", [X], QUICK, jobs=Idle())
    with torch.no_grad():
        model[3].weight.zero_()
    compress(model, "bits <= 4", [X], QUICK)


def _linear_error(weights, inputs):
    """How far 4 bits are off for a network and inputs of a size."""
    model = settled(nn.Sequential(nn.Linear(16, 48, bias=False), nn.Linear(48, 8, bias=False)))
    with torch.no_grad():
        model[0].weight.mul_(weights)
    mixed = rand(16, 16) * torch.logspace(0, -2, 16)
    data = [inputs * (rand(64, 16, seed=k) @ mixed) for k in range(4)]
    result = compress(model, "bits <= 3", data, Joint(tuning=Tuning(steps=10)))
    with torch.no_grad():
        return relative_error(result.model(data[0]), model(data[0]))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("weights", "inputs"),
    thinned([(1e-9, 1.0), (1.0, 1e-8), (1e9, 1.0), (1.0, 1e12), (1e-6, 1e-6)]),
)
def test_the_units_of_weights_and_inputs_change_nothing(weights, inputs):
    assert _linear_error(weights, inputs) < 1.2 * _linear_error(1.0, 1.0)


def test_inputs_whose_squares_do_not_fit_are_refused():
    with pytest.raises(DataError, match="do not fit float32"):
        compress(_net(), "bits <= 4", [X * 1e20], QUICK)


def test_a_buffer_that_is_not_finite_is_refused_by_name():
    model = settled(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    model[1].running_var[2] = torch.nan
    with pytest.raises(ModelError, match=r"1\.running_var"):
        survey(model, [X])


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize("make", [torch.jit.script, lambda m: torch.jit.trace(m, X)])
def test_a_scripted_network_is_refused_and_so_is_a_scripted_part(make):
    with pytest.raises(ModelError, match="the model is scripted"):
        compress(make(_net()), "bits <= 4", [X], QUICK)
    with pytest.raises(ModelError, match="body is scripted"):
        compress(
            nn.Sequential(OrderedDict(body=make(_net()), head=nn.Linear(5, 3))),
            "bits <= 4",
            [X],
            QUICK,
        )


@pytest.mark.parametrize("other", [{"1": "meta"}, {"0": "meta", "1": "meta"}])
def test_a_network_on_several_devices_or_on_none_is_refused_by_name(other):
    model = nn.Sequential(*(nn.Linear(6, 6, device=other.get(str(k), "cpu")) for k in range(2)))
    with pytest.raises(ModelError, match=r"\d\.weight"):
        compress(model, "bits <= 4", [rand(4, 6)], QUICK)


@pytest.mark.parametrize(
    "model", [nn.ReLU(), nn.Sequential(), nn.LayerNorm(6), nn.Bilinear(3, 3, 2)]
)
def test_a_network_with_nothing_to_compress_is_refused(model):
    batch = (rand(4, 3), rand(4, 3)) if isinstance(model, nn.Bilinear) else rand(4, 6)
    with pytest.raises(ModelError, match="nothing in this network can be compressed"):
        compress(model, "bits <= 4", [batch], QUICK)


def test_a_network_whose_layers_cannot_be_swapped_says_why_of_each():
    tied = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    tied[1].weight = tied[0].weight
    with pytest.raises(
        ModelError, match=r"0: its weight is shared with 1; 1: its weight is shared with 0"
    ):
        survey(tied, [rand(2, 6)])


def test_a_network_that_was_never_run_is_refused():
    with pytest.raises(ModelError, match="initialised"):
        compress(nn.Sequential(nn.LazyLinear(4)), "bits <= 4", [rand(4, 6)], QUICK)


@pytest.mark.parametrize(
    "model", [nn.Linear, None, "model.pt", lambda x: x, {"weight": rand(3, 3)}]
)
def test_what_is_not_a_network_is_refused(model):
    with pytest.raises(ModelError, match=re.escape(type(model).__name__)):
        compress(model, "bits <= 4", [rand(4, 6)], QUICK)


class Answers(nn.Module):
    """A linear, and a function of its output that gives the answer."""

    def __init__(self, answer):
        super().__init__()
        self.fc, self.answer = nn.Linear(6, 3), answer

    def forward(self, x):
        return self.answer(self.fc(x))


def _raise(error):
    raise error


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError,
        KeyError,
        AttributeError,
        AssertionError,
        ZeroDivisionError,
        NotImplementedError,
    ],
)
def test_what_a_forward_raises_is_passed_on_with_a_note_of_the_batch(error):
    model = Answers(lambda _: _raise(error("out of cheese")))
    with pytest.raises(error, match="out of cheese") as caught:
        compress(model, "bits <= 4", [rand(4, 6)], QUICK)
    assert "raised in the forward: the model does not run on a batch of float32[4, 6]" in _notes(
        caught.value
    )


def _notes(error):
    """What rabbet adds to an error of the user's own code."""
    assert not isinstance(error, RabbetError)
    return " ".join(error.__notes__)


@pytest.mark.parametrize(
    "answer",
    [lambda _: None, lambda _: "yes", lambda y: y.argmax(1), lambda y: {"n": 3, "m": [y > 0]}],
)
def test_a_network_without_a_floating_answer_is_refused(answer):
    with pytest.raises(DataError, match="without a floating tensor"):
        compress(Answers(answer), "bits <= 4", [rand(4, 6)], QUICK)


def test_a_network_whose_answer_is_not_finite_is_refused():
    with pytest.raises(DataError, match="outputs hold NaN"):
        compress(Answers(lambda y: (y - 100).log()), "bits <= 4", [rand(4, 6)], QUICK)


def _in_float8():
    model = _net()
    model[0].weight = nn.Parameter(model[0].weight.data.to(torch.float8_e4m3fn), False)
    return model


def _with_sparse():
    model = _net()
    model.register_buffer("graph", torch.eye(3).to_sparse())
    return model


@pytest.mark.parametrize(
    ("make", "words"), [(_in_float8, "0.weight is of type torch.float8"), (_with_sparse, "graph")]
)
def test_a_tensor_that_cannot_be_computed_with_is_refused_by_name(make, words):
    with pytest.raises(ModelError, match=words):
        compress(make(), "bits <= 4", [X], QUICK, jobs=Idle())


def test_a_network_through_which_no_gradient_passes_is_told_before_any_work():
    class Stubborn(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

    model, batches = Answers(Stubborn.apply), [rand(4, 6)]
    for method in (QUICK, CoRa(), CGMQ(), TTQAT(rank=None, table_rank=None)):
        with pytest.raises(ModelError, match="no gradient can be taken through the network"):
            compress(model, "bits <= 4", batches, method, jobs=Idle())
    for method in (Joint(), CGMQ(), TTQAT()):
        with pytest.raises(ModelError, match="no gradient can be taken through the network"):
            fit(model, "fc  dense@4c", batches, method, jobs=Idle())
    fit(model, "fc  dense@4c", batches, QUICK)  # which needs none
    compress(model, "bytes <= 1000%", batches, ADMM())


def test_a_network_that_cannot_be_copied_is_refused():
    model = nn.Sequential(nn.Linear(6, 3))
    model.lock = threading.Lock()
    with pytest.raises(ModelError, match="cannot be copied"):
        compress(model, "bits <= 4", [rand(4, 6)], QUICK)


# Batches


def test_inputs_that_are_not_finite_are_refused_by_the_layer_that_met_them():
    bad = X.clone()
    bad[2, 1, 3, 3] = torch.inf  # a mask may hold such values: only a layer can tell
    with pytest.raises(DataError, match=r"inputs of 0 hold NaN"):
        compress(_net(), "bits <= 4", [X, bad], QUICK)


def test_a_batch_with_nan_is_refused_whatever_is_done_with_it():
    bad = X.clone()
    bad[2, 1, 3, 3] = torch.nan
    for method in (QUICK, CGMQ(), TTQAT(), CoRa(), ADMM()):
        with pytest.raises(DataError, match="batch 1 of the data, counted from 0, holds NaN"):
            compress(_net(), "bits <= 4", [X, bad], method)
    result = compress(_net(), "bits <= 4", [X], QUICK)
    with pytest.raises(DataError, match="holds NaN"):
        calibrate_ranges(result.model, Task([X, bad]))


def test_a_vector_is_not_a_batch_of_numbers():
    model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
    with pytest.raises(DataError, match=r"is given \[16\], which has no batch axis"):
        compress(model, "bits <= 4", [rand(16), rand(16)], QUICK)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"batches": None}, "found NoneType"),
        ({"batches": X}, "write \\[batch\\]"),
        ({"batches": [X], "limit": -5}, "at least 1"),
    ],
)
def test_a_task_that_makes_no_sense_is_refused_when_it_is_made(given, words):
    with pytest.raises(DataError, match=words):
        Task(**given)


def _fails(*_):
    raise KeyError("labels")


FUNCTIONS = {
    "loss": (_fails, "Task(loss=...)"),
    "loss of each example": (
        lambda out, b: F.mse_loss(out, torch.zeros_like(out), reduction="none"),
        "one number",
    ),
    "loss as a number": (lambda out, b: 3.0, "found float"),
    "evaluate": (lambda m: None, "Task(evaluate=...)"),
    "evaluate nan": (lambda m: float("nan"), "gave NaN"),
    "vary": (lambda b: b, "Task(vary=...)"),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_of_the_user_that_fail_are_named(name):
    function, words = FUNCTIONS[name]
    task = Task([rand(4, 6, seed=k) for k in range(3)], **{name.partition(" ")[0]: function})
    model = settled(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)))
    methods = [
        TTQAT(rank=2, epochs=1, finish=1, distil=Distillation(blocks=("0", "2"))),
        CGMQ(epochs=1, finish=1, steps=1, batch=2),
    ]
    for method in methods[: 2 if name.startswith("loss") else 1]:
        with pytest.raises((DataError, KeyError, TypeError)) as caught:
            compress(model, "bits <= 32", task, method)
        own = not isinstance(caught.value, DataError)
        assert words in (_notes(caught.value) if own else str(caught.value))


@pytest.mark.parametrize("method", ["fast", Joint, 3])
def test_what_is_not_a_method_is_refused(method):
    with pytest.raises(PlanError, match="method is an object such as"):
        compress(_net(), "bits <= 4", [X], method)


def test_of_a_compiled_network_the_eager_one_is_compressed():
    result = compress(torch.compile(_net(), backend="eager"), "bits <= 4", [X], QUICK)
    assert result.plan == compress(_net(), "bits <= 4", [X], QUICK).plan
    whole = nn.Sequential(torch.compile(_net(), backend="eager"))
    assert [s.name for s in survey(whole, [X])] == [f"0.{line.name}" for line in result.plan]


def test_accuracy_needs_labels_and_leaves_the_network_as_it_was():
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)).train()
    model[0].eval()
    before = model[1].running_mean.clone()
    accuracy(model, [(rand(4, 6), torch.zeros(4, dtype=torch.long))])
    assert torch.equal(model[1].running_mean, before)
    assert (model.training, model[0].training, model[1].training) == (True, False, True)
    with pytest.raises(DataError, match="batches of \\(inputs, labels\\)"):
        accuracy(model, [rand(4, 6)])
    for labels in (torch.zeros(4, 1), torch.zeros(4, 4), torch.zeros(3)):
        with pytest.raises(DataError, match=r"need labels \[4\], whole numbers; found"):
            accuracy(model, [(rand(4, 6), labels)])
    with pytest.raises(DataError, match=r"scores \[4\] are of classes on axis 1"):
        accuracy(nn.Flatten(0), [(rand(4, 1), torch.zeros(4))])
    # a class for each place
    assert accuracy(nn.Conv2d(3, 2, 1), [(X, torch.zeros(4, 6, 6))]) <= 100
    words = nn.Linear(6, 3)  # scores [batch, words, classes]
    with pytest.raises(DataError, match=r"last axis; hand scores on as scores.movedim\(-1, 1\)"):
        accuracy(words, [(rand(5, 4, 6), torch.zeros(5, 4, dtype=torch.long))])


def test_a_mask_of_infinities_among_the_buffers_is_accepted(tmp_path):
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 6)
            self.register_buffer("mask", torch.full((6, 6), -torch.inf).triu(1))

        def forward(self, x):
            return (self.layer(x)[:, None] + self.mask).softmax(-1)

    model = Masked().eval()
    result = compress(model, "bits <= 4.5", [rand(8, 6)], QUICK)
    result.save(tmp_path / "a.safetensors")
    assert torch.equal(load(tmp_path / "a.safetensors", model).mask, model.mask)


def test_a_forward_that_counts_leaves_no_count():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 6)
            self.register_buffer("seen", torch.zeros(()))
            self.register_buffer("last", torch.zeros(()))
            self.register_buffer("wide", torch.zeros(1).expand(3))

        def forward(self, x):
            self.seen += 1
            self.last = self.seen * 2
            return self.layer(x)

    model = Counting().eval()
    compress(model, "bits <= 4.5", [rand(8, 6)], QUICK)
    assert (float(model.seen), float(model.last)) == (0, 0)


@pytest.mark.parametrize("seed", [-1, 2**32, 1.5, None])
def test_an_impossible_seed_is_refused(seed):
    with pytest.raises(PlanError, match="seed is a whole number from 0"):
        compress(_net(), "bits <= 4", [X], QUICK, seed=seed, jobs=Idle())


def test_what_is_not_a_plan_is_refused_by_its_type(tmp_path):
    for given in (7, tmp_path):
        with pytest.raises(
            PlanError, match=f"or its text, such as result.plan; found {type(given).__name__}"
        ):
            fit(_net(), given, [X], QUICK)


def test_jobs_that_are_none_are_refused_by_name():
    for given in ("work", 4):
        with pytest.raises(PlanError, match=rf"jobs is an object rabbet\.Jobs.*found {given!r}"):
            compress(_net(), "bits <= 4", [X], QUICK, jobs=given)
    with pytest.raises(PlanError, match="found 4"):
        Jobs(4)
    with pytest.raises(PlanError, match="found 3"):
        Jobs(folder=3)


def test_an_executor_that_is_shut_down_is_named():
    with ThreadPoolExecutor(1) as pool:
        pass
    with pytest.raises(RabbetError, match="the executor takes no work"):
        compress(_net(), "bits <= 4", [X], QUICK, jobs=Jobs(pool))


def test_a_folder_that_goes_away_is_named(tmp_path):
    jobs = Jobs(folder=tmp_path / "work")
    (tmp_path / "work").rmdir()
    with pytest.raises(FileError, match="finished work cannot be kept in"):
        compress(_net(), "bits <= 4", [X], QUICK, jobs=jobs)


def test_a_folder_that_cannot_be_written_is_refused_before_any_work(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", str(tmp_path / "file" / "deeper")):
        with pytest.raises(FileError, match="no folder that can be written to"):
            Jobs(folder=folder)
    assert (
        compress(
            _net(), "bits <= 4", [X], QUICK, jobs=Jobs(folder=str(tmp_path / "work"))
        ).cost.bits
        <= 4
    )


def test_hidden_values_that_are_not_finite_are_refused_by_the_layer_that_met_them():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x):
            return self.second(self.first(x).log()).nan_to_num()

    with pytest.raises(DataError, match="inputs of second hold NaN"):
        compress(settled(Odd()), "bits <= 4", [rand(8, 6)], QUICK)


@pytest.mark.parametrize(
    "data",
    [
        [],
        (),
        iter(()),
        [torch.zeros(0, 3, 6, 6)],
        [X, torch.zeros(0, 3, 6, 6)],
        [None],
        ["a"],
        [{}],
        [()],
        [{"x": "y"}],
        [5],
        [[["deep"]]],
    ],
)
def test_data_without_an_example_is_refused(data):
    with pytest.raises(DataError):
        compress(_net(), "bits <= 4", data, QUICK, jobs=Idle())


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        (torch.zeros(4, 3, 6, 6, device="meta"), "batch 1 .* lies on the meta device"),
        (X.flatten(1).to_sparse(), "batch 1 .* is sparse or nested"),
        (torch.zeros(4, 3).to_sparse_csr(), "batch 1 .* is sparse or nested"),
        (torch.nested.nested_tensor([X[0], X[1]]), "batch 1 .* is sparse or nested"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*(Sparse|nested).*:UserWarning")
def test_a_batch_without_plain_numbers_is_refused_by_its_number(batch, words):
    with pytest.raises(DataError, match=words):
        compress(_net(), "bits <= 4", [X, batch], QUICK, jobs=Idle())


@pytest.mark.parametrize(
    "data", ["batches", b"batches", X, {"x": X}, None, 5, nn.Linear(2, 2), torch.zeros]
)
def test_what_is_not_an_iterable_of_batches_is_refused_by_its_type(data):
    with pytest.raises(DataError, match=type(data).__name__):
        compress(_net(), "bits <= 4", data, QUICK, jobs=Idle())


@pytest.mark.parametrize(
    "batch",
    [
        rand(4, 3, 6, 5),
        rand(4, 2, 6, 6),
        rand(4, 3),
        (X, X),
        [X, X, X],
        {"y": X},
        X.long(),
        torch.ones(4, 3, 6, 6) > 0,
    ],
)
def test_a_batch_that_the_network_does_not_take_is_described(batch):
    for data in ([batch], [X, batch]):
        with pytest.raises((RuntimeError, TypeError, ValueError, DataError)) as caught:
            compress(_net(), "bits <= 4", data, QUICK)
        # one that is not like the first is refused before the network sees it
        unlike = isinstance(caught.value, DataError)
        said = str(caught.value) if unlike else _notes(caught.value)
        assert str(list(tensors(batch)[0].shape)) in said


def test_indices_outside_a_table_are_refused():
    model = settled(nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3)))
    with pytest.raises(IndexError) as caught:
        compress(model, "bits <= 4", [torch.tensor([[0, 4, 5]])], QUICK)
    assert "int64[1, 3]" in _notes(caught.value)


def test_a_limit_of_no_examples_is_refused():
    with pytest.raises(DataError):
        compress(_net(), "bits <= 4", Task([X], limit=0), QUICK)


def test_batches_that_can_be_read_only_once_are_enough():
    once = (rand(4, 3, 6, 6, seed=k) for k in range(3))
    again = [rand(4, 3, 6, 6, seed=k) for k in range(3)]
    assert (
        compress(_net(), "bits <= 4", once, QUICK).plan
        == compress(_net(), "bits <= 4", again, QUICK).plan
    )


def test_a_generator_that_was_used_up_is_refused_as_such():
    once = iter([X])
    compress(_net(), "bits <= 4", once, QUICK)
    with pytest.raises(DataError, match="read only once"):
        compress(_net(), "bits <= 4", once, QUICK)


def test_what_a_generator_raises_is_passed_on():
    def batches():
        yield X
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="disk is gone") as caught:
        compress(_net(), "bits <= 4", batches(), QUICK)
    assert "raised in the data, at batch 1, counted from 0" in _notes(caught.value)


def test_batches_that_the_network_changes_in_place_are_not_used_up():
    class Normalising(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 3)

        def forward(self, x):
            return self.fc(x.sub_(1.0).mul_(0.5))

    batch = rand(16, 6)
    before = batch.clone()
    compress(settled(Normalising()), "bits <= 4", [batch], QUICK)
    assert torch.equal(batch, before)


def test_accuracy_without_labels_is_refused():
    with pytest.raises(DataError, match="no labelled batch"):
        accuracy(_net(), [])


# Plans


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "empty"),
        ("# nothing", "empty"),
        ("1 dense@4c", "for 1,"),
        ("0 dense@4c\nconv1 dense@4c", "conv1"),
        ("0 dense@4c9", "axis 9"),
        ("0 lowrank[9]@4c", "more than the 8"),
        ("3 lowrank[6]@4c", "more than the 5"),
        ("0 dense@4c\n0 dense@4c", "two lines"),
        ("0 dense@4c | act@1", "act@1"),
        ("0 cake@4c", "cake"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused_by_its_line(text, word):
    with pytest.raises(PlanError, match=re.escape(word)):
        fit(_net(), text, [X], QUICK, jobs=Idle())


@pytest.mark.parametrize(
    ("model", "batch", "text", "word"),
    [
        (
            nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)),
            rand(2, 4, 5, 5),
            "0 lowrank[1]@4c",
            "lowrank does not fit",
        ),
        (
            nn.Sequential(nn.Embedding(5, 4)),
            torch.zeros(2, 3, dtype=torch.long),
            "0 lowrank[1]@4c",
            "lowrank does not fit",
        ),
        (
            nn.Sequential(nn.Embedding(5, 4)),
            torch.zeros(2, 3, dtype=torch.long),
            "0 dense@4c | act@8",
            "is an index",
        ),
    ],
)
def test_a_form_or_width_that_a_layer_cannot_take_is_refused(model, batch, text, word):
    with pytest.raises(PlanError, match=word):
        fit(model, text, [batch], QUICK, jobs=Idle())


def test_a_plan_of_another_network_is_refused():
    other = plan(network("residual").model, "bits <= 4", network("residual").batches, QUICK)
    with pytest.raises(PlanError, match="not a layer that can be compressed here"):
        fit(_net(), other, [X], QUICK, jobs=Idle())
    with pytest.raises(PlanError):
        build(_net(), other, survey(_net(), [X]))


@pytest.mark.parametrize(
    "settings",
    [
        {"grids": ()},
        {"grids": ("9c",)},
        {"grids": ("4c", "x")},
        {"adapter_grid": "0"},
        {"adapters": (("q", 0.1),)},
        {"act": 1},
        {"act": 9},
    ],
)
def test_a_method_with_impossible_settings_is_refused_at_once(settings):
    with pytest.raises(PlanError):
        Joint(**settings)


# Afterwards


def test_a_network_that_was_built_but_not_calibrated_does_not_run():
    model = _net()
    surveyed = survey(model, [X])
    student = build(model, plan(model, "bits <= 4", [X], QUICK), surveyed)
    with pytest.raises(ModelError, match="calibrate_ranges"):
        student(X)


def test_a_result_that_was_changed_is_not_written(tmp_path):
    for change in (
        lambda m: m.__setitem__(0, nn.Conv2d(3, 8, 3)),
        lambda m: m.__setitem__(3, settled(nn.Linear(8 * 16, 5))),
    ):
        result = compress(_net(), "bits <= 4", [X], QUICK)
        change(result.model)
        with pytest.raises(RabbetError):
            result.save(tmp_path / "f")
    model = settled(nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6)))
    result = compress(model, "bits <= 4", [rand(4, 6)], QUICK)
    result.model[1] = nn.LayerNorm(7)
    with pytest.raises(RabbetError):
        result.save(tmp_path / "f")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("stage", ["survey", "moments", "solve", "score"])
def test_a_run_that_fails_leaves_the_network_as_it_was(stage, monkeypatch):
    model = settled(nn.Sequential(Residual(3, 4), nn.Flatten(), nn.Linear(4 * 36, 5))).train()
    before, state = _facts(model), {k: v.clone() for k, v in model.state_dict().items()}
    bad = X.clone()
    bad[0] = torch.nan
    if stage == "survey":
        batches = [rand(4, 2, 6, 6)]
    elif stage == "moments":
        batches = [X, bad]
    else:
        batches = [X]
        target = {
            "solve": "rabbet.reconstruct.network.solve_site",
            "score": "rabbet.choose.search.output_errors",
        }[stage]
        monkeypatch.setattr(target, lambda *_, **__: _raise(DataError("stopped")))
        if stage == "solve":
            monkeypatch.setattr(Jobs, "run", lambda *_: _raise(DataError("stopped")))
    with pytest.raises((DataError, RuntimeError)):
        compress(model, "bits <= 4", batches, QUICK)
    assert _facts(model) == before
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize("ask", [rabbet.compress, rabbet.plan])
@pytest.mark.parametrize("budget", ["macs <= 60%", "bytes <= 60%"])
def test_an_unknown_target_is_refused_whatever_the_budget_names(ask, budget):
    with pytest.raises(rabbet.RabbetError, match="'foo'"):
        ask(nn.Sequential(nn.Linear(8, 8)), budget, [torch.ones(2, 8)], target="foo")


@pytest.mark.parametrize("path", [None, 3, "x\0.safetensors"])
def test_what_is_no_path_is_refused(path):
    net, data = nn.Sequential(nn.Linear(8, 8)), [torch.ones(2, 8)]
    result = rabbet.fit(net, "0 dense@8c", data, quality="fast")
    for ask in (result.save, lambda p: result.export(p, "onnx"), lambda p: rabbet.load(p, net)):
        with pytest.raises(FileError, match="a path is a text"):
            ask(path)


def test_a_name_that_no_file_can_hold_is_refused_before_one_is_written(tmp_path):
    net = nn.Sequential(OrderedDict({"\ud800lone": nn.Linear(8, 8)}))
    result = rabbet.compress(net, "bits <= 8", [torch.ones(2, 8)], quality="fast")
    with pytest.raises(FileError, match="lone surrogate"):
        result.save(tmp_path / "a.safetensors")
    assert list(tmp_path.iterdir()) == []
