"""The ONNX file: answers, integer kernels, packed bytes; for every network, grid and term."""

import copy
import functools
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from exporting import CASES, GRIDS, parcel
from networks import Case, images, lasting, rand, settled, thinned
from torch import nn

import rabbet
from rabbet.cli.stored import opened
from rabbet.data.batches import relative_error, tensors
from rabbet.data.task import Task
from rabbet.errors import DataError, FileError, ModelError
from rabbet.export.onnx import compare
from rabbet.export.onnx.merge import merged
from rabbet.export.onnx.write import assemble, write_float, write_onnx, write_openvino
from rabbet.export.signature import unlabelled
from rabbet.export.writing import write_native
from rabbet.grids.pack import packed_bytes
from rabbet.methods import QUALITY
from rabbet.model.compressed import compressed_layers
from rabbet.runtime.session import KERNELS, Session, kernels

TERMS = {
    "dense": GRIDS,
    "adapter": ("dense@3c + lowrank[2]@8c", "dense@2hc + lowrank[1]@4c"),
    "rows": ("dense[even]@4c + dense[odd]@2hc", "dense[odd]@8c + dense[even]@3c + lowrank[1]@8c"),
    "groups": ("dense@4g8", "dense@3g16z + lowrank[1]@4g4"),
    "low rank": ("lowrank[2]@4c", "lowrank[3]@8c", "lowrank[2]@3c"),
    "trains": ("tt[4]@4", "tt[3]@8c", "tt[4]@3c"),
    "chains": ("cp[6]@4c", "tucker[3]@8c", "ttconv[4]@4c", "cp[9]@6c", "tucker[2]@3c", "cp[4]@4"),
}


QUICK = QUALITY["fast"]


def _answers(model, batch):
    with torch.no_grad():
        return [t.detach() for t in tensors(Task([batch]).run(model, batch))]


def _apart(a, b):
    return float((a - b).norm() / b.norm().clamp_min(1e-6))


def _factors(parcel):
    return [
        f for layer in compressed_layers(parcel.model).values() for t in layer.factors for f in t
    ]


# Dense terms on every case, one other kind of terms on each, and all kinds on a case of convs and
# linears: a failure then points to the graph or to the kind of term.
OTHERS = [kind for kind in TERMS if kind != "dense"]
PAIRS = list(
    dict.fromkeys(
        [
            *((name, "dense") for name in CASES),
            *((name, OTHERS[k % len(OTHERS)]) for k, name in enumerate(CASES)),
            *(("stack", kind) for kind in TERMS),
        ]
    )
)


@pytest.fixture(
    scope="module", params=thinned([(p,) for p in PAIRS], 5), ids=[f"{n}-{k}" for n, k in PAIRS]
)
def written(request, tmp_path_factory):
    """A case, compressed with a kind of terms, and its file."""
    name, kind = request.param
    case = CASES[name]()
    compressed = parcel(case, TERMS[kind])
    path = tmp_path_factory.mktemp("onnx") / "small.onnx"
    return case, compressed, write_onnx(compressed, path), path


def test_the_file_answers_as_the_network_at_every_batch_size(written, kernels_are_exact):
    case, compressed, export, path = written
    assert export.bytes == path.stat().st_size
    session = Session(path, exact=not kernels_are_exact)
    axes = compressed.task.examples
    for batch in case.batches:
        for count in {1, axes.count(batch)}:
            part = axes.first(batch, count)
            ours = session(*tensors(part))
            ours = list(ours) if isinstance(ours, tuple) else [ours]
            theirs = _answers(compressed.model, part)
            assert [t.shape for t in ours] == [t.shape for t in theirs]
            assert all(_apart(a, b) < 0.2 for a, b in zip(ours, theirs, strict=True))


def test_every_layer_runs_on_an_integer_kernel(written):
    _, compressed, export, path = written
    floats = [s for s in compressed.survey if not s.kind.integer_kernel]
    assert len(lasting(export.notes)) == len(floats)
    assert all(f"{s.name} runs in float (ConvTranspose)" in "".join(export.notes) for s in floats)
    ran = kernels(path)
    multiplied = [
        f"{s.name}.{t}.{f}".lstrip(".")
        for s in compressed.survey
        if s.name in {line.name for line in compressed.plan} and s.multiplies and s not in floats
        for t, term in enumerate(compressed_layers(merged(compressed.model))[s.name].factors)
        for f in range(len(term))
    ]
    for name in multiplied:
        assert any(k in KERNELS for w, k in ran.items() if w.startswith(name)), name


