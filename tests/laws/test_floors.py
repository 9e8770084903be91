"""The shape of the code: imports go strictly down, and files stay small."""

import ast
import re
from pathlib import Path

import pytest

import rabbet

SOURCE = Path(rabbet.__file__).parent

# From the ground up. A module imports only what stands on a lower line, or a file of its own
# package.
FLOORS = (
    {"errors", "origin"},
    {"files", "fingerprint", "cluster", "progress"},
    {"grids", "jobs", "layers", "data"},
    {"solve", "spread"},
    {"forms"},
    {"core"},
    {"model"},
    {"calibrate"},
    {"workpiece"},
    {"reconstruct", "runtime"},
    {"train", "export"},
    {"choose"},
    {"methods"},
    {"report"},
    {"_bench"},
    {"_api"},
    {"_points"},
    {"_frontier", "_stream", "_sweep"},
    {"hf", "tasks"},
    {"cli", "__init__", "demo"},
    {"__main__"},
)
OPTIONAL = {
    "accelerate",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "onnx_ir",
    "openvino",
    "transformers",
    "gguf",
    "sklearn",
    "PIL",
    "timm",
    "torchvision",
    "distributed",
    "matplotlib",
    "vl_convert",
}
# Required, but slow to import and wanted by one step alone.
SLOW = {"choose/milp": {"scipy"}}


def _files():
    return {
        path.relative_to(SOURCE).with_suffix("").as_posix(): path
        for path in sorted(SOURCE.rglob("*.py"))
    }


def _imports(path):
    """Every import in a file: (module, name taken from it or None, whether at the top)."""
    tree = ast.parse(path.read_text())
    top = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None, id(node) in top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write imports in full"
            yield from ((node.module, alias.name, id(node) in top) for alias in node.names)


def _room(module):
    """The part of a file's name that stands on a floor: its package, or itself."""
    return module.split("/")[0]


def _uses(name):
    """The files of rabbet that a file imports."""
    files = _files()
    for module, part, _ in _imports(files[name]):
        if module.split(".")[0] == "rabbet":
            folder = "/".join(module.split(".")[1:])
            yield next(
                f
                for f in (f"{folder}/{part}".lstrip("/"), folder, f"{folder}/__init__".lstrip("/"))
                if f in files
            )


LEVEL = {room: k for k, floor in enumerate(FLOORS) for room in floor}


def test_imports_go_strictly_down():
    for name in _files():
        assert _room(name) in LEVEL, f"{name} stands on no floor; give it one in FLOORS"
        above = [used for used in _uses(name) if LEVEL[_room(used)] >= LEVEL[_room(name)]]
        above = [used for used in above if _room(used) != _room(name)]
        assert not above, f"{name} imports {above}, which do not stand below it"


def test_no_import_goes_round_in_a_circle():
    left = {name: set(_uses(name)) for name in _files()}
    while left:
        free = {name for name, used in left.items() if not used & left.keys()}
        assert free, f"these import each other: {sorted(left)}"
        left = {name: used for name, used in left.items() if name not in free}


def test_only_what_may_be_missing_or_is_slow_is_imported_late():
    # The help of a command does not load what the command needs, and public names are imported on
    # first use.
    for name, path in _files().items():
        own = {"rabbet"} if _room(name) in ("cli", "__init__") else set()
        late = {module.split(".")[0] for module, _, top in _imports(path) if not top}
        assert late <= OPTIONAL | SLOW.get(name, set()) | own, name


def test_a_file_fits_on_a_few_screens():
    for name, path in _files().items():
        lines = path.read_text().splitlines()
        assert len(lines) <= 400, name
        nodes = ast.walk(ast.parse("\n".join(lines)))
        long = [
            n.name
            for n in nodes
            if isinstance(n, ast.FunctionDef) and n.end_lineno - n.lineno >= 60
        ]
        assert not long, f"{name}: {long}"


KNOWN_ONLY_TO = {
    # only one package may ask what kind of layer, form or grid something is
    r"\b(site|s|kind)\.(kind|name) (==|!=|in) [\"']|\bkind (==|!=) [\"']|\.stride\b": {"layers"},
    r"isinstance\([^)]*, (Dense|LowRank|CP|Tucker|TT|TTM|Ranked|Chain)\b": {"forms"},
    r"isinstance\([^)]*, (Signed|Unsigned|HalfStep|Ternary|PerSlice|OneScale)\b": {"grids"},
}


@pytest.mark.parametrize("pattern", KNOWN_ONLY_TO)
def test_kinds_are_told_apart_in_one_package(pattern):
    for name, path in _files().items():
        if _room(name) not in KNOWN_ONLY_TO[pattern]:
            places = [x for x in path.read_text().splitlines() if re.search(pattern, x)]
            assert not places, f"{name}: {places}"


def test_nothing_is_unpickled():
    for name, path in _files().items():
        if name == "spread":  # what a process sent to its own workers, and they to it; no file
            continue
        modules = {module.split(".")[0] for module, _, _ in _imports(path)}
        assert not modules & {"pickle", "dill", "joblib", "cloudpickle", "marshal", "shelve"}, name
        assert not re.search(r"(?<!safetensors\.)\btorch\.load\(", path.read_text()), name


def test_descriptors_of_the_process_belong_to_it():
    # Other threads write to them meanwhile; only the command line is a process of its own.
    for name, path in _files().items():
        if _room(name) != "cli":
            moved = re.findall(r"dup2|redirect_std\w+|logging\.disable\(", path.read_text())
            assert not moved, f"{name}: {moved}"


def test_a_word_of_the_architecture_means_one_thing():
    text = (Path(__file__).parents[2] / "docs" / "architecture.md").read_text()
    table = text.partition("## The few other words")[2].partition("\n## ")[0]
    firsts = [line.split("|")[1] for line in table.splitlines() if line.startswith("|")]
    words = [word for first in firsts for word in re.findall(r"`(\w+)`", first)]
    assert len(words) > 50
    assert {word for word in words if words.count(word) > 1} == set()
