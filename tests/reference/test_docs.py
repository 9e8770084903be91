"""The documentation runs: every Python block, every command, and every relative link.

A page's blocks run in order in a folder of their own. A block of `python` with a title is written
to a file of that name, any other is run in the page's namespace, and a `text` block right behind it
is what it prints. In a `console` block a line that begins with `$ ` is a command, and what follows
is what it prints; lines of the output may be left out with `...`, and so may parts of a line.
`<!-- not run: reason -->` before a block leaves it out; an output is then not compared.
"""

import contextlib
import importlib
import io
import json
import pydoc
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import rabbet
import rabbet.hf
import rabbet.tasks
from rabbet.cli import main

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
NOTEBOOKS = sorted(DOCS.rglob("*.ipynb"))
SLOW = {
    "README.md",
    "docs/howto/frontier.md",
    "docs/howto/language.md",
    "docs/howto/machines.md",
    "docs/methods/cora.md",
    "docs/reference/cli.md",
    "docs/tutorials/budget.md",
    "docs/tutorials/convnet.md",
    "docs/tutorials/deploy.md",
    "docs/tutorials/plan.md",
    "docs/tutorials/transformer.md",
}

FENCE = re.compile(
    r"^(?:<!-- not run: *(?P<reason>.*?) *-->\n+)?"
    r"^```(?P<language>\w*)(?: title=\"(?P<title>[^\"]+)\")?\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
LINK = re.compile(r"\]\(([^)\s]+)\)")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    language: str
    title: str | None
    text: str
    reason: str | None
    line: int
    output: str | None = None


def blocks(page):
    """The fenced blocks of a page; what a Python block prints is put to that."""
    content, found, end = page.read_text(encoding="utf-8"), [], 0
    for m in FENCE.finditer(content):
        line = content.count("\n", 0, m.start("text"))
        follows = not content[end : m.start()].strip()
        if m["language"] == "text" and found and follows and found[-1].language == "python":
            last = found.pop()
            output = m["text"] if m["reason"] is None else None
            found.append(Block("python", last.title, last.text, last.reason, last.line, output))
        else:
            found.append(Block(m["language"], m["title"], m["text"], m["reason"], line))
        end = m.end()
    return found


def named(page):
    return page.relative_to(ROOT).as_posix()


def running(page):
    """The blocks of a page that a test runs."""
    return [b for b in blocks(page) if b.language in ("python", "console") and b.reason is None]


def marked(paths):
    return [
        pytest.param(p, id=named(p), marks=[pytest.mark.slow] if named(p) in SLOW else [])
        for p in paths
    ]


def pattern(expected):
    """A pattern for an output in which `...` stands for anything.

    The error of a layer, behind its line of a plan, may be another one on another processor.
    """
    parts = []
    for line in expected.strip("\n").split("\n"):
        whole = line.strip() == "..."
        words = re.escape(line.rstrip()).replace(re.escape("..."), "[^\n]*")
        if "@" in line:
            words = re.sub(r"(\\ )+[0-9.\\]+%$", "[ ]+[0-9.]+%", words)
        parts.append("(?:[^\n]*\n)*?" if whole else f"{words}[ ]*\n")
    return re.compile("".join(parts))


def told(call):
    """What a call writes to stdout and stderr, in the order in which it is written."""
    seen = io.StringIO()
    with contextlib.redirect_stdout(seen), contextlib.redirect_stderr(seen):
        call()
    return seen.getvalue()


def command(line):
    """Run a line of a console: rabbet in this process, anything else in a shell of its own."""
    arguments = shlex.split(line, comments=True)
    if arguments[0] == "rabbet":
        main(arguments[1:])
        return
    if arguments[0] == "python":
        line = shlex.join([sys.executable, *arguments[1:]])
    done = subprocess.run(line, shell=True, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    sys.stdout.write(done.stdout + done.stderr)


def commands(text):
    """The commands of a console block, and what each is said to print."""
    pairs = []
    for line in text.splitlines():
        if line.startswith("$ "):
            pairs.append([line[2:], []])
        elif pairs[-1][0].endswith("\\"):
            pairs[-1][0] = pairs[-1][0][:-1] + line
        else:
            pairs[-1][1].append(line)
    return [(line, "\n".join(output)) for line, output in pairs]


def shown(expected, found, where):
    if expected is not None and expected.strip():
        assert pattern(expected).search(found.rstrip("\n") + "\n"), (
            f"{where} prints\n{found}\nand not\n{expected}"
        )


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A temporary folder that is imported from."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setenv("RABBET_CACHE", str(tmp_path / "cache"))
    return tmp_path


def execute(text, where, line, namespace):
    """Run Python code; an error shows the line of the page."""
    exec(compile("\n" * line + text, where, "exec"), namespace)


@pytest.mark.parametrize("page", marked(p for p in PAGES if running(p)))
def test_a_page_runs(page, folder):
    namespace = {"__name__": "__main__"}
    for block in running(page):
        where = f"{named(page)}, line {block.line}"
        if block.language == "console":
            for line, expected in commands(block.text):
                shown(expected, told(lambda line=line: command(line)), f"{where}: {line}")
        elif block.title:
            Path(block.title).write_text(block.text, encoding="utf-8")
        else:
            run = (block.text, str(page), block.line, namespace)
            shown(block.output, told(lambda run=run: execute(*run)), where)


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=named)
def test_a_notebook_runs(notebook, folder):
    namespace = {"__name__": "__main__"}
    for k, cell in enumerate(json.loads(notebook.read_text(encoding="utf-8"))["cells"]):
        if cell["cell_type"] == "code":
            told(
                lambda cell=cell, k=k: execute(
                    "".join(cell["source"]), f"{notebook}, cell {k}", 0, namespace
                )
            )


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=named)
def test_a_notebook_holds_no_outputs(notebook):
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_what_is_not_run_has_a_reason(page):
    for block in blocks(page):
        where = f"{named(page)}, line {block.line}"
        assert block.language in ("python", "console", "text"), where
        assert block.reason is None or block.reason, where
    # every fence is read: none is in a list or a quotation, where it would be left out
    fences = re.findall(r"^ *>? *```", page.read_text(encoding="utf-8"), re.MULTILINE)
    pairs = len(list(FENCE.finditer(page.read_text(encoding="utf-8"))))
    assert len(fences) == 2 * pairs, f"{named(page)} has fences that are not read"


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_relative_links_lead_to_files(page):
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for link in LINK.findall(text):
        if not re.match(r"[a-z]+:|#", link):
            assert (page.parent / link.partition("#")[0]).exists(), f"{named(page)}: {link}"


def test_the_names_of_the_api_are_where_its_page_says():
    text = (DOCS / "reference" / "api.md").read_text()
    options = r"\n    options:$(?:\n      heading: (\S+)$)?(?:\n      members: \[(.*)\]$)?"
    entry = rf"^::: (\S+)$(?:{options})?"
    public = set[str]()
    for place, heading, members in re.findall(entry, text, re.M):
        name = heading or place
        module, _, last = place.rpartition(".")
        found, said = getattr(importlib.import_module(module), last), pydoc.locate(name)
        # a method is documented by its settings, which it inherits
        assert said is found or issubclass(said, found), name
        public |= {name} | {f"{name}.{member}" for member in members.split(", ")}
    for module in (rabbet, rabbet.hf, rabbet.tasks):
        assert {f"{module.__name__}.{name}" for name in module.__all__} <= public