def test_the_file_is_hardly_larger_than_the_native_one(written, tmp_path):
    _, compressed, export, _ = written
    native = write_native(compressed, tmp_path / "small.safetensors").bytes
    assert export.bytes <= 1.15 * native + 100_000


def test_weights_take_their_packed_bytes_and_no_more(written):
    _, compressed, _, path = written
    graph = onnx.load(path).graph
    packed = {node.input[0] for node in graph.node if node.op_type == "unpack"}
    fours = (onnx.TensorProto.INT4, onnx.TensorProto.UINT4)
    size = sum(_size(i) for i in graph.initializer if i.name in packed or i.data_type in fours)
    wanted = sum(
        packed_bytes(f.codes.numel(), f.grid.levels)
        for f in _factors(compressed)
        if f.grid.bits < 8 or f.grid.kind == "half"
    )
    assert size == wanted


def _size(initializer):
    return len(initializer.raw_data) or onnx.numpy_helper.to_array(initializer).nbytes


@pytest.mark.parametrize("write", [write_onnx, write_openvino])
def test_the_integers_in_the_runtime_are_exactly_the_codes(write, tmp_path):
    # 3 x 5 x 3 x 3 = 135 codes a layer: no multiple of 8, 5 or 2
    model = nn.ModuleList()
    for k in range(len(GRIDS)):
        model.append(nn.Conv2d(5, 3, 3, padding=1) if k % 2 else nn.Linear(15, 9))

    class All(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = model

        def forward(self, x, y):
            return tuple(m(x if k % 2 else y) for k, m in enumerate(self.layers))

    compressed = parcel(Case(settled(All()), [(rand(4, 5, 6, 6), rand(4, 3, 15))]))
    path = tmp_path / "small.onnx"
    write(compressed, path)
    Session(path, 1, tmp_path / "optimised.onnx")
    constants = {
        i.name: onnx.numpy_helper.to_array(i)
        for i in onnx.load(tmp_path / "optimised.onnx").graph.initializer
    }
    for name, layer in compressed_layers(compressed.model).items():
        (factor,) = layer.factors[0]
        held = next(v for k, v in constants.items() if k in {f"{name}.0.0", f"{name}.0.0.moved"})
        half = factor.grid.kind == "half"
        wanted = (2 * factor.codes + 1 if half else factor.codes).numpy()
        held = held.T if held.shape != wanted.shape else held
        assert (held == wanted).all(), (name, str(factor.grid))


@pytest.mark.parametrize("act", ["act@4", "act@6"])
def test_inputs_of_fewer_bits_are_cut_to_their_codes(act, tmp_path):
    case = CASES["cifar resnet"]()
    compressed = parcel(case, ("dense@8c",), act)
    assert lasting(write_onnx(compressed, tmp_path / "small.onnx").notes) == ()
    answer, wanted = (
        Session(tmp_path / "small.onnx")(case.batches[0]),
        _answers(compressed.model, case.batches[0])[0],
    )
    assert _apart(answer, wanted) < 0.1


def test_layers_that_read_one_tensor_may_do_so_in_different_bits(tmp_path, kernels_are_exact):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return torch.relu(self.a(x)) + self.b(x)

    model, data = settled(Two()), images()
    result = rabbet.fit(model, "a dense@8c | act@8\nb dense@8c | act@3", data, QUALITY["fast"])
    result.export(tmp_path / "small.onnx")
    answer = Session(tmp_path / "small.onnx")(data[0])
    most = 0.05 if kernels_are_exact else 0.2
    assert _apart(answer, _answers(result.model, data[0])[0]) < most


def test_a_layer_whose_input_stays_float_is_listed_with_the_reason(tmp_path):
    compressed = parcel(CASES["cifar resnet"](), ("dense@4c",), "")
    notes = write_onnx(compressed, tmp_path / "small.onnx").notes
    assert len(notes) == len(compressed.plan)
    assert all("runs in float" in n and "its plan has no act" in n for n in notes)


@pytest.mark.parametrize(
    ("name", "kind"),
    thinned(
        [(n, ("dense", "trains", "rows")[k % 3]) for k, n in enumerate(CASES)]
        + [("tied", "dense"), ("bert", "trains"), ("tokens", "rows")],
        4,
    ),
)
def test_no_weight_that_meets_floats_is_dequantised_in_every_run(name, kind, tmp_path):
    case, terms = CASES[name](), TERMS[kind]
    compressed = parcel(case, terms, "")
    notes = write_onnx(compressed, tmp_path / "small.onnx").notes
    ours, theirs = (
        _answers(net, case.batches[0])[0]
        for net in (Session(tmp_path / "small.onnx"), compressed.model)
    )
    assert _apart(ours, theirs) < 0.1
    assert not any("unknown kernel" in n for n in notes)
    Session(tmp_path / "small.onnx", 1, tmp_path / "runs.onnx")
    graph = onnx.load(tmp_path / "runs.onnx").graph
    constants = {i.name for i in graph.initializer}
    assert not [
        n for n in graph.node if n.op_type == "DequantizeLinear" and n.input[0] in constants
    ]


def test_a_dead_channel_keeps_its_bias(tmp_path):
    model = settled(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)))
    with torch.no_grad():
        model[0].weight[1] = 0
        model[0].weight[2] *= 1e-13
        model[0].bias[1:3] = torch.tensor([3.0, 2.0])
    case = Case(model, images())
    compressed = parcel(case, ("dense@8c", "dense@2hc"))
    write_onnx(compressed, tmp_path / "small.onnx")
    assert (
        _apart(
            Session(tmp_path / "small.onnx")(case.batches[0]),
            _answers(compressed.model, case.batches[0])[0],
        )
        < 0.05
    )


