"""A report as one HTML file that needs nothing else: no network, no program but a browser.

Charts are drawn by Vega-Lite, whose script comes with vl-convert and lies inside the file. The
page allows itself no request, and no script but its own two, by their hashes: a name that got
past everything else would still not run.
"""

import base64
import functools
import hashlib
import json
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from string import Template
from typing import Any

from rabbet.errors import FileError
from rabbet.files import path_of, write_whole
from rabbet.report.charts import chart_facts
from rabbet.report.content import Head, Report
from rabbet.report.facts import known
from rabbet.report.markup import Element, element, markup
from rabbet.report.sections import sections
from rabbet.report.text import standings, times_smaller


def write_page(report: Report, path: str | Path) -> int:
    """Write the page of a report, whole or not at all; returns its bytes.

    Folders that are not there are made. Raises FileError without vl-convert-python, for an ending
    that is no page's, and for a place that cannot be written.
    """
    page_path(path)  # before what takes long
    return write(page(report), path)


def write(text: str, path: str | Path) -> int:
    """Write a page into a folder, which is made if it is not there; raises as `write_page` does."""
    path, content = page_path(path), text.encode("utf-8", "replace")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise FileError(f"cannot write {path}: {e}") from e
    return write_whole(path, [content])


def page_path(path: str | Path) -> Path:
    """The path of a page. Raises FileError for any other, which may be that of another file."""
    place = path_of(path)
    if place.suffix.lower() not in (".html", ".htm"):
        raise FileError(f"a page ends in .html; found {path}")
    return place


def require_drawing() -> None:
    """Raise FileError, before any work, if what pages are drawn with is not installed."""
    if find_spec("vl_convert") is None:
        raise FileError("pages of reports need vl-convert-python; install rabbet[report]")


def page(report: Report) -> str:
    """The page as text. Raises FileError without vl-convert-python."""
    return assembled(_head(report), sections(report), chart_facts(report))


def assembled(head: Head, parts: list[Element], facts: dict[str, Any]) -> str:
    """A page of sections under a head. Raises FileError without vl-convert-python.

    facts: what its charts are drawn from, by the name that the script knows.
    """
    library, script = _library(), _own("page.js")
    hashes = " ".join(f"'sha256-{_hash(text)}'" for text in (library, script))
    policy = (
        f"default-src 'none'; script-src {hashes} 'unsafe-eval'; style-src 'unsafe-inline'; "
        "img-src data:"
    )  # Vega compiles its expressions; they are of the page's own script
    return Template(_own("page.html")).substitute(
        title=markup(element("title", head.title)),
        policy=policy,
        style=_own("page.css"),
        head=markup(_header(head), _contents(parts)),
        body=markup(*parts),
        facts=_inert(facts),
        library=library,
        script=script,
    )


def _head(report: Report) -> Head:
    size = f"{report.cost.bytes:,} bytes, {times_smaller(report.whole.bytes, report.cost.bytes)}"
    stood = standings(report.cost, report.whole, report.budget.limits if report.budget else ())
    broken = [s.verdict() for s in stood if s.over]
    verdict = "; ".join(broken) if broken else "within the budget"
    told = [size, *([verdict] if stood else [])]
    return Head("Result" if report.fitted else "Plan, not fitted", report.title, "; ".join(told))


def _header(head: Head) -> Element:
    return element(
        "header",
        element("p", head.kind, class_="kind"),
        element("h1", head.title),
        element("p", head.lead, class_="lead"),
    )


def _contents(parts: list[Element]) -> Element:
    links = (element("a", part[0].text or "", href=f"#{part.get('id')}") for part in parts)
    return element("nav", *links, aria_label="Sections")


def _inert(facts: dict[str, Any]) -> str:
    """JSON that no reader of HTML takes for markup, whatever the names in it are."""
    text = json.dumps(known(facts), separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _hash(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _own(name: str) -> str:
    return files("rabbet.report").joinpath(name).read_text(encoding="utf-8")


@functools.cache
def _library() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script; no end of a script element lies in it."""
    require_drawing()
    import vl_convert

    script: str = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    assert "</script" not in script.lower()
    return script
