"""Every benchmark finds what it imports: scripts that nobody runs for months still start."""

import ast
import importlib
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_every_name_that_a_benchmark_takes_from_rabbet_is_there(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "rabbet":
            module = importlib.import_module(node.module)
            missing = [n.name for n in node.names if not hasattr(module, n.name)]
            submodules = [n for n in missing if importlib.util.find_spec(f"{node.module}.{n}")]
            assert missing == submodules, (path.name, node.module)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_every_attribute_of_rabbet_that_a_benchmark_uses_is_there(path):
    rabbet = importlib.import_module("rabbet")
    used = {
        node.attr
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
        if node.value.id == "rabbet"
    }
    assert [name for name in sorted(used) if not hasattr(rabbet, name)] == []