def test_a_float_network_is_written_as_it_is(tmp_path):
    case = CASES["imagenet resnet"]()
    write_float(case.model, Task.of(case.batches), tmp_path / "float.onnx")
    assert (
        _apart(
            Session(tmp_path / "float.onnx")(case.batches[0]),
            _answers(case.model, case.batches[0])[0],
        )
        < 1e-4
    )
    assert not set(kernels(tmp_path / "float.onnx").values()) & set(KERNELS)


@pytest.fixture(scope="module")
def result():
    return rabbet.fit(
        TestThroughTheFrontDoor.MODEL,
        TestThroughTheFrontDoor.PLAN,
        TestThroughTheFrontDoor.DATA,
        QUICK,
    )


class TestThroughTheFrontDoor:
    """As a user does it."""

    MODEL = settled(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5))
    )
    DATA = images()
    PLAN = "0 dense@3c | act@8\n3 dense@4c | act@8"

    def test_the_same_file_comes_from_the_result_and_from_its_native_file(self, result, tmp_path):
        result.export(tmp_path / "a.onnx")
        result.save(tmp_path / "small.safetensors")
        again = rabbet.Result.load(tmp_path / "small.safetensors", self.MODEL, self.DATA)
        again.export(tmp_path / "b.onnx")
        assert (again.plan, again.cost) == (result.plan, result.cost)
        assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()

    def test_what_is_reopened_is_the_file_whatever_opens_it(self, tmp_path):
        half = copy.deepcopy(self.MODEL).half()
        result = rabbet.fit(
            half, "0 dense@3c | act@8", [x.half() for x in self.DATA], QUALITY["fast"]
        )
        size = result.save(tmp_path / "small.safetensors")
        again = rabbet.Result.load(tmp_path / "small.safetensors", self.MODEL, self.DATA)
        assert again.cost == result.cost
        assert again.cost.bytes == again.save(tmp_path / "again.safetensors") == size
        assert (tmp_path / "again.safetensors").read_bytes() == (
            tmp_path / "small.safetensors"
        ).read_bytes()

    @pytest.mark.parametrize("kind", [torch.half, torch.double])
    @pytest.mark.parametrize("end", ["onnx", "pt2"])
    def test_networks_and_batches_of_other_types_are_exported(self, kind, end, tmp_path):
        model = copy.deepcopy(self.MODEL).half() if kind == torch.half else self.MODEL
        result = rabbet.fit(model, self.PLAN, [x.to(kind) for x in self.DATA], QUALITY["fast"])
        result.export(tmp_path / f"a.{end}")
        answer = opened(tmp_path / f"a.{end}", model)(self.DATA[0])
        assert float((answer - result.model(self.DATA[0])).norm() / answer.norm()) < 0.05

    @pytest.mark.parametrize("outs", [6, 8])
    def test_scales_that_lie_on_the_inputs_of_a_layer_stay_there(self, outs, tmp_path):
        torch.manual_seed(0)
        model = settled(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, outs, 3),
                                      nn.Flatten(), nn.Linear(outs * 16, outs * 16)))  # fmt: skip
        with torch.no_grad():
            for k in (2, 4):
                model[k].weight *= torch.logspace(-1, 1, model[k].weight.shape[1]).view(
                    1, -1, *[1] * (k == 2) * 2
                )
        plan = "2 dense@4c1 | act@8\n4 dense@4c1 | act@8"
        result = rabbet.fit(model, plan, self.DATA, QUALITY["fast"])
        result.export(tmp_path / "a.onnx")
        answer, wanted = Session(tmp_path / "a.onnx")(self.DATA[0]), result.model(self.DATA[0])
        assert float((answer - wanted).norm() / wanted.norm()) < 0.02

    def test_an_export_touches_neither_network(self, result, tmp_path):
        before = [copy.deepcopy(m.state_dict()) for m in (self.MODEL, result.model)]
        result.export(tmp_path / "a.onnx")
        for state, model in zip(before, (self.MODEL, result.model), strict=True):
            assert all(torch.equal(v, model.state_dict()[k]) for k, v in state.items())

    def test_accuracy_takes_a_session(self, result, tmp_path):
        result.export(tmp_path / "a.onnx")
        test = [(x, result.model(x).argmax(1)) for x in self.DATA]
        assert rabbet.accuracy(rabbet.Session(tmp_path / "a.onnx"), test) > 80

    def test_a_torch_program_computes_the_same_without_rabbet(self, result, tmp_path):
        result.export(tmp_path / "small.pt2")
        program = torch.export.load(tmp_path / "small.pt2").module()
        for x in (self.DATA[0], self.DATA[0][:1]):
            assert torch.equal(program(x), result.model(x))
        assert not any(type(m).__module__.startswith("rabbet") for m in program.modules())

    def test_openvino_runs_its_file_on_integer_kernels(self, result, tmp_path):
        openvino = pytest.importorskip("openvino")
        result.export(tmp_path / "a.onnx", "openvino")
        compiled = openvino.Core().compile_model(
            tmp_path / "a.onnx", "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
        )
        answer = torch.from_numpy(next(iter(compiled({0: self.DATA[0].numpy()}).values())))
        assert _apart(answer, result.model(self.DATA[0])) < 0.1
        facts = [op.get_rt_info() for op in compiled.get_runtime_model().get_ordered_ops()]
        layers = [f for f in facts if _said(f, "layerType") in {"Convolution", "FullyConnected"}]
        assert len(layers) == 2
        assert all("I8" in _said(f, "primitiveType") for f in layers)

    def test_a_file_that_answers_differently_is_an_error_and_is_not_written(
        self, result, tmp_path, monkeypatch
    ):
        (tmp_path / "a.onnx").write_text("mine")
        monkeypatch.setattr(compare, "NEAR", 0.0)
        with pytest.raises(ModelError, match=r"differs from the network's by .* first at"):
            result.export(tmp_path / "a.onnx")
        assert [p.name for p in tmp_path.iterdir()] == ["a.onnx"]
        assert (tmp_path / "a.onnx").read_text() == "mine"

    def test_missing_packages_are_named(self, result, tmp_path, monkeypatch):
        monkeypatch.setattr("rabbet.runtime.session.find_spec", lambda name: None)
        with pytest.raises(FileError, match=r"need onnx, .* install rabbet\[onnx\]"):
            result.export(tmp_path / "a.onnx")

    @pytest.mark.parametrize("target", ["onnx", "torch"])
    def test_a_network_that_cannot_be_traced_is_one_clear_error(self, target, tmp_path):
        class Moody(nn.Module):
            def __init__(self):
                super().__init__()
                self.a = nn.Linear(4, 4)

            def forward(self, x):
                return self.a(x) if x.sum() > 0 else -self.a(x)

        compressed = rabbet.fit(
            settled(Moody()), "a dense@8c | act@8", [rand(4, 4)], QUALITY["fast"]
        )
        with pytest.raises(ModelError, match="torch cannot export this network") as caught:
            compressed.export(tmp_path / "f", target)
        assert "\n" not in str(caught.value)
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("target", ["onnx", "torch"])
    def test_a_network_that_counts_its_examples_is_told_how_to(self, target, tmp_path):
        class Counting(nn.Module):
            def __init__(self):
                super().__init__()
                self.first, self.a = nn.Parameter(torch.zeros(1, 1, 4)), nn.Linear(4, 4)

            def forward(self, x):
                return self.a(torch.cat([self.first.expand(len(x), -1, -1), x], 1))

        compressed = rabbet.fit(
            settled(Counting()), "a dense@8c | act@8", [rand(6, 3, 4)], QUALITY["fast"]
        )
        with pytest.raises(ModelError, match=r"write x\.shape\[0\], not len\(x\)"):
            compressed.export(tmp_path / "f", target)

    def test_an_unknown_target_is_an_error_that_names_the_known_ones(self, result, tmp_path):
        with pytest.raises(FileError, match="safetensors, onnx, openvino, torch"):
            result.export(tmp_path / "a.onnx", "tflite")
        with pytest.raises(FileError, match=r"ends in '.xyz'"):
            result.export(tmp_path / "a.xyz")

    def test_a_session_says_what_it_takes(self, result, tmp_path):
        result.export(tmp_path / "a.onnx")
        with pytest.raises(DataError, match="the file takes input"):
            Session(tmp_path / "a.onnx")(self.DATA[0], self.DATA[0])
        with pytest.raises(DataError, match="does not run on"):
            Session(tmp_path / "a.onnx")(self.DATA[0][:, :1])
        (tmp_path / "bad.onnx").write_bytes(b"nothing")
        with pytest.raises(FileError, match="onnxruntime does not take"):
            Session(tmp_path / "bad.onnx")
        with pytest.raises(FileError, match="there is no file"):
            Session(tmp_path / "none.onnx")


