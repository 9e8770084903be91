"""Files for runtimes on the command line: export, eval, bench."""

import json
import sys

import pytest
from commands import QUICK

import rabbet
from rabbet import demo
from rabbet.cli import timing
from rabbet.runtime.bench import plain_int8
from rabbet.runtime.session import KERNELS, kernels


@pytest.fixture(scope="module")
def exported(small, tmp_path_factory):
    """The demo network's file for onnxruntime, and the float one."""
    from rabbet.cli import main

    folder = tmp_path_factory.mktemp("exported")
    assert (
        main(
            [
                "export",
                str(small),
                "--output",
                str(folder / "s.onnx"),
                "--float",
                str(folder / "float.onnx"),
            ]
        )
        == 0
    )
    return folder


def test_export_writes_a_file_that_runs_on_integer_kernels_and_the_float_one(run, small, tmp_path):
    path, whole = tmp_path / "new" / "s.onnx", tmp_path / "float.onnx"
    code, out, err = run("export", small, "--output", path, "--float", whole)
    assert (code, err) == (0, "")
    for written in (path, whole):
        assert f"{written}: {written.stat().st_size:,} bytes" in out
    assert set(kernels(path).values()) <= set(KERNELS)
    assert not set(kernels(whole).values()) & set(KERNELS)


def test_export_takes_a_target_and_answers_in_json(run, small, tmp_path):
    code, out, _ = run(
        "export", small, "--output", tmp_path / "s.onnx", "--target", "openvino", "--json"
    )
    facts = json.loads(out)
    assert code == 0
    assert (facts["target"], facts["notes"]) == ("openvino", [])
    assert facts["files"] == {str(tmp_path / "s.onnx"): (tmp_path / "s.onnx").stat().st_size}


def test_eval_measures_any_file_that_is_written(run, small, exported, tmp_path):
    assert run("export", small, "--output", tmp_path / "s.pt2")[0] == 0
    for path in (small, exported / "s.onnx", tmp_path / "s.pt2"):
        code, out, err = run("eval", path)
        assert (code, err) == (0, "")
        assert out.startswith(f"{path}: accuracy 9")
    value = json.loads(run("eval", exported / "s.onnx", "--json")[1])["value"]
    assert value == rabbet.accuracy(rabbet.Session(exported / "s.onnx"), demo.test())


@pytest.mark.slow
def test_compress_writes_for_a_runtime_and_says_how_good_that_file_is(run, kept, tmp_path):
    arguments = (*QUICK, "--resume", kept)
    code, out, _ = run("compress", "--output", tmp_path / "s.onnx", *arguments)
    assert code == 0
    after = rabbet.accuracy(rabbet.Session(tmp_path / "s.onnx"), demo.test())
    assert f"-> {after:.2f}%" in out


def test_bench_times_files_in_turn_and_counts_kernels(run, exported):
    code, out, err = run(
        "bench",
        exported / "s.onnx",
        "--against",
        exported / "float.onnx",
        "--batch",
        4,
        "--runs",
        2,
    )
    assert (code, err) == (0, "")
    rows = [line for line in out.splitlines() if "onnx" in line and " of " in line]
    assert len(rows) == 6  # two files and the plain int8 one, at two sizes
    assert "1.00x" in out
    assert "one example as in the first batch: [1, 8, 8]" in out
    facts = json.loads(run("bench", exported / "s.onnx", "--runs", 2, "--json")[1])
    (file,) = facts["files"]
    assert file["times"]["1"]["p95"] >= file["times"]["1"]["median"] > 0
    assert facts["float layers"] == []
    assert {"processor", "instructions", "threads", "onnxruntime"} <= facts["machine"].keys()


def test_what_the_plain_quantiser_warns_of_stays_off_the_terminal(run, exported, monkeypatch):
    def warning(*given):
        print("Axis 1 is out-of-range", file=sys.stderr)
        return plain_int8(*given)

    monkeypatch.setattr(timing, "plain_int8", warning)
    files = exported / "s.onnx", "--against", exported / "float.onnx"
    code, out, err = run("bench", *files, "--runs", 1)
    assert (code, err) == (0, "")
    assert "plain int8 of onnxruntime" in out


def test_bench_says_that_batches_which_are_one_example_are_not_joined(run, exported, tmp_path):
    text = "from rabbet import Task, demo\ndata = lambda: Task(demo.calibration(), axes=())\n"
    (tmp_path / "nets.py").write_text(text)
    data = ("--data", f"{tmp_path / 'nets.py'}:data", "--runs", 2)
    code, out, _ = run("bench", exported / "s.onnx", "--batch", 4, *data)
    assert code == 0
    assert "no batch of 4: a batch of these data is one example" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("export", "SMALL", "--output", "x.xyz"), "must end in one of .safetensors, .onnx, .pt2"),
        (
            ("export", "SMALL", "--output", "x.onnx", "--target", "tflite"),
            "the targets are safetensors, onnx",
        ),
        (("export", "none.safetensors", "--output", "x.onnx"), "there is no file"),
        (("eval", "none.onnx"), "there is no file or folder none.onnx"),
        (("eval", "SMALL", "--model", "rabbet.demo:DigitsNet"), "say what to measure with"),
        (("bench", "SMALL"), "is not an .onnx file"),
        (("bench", "none.onnx"), "there is no file none.onnx"),
    ],
)
def test_a_mistake_is_one_line(run, small, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*(small if a == "SMALL" else a for a in arguments))
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert words in err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_budget_of_bytes_is_of_the_file_for_the_target(run, tmp_path):
    path = tmp_path / "s.onnx"
    asked = ("--budget", "bytes <= 30%", "--target", "onnx", *QUICK)
    code, out, _ = run("compress", "--output", path, *asked, "--json")
    facts = json.loads(out)
    assert code == 0
    assert facts["budget"] == "onnx <= 30%"
    assert facts["float"]["onnx"] == facts["float"]["bytes"]
    most = 0.3 * facts["float"]["bytes"]
    assert facts["bytes"] == path.stat().st_size <= facts["cost"]["onnx"] <= most
    assert facts["cost"]["openvino"] == facts["float"]["openvino"] == 0
    code, out, err = run("plan", *asked)
    assert (code, out.strip()) == (0, facts["plan"].strip())
    assert f"onnx    {facts['cost']['onnx']:,}" in " ".join(err.split()).replace(
        "onnx ", "onnx    "
    )


@pytest.mark.slow
def test_a_plan_whose_exported_file_is_too_long_is_refused_before_it_is_fitted(run, tmp_path):
    plan = tmp_path / "a.plan"
    assert run("plan", "--budget", "bits <= 8", "--out", plan, *QUICK)[0] == 0
    wish = ("compress", "--output", tmp_path / "s.onnx", "--plan", plan)
    code, _, err = run(*wish, "--budget", "onnx <= 10%")
    assert code == 1
    assert "bytes of the onnx file" in err
    assert not (tmp_path / "s.onnx").exists()
