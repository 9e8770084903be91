"""Pages of sweeps, opened in a browser."""

import pytest
from browsing import Visit, started
from pages import swept

from rabbet.report.sweeps import sweep_facts

CASES = {
    "bits": (["bytes <= 90%"], {"bits": [3, 4, 8]}, [97.5, 98.25, 98.875]),
    "names and bits": (
        ["bytes <= 90%"],
        {"start": ["als", "<b>svd"], "bits": [4, 8]},
        [97.0, 98.0, "refused", 98.5],
    ),
    "budgets": (
        ["bytes <= 40%", "bytes <= 20%"],
        {"bits": [3, 8], "tuning.steps": [0, 100]},
        [97.0, 98.0, 97.5, 98.5, 96.0, 97.0, "refused", "refused"],
    ),
    "a budget alone": (["bits <= 4"], {}, [98.0]),
    "no measures": (["bits <= 4"], {"bits": [4, 8]}, [None, None]),
}


@pytest.fixture(scope="module")
def browser():
    with started() as chromium:
        yield chromium


@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("name", CASES)
def test_a_sweep_is_shown_whole(browser, tmp_path, name, width):
    sweep = swept(tmp_path / "a.html", *CASES[name])
    seen = Visit(browser, tmp_path / "a.html", width)
    assert seen.layout() == []
    seen.page.eval_on_selector_all("details", "(all) => all.forEach((one) => { one.open = true; })")
    assert seen.layout() == []
    assert seen.texts("#rows th")[: sweep.table.left] == list(sweep.table.heads[: sweep.table.left])
    assert seen.texts("h1") == ["<i>sweep</i>"]
    rows = [list(row) for row in sweep.table.rows]
    assert seen.texts("#rows tbody tr th") == [row[0] for row in rows]
    cells = seen.texts("#rows tbody tr td")
    assert cells == [text for row in rows for text in row[1:]]
    dots = seen.page.eval_on_selector_all("[data-chart=sweep] .mark-symbol path", "(x) => x.length")
    known = [row for row in sweep.rows if row.measure is not None]
    # Legends are made of symbols, too.
    lines = sweep_facts(sweep)["lines"]
    assert dots == len(known) + (lines if lines > 1 else 0)
    assert seen.texts("#refused li") == sweep.errors
    assert len(seen.texts("#plans details")) == sum(row.plan is not None for row in sweep.rows)
    seen.close()


def test_along_the_axis_lies_what_was_changed(tmp_path):
    facts = {n: sweep_facts(swept(tmp_path / "a.html", *case)) for n, case in CASES.items()}
    bits = facts["bits"]
    assert (bits["axis"], bits["share"], bits["places"], bits["lines"]) == ("bits", False, None, 1)
    assert [(row["x"], row["y"]) for row in bits["rows"]] == [(3, 97.5), (4, 98.25), (8, 98.875)]
    names = facts["names and bits"]
    assert (names["axis"], names["places"]) == ("start", ["als", "<b>svd"])
    assert [row["line"] for row in names["rows"]] == ["bits=4", "bits=8", "bits=8"]
    budgets = facts["budgets"]
    assert budgets["axis"] == "bytes, of float32"
    assert budgets["share"]
    assert budgets["lines"] == 4
    assert all(0 < row["x"] < 1 for row in budgets["rows"])
    assert facts["no measures"]["rows"] == []