def _said(facts, key):
    value = facts[key]
    return str(getattr(value, "value", value))


@pytest.mark.slow
def test_axes_in_which_batches_differ_are_dynamic(tmp_path):
    compressed = parcel(CASES["bert"]())
    write_onnx(compressed, tmp_path / "small.onnx")
    session = Session(tmp_path / "small.onnx")
    assert [i.shape for i in session.session.get_inputs()] == [["batch", "length"]] * 2
    for count, length in ((1, 5), (4, 13)):
        ids = torch.randint(40, (count, length))
        assert session(input_ids=ids, attention_mask=torch.ones_like(ids))[0].shape == (
            count,
            length,
            16,
        )


@pytest.mark.data
@pytest.mark.slow
def test_resnet20_keeps_its_accuracy_in_the_runtime(real, tmp_path: Path):
    train, _ = real.load.cifar10("train", 256)
    images, labels = real.load.cifar10("test", 500)
    test = list(
        zip(torch.from_numpy(images).split(250), torch.from_numpy(labels).split(250), strict=True)
    )
    compressed = parcel(
        Case(real.nets.cifar_resnet(20), list(torch.from_numpy(train).split(64))),
        ("dense@6c", "dense@8c"),
    )
    assert lasting(write_onnx(compressed, tmp_path / "small.onnx").notes) == ()
    assert set(kernels(tmp_path / "small.onnx").values()) == {"QLinearConv", "QGemm"}
    apart = rabbet.accuracy(Session(tmp_path / "small.onnx"), test) - rabbet.accuracy(
        compressed.model, test
    )
    assert abs(apart) <= 1.0


