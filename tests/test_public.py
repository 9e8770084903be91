"""The public interface: which names there are, what importing them costs, what first calls say."""

import ast
import inspect
import itertools
import pkgutil
import subprocess
import sys
import textwrap
from dataclasses import fields, is_dataclass, replace
from importlib import import_module
from pathlib import Path

import pytest
import torch
from networks import rand

import rabbet
from rabbet import demo
from rabbet.cli import main, options
from rabbet.errors import DataError, PlanError
from rabbet.export import EXPORTS
from rabbet.methods import METHODS, QUALITY, method_of
from rabbet.train.tuning import Tuning

PUBLIC = {
    "ADMM", "Blockwise", "Budget", "CGMQ", "CoRa", "Frontier", "Jobs", "Joint", "Plan",
    "RabbetError", "Result", "Session", "Sweep", "TTQAT", "Task", "accuracy", "compress",
    "fit", "frontier", "load",
    "open_attention", "plan", "price", "survey", "sweep",
}  # fmt: skip
PLAN = "stem.0 dense@4c | act@8\nhead dense@8c | act@8"


@pytest.fixture(scope="module")
def fitted():
    """The demo network, two of its layers compressed."""
    return rabbet.fit(demo.model(), PLAN, demo.calibration(), quality="fast")


def test_the_public_names_are_these():
    assert set(rabbet.__all__) == PUBLIC
    assert len(rabbet.__all__) == len(PUBLIC)
    assert set(dir(rabbet)) >= PUBLIC
    for name in PUBLIC:
        doc = getattr(rabbet, name).__doc__
        assert doc is not None
        assert not doc.startswith(f"{name}("), f"{name} has no docstring of its own"


def test_no_public_name_hides_a_module():
    modules = {module.name for module in pkgutil.iter_modules(rabbet.__path__)}
    assert not modules & PUBLIC


def test_an_unknown_name_is_not_an_attribute():
    with pytest.raises(AttributeError, match="rabbet"):
        rabbet.Grid  # noqa: B018


def test_a_type_checker_sees_what_a_program_gets():
    tree = ast.parse(Path(rabbet.__file__).read_text())
    (typing,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in typing.body for alias in node.names}
    assert seen == rabbet._PLACES
    for name, module in seen.items():
        assert getattr(rabbet, name) is getattr(import_module(module), name)
        assert getattr(rabbet, name).__module__ == module, "the table names where it is written"


def _imported(program):
    """The modules that a program has imported at its end."""
    program += "\nimport sys; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    return set(done.stdout.splitlines()[-1].split())


def test_the_command_line_starts_without_what_is_slow():
    program = (
        "from rabbet.cli import main\nassert main(['--help']) == main(['compress', '--help']) == 0"
    )
    assert not _imported(program) & {"torch", "numpy", "scipy", "rabbet._api", "rabbet.methods"}


def test_compress_is_imported_without_what_only_some_runs_need():
    names = _imported("import rabbet\nrabbet.compress")
    assert "torch" in names
    optional = {"onnx", "onnxruntime", "onnxscript", "openvino", "transformers", "sklearn"}
    assert not names & (optional | {"matplotlib", "scipy", "rich", "typer"})


def test_the_help_names_what_there_is():
    assert list(METHODS) == list(options.METHODS)
    assert list(EXPORTS) == list(options.TARGETS)
    assert list(QUALITY) == list(options.QUALITIES)


@pytest.mark.parametrize("call", [rabbet.compress, rabbet.plan, rabbet.fit])
def test_options_are_given_by_name_and_mean_the_same_everywhere(call):
    parameters = inspect.signature(call).parameters
    # a plan that is given is of no target
    options = ["quality", "seed", "jobs", *([] if call is rabbet.fit else ["target"])]
    assert list(parameters)[2:] == ["data", "method", *options]
    by_name = [p.name for p in parameters.values() if p.kind is p.KEYWORD_ONLY]
    assert by_name == options


