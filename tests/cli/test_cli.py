"""The command line: what each command prints, writes and returns."""

import json
import re
import zlib

import numpy as np
import pytest
from commands import QUICK

import rabbet
from rabbet import demo
from rabbet.cli.texts import worker_of
from rabbet.core.plan import LayerPlan
from rabbet.core.survey import shapes
from rabbet.data.answers import Answers

BUDGET = "bytes <= 10%"


def test_the_version_is_printed(run):
    assert run("--version") == (0, f"rabbet {rabbet.__version__}\n", "")


def test_without_a_command_the_help_is_shown(run):
    _, out, err = run()
    assert "compress" in out
    assert "error" not in err


def test_survey_lists_every_layer(run):
    code, out, err = run("survey")
    assert (code, err) == (0, "")
    for site in rabbet.survey(demo.model(), demo.calibration()):
        line = next(line.split() for line in out.splitlines() if line.startswith(f"{site.name} "))
        assert line[1:4] == [site.kind.name, "x".join(map(str, site.shape)), f"{site.macs:,}"]


def test_macs_are_said_to_be_of_one_example_of_the_first_batch(run, mine, small):
    given = (f"{mine}:net", "--data", f"{mine}:batches")
    of = "of one example as in the first batch, [3, 8, 8]"
    out = run("survey", *given)[1]
    assert f"\nMACs: {of}\n" in out
    err = run("plan", *given, "--budget", "bits <= 3", *QUICK)[2]
    assert f"\nMACs and BOPs: {of}\n" in err
    assert json.loads(run("survey", *given, "--json")[1])["example"] == [[3, 8, 8]]
    stored = run("show", small)[1]
    known = "MACs and BOPs: of one example, as in the first batch it was compressed with"
    assert known in stored.splitlines()
    assert json.loads(run("show", small, "--json")[1])["example"] is None
    assert max(map(len, (out + err + stored).splitlines())) <= 80


def test_many_inputs_are_named_by_the_first_of_them():
    words, image = (37,), (3, 224, 224)
    assert shapes([words, words]) == "[37]"
    assert shapes([words, image]) == "[37] and [3, 224, 224]"
    assert shapes([image, words, (77, 768), (5,)]) == "[3, 224, 224] and 3 more"


def test_survey_says_what_is_left_alone_and_why(run, mine):
    given = (f"{mine}:left", "--data", f"{mine}:nines")
    code, out, _ = run("survey", *given)
    assert code == 0
    assert "left alone: 1 (72 bytes): tensors too small to be worth a line" in out
    facts = json.loads(run("survey", *given, "--json")[1])
    assert [site["name"] for site in facts["sites"]] == ["0"]
    assert facts["left"][0]["bytes"] == 72


def test_plan_prints_the_plan_and_nothing_else(run, kept, tmp_path):
    code, out, err = run(
        "plan", "--out", tmp_path / "new" / "plan.txt", "--budget", BUDGET, "--resume", kept, *QUICK
    )
    assert code == 0
    assert str(rabbet.Plan.parse(out)) + "\n" == out == (tmp_path / "new" / "plan.txt").read_text()
    assert "allowed" in err


def test_a_method_is_named_with_its_settings(run, kept):
    method = "cora bits=3 ranking.steps=3"
    code, out, _ = run("plan", "--budget", "bits <= 3.5", "--method", method, "--resume", kept)
    assert code == 0
    plan = rabbet.Plan.parse(out)
    assert {str(line.terms[0]) for line in plan} == {"dense@3c"}
    assert any(len(line.terms) > 1 for line in plan)


def test_plan_as_json_has_plan_and_cost(run, kept):
    code, out, err = run("plan", "--budget", "bits <= 3", "--resume", kept, *QUICK, "--json")
    facts = json.loads(out)
    assert (code, err) == (0, "")
    assert len(rabbet.Plan.parse(facts["plan"])) == len(facts["layers"])
    assert facts["cost"]["bits"] <= 3
    assert facts["budget"] == "bits <= 3"


