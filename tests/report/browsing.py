"""A browser for the tests of pages: how it is found, and what is seen of a page in it."""

import contextlib
import importlib.util
import os
import shutil

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")

LAYOUT = """
() => {
  const wrong = [], wide = document.documentElement.clientWidth;
  const unseen = "script, style, noscript, title, #vg-tooltip-element";
  const hidden = (head) => head !== null && getComputedStyle(head).position === "absolute";
  const closed = "details:not([open]) > :not(summary)";
  const clipped = (e) => e.closest(`${unseen}, ${closed}`) !== null || hidden(e.closest("thead"));
  const show = (text) => text.trim().slice(0, 40);
  const boxes = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode, owner = node.parentElement;
    if (!node.data.trim() || clipped(owner) || getComputedStyle(owner).opacity === "0") continue;
    const range = document.createRange();
    range.selectNodeContents(node);
    for (const r of range.getClientRects()) {
      if (r.width > 0) boxes.push({ what: show(node.data), owner, node, r });
    }
  }
  for (const e of document.querySelectorAll("img, input, button:not([hidden]), .chart svg")) {
    const r = e.getBoundingClientRect();
    if (r.width > 0) boxes.push({ what: e.tagName, owner: e, node: e, r });
    else if (getComputedStyle(e).display !== "none") wrong.push(`nothing is seen of ${e.tagName}`);
  }
  for (const { what, r } of boxes) {
    if (r.left < -0.5 || r.right > wide + 0.5) wrong.push(`cut off: ${what}`);
  }
  for (const svg of document.querySelectorAll(".chart svg")) {
    const whole = svg.getBoundingClientRect();
    for (const { what, owner, r } of boxes) {
      if (owner === svg || !svg.contains(owner)) continue;
      const sides = [whole.left - r.left, r.right - whole.right];
      const out = Math.max(...sides, whole.top - r.top, r.bottom - whole.bottom);
      if (out > 1.5) wrong.push(`outside its chart by ${out}: ${what}`);
    }
  }
  for (const e of document.querySelectorAll("body *")) {
    if (clipped(e) || e.closest("svg") !== null) continue;
    const what = `${e.tagName} ${show(e.textContent)}`, holds = getComputedStyle(e).overflowX;
    if (holds !== "visible" && e.scrollWidth > e.clientWidth + 1) wrong.push(`scrolls: ${what}`);
    if (e.getBoundingClientRect().right > wide + 0.5) wrong.push(`too wide: ${what}`);
  }
  boxes.sort((a, b) => a.r.top - b.r.top);
  boxes.forEach((a, k) => {
    for (const b of boxes.slice(k + 1)) {
      if (b.r.top >= a.r.bottom) break;
      if (a.node === b.node || a.owner.contains(b.owner) || b.owner.contains(a.owner)) continue;
      const x = Math.min(a.r.right, b.r.right) - Math.max(a.r.left, b.r.left);
      const y = Math.min(a.r.bottom, b.r.bottom) - Math.max(a.r.top, b.r.top);
      if (x > 1 && y > 3) wrong.push(`overlap by ${x} x ${y}: ${a.what} | ${b.what}`);
    }
  });
  if (document.documentElement.scrollWidth > wide) wrong.push("the page scrolls sideways");
  return wrong;
}
"""
"""What is cut off, lies outside its place, or over something else, in words."""


def needed(what):
    """Skip a test that lacks something, or fail where everything has to be there."""
    if os.environ.get("CI") == "true":
        pytest.fail(what)
    pytest.skip(what)


@contextlib.contextmanager
def started():
    """A headless Chromium of the system's."""
    for package, wish in (("playwright", "dev"), ("vl_convert", "report")):
        if importlib.util.find_spec(package) is None:
            needed(f"pages are tested with {package}: pip install -e '.[{wish}]'")
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        needed("pages are tested in Chromium: install it, as by apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as player:
        browser = player.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


class Visit:
    """A page that is open: what it said on the console, and which requests it made."""

    def __init__(self, browser, path, width, scheme="light", guarded=True):
        self.said, self.asked = [], []
        self.context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, bypass_csp=not guarded
        )
        self.context.route("**/*", self._decide)
        self.page = self.context.new_page()
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.home = path.as_uri()
        self.page.goto(self.home)
        self.page.wait_for_selector("html[data-ready]", timeout=60_000, state="attached")

    def _decide(self, route):
        if route.request.url == self.home:
            route.continue_()
        else:
            self.asked.append(route.request.url)
            route.abort()

    def texts(self, selector):
        """The texts of elements, as they are in the page."""
        return self.page.locator(selector).all_text_contents()

    def settled(self):
        """Let the charts be drawn anew."""
        self.page.evaluate("() => new Promise((done) => setTimeout(done, 150))")

    def layout(self):
        """What is wrong with the layout."""
        return self.page.evaluate(LAYOUT)

    def close(self):
        """Close the page; it must have been quiet."""
        self.context.close()
        assert (self.said, self.asked) == ([], [])
