"""Networks and data that a command finds by a name or a file, without a program of the user's."""

import copy
import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

import rabbet
from rabbet.cli import machine
from rabbet.cli.datasets import open_data
from rabbet.cli.judge import open_judge
from rabbet.cli.networks import open_network
from rabbet.cli.references import settings_of
from rabbet.data.batches import relative_error
from rabbet.errors import DataError, FileError, ModelError
from rabbet.model.program import layers_of
from rabbet.train.tuning import Tuning

QUICK = ("--method", "joint forms=() adapters=() tuning.steps=0", "--budget", "bits <= 5")
SCALED = "size=16 mean=0.5,0.5,0.5 std=0.2,0.2,0.2"


class Mixed(nn.Module):
    """A layer of each kind, one that runs twice, and what is no layer."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.same = nn.Conv2d(8, 8, 3, padding="same", groups=2)
        self.up = nn.ConvTranspose2d(8, 8, 2, 2)
        self.words = nn.Embedding(10, 5, padding_idx=0)
        self.head, self.scale = nn.Linear(8, 5), nn.LayerNorm(5)

    def forward(self, x, words):
        x = torch.relu(self.norm(self.first(x)))
        x = self.up(self.same(self.same(x))).mean((2, 3))
        return self.scale(self.head(x) + self.words(words))


def exported(network, batch, path):
    count = torch.export.Dim("count")
    shapes = tuple({0: count} for _ in batch)
    torch.export.save(torch.export.export(network, batch, dynamic_shapes=shapes), path)
    return path


@pytest.fixture
def pictures(tmp_path):
    """Images of two sizes in a folder for each of three classes."""
    draw = np.random.default_rng(0)
    for k in range(9):
        file = tmp_path / "pictures" / "abc"[k % 3] / f"{k}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 255, (20 + k, 30, 3), dtype=np.uint8)).save(file)
    return tmp_path / "pictures"


@pytest.fixture
def program(tmp_path, monkeypatch):
    """A file of torch.export in the current folder."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)
    )
    return exported(network.eval(), (torch.rand(2, 3, 16, 16),), tmp_path / "net.pt2")


def test_settings_stand_behind_a_name():
    assert settings_of("timm:a pretrained=False b=x") == ("timm:a", {"pretrained": False, "b": "x"})
    assert settings_of("my folder/with spaces") == ("my folder/with spaces", {})
    assert settings_of("my folder mean=1,2 size=3") == ("my folder", {"mean": (1, 2), "size": 3})


def test_an_exported_program_is_made_of_its_layers_again(tmp_path):
    torch.manual_seed(0)
    network, batch = Mixed().eval(), (torch.rand(4, 3, 8, 8), torch.randint(0, 10, (4,)))
    network.norm.running_mean.normal_()
    again = open_network(str(exported(network, batch, tmp_path / "net.pt2")))
    other = torch.rand(6, 3, 8, 8), torch.randint(0, 10, (6,))
    with torch.no_grad():
        assert torch.equal(again(*other), network(*other))
    ours, theirs = rabbet.survey(again, [batch]), rabbet.survey(network, [batch])
    assert {s.name: (s.shape, s.macs, s.calls) for s in ours} == {
        s.name: (s.shape, s.macs, s.calls) for s in theirs
    }
    assert [s.norm for s in ours if s.norm] == ["norm"]
    result = rabbet.compress(again, "bits <= 6", [batch], quality="fast")
    result.save(tmp_path / "small.safetensors")
    loaded = rabbet.load(tmp_path / "small.safetensors", open_network(str(tmp_path / "net.pt2")))
    with torch.no_grad():
        assert torch.equal(loaded(*other), result.model(*other))


