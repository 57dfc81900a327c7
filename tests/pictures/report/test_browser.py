"""A report in a real browser: Debian's Chromium, or any other that is installed, driven by Playwright."""

import shutil
from itertools import product

import pytest

from tests.matrix import matrix

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="the report is not tried in a browser without playwright")
    path = next((found for name in NAMES if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip(f"the report is not tried in a browser: there is no {', '.join(NAMES)}; apt-get install chromium")
    with api.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def open_page(browser, written):
    """Opens the report at a width; no console error and no request to a network is let pass."""
    (_, file), pages, complaints, asked = written("words"), [], [], []

    def open_at(width=1400, scheme="light", **options):
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme, **options)
        pages.append(page)
        page.on("console", lambda message: message.type == "error" and complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(file.as_uri())
        if options.get("java_script_enabled", True):
            page.wait_for_selector("html[data-drawn=all]")
        return page

    yield open_at
    for page in pages:
        page.close()
    assert complaints == []
    assert {url for url in asked if not url.startswith("data:")} == {file.as_uri()}


@pytest.mark.parametrize(("width", "scheme"), matrix(product([400, 1400], ["light", "dark"]), (400, "light")))
def test_it_is_drawn_at_any_width(open_page, width, scheme):
    page = open_page(width, scheme)
    assert page.locator(".chart svg").count() == 5
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for chart in page.locator(".chart svg").all():
        box = chart.bounding_box()
        assert 250 < box["width"] <= width
    ink, paper = (page.evaluate(f"getComputedStyle(document.body).{name}") for name in ("color", "backgroundColor"))
    brightness = [int(colour.removeprefix("rgb(").split(",")[0]) for colour in (ink, paper)]
    assert (brightness[0] < brightness[1]) == (scheme == "light")
    label = page.locator(".chart svg .role-axis-title text").first
    assert label.evaluate("node => getComputedStyle(node).fill") == ink


def test_hover_says_what_a_point_is(open_page):
    page = open_page()
    points = page.locator("[data-chart=milliseconds] .mark-symbol.role-mark path")
    assert points.count() >= 3
    names = set()
    for index in range(points.count()):
        points.nth(index).hover(force=True)
        tooltip = page.locator("#vg-tooltip-element.visible")
        tooltip.wait_for()
        names.add(tooltip.locator("tr", has_text="name").locator("td.value").inner_text())
        assert "KL, nats" in tooltip.inner_text()
        assert "agreement" in tooltip.inner_text()
    assert {"ToMe r 8", "a </script> & co"} <= names


def test_the_axis_can_be_switched(open_page):
    page = open_page()
    points = page.locator("[data-chart=tokens] .mark-symbol.role-mark path")

    def names():
        return {point.get_attribute("aria-label").split(";")[0] for point in points.all()}

    before = names()
    assert not any("the model itself" in name for name in names())
    page.get_by_role("radio", name="linear").check()
    page.locator("[data-chart=tokens] path[aria-label*='the model itself']").first.wait_for()
    assert len(names()) > len(before)
    page.get_by_role("radio", name="logarithmic").check()
    page.locator("[data-chart=tokens] path[aria-label*='the model itself']").first.wait_for(state="detached")
    assert names() == before


def painted(page, index=0):
    """How many pixels of an image's overlay are not empty."""
    pixels = "one.getContext('2d').getImageData(0, 0, one.width, one.height).data"
    canvas = page.locator("canvas[data-image]").nth(index)
    return canvas.evaluate(f"one => {pixels}.filter((value, place) => place % 4 == 3 && value).length")


def test_the_slider_goes_through_the_blocks(open_page):
    page = open_page()
    slider, tokens = page.locator("#place"), page.locator("article .tokens span").first
    assert page.locator("#where").inner_text() == "after block 5"
    end = tokens.inner_text()
    slider.focus()
    slider.press("Home")
    assert (page.locator("#where").inner_text(), tokens.inner_text()) == ("the image", "101")
    assert painted(page) == 0
    slider.press("ArrowRight")
    assert page.locator("#where").inner_text() == "before block 0"
    entering = painted(page)
    assert entering > 0
    for _ in range(2):
        slider.press("ArrowRight")
    assert page.locator("#where").inner_text() == "after block 1"
    assert painted(page) > entering
    assert slider.get_attribute("aria-valuetext") == "after block 1"
    slider.press("End")
    assert tokens.inner_text() == end
    assert end.startswith("101 → ")


def test_pointing_at_a_patch_says_what_became_of_it(open_page):
    page = open_page()
    canvas = page.locator("canvas[data-image]").first
    before = painted(page)
    seen = set()
    box = canvas.bounding_box()
    for column in range(10):
        canvas.hover(position={"x": (column + 0.5) * box["width"] / 10, "y": box["height"] / 2})
        seen.add(canvas.get_attribute("title"))
    assert all(title == "dropped" or title.startswith("a token of ") for title in seen)
    page.mouse.move(0, 0)
    page.wait_for_timeout(100)
    assert painted(page) == before


def test_the_plan_can_be_copied(open_page):
    page = open_page()
    page.get_by_role("button", name="copy").click()
    page.get_by_role("button", name="copied").wait_for()
    assert page.evaluate("getSelection().toString()").lstrip().startswith("{")


@pytest.mark.slow
def test_it_reads_without_scripts_and_in_print(open_page, tmp_path):
    page = open_page(java_script_enabled=False)
    assert "need JavaScript" in page.locator("noscript").inner_text()
    page.get_by_text("The points as a table").click()
    assert page.get_by_role("row", name="ToMe r 8").is_visible()
    page = open_page(scheme="dark")
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert not any(page.locator(what).is_visible() for what in (".slider", ".switch", "nav", "button"))
    over = page.locator("article td").evaluate_all("cells => cells.map(cell => cell.scrollWidth - cell.clientWidth)")
    assert max(over) <= 0  # figures are not wrapped, and fit
    assert page.pdf(path=tmp_path / "out.pdf", format="A4", print_background=True).startswith(b"%PDF")
