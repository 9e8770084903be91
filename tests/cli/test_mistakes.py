"""The command line: a mistake is one line, an exit code, and no file."""

import shlex

import pytest
from commands import QUICK

from rabbet.errors import ModelError
from rabbet.export import EXPORTS

MISTAKES = {
    "survey mine_of_user:nett --data mine_of_user:batches": "has no 'nett'; did you mean net?",
    "survey mine_of_usr:net --data mine_of_user:batches": "no module 'mine_of_usr'",
    "survey mine_of_usr.py:net --data mine_of_user:batches": "did you mean mine_of_user.py?",
    "survey rabbet.dem:model --data rabbet.demo:test": "'rabbet.dem' in rabbet; did you mean demo?",
    "survey mine_of_user --data mine_of_user:batches": "module:callable",
    "survey mine_of_user:net": "needs batches",
    "survey mine_of_user:broken --data mine_of_user:batches": "AttributeError",
    "survey mine_of_user:number --data mine_of_user:batches": "gives int, not a torch.nn.Module",
    "survey mine_of_user:net --data mine_of_user:number": "found int",
    "survey mine_of_user:net --data mine_of_user:labelled": "does not run on a batch",
    "survey mine_of_user:net --data rabbet.demo:calibration": "does not run on a batch",
    "survey imports_nothing:net --data mine_of_user:batches": "No module named 'not_there_at_all'",
    "compress --output a.safetensors --test mine_of_user:number": "gives int, not batches",
    "compress --output a.safetensors --test mine_of_user:unlabelled": "labels), found float32",
    "compress --output a.onnxx": ".safetensors",
    "compress --output mine_of_user.py/a.safetensors": "is not a folder",
    "plan --out mine_of_user.py/a.plan": "is not a folder",
    "compress --output a.safetensors --resume mine_of_user.py/work": "cannot be kept in",
    "compress --output a.safetensors --quality superb": "fast, default, best",
    "compress --output a.safetensors --plan nowhere.txt": "cannot be read",
    "compress --output a.safetensors --plan mine_of_user.py": "mine_of_user.py: 'import torch':",
    "compress --output a.safetensors --jobs 0": "jobs",
    "compress --output a.safetensors --method cora --quality fast": "setting of the method Joint",
    "plan --method cola": "one of joint, admm, cora",
    "plan --method 'cgmq.paper bit=3'": "'bit' is no setting; there are start",
    "plan --method 'cora bit=3'": "'bit' is no setting; there are bits",
    "plan --method 'joint forms=cp'": "forms is (a text, ...); found 'cp'",
    "plan --method 'cora act=high'": "act is a whole number or None; found 'high'",
    "plan --method 'cora bits=three'": "bits is a whole number; found 'three'",
    "plan --method 'cora bits.of=3'": "'of' is no setting; there are none",
    "plan --method 'cora base=soft'": "one of 'feedback', 'clipped'; found 'soft'",
    "plan --method 'cora ranking.steps=0'": "at least 1",
    "plan --method ''": "'' is not one of",
    "plan --method 'joint forms=(\"cpp\",)'": "found 'cpp'",
    "plan --method 'joint adapters=(\"2hc\",)'": "adapters is ((a text, a finite number), ...)",
    "compress --output a.safetensors --plan good.plan --budget 'latency <= 5 ms'": "rabbet bench",
    "check a.safetensors --budget 'latency <= 5 ms'": "rabbet bench",
    "compress --output a.safetensors --axis macs": "only a --drop looks for the least along it",
    "compress --output a.safetensors --held mine_of_user:labelled": "only a --drop is measured",
    "compress --output a.safetensors --drop 0.5%": "points of an accuracy",
    "compress --output a.safetensors --drop 1 --plan good.plan": "nothing to look for",
    "compress --output a.safetensors --drop 1 --budget bytes<=5%": "bytes is the axis",
    "compress --output a.safetensors --drop 1 --held a:b --test a:b": "a:b is the --test as well",
    "compress --output a.safetensors --drop 1 --held mine_of_user:nett": "--held: mine_of_user",
    "frontier mine_of_user:net --data mine_of_user:batches --measure 2": "networks are measured on",
    "frontier --axis size": "one of bytes, macs",
    "frontier --budget bytes<=5%": "bytes is the axis",
    "frontier --held mine_of_user:labelled": "with --measure",
    "frontier --measure 1": "two points or more",
    "frontier --measure 2 --held mine_of_user:unlabelled": "labels), found float32",
    "frontier --limits ten 30%": "'bytes <= ten' is not a budget",
    "frontier --html page.htmx": "must end in .html",
    "sweep --set bits": "such as 'bits=2;3;4'",
    "sweep --set bits=2": "'bits' is no setting; there are grids",
    "sweep --set act=none": "act is a whole number or None; found 'none'",
    "sweep --plot picture": "what kind of picture",
    "plan --outputs score": "'score' is not one of scores, values",
    "plan mine_of_user:net --data mine_of_user:scored --outputs values": "says outputs='scores'",
    "compress hf:. --output small --outputs scores": "no such option",
    "check a.safetensors --budget 'onnx <= 5 MB'": "rabbet export",
    "compress --output a.safetensors --target onnx": "not for onnx",
    "compress --output a.onnx --target tflite": "is not one of safetensors, onnx",
    "plan --target torch --budget 'bytes <= 5%'": "there are safetensors, onnx, openvino",
    "export a.safetensors --output a.onnx --float a.onnx": "not be the --output itself",
    "export a.safetensors --output a.onnx --float b.pt2": "must end in .onnx",
    "survey mine_of_user:net --data mine_of_user:with_nan": "holds NaN",
    "survey mine_of_user:net --data mine_of_user:breaking": "ZeroDivisionError: integer division",
    "survey ''": "module:callable",
    "survey mine_of_user:net --data ''": "module:callable",
    "compress --output a.safetensors --plan good.plan --budget ''": "is not a budget",
    "compress --output a.safetensors --budget ''": "is not a budget",
    "compress --output a.safetensors --seed 99999999999": "seed",
    "eval mine_of_user.pt2 --test mine_of_user:labelled": "is damaged or not a program",
    "compress": "--output",
    "plan --budget bytes>3": "is not a budget",
    "check nowhere.safetensors --budget bytes<=3": "there is no file",
    "check mine_of_user.py --budget bytes<=3": "not a rabbet file",
    "check . --budget bytes<=3": "a folder without a native file",
    "compare nowhere.safetensors": "at least two files",
    "show --bogus": "--bogus",
    "frobnicate": "frobnicate",
}


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(run, mine, tmp_path, line):
    (tmp_path / "imports_nothing.py").write_text("import not_there_at_all\n")
    (tmp_path / "mine_of_user.pt2").write_text("no program")
    (tmp_path / "good.plan").write_text("head dense@8c\n")
    code, out, err = run(*shlex.split(line))
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert MISTAKES[line] in err
    assert not (tmp_path / "a.safetensors").exists()