def test_tied_weights_of_a_program_stay_tied(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.head = nn.Embedding(30, 8), nn.Linear(8, 30, bias=False)
            self.head.weight = self.words.weight

        def forward(self, words):
            return self.head(self.words(words))

    batch = (torch.randint(0, 30, (4, 7)),)
    again = open_network(str(exported(Tied().eval(), batch, tmp_path / "net.pt2")))
    (site,) = rabbet.survey(again, [batch])
    assert len(site.heads) == 1


def test_a_program_in_training_mode_is_refused():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    with pytest.raises(ModelError, match="takes the statistics of the batch"):
        layers_of(torch.export.export(network, (torch.rand(2, 3, 8, 8),)))


def test_a_program_and_images_are_compressed_without_a_line_of_python(run, program, pictures):
    given = (str(program), "--data", f"{pictures} {SCALED}", "--test", f"{pictures} {SCALED}")
    output = program.with_name("small.safetensors")
    code, out, err = run("compress", *given, "--output", output, *QUICK, "--json")
    assert code == 0, err
    assert json.loads(out)["evaluation"]["quantity"] == "accuracy"
    given = ("--model", program, "--test", f"{pictures} {SCALED} batch=4")
    code, out, err = run("eval", output, *given, "--json")
    assert (code, err) == (0, "")


def test_images_are_scaled_cut_and_numbered_by_class(pictures):
    batches = open_data(f"{pictures} {SCALED} batch=4", None, "--data")
    shapes = [tuple(x.shape) for x in batches]
    assert shapes == [(4, 3, 16, 16), (4, 3, 16, 16), (1, 3, 16, 16)]
    assert torch.cat([y for _, y in batches.labelled()]).tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    some = open_data(f"{pictures} {SCALED} limit=3", None, "--data").spread()
    assert torch.equal(next(iter(some)), torch.cat(list(batches))[::3])


def test_a_network_that_says_how_images_are_prepared_needs_no_settings(pictures):
    network = nn.Identity()
    network.pretrained_cfg = {
        "input_size": (3, 8, 8), "mean": (0, 0, 0), "std": (1, 1, 1), "crop_pct": 0.5,
        "interpolation": "bicubic",
    }  # fmt: skip
    x = next(iter(open_data(str(pictures), network, "--data")))
    assert x.shape == (9, 3, 8, 8)
    assert 0 <= x.min() < x.max() <= 1


def test_arrays_are_inputs_by_name_and_labels(tmp_path):
    x, y = np.random.default_rng(0).random((5, 4), np.float32), np.arange(5)
    np.save(tmp_path / "x.npy", x)
    assert torch.equal(
        next(iter(open_data(str(tmp_path / "x.npy"), None, "--data"))), torch.tensor(x)
    )
    np.savez(tmp_path / "x.npz", left=x, right=x, labels=y)
    (inputs, labels), *_ = open_data(f"{tmp_path / 'x.npz'} batch=2", None, "--data").labelled()
    assert inputs.keys() == {"left", "right"}
    assert labels.tolist() == [0, 1]


def test_texts_are_numbered_by_the_tokenizer_of_the_folder(run, tmp_path):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "a", "good", "bad", "film"]
    tokenizer = Tokenizer(WordLevel({w: k for k, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
    config = BertConfig(vocab_size=6, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                        intermediate_size=32, max_position_embeddings=16)  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(tmp_path / "net")
    lines = ["a good film", "bad film", "a bad bad film", "good"] * 4
    (tmp_path / "texts.txt").write_text("\n".join(lines))
    pairs = "\n".join(f"{t}\t{k % 2}" for k, t in enumerate(lines))
    (tmp_path / "texts.tsv").write_text(pairs)
    given = (f"hf:{tmp_path / 'net'}", "--data", tmp_path / "texts.txt", "--output",
             tmp_path / "small.safetensors", "--test", tmp_path / "texts.tsv")  # fmt: skip
    code, _, err = run("compress", *given, *QUICK)
    assert code == 2
    assert "numbered by a tokenizer" in err
    fast.save_pretrained(tmp_path / "net")
    code, out, err = run("compress", *given, *QUICK)
    assert code == 0, err
    assert "accuracy: " in out


@pytest.mark.parametrize(
    ("reference", "content", "words"),
    [
        ("nowhere.npy", None, "there is no file"),
        ("x.npy", b"no array", "cannot be read as arrays"),
        ("x.npz", b"PK no archive", "cannot be read as arrays"),
        ("x.npy batch=0", b"", "batch=0: a whole number"),
        ("x.npy colour=3", b"", "'colour' is no setting here; there are batch, limit"),
        (". wide=3", None, "'wide' is no setting here"),
        (".", None, "does not say how images are scaled: write size="),
        (f". {SCALED}", None, "holds no example"),
        (". size=16 mean=1 std=1,1,1", None, "mean=1: three numbers"),
        ("x.txt", b"a", "numbered by a tokenizer"),
    ],
)
def test_data_that_cannot_be_read_are_one_line(run, program, reference, content, words):
    if content is not None:
        Path(reference.split()[0]).write_bytes(content)
    code, out, err = run("survey", program, "--data", reference)
    assert (code, out) == (2, "")
    assert words in err
    assert err.count("\n") == 1


def test_labels_that_are_not_there_are_named(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((3, 2)))
    with pytest.raises(DataError, match="no labels to measure accuracy with"):
        open_data(str(tmp_path / "x.npy"), None, "--test").labelled()


@pytest.mark.usefixtures("libraries")
@pytest.mark.parametrize(
    ("reference", "words"),
    [
        ("timm:resnet1888", "timm has no network 'resnet1888'; did you mean"),
        ("torchvision:resnet19", "torchvision has no network 'resnet19'; did you mean"),
        ("hf:someone/something", "there is no folder someone/something; nothing is downloaded"),
        ("hf:. size=3", "a folder takes no settings, found size"),
        ("nowhere.pt2", "there is no file nowhere.pt2"),
        ("torchvision:resnet18 sizes=3", "torchvision:resnet18 sizes=3 failed: TypeError"),
    ],
)
def test_networks_that_are_not_there_are_one_line(run, reference, words):
    code, out, err = run("survey", reference, "--data", "rabbet.demo:calibration")
    assert (code, out) == (2, "")
    assert words in err


def in_process(words):
    """A command in a process of its own: torch logs to the stderr that it found when imported."""
    command = [sys.executable, "-m", "rabbet", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_torch_says_nothing_of_a_program_that_is_surveyed(program, tmp_path):
    np.save(tmp_path / "images.npy", np.zeros((2, 3, 16, 16), np.float32))
    done = in_process(["survey", program, "--data", tmp_path / "images.npy"])
    assert (done.returncode, done.stderr) == (0, "")
    assert "MACs: of one example as in the first batch" in done.stdout


def test_a_damaged_program_is_one_line(tmp_path):
    (tmp_path / "net.pt2").write_bytes(b"no archive")
    words = ["survey", tmp_path / "net.pt2", "--data", "rabbet.demo:calibration"]
    done = in_process(words)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert "is damaged or not a program of torch.export" in done.stderr


@pytest.fixture
def libraries(monkeypatch):
    """Stand-ins for timm and torchvision, whose builds fit one build of torch each."""

    def made(name, **settings):
        if settings.pop("sizes", None):
            raise TypeError("unexpected keyword argument 'sizes'")
        network = nn.Conv2d(3, 4, 3).train()
        network.asked = name, settings
        return network

    def made_by_timm(name, **settings):
        network = made(name, **settings)
        network.pretrained_cfg = {"input_size": (3, 160, 160), "mean": (0, 0, 0), "std": (1, 1, 1)}
        return network

    preset = SimpleNamespace(
        crop_size=[224], resize_size=[256], mean=[0.5] * 3, std=[0.5] * 3,
        interpolation=SimpleNamespace(value="bilinear"),
    )  # fmt: skip
    weights = SimpleNamespace(DEFAULT=SimpleNamespace(transforms=lambda: preset))
    models = SimpleNamespace(
        list_models=lambda: ["resnet18"], get_model=made, get_model_weights=lambda _: weights
    )
    timm = SimpleNamespace(list_models=lambda: ["resnet18"], create_model=made_by_timm)
    monkeypatch.setitem(sys.modules, "timm", timm)
    monkeypatch.setitem(sys.modules, "torchvision", SimpleNamespace(models=models))


@pytest.mark.usefixtures("libraries")
@pytest.mark.parametrize(
    ("reference", "asked", "size"),
    [
        ("timm:resnet18", {"pretrained": True}, 160),
        ("timm:resnet18.a1_in1k pretrained=False", {"pretrained": False}, 160),
        ("torchvision:resnet18", {"weights": "DEFAULT"}, 224),
        ("torchvision:resnet18 weights=None", {"weights": None}, 224),
    ],
)
def test_networks_of_libraries_say_how_their_images_are_prepared(reference, asked, size, pictures):
    network = open_network(reference)
    assert network.asked[1] == asked
    assert not network.training
    x = next(iter(open_data(f"{pictures} batch=2", network, "--data")))
    assert x.shape == (2, 3, size, size)


def test_a_library_that_is_not_installed_is_named(run, monkeypatch):
    for name in ("timm", "torchvision"):
        monkeypatch.setitem(sys.modules, name, None)
        code, _, err = run("survey", f"{name}:resnet18", "--data", "rabbet.demo:calibration")
        assert code == 2
        assert "which is not installed; install 'rabbet[vision]'" in err


def test_a_file_for_a_runtime_is_told_from_a_damaged_one(run, tmp_path):
    (tmp_path / "small.onnx").write_bytes(b"x")
    for command in (("show",), ("check", "--budget", "bytes <= 10%")):
        code, _, err = run(*command, tmp_path / "small.onnx")
        assert code == 2
        assert "is written for a runtime" in err


def test_missing_files_are_named():
    with pytest.raises(FileError, match="there is no file"):
        open_data("nowhere.txt", None, "--data")


def test_doctor_says_what_is_there_and_what_is_missing(run, monkeypatch):
    code, out, err = run("doctor")
    assert (code, err) == (0, "")
    assert f"torch: {torch.__version__}" in out
    assert "int8 kernels of onnxruntime: " in out
    monkeypatch.setitem(machine.EXTRAS, "onnx", (("no-such-package",), "nothing"))
    assert "pip install 'rabbet[onnx" in run("doctor")[1]
    facts = json.loads(run("doctor", "--json")[1])
    assert facts["extras"]["onnx"] == {"no-such-package": None}


def test_init_writes_a_program_in_which_only_the_data_are_missing(run, program):
    code, out, err = run("init", program)
    assert (code, err) == (0, "")
    assert "nets.py" in out
    text = Path("nets.py").read_text()
    assert "0 takes float32 [examples, 3, height, width]" in text
    data = "[(torch.rand(3, 16, 16), k % 3) for k in range(64)]"
    text = text.replace("TRAIN = None", f"import torch\nTRAIN = {data}")
    Path("nets.py").write_text(text.replace("TEST = None", f"TEST = {data}"))
    given = ("nets.py:network", "--data", "nets.py:batches", "--test", "nets.py:labelled")
    code, out, err = run("compress", *given, "--output", "small.safetensors", *QUICK)
    assert (code, err) == (0, "")
    assert "accuracy: " in out
    code, _, err = run("init", program)
    assert code == 2
    assert "nets.py is there already" in err


class Clash(nn.Module):
    """A layer used with two strides, beside one that has the name that comes to mind."""

    def __init__(self):
        super().__init__()
        self.c, self.c_2 = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x):
        twice = nn.functional.conv2d(self.c(x), self.c.weight, self.c.bias, stride=2, padding=1)
        return self.c_2(twice)


class Own(nn.Module):
    """Weights of its own: a parameter, a kernel in a buffer, and a layer with one more."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 6))
        self.register_buffer("kernel", torch.randn(4, 1, 3))
        self.scaled = nn.Linear(4, 4)
        self.scaled.scale = nn.Parameter(torch.randn(4))

    def forward(self, x):
        x = nn.functional.linear(x, self.w)
        x = nn.functional.conv1d(x[..., None], self.kernel, padding=1, groups=4)[..., 0]
        return self.scaled(x) * self.scaled.scale


PROGRAMS = {
    "a clash of names": (Clash, (torch.rand(4, 3, 8, 8),), {"c_2"}),
    "own weights": (Own, (torch.rand(4, 6),), {"w_layer", "scaled_2"}),
    "a layer alone": (lambda: nn.Linear(6, 4), (torch.rand(4, 6),), {"layer"}),
    "attention": (
        lambda: nn.TransformerEncoderLayer(16, 2, 32, batch_first=True),
        (torch.rand(4, 5, 16),),
        None,
    ),
    "layers below a layer": (
        lambda: lora(nn.Linear(6, 4)),
        (torch.rand(4, 6),),
        None,
    ),
}


def lora(layer):
    """A layer with two small ones of its own."""
    layer.down, layer.up = nn.Linear(6, 2), nn.Linear(2, 4)
    forward = type(layer).forward
    layer.forward = lambda x: forward(layer, x) + layer.up(layer.down(x))
    return layer


@pytest.mark.parametrize("name", PROGRAMS)
def test_ordinary_programs_answer_as_before_and_are_compressed(name):
    make, batch, names = PROGRAMS[name]
    torch.manual_seed(0)
    network = make().eval()
    again = layers_of(torch.export.export(network, batch))
    with torch.no_grad():
        assert torch.allclose(again(*batch), network(*batch), atol=1e-6)
    sites = rabbet.survey(again, [batch])
    assert names is None or {s.name for s in sites} == names
    method = rabbet.Joint(forms=(), adapters=(), tuning=Tuning(steps=0))
    result = rabbet.compress(again, "bits <= 8", [batch], method)
    with torch.no_grad():
        assert relative_error(result.model(*batch), network(*batch)) < 0.1


def test_a_program_refuses_sizes_that_it_was_not_exported_for(tmp_path):
    network = nn.Sequential(nn.LSTM(6, 8, batch_first=True))
    program = torch.export.export(network.eval(), (torch.rand(4, 5, 6),))
    again = layers_of(program)
    assert again(torch.rand(4, 5, 6))[0].shape == (4, 5, 8)
    for copied in (again, copy.deepcopy(again)):
        with pytest.raises(
            ModelError, match=r"exported for inputs of \[4, 5, 6\], found \[8, 5, 6\]"
        ):
            copied(torch.rand(8, 5, 6))


def test_a_program_of_a_compressed_network_is_compressed_again(tmp_path):
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)
    )
    data = [torch.randn(64, 16) for _ in range(4)]
    method = rabbet.Joint(forms=(), adapters=(), tuning=Tuning(steps=0))
    first = rabbet.compress(network.eval(), "bits <= 8", data, method)
    first.export(tmp_path / "small.pt2")
    again = open_network(str(tmp_path / "small.pt2"))
    second = rabbet.compress(again, "bits <= 8", data, method)
    with torch.no_grad():
        assert relative_error(second.model(data[0]), first.model(data[0])) < 0.05


def test_what_is_read_is_never_written_over(run, program, pictures, tmp_path):
    given = (program, "--data", f"{pictures} {SCALED}", *QUICK, "--output")
    before = program.read_bytes()
    (pictures / "old.safetensors").write_bytes(b"old")
    for output in (program, pictures / "old.safetensors"):
        code, out, err = run("compress", *given, output)
        assert (code, out) == (2, "")
        assert "is read by this command" in err
    assert program.read_bytes() == before


def test_classes_of_a_test_are_numbered_as_those_of_the_data(run, program, pictures, tmp_path):
    part = tmp_path / "part"
    shutil.copytree(pictures / "c", part / "c")
    (part / ".hidden").mkdir()
    (part / "c" / "._x.png").write_bytes(b"no image")
    data = open_data(f"{pictures} {SCALED}", None, "--data")
    test = open_data(f"{part} {SCALED}", None, "--test")
    assert [y.tolist() for _, y in test.labelled(data.table.classes)] == [[2, 2, 2]]
    (part / "c").rename(part / "d")
    with pytest.raises(DataError, match="the class 'd' of the test is not among"):
        test = open_data(f"{part} {SCALED}", None, "--test").labelled(data.table.classes)
    (part / "e").mkdir()
    with pytest.raises(FileError, match="e holds no image of"):
        open_data(f"{part} {SCALED}", None, "--test")


def test_folders_of_some_of_the_classes_do_not_judge_a_network_of_all(pictures):
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 5)).eval()
    judge = open_judge(f"{pictures} {SCALED}", None, network)
    with pytest.raises(DataError, match="are numbers of 3: there is a folder"):
        judge(network)
    assert 0 <= open_judge(f"{pictures} {SCALED}")(network[:1].append(nn.Linear(768, 3))) <= 100


def test_labels_that_a_network_cannot_give_are_refused():
    network = nn.Linear(4, 3).eval()
    for labels in ([0, 3], [-1, 0], [0.5, 1.0]):
        with pytest.raises(DataError, match="whole numbers from 0 below 3"):
            rabbet.accuracy(network, [(torch.rand(2, 4), torch.tensor(labels))])


def test_pictures_of_16_bits_and_grey_are_read_as_they_look(tmp_path):
    grey = np.random.default_rng(0).integers(0, 255, (16, 16), dtype=np.uint8)
    for name, values in (("a.png", grey), ("b.png", grey.astype(np.uint16) * 257)):
        Image.fromarray(values).save(tmp_path / name)
    x = next(iter(open_data(f"{tmp_path} {SCALED}", None, "--data")))
    assert torch.equal(x[0], x[1])


def test_arrays_without_names_are_arguments_in_order(tmp_path):
    x, y = np.zeros((5, 4), ">f4"), np.ones((5, 2), np.float32)
    np.savez(tmp_path / "two.npz", x, y)
    inputs = next(iter(open_data(str(tmp_path / "two.npz"), None, "--data")))
    assert [t.shape for t in inputs] == [(5, 4), (5, 2)]
    np.savez(tmp_path / "one.npz", anything=x, labels=np.arange(5))
    (inputs, labels), *_ = open_data(f"{tmp_path / 'one.npz'} limit=3", None, "--test").labelled()
    assert inputs.shape == (3, 4)
    assert labels.tolist() == [0, 2, 4]


@pytest.mark.parametrize(
    "setting",
    ["interpolation=foo", "interpolation=3", "mean=a,b,c", "crop=0", "crop=x", "std=0,0,0"],
)
def test_settings_of_images_are_checked(setting, pictures):
    with pytest.raises(typer.BadParameter, match=setting.partition("=")[0]):
        open_data(f"{pictures} {SCALED} {setting}", None, "--data")


def test_a_batch_norm_without_bias_or_in_training_mode():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    network[1].bias = None
    x = torch.rand(2, 3, 8, 8)
    again = layers_of(torch.export.export(network, (x,)))
    with torch.no_grad():
        assert torch.allclose(again(x), network(x), atol=1e-6)
    bare = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False))
    with pytest.raises(ModelError, match="takes the statistics of the batch"):
        layers_of(torch.export.export(bare, (x,)))


def test_a_bias_that_is_read_elsewhere_stays_where_it_is():
    class Apart(nn.Module):
        def __init__(self):
            super().__init__()
            self.c = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return nn.functional.conv2d(x, self.c.weight) + self.c.bias.view(1, -1, 1, 1)

    network, x = Apart().eval(), torch.rand(2, 3, 8, 8)
    again = layers_of(torch.export.export(network, (x,)))
    with torch.no_grad():
        assert torch.allclose(again(x), network(x), atol=1e-6)
    assert [s.name for s in rabbet.survey(again, [x])] == ["c_2"]


def test_many_arrays_without_names_keep_their_order(tmp_path):
    np.savez(tmp_path / "x.npz", *[np.full((2, 1), k, np.float32) for k in range(12)])
    batch = next(iter(open_data(str(tmp_path / "x.npz"), None, "--data")))
    assert [int(t[0]) for t in batch] == list(range(12))


def test_a_folder_of_hugging_face_is_not_written_over(run, tmp_path):
    config = BertConfig(vocab_size=60, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                        intermediate_size=32, max_position_embeddings=16)  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(tmp_path / "net")
    ids = np.ones((4, 9), np.int64)
    np.savez(tmp_path / "x.npz", input_ids=ids, attention_mask=ids)
    weights = tmp_path / "net" / "model.safetensors"
    before = weights.read_bytes()
    given = (f"hf:{tmp_path / 'net'}", "--data", tmp_path / "x.npz", *QUICK, "--output", weights)
    code, _, err = run("compress", *given)
    assert code == 2
    assert "is read by this command" in err
    assert weights.read_bytes() == before


def test_what_is_no_name_of_anything_says_so(run):
    """A path that is not there, and a network of a library that is named without the library."""
    for arguments, said in (
        (["survey", "rabbet.demo:model", "--data", "nowhere"], "no such file or folder"),
        (["survey", "resnet18", "--data", "nowhere"], "timm:resnet18 or torchvision:resnet18"),
        (["survey", "rabbet.demo:network"], "a folder of images, a .npy or .npz file"),
    ):
        code, _, error = run(*arguments)
        assert code == 2
        assert said in error, error


def test_a_library_that_does_not_fit_is_told_from_one_that_is_missing(monkeypatch):
    def imported(name):
        if name == "timm":
            raise ModuleNotFoundError("No module named 'torchvision'", name="torchvision")
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(importlib, "import_module", imported)
    with pytest.raises(FileError, match=r"timm, which needs torchvision, which is not installed"):
        open_network("timm:resnet18")
    with pytest.raises(FileError, match="built for another torch"):
        open_network("torchvision:resnet18")


def test_completion_ends_well():
    asked = {"_RABBET_COMPLETE": "complete_bash", "COMP_WORDS": "rabbet com", "COMP_CWORD": "1"}
    command = [Path(sys.executable).with_name("rabbet")]
    done = subprocess.run(command, env=os.environ | asked, capture_output=True, check=True)
    assert done.stdout.split() == [b"compress", b"compare"]