@pytest.mark.slow
def test_compress_needs_nothing_but_a_file_to_write(run, tmp_path):
    path = tmp_path / "build" / "deep" / "digits.safetensors"
    code, out, err = run("compress", "--output", path, "--quality", "fast")
    assert (code, err) == (0, "")
    assert f"{path}: {path.stat().st_size:,} bytes" in out
    assert path.stat().st_size <= 0.1 * 77_456
    assert "accuracy: 99.33% ± 0.49 -> " in out
    assert len(list(path.parent.iterdir())) == 1


@pytest.mark.slow
def test_compress_as_json_tells_what_was_measured_on_the_file(run, kept, tmp_path):
    path = tmp_path / "a.safetensors"
    code, out, err = run(
        "compress", "--output", path, "--budget", "bits <= 2.2", "--resume", kept, *QUICK, "--json"
    )
    facts = json.loads(out)
    assert (code, err) == (0, "")
    assert facts["bytes"] == facts["cost"]["bytes"] == path.stat().st_size
    assert facts["cost"]["bits"] <= 2.2
    net = rabbet.load(path, demo.model())
    assert facts["evaluation"]["after"] == rabbet.accuracy(net, demo.test())
    assert facts["evaluation"]["before"] == rabbet.accuracy(demo.model(), demo.test())


@pytest.mark.slow
def test_a_plan_can_be_edited_and_fitted(run, kept, tmp_path):
    text = run("plan", "--resume", kept, *QUICK)[1]
    edited = rabbet.Plan.parse(text).with_layer(LayerPlan.parse("stem.0 dense@5c | act@8"))
    assert str(edited) + "\n" != text
    (tmp_path / "plan.txt").write_text(f"# by hand\n{edited}\n")
    path = tmp_path / "a.safetensors"
    code, out, _ = run(
        "compress", "--plan", tmp_path / "plan.txt", "--output", path, "--resume", kept, *QUICK
    )
    assert code == 0
    assert "allowed" not in out
    assert json.loads(run("show", path, "--json")[1])["plan"] == str(edited)


def test_a_plan_over_the_budget_is_refused_before_anything_is_solved(
    run, kept, tmp_path, monkeypatch
):
    (tmp_path / "plan.txt").write_text("stem.0 dense@8c | act@8\n")
    monkeypatch.setattr(rabbet.Joint, "fit", lambda *_: pytest.fail("solved"))
    given = ("--plan", tmp_path / "plan.txt", "--budget", BUDGET)
    code, out, err = run("compress", *given, "-o", tmp_path / "a.safetensors", *QUICK)
    assert (code, out) == (1, "")
    assert err.startswith("error: 'bytes <= 10%' allows 7,745 bytes")
    assert not (tmp_path / "a.safetensors").exists()


@pytest.mark.slow
def test_a_plan_within_the_budget_is_fitted(run, kept, tmp_path):
    (tmp_path / "plan.txt").write_text(run("plan", "--resume", kept, *QUICK)[1])
    given = ("--plan", tmp_path / "plan.txt", "--budget", BUDGET, "--resume", kept)
    code, out, _ = run("compress", *given, "--output", tmp_path / "a.safetensors", *QUICK, "--json")
    assert code == 0
    assert json.loads(out)["budget"] == BUDGET


def test_show_needs_no_network(run, small):
    code, out, err = run("show", small)
    assert (code, err) == (0, "")
    assert "dense@" in out
    facts = json.loads(run("show", small, "--json")[1])
    assert facts["cost"]["bytes"] == small.stat().st_size
    result = rabbet.compress(demo.model(), BUDGET, demo.calibration(), worker_of(QUICK[1]))
    assert facts["plan"] == str(result.plan)
    assert facts["cost"]["bops"] == result.cost.bops
    assert facts["float"]["bytes"] == result.float_cost.bytes