@pytest.mark.parametrize(
    "command", ["plan", "compress --output a.safetensors", "compress --output a.safetensors --json"]
)
def test_a_budget_that_cannot_be_met_is_exit_code_1(run, mine, tmp_path, command):
    code, out, err = run(*command.split(), "--budget", "bytes <= 1%")
    assert (code, out) == (1, "")
    assert err.startswith("error: ")
    assert "smallest reachable value" in err
    assert err.count("\n") == 1
    assert not (tmp_path / "a.safetensors").exists()


HOSTILE = """
import torch
from torch import nn

class Raising(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.calls = nn.Linear(9, 9), 0

    def forward(self, x):
        raise KeyError("no such \\n key")

class Deciding(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(9, 9)

    def forward(self, x):
        y = self.a(x)
        return y if float(y.sum()) > 0 else -y

def raising():
    return Raising()

def deciding():
    return Deciding()

def nines():
    return [torch.rand(8, 9)]
"""


def test_an_error_of_a_forward_is_one_line_with_its_place(run, tmp_path, monkeypatch):
    (tmp_path / "hostile_nets.py").write_text(HOSTILE)
    monkeypatch.chdir(tmp_path)
    code, out, err = run("survey", "hostile_nets.py:raising", "--data", "hostile_nets.py:nines")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: KeyError: ")
    assert "raised in the forward: the model does not run on a batch of float32[8, 9]" in err


def test_a_network_that_cannot_be_exported_is_refused_before_any_work(run, tmp_path, monkeypatch):
    (tmp_path / "hostile_nets.py").write_text(HOSTILE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("rabbet.jobs.Jobs.run", lambda *_: pytest.fail("work was done"))
    names = ("hostile_nets.py:deciding", "--data", "hostile_nets.py:nines", "--budget", "bits <= 8")
    code, _, err = run("compress", *names, "--output", "a.onnx")
    assert (code, err.count("\n")) == (2, 1)
    assert "torch cannot export this network to ONNX" in err


@pytest.mark.slow
def test_an_export_that_fails_in_the_end_leaves_the_native_file(run, kept, tmp_path, monkeypatch):
    def broken(*_):
        raise ModelError("the runtime is broken")

    monkeypatch.setitem(EXPORTS, "torch", broken)
    target = tmp_path / "a.pt2"
    arguments = (*QUICK, "--resume", str(kept), "--output", str(target))
    code, _, err = run("compress", *arguments)
    assert code == 2
    spare = tmp_path / "a.pt2.safetensors"
    assert f"the runtime is broken; the compressed network is kept in {spare}" in err
    monkeypatch.undo()
    assert run("export", str(spare), "--output", str(target))[0] == 0
    spare.unlink()
    assert run("compress", *arguments)[0] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt2"]