@pytest.mark.slow
def test_a_quality_is_the_default_method_with_another_tuning(fitted):
    assert [method_of(None, name) for name in QUALITY] == list(QUALITY.values())
    assert method_of(rabbet.Joint(), "best") == QUALITY["best"]
    assert method_of(None) == rabbet.Joint()
    same = rabbet.fit(demo.model(), PLAN, demo.calibration(), QUALITY["fast"])
    assert fitted.notes == same.notes
    pairs = zip(fitted.model.state_dict().values(), same.model.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_quality_sets_the_tuning_of_a_joint_that_leaves_it_open():
    method = rabbet.Joint(act=None, rank=False)
    assert method_of(method, "fast") == replace(method, tuning=Tuning(steps=0))
    assert method_of(replace(method, tuning=Tuning(steps=0)), "fast").tuning == Tuning(steps=0)


@pytest.mark.parametrize(
    ("method", "why"),
    [
        (rabbet.CoRa(), "is a setting of the method Joint; leave it out"),
        (rabbet.Joint(tuning=Tuning(steps=3)), "says how long Joint tunes, and so does its tuning"),
    ],
)
@pytest.mark.parametrize("call", ["compress", "plan", "fit"])
def test_a_quality_beside_what_has_none_or_its_own_is_refused(call, method, why):
    work = PLAN if call == "fit" else "bits <= 4"
    with pytest.raises(PlanError, match=f"quality='fast' {why}"):
        getattr(rabbet, call)(demo.model(), work, demo.calibration(), method, quality="fast")


@pytest.mark.parametrize("quality", ["superb", None, 3, ["fast"]])
def test_an_unknown_quality_is_refused(quality):
    with pytest.raises(PlanError, match="quality is one of 'fast', 'default', 'best'; found"):
        rabbet.compress(demo.model(), "bits <= 4", demo.calibration(), quality=quality)


def of_file(result):
    """A result without what its file does not hold: notes, errors, the shape of an example."""
    return replace(result, notes=(), errors={}, survey=replace(result.survey, example=()))


@pytest.mark.slow
def test_a_result_comes_back_from_its_file(fitted, tmp_path):
    fitted.save(tmp_path / "a.safetensors")
    again = rabbet.Result.load(tmp_path / "a.safetensors", demo.model(), demo.calibration())
    assert again.plan == fitted.plan
    assert (again.cost, again.float_cost) == (fitted.cost, fitted.float_cost)
    assert again.save(tmp_path / "b.safetensors") == fitted.cost.bytes
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert str(again) == str(of_file(fitted))
    with pytest.raises(DataError, match="iterable of batches"):
        rabbet.Result.load(tmp_path / "a.safetensors", demo.model(), 7)


def test_a_survey_takes_data_as_all_others_do():
    model = torch.nn.Sequential(torch.nn.Linear(4, 3))
    of_list = rabbet.survey(model, [rand(2, 4), rand(2, 4)])
    assert of_list == rabbet.survey(model, (rand(2, 4) for _ in range(2)))
    task = rabbet.Task([{"x": rand(2, 4)}], forward=lambda m, batch: m(batch["x"]))
    assert of_list == rabbet.survey(model, task)
    assert [site.name for site in of_list] == ["0"]
    with pytest.raises(DataError, match=r"for one batch write \[batch\]"):
        rabbet.survey(model, rand(2, 4))


def test_python_and_the_command_line_say_the_same(fitted, tmp_path, capsys):
    fitted.save(tmp_path / "a.safetensors")
    assert main(["show", str(tmp_path / "a.safetensors")]) == 0
    shown = capsys.readouterr().out.splitlines()
    text = str(of_file(fitted)).splitlines()
    assert [line.split() for line in shown] == [line.split() for line in text]


def _settings(kind):
    """A dataclass, those that it inherits from and those that its fields hold."""
    classes = [c for c in kind.__mro__ if is_dataclass(c)]
    held = [type(getattr(kind(), f.name)) for f in fields(kind)]
    return [*classes, *(c for one in held if is_dataclass(one) for c in _settings(one))]


@pytest.mark.parametrize("name", METHODS)
def test_every_setting_has_a_line_of_documentation_where_it_stands(name):
    for settings in _settings(METHODS[name]):
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(settings))).body
        for field, text in itertools.pairwise(tree.body):
            if isinstance(field, ast.AnnAssign):
                documented = isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
                assert documented, f"{settings.__name__}.{ast.unparse(field.target)}"