def test_check_tells_by_exit_code_whether_a_file_is_within_a_budget(run, small):
    size = small.stat().st_size
    code, out, _ = run("check", small, "--budget", f"bytes <= {size + 3}")
    assert (code, out) == (
        0,
        f"bytes <= {size + 3}: {size:,} of {size + 3:,} bytes, within, 3 to spare\n",
    )
    code, out, err = run("check", small, "--budget", f"bits <= 8, bytes <= {size - 1}")
    assert (code, err) == (1, "")
    assert "OVER by 1" in out
    code, out, _ = run("check", small, "--budget", f"bytes <= {size - 7}", "--json")
    facts = json.loads(out)
    assert (code, facts["within"], facts["limits"][0]["over"]) == (1, False, 7)


def test_check_counts_the_bytes_on_disk(run, small, tmp_path):
    longer = tmp_path / "longer.safetensors"
    content = small.read_bytes()
    length = int.from_bytes(content[:8], "little")
    # the header may end in any number of spaces: the file is whole, and longer than its plan needs
    whole = b"".join(
        (
            (length + 800).to_bytes(8, "little"),
            content[8:34],
            b"00000000",  # where the checksum stands
            content[42 : 8 + length],
            b" " * 800,
            content[8 + length :],
        )
    )
    longer.write_bytes(whole[:34] + b"%08x" % zlib.crc32(whole) + whole[42:])
    assert run("check", longer, "--budget", f"bytes <= {len(content)}")[0] == 1
    assert run("check", longer, "--budget", f"bytes <= {len(content) + 800}")[0] == 0


def test_a_flipped_bit_is_found_without_the_network(run, small, tmp_path):
    content = small.read_bytes()
    damaged = tmp_path / "damaged.safetensors"
    for at in (20, 40, 300, len(content) // 2, len(content) - 1):
        damaged.write_bytes(content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :])
        for command in (("show",), ("check", "--budget", BUDGET), ("compare", small)):
            code, out, err = run(*command, damaged)
            assert (code, out) == (2, "")
            assert "damaged" in err


@pytest.mark.parametrize("cut", [4, 1000, -1])
def test_a_damaged_file_is_exit_code_2(run, small, tmp_path, cut):
    (tmp_path / "cut.safetensors").write_bytes(small.read_bytes()[:cut])
    for command in (("show",), ("check", "--budget", BUDGET)):
        code, out, err = run(*command, tmp_path / "cut.safetensors")
        assert (code, out) == (2, "")
        assert err.startswith("error: ")
        assert "damaged" in err


@pytest.mark.slow
def test_compare_shows_costs_accuracy_and_where_plans_differ(run, small, kept, tmp_path):
    other = tmp_path / "other.safetensors"
    assert (
        run("compress", "--output", other, "--budget", "bits <= 2", "--resume", kept, *QUICK)[0]
        == 0
    )
    code, out, err = run("compare", small, other, "--model", "rabbet.demo:model")
    assert (code, err) == (0, "")
    assert f"{small.stat().st_size:,}" in out
    assert "accuracy" in out
    facts = json.loads(run("compare", small, other, "--json")[1])
    assert [f["cost"]["bytes"] for f in facts["files"]] == [
        p.stat().st_size for p in (small, other)
    ]
    plans = [
        rabbet.Plan.parse(json.loads(run("show", p, "--json")[1])["plan"]) for p in (small, other)
    ]
    differing = {a.name: [a.body, b.body] for a, b in zip(*plans, strict=True) if a != b}
    assert {d["layer"]: d["plans"] for d in facts["differences"]} == differing != {}


def test_compare_says_when_plans_are_the_same(run, small):
    assert "the plans are the same" in run("compare", small, small)[1]


def test_compare_of_different_networks_tells_a_kept_layer_from_one_that_is_not_there(
    run, small, mine, tmp_path
):
    (tmp_path / "plan.txt").write_text("0 dense@4c")
    own = (f"{mine}:net", "--data", f"{mine}:batches", "--plan", tmp_path / "plan.txt", *QUICK)
    assert run("compress", *own, "--output", tmp_path / "a.safetensors")[0] == 0
    differences = json.loads(run("compare", tmp_path / "a.safetensors", small, "--json")[1])[
        "differences"
    ]
    by_name = {d["layer"]: d["plans"] for d in differences}
    assert by_name["0"] == ["dense@4c", "not in this file"]
    assert by_name["3"] == ["kept as it is", "not in this file"]
    assert by_name["head"][0] == "not in this file"