def test_where_only_the_integer_kernels_of_a_processor_differ_that_is_said(monkeypatch):
    case = CASES["stack"]()
    compressed = parcel(case, TERMS["dense"])
    task, _ = unlabelled(compressed.task, compressed.model)
    model = merged(compressed.model)
    made = assemble(model, task)

    class Saturating(Session):
        """Kernels that are off by a fifth, where they are not left out."""

        def __init__(self, source, *args, exact=False, **kwargs):
            super().__init__(source, *args, exact=exact, **kwargs)
            self.factor = 1.0 if exact else 1.2

        def run(self, feed, outputs=None):
            return [a * np.float32(self.factor) for a in super().run(feed, outputs)]

    exact = functools.partial(Session, exact=True)
    monkeypatch.setattr(compare, "Session", exact)
    assert compare.compare(made.content, made.plain, model, task)[1] == ()
    monkeypatch.setattr(compare, "Session", Saturating)
    error, (note,) = compare.compare(made.content, made.plain, model, task)
    assert error > 0.1
    assert note.startswith("the integer kernels of this processor")


class Spread(nn.Module):
    """One key for all heads, and one mask for all queries."""

    def __init__(self):
        super().__init__()
        self.q, self.kv, self.last = nn.Linear(16, 16), nn.Linear(16, 8), nn.Linear(16, 4)

    def forward(self, x):
        q = self.q(x).unflatten(-1, (4, 4)).transpose(1, 2)
        k, v = self.kv(x).unsqueeze(1).chunk(2, -1)
        mask = torch.zeros(x.shape[0], 1, 1, x.shape[1]) - x[:, None, None, :, 0].relu()
        y = F.scaled_dot_product_attention(q, k, v, mask)
        return self.last(y.transpose(1, 2).flatten(2))


