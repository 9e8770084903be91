"""Pages of reports, opened and used in a browser."""

import io
import os
from pathlib import Path

import pytest
from browsing import Visit, started
from pages import HOSTILE, digits, reported
from PIL import Image

from rabbet.core.plan import quoted
from rabbet.report.text import layer_rows

NETWORKS = ("convnet", "transformer", "two outputs", "hostile names")
SIZES = (400, 1400)


@pytest.fixture(scope="module")
def browser():
    with started() as chromium:
        yield chromium


@pytest.fixture(scope="module")
def pages(browser, tmp_path_factory):
    """Pages by the name of their network, made when they are asked for; with what they show."""
    folder, made = tmp_path_factory.mktemp("pages"), {}

    def page(name):
        if name not in made:
            path = folder / f"{name}.html"
            made[name] = (path, *reported(name, path))
        return made[name]

    return page


@pytest.fixture
def visit(browser):
    """Opens pages; each must have been silent and asked for nothing when the test ends."""
    visits = []

    def opened(path, width=1400, **how):
        visits.append(Visit(browser, path, width, **how))
        return visits[-1]

    yield opened
    for one in visits:
        one.close()


def shown(visit):
    """The numbers that the slider is about: cost, layers, bars."""
    return {
        "bytes": visit.texts("tr[data-metric=bytes] td.found")[0],
        "plans": visit.texts("tr[data-layer] td.plan"),
        "sizes": visit.texts("tr[data-layer] td.bytes"),
        "bars": visit.page.eval_on_selector_all(
            "[data-chart=layers] .mark-rect path",
            "(paths) => paths.map((p) => p.getAttribute('d'))",
        ),
        "words": visit.texts("#at-words")[0],
    }


def expected(frontier, place):
    """What a page says of a point."""
    point = frontier.points[place]
    rows = layer_rows(frontier.survey, point.plan)
    return {
        "bytes": f"{point.cost.bytes:,}",
        "plans": [row.body for row in rows],
        "sizes": [f"{row.bytes:,}" for row in rows],
    }


@pytest.mark.parametrize("width", SIZES)
@pytest.mark.parametrize("name", NETWORKS)
def test_nothing_is_cut_off_and_nothing_overlaps(pages, visit, name, width):
    path, _, _ = pages(name)
    seen = visit(path, width)
    assert seen.layout() == []
    seen.page.focus("#at")
    seen.page.keyboard.press("End")
    seen.settled()
    assert seen.layout() == []


@pytest.mark.parametrize("name", NETWORKS[:3])
def test_the_slider_changes_numbers_table_and_bars(pages, visit, name):
    path, result, frontier = pages(name)
    seen = visit(path)
    first = shown(seen)
    assert first["bytes"] == f"{result.cost.bytes:,}"
    assert first["plans"] == [line.body for line in result.plan]
    assert "the one of this report" in first["words"]
    slider = seen.page.locator("#at")
    slider.scroll_into_view_if_needed()
    box = slider.bounding_box()
    middle = box["y"] + box["height"] / 2
    # By mouse: dragged from where it stands to the left end, which is the loosest plan.
    place = box["x"] + box["width"] * int(slider.input_value()) / (len(frontier.points) - 1)
    seen.page.mouse.move(place, middle)
    seen.page.mouse.down()
    seen.page.mouse.move(box["x"] + 2, middle, steps=5)
    seen.page.mouse.up()
    seen.settled()
    loosest = shown(seen)
    assert expected(frontier, 0).items() <= loosest.items()
    assert loosest["bars"] != first["bars"]
    assert loosest["words"] == f"plan 1 of {len(frontier.points)}"
    # By keyboard: it is reached by Tab, End is the tightest plan, an arrow goes by one.
    seen.page.keyboard.press("End")
    seen.settled()
    tightest = shown(seen)
    assert expected(frontier, len(frontier.points) - 1).items() <= tightest.items()
    assert tightest["bars"] != loosest["bars"]
    assert set(seen.texts("tr[data-layer] td.own")) == {""}  # errors are known of what was fitted
    seen.page.keyboard.press("ArrowLeft")
    assert expected(frontier, len(frontier.points) - 2).items() <= shown(seen).items()
    seen.page.keyboard.press("End")
    seen.page.click("#back")
    seen.settled()
    assert shown(seen) == first


def test_the_slider_is_reached_by_the_keyboard_alone(pages, visit):
    seen = visit(pages("two outputs")[0])
    for _ in range(30):
        seen.page.keyboard.press("Tab")
        if seen.page.evaluate("document.activeElement.id") == "at":
            break
    before = seen.texts("#at-words")
    seen.page.keyboard.press("ArrowRight")
    assert seen.texts("#at-words") != before
    value = seen.page.get_attribute("#at", "aria-valuetext")
    assert value.startswith(seen.texts("#at-words")[0])