@pytest.mark.parametrize("test", ["labelled", "judge"])
def test_a_network_of_the_user_is_found_as_module_and_as_file(run, mine, tmp_path, test):
    given = (
        "--data",
        f"{mine}:batches",
        "--test",
        f"{mine}:{test}",
        "--budget",
        "bytes <= 25%",
        *QUICK,
    )
    code, out, err = run(
        "compress", f"{mine}.py:net", *given, "--output", "a.safetensors", "--json"
    )
    assert (code, err) == (0, "")
    facts = json.loads(out)["evaluation"]
    assert facts["quantity"] == {"labelled": "accuracy", "judge": "evaluation"}[test]
    assert isinstance(facts["before"], float)
    assert isinstance(facts["after"], float)


def test_a_task_brings_its_own_evaluation(run, mine):
    given = (f"{mine}:net", "--data", f"{mine}:task", "--budget", "bytes <= 25%", *QUICK)
    code, out, _ = run("compress", *given, "--output", "a.safetensors")
    assert code == 0
    assert "evaluation: " in out


@pytest.mark.parametrize("data", ["batches", "nines.npy"])
@pytest.mark.parametrize(
    "command", ["plan", "compress -o a.safetensors", "frontier --axis macs", "sweep"]
)
def test_what_outputs_are_can_be_said(run, mine, tmp_path, monkeypatch, command, data):
    np.save(tmp_path / "nines.npy", np.random.default_rng(0).random((32, 3, 8, 8), np.float32))
    data = f"{mine}:{data}" if data == "batches" else str(tmp_path / data)
    given = (f"{mine}:net", "--data", data, "--budget", "bytes <= 25%", *QUICK)
    told, said = set[tuple[bool, str]](), Answers.of

    def watched(*args):
        found = said(*args)
        told.update((found.declared, kind) for kind in found.kinds)
        return found

    monkeypatch.setattr(Answers, "of", watched)
    code, _, err = run(*command.split(), *given, "--outputs", "scores")
    assert code == 0, err
    assert told == {(True, "scores")}


def test_layers_with_odd_names_are_shown_as_they_are(run, mine):
    code, out, _ = run("survey", f"{mine}:odd", "--data", f"{mine}:nines")
    assert code == 0
    assert '"[red]a b"' in out


def test_progress_goes_to_stderr_now_and_then_where_there_is_no_terminal(run, mine, monkeypatch):
    given = (f"{mine}:net", "--data", f"{mine}:batches", "--budget", "bytes <= 25%", *QUICK)
    assert run("compress", *given, "--output", "a.safetensors")[2] == ""
    monkeypatch.setattr("rabbet.cli.terminal.EVERY", 0.0)
    err = run("compress", *given, "--output", "a.safetensors")[2]
    assert re.search(r"solving layers: 100 %, (\d+) of \1\b", err)
    assert run("compress", *given, "--output", "a.safetensors", "--json")[2] == ""


def test_a_file_that_is_replaced_is_said_to_be(run, mine):
    given = (f"{mine}:net", "--data", f"{mine}:batches", "--budget", "bytes <= 25%", *QUICK)
    assert "in place of" not in run("compress", *given, "--output", "a.safetensors")[1]
    assert (
        "bytes, in place of an older file"
        in run("compress", *given, "--output", "a.safetensors")[1]
    )


def test_the_report_ends_in_a_sentence(run, mine):
    given = (f"{mine}:net", "--data", f"{mine}:batches", "--budget", "bytes <= 25%", *QUICK)
    out = run("compress", *given, "--test", f"{mine}:labelled", "--output", "a.safetensors")[1]
    last = out.splitlines()[-1]
    assert "x smaller than float32; " in last
    assert " on 32 examples, within what so many can tell (two standard errors are " in last