@pytest.mark.slow
def test_attention_that_torch_spreads_over_heads_and_queries_is_exported(tmp_path):
    plan = "q dense@7c | act@8\nkv dense@7c | act@8\nlast dense@7c | act@8"
    result = rabbet.fit(settled(Spread()), plan, [rand(4, 6, 16)])
    assert result.export(tmp_path / "a.onnx").error < 0.02


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_stored_weights_are_integers_in_the_file(kind, tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.last = (
                kind(24, 64, batch_first=True, bidirectional=True),
                nn.Linear(128, 4),
            )

        def forward(self, x):
            return self.last(self.rnn(x)[0])

    model = settled(Net())
    result = rabbet.compress(model, "bytes <= 14%", [rand(8, 5, 24)], quality="fast")
    written = result.export(tmp_path / "a.onnx")
    assert written.bytes < 1.25 * result.cost.bytes + 8192
    session = rabbet.Session(tmp_path / "a.onnx")
    assert Counter(n.op_type for n in onnx.load(tmp_path / "a.onnx").graph.node)[kind.__name__] == 1
    x = rand(3, 5, 24, seed=2)
    assert relative_error(session(x), result.model(x)) < 0.05


@pytest.mark.parametrize("grid", ["4g16", "4g16z"])
def test_stored_weights_whose_groups_share_scales_are_exported(grid, tmp_path):
    torch.manual_seed(0)
    task = Task([rand(4, 5, 32)], lambda m, x: m(x)[0])
    plan = f"weight_ih_l0 dense@{grid}\nweight_hh_l0 dense@{grid}"
    result = rabbet.fit(settled(nn.GRU(32, 32, batch_first=True)), plan, task, QUALITY["fast"])
    assert result.export(tmp_path / "a.onnx").error < 1e-5


def test_weights_of_seven_bits_saturate_nowhere(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(512, 10),
    ).eval()  # fmt: skip
    x = rand(8, 3, 8, 8).abs() * 3
    result = rabbet.compress(model, "bits <= 7", [x], replace(QUICK, widest=7, rank=False))
    assert max(term.grid.bits for line in result.plan for term in line.terms) == 7
    menu = replace(QUICK, widest=7).menu(next(iter(result.survey)))
    assert max(term.grid.bits for terms in menu for term in terms) == 7
    written = result.export(tmp_path / "a.onnx")
    assert lasting(written.notes) == written.notes
    assert written.error < 0.02