def test_a_broken_limit_is_said_of_the_plan_at_the_slider(pages, visit):
    seen = visit(pages("two outputs")[0])
    verdict = "tr[data-metric=bits] td.verdict"
    assert seen.texts(verdict) == ["kept, 1.000 to spare"]
    seen.page.focus("#at")
    seen.page.keyboard.press("Home")
    assert seen.texts(f"{verdict}.over") == ["over by 3.000"]


@pytest.mark.parametrize("guarded", [True, False])
def test_names_are_shown_as_text_whatever_they_are(pages, visit, guarded):
    path, _, frontier = pages("hostile names")
    seen = visit(path, guarded=guarded)  # the page's own policy would stop what is not escaped
    assert [site.name for site in frontier.survey] == list(HOSTILE)
    assert seen.texts("tr[data-layer] .name") == list(map(quoted, HOSTILE))
    bars = seen.page.locator("[data-chart=layers] .mark-rect path")
    for place in range(len(HOSTILE)):
        bars.nth(place).hover()
        seen.page.wait_for_selector("#vg-tooltip-element.visible")
        assert quoted(HOSTILE[place])[:60] in seen.texts("#vg-tooltip-element")[0]
    for key in ("Home", "End"):
        seen.page.focus("#at")
        seen.page.keyboard.press(key)
    assert seen.page.evaluate("typeof hacked") == "undefined"
    assert len(seen.page.query_selector_all("script")) == 3
    assert seen.page.query_selector_all("main img, main b, main [onclick], [onerror]") == []


def test_inputs_and_answers_stand_side_by_side(pages, visit):
    seen = visit(pages("convnet")[0])
    assert len(seen.texts("#examples article")) == 6
    whole = "(pictures) => pictures.every((p) => p.complete && p.naturalWidth === 8)"
    assert seen.page.eval_on_selector_all("#examples img", whole)
    tokens = visit(pages("transformer")[0])
    assert all(text.count(",") == 6 for text in tokens.texts("#examples code"))
    two = visit(pages("two outputs")[0])
    article = two.texts("#examples article")[0]
    assert "output 1 of 2" in article
    assert "class " in article
    assert "output 2 of 2" in article
    assert "% apart, over 4 values" in article


def test_dark_and_printed_pages_have_colours_of_their_own(pages, visit):
    path, _, _ = pages("convnet")
    ground = "getComputedStyle(document.body).backgroundColor"
    bar = "getComputedStyle(document.querySelector('[data-chart=layers] .mark-rect path')).fill"
    light, dark = visit(path), visit(path, scheme="dark")
    colours = [(x.page.evaluate(ground), x.page.evaluate(bar)) for x in (light, dark)]
    assert colours[0][0] == "rgb(255, 255, 255)"
    assert colours[0][0] != colours[1][0]
    assert colours[0][1] != colours[1][1]
    dark.page.emulate_media(media="print", color_scheme="dark")
    assert dark.page.evaluate(ground) == "rgb(255, 255, 255)"
    assert (dark.page.evaluate(ground), dark.page.evaluate(bar)) == colours[0]
    assert dark.layout() == []
    assert dark.page.pdf(format="A4").startswith(b"%PDF")


@pytest.mark.slow
def test_pictures_for_the_documentation_are_taken(visit, browser, tmp_path):
    """With RABBET_PICTURES=docs/pictures they are those of docs/howto/report.md."""
    folder = Path(os.environ.get("RABBET_PICTURES", tmp_path / "pictures"))
    folder.mkdir(parents=True, exist_ok=True)
    path = tmp_path / "digits.html"
    digits(path)
    for name, width, scheme, parts in (
        ("report", 1100, "light", ("main > header", "#frontier")),
        ("report-dark", 1100, "dark", ("#frontier", "#layers")),
        ("report-phone", 400, "light", ("main > header", "#asked")),
    ):
        seen = visit(path, width, scheme=scheme)
        first, last = (seen.page.locator(part).bounding_box() for part in parts)
        whole = Image.open(io.BytesIO(seen.page.screenshot(full_page=True)))
        end = last["y"] + last["height"] + 24
        picture = whole.crop((0, max(first["y"] - 24, 0), width, end))
        picture = picture.quantize(256, dither=Image.Dither.NONE)
        picture.save(folder / f"{name}.png", optimize=True)
        assert 5_000 < (folder / f"{name}.png").stat().st_size < 200_000
        assert len(picture.getcolors()) > 8  # something is drawn


def test_a_page_is_small_and_says_what_it_may_not_do(pages):
    for name in ("convnet", "transformer"):
        path, _, _ = pages(name)
        text = path.read_text(encoding="utf-8")
        assert path.stat().st_size < 5_000_000
        assert "default-src 'none'" in text
        assert "unsafe-inline'" not in text.partition("script-src")[2].partition(";")[0]
