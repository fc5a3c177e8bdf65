"""The report of a demo run, opened in a real Chromium without a network."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.command_line import call

sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
pytest.importorskip("altair", reason="the extra `report` is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine"),
]
SIZES = (400, 1400)


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a small run, written by `run` itself."""
    out = tmp_path_factory.mktemp("demo") / "run"
    done = call(
        "run", "demo", "--samples", 60, "--eval-samples", 40, "--solver", "paper", "--budget", "30%", "--out", out,
        "--sweep",
    )  # fmt: skip
    assert done["report"] == str(out / "report.html")
    return out / "report.html"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def page(browser: Any, html: Path) -> Iterator[Any]:
    """The report at 1400 pixels; anything on the console, or any request, fails the test."""
    yield from opened(browser, html, 1400, "light")


def opened(browser: Any, html: Path, width: int, scheme: str) -> Iterator[Any]:
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on(
        "request",
        lambda request: None if request.url.startswith(("file:", "data:")) else said.append(request.url),
    )
    page.goto(html.as_uri())
    page.wait_for_selector("html[data-drawn]")
    yield page
    page.close()
    assert said == []


def picture(page: Any) -> str:
    """The pixels of the viewer's first picture."""
    return str(page.evaluate("document.querySelector('.viewer canvas').toDataURL()"))


def test_the_slider_changes_the_picture_and_the_text(page: Any) -> None:
    slider = page.locator(".viewer .layer")
    page.wait_for_function("document.querySelector('.viewer canvas').width > 300")
    before = picture(page)
    assert page.locator(".viewer .state").inner_text() == "64 vision tokens."
    slider.focus()
    for _ in range(6):
        page.keyboard.press("ArrowRight")
    assert slider.input_value() == "5"
    assert "Layer 5 computes" in page.locator(".viewer .state").inner_text()
    assert "layer 5" in slider.get_attribute("aria-valuetext")
    at_five = picture(page)
    assert at_five != before
    page.locator(".viewer .drop").uncheck()
    assert picture(page) != at_five
    assert "Layer 5 computes" in page.locator(".viewer canvas").get_attribute("aria-label")


def test_samples_are_chosen_by_keyboard_and_wrong_ones_come_first(page: Any) -> None:
    options = page.locator(".viewer .sample option")
    assert options.count() >= 24
    marks = [text.split(". ")[1].split(":")[0] for text in options.all_inner_texts()]
    assert marks == sorted(marks, key=lambda mark: mark != "wrong")
    assert "wrong" in marks
    first = page.locator(".viewer .question").inner_text()
    assert page.locator(".viewer .pruned-score").inner_text() == "wrong"
    page.locator(".viewer .next").focus()
    page.keyboard.press("Enter")
    assert page.locator(".viewer .question").inner_text() != first
    for which in ("reference", "full", "pruned"):
        assert page.locator(f".viewer td.{which}").inner_text()


def test_tables_sort_by_number_in_both_directions(page: Any) -> None:
    column = "#r0-methods tbody td:nth-child(3)"
    button = page.locator("#r0-methods thead th:nth-child(3) button")
    button.focus()
    page.keyboard.press("Enter")
    rising = [float(text) for text in page.locator(column).all_inner_texts()]
    assert rising == sorted(rising)
    assert len(set(rising)) > 2
    assert page.locator("#r0-methods thead th:nth-child(3)").get_attribute("aria-sort") == "ascending"
    button.click()
    falling = [float(text) for text in page.locator(column).all_inner_texts()]
    assert falling == sorted(rising, reverse=True)


def test_charts_are_drawn_and_follow_the_theme(page: Any) -> None:
    charts = page.locator(".chart svg")
    assert charts.count() == page.locator(".chart").count() >= 5
    ink = "getComputedStyle(document.querySelector('.chart svg text')).fill"
    light = page.evaluate(ink)
    page.locator("#theme").click()
    page.wait_for_selector("html[data-drawn=dark]")
    assert page.evaluate(ink) != light
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(13, 17, 23)"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", SIZES)
def test_the_page_is_readable_at_any_width(browser: Any, html: Path, width: int, scheme: str) -> None:
    for page in opened(browser, html, width, scheme):
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        smallest = page.evaluate(
            "Math.min(...[...document.querySelectorAll('main *')].filter((e) => !e.closest('svg') && e.innerText)"
            ".map((e) => parseFloat(getComputedStyle(e).fontSize)))"
        )
        assert smallest >= 12
        # Everything but what scrolls on its own lies within the page.
        outside = page.evaluate(
            "[...document.querySelectorAll('main *')].filter((e) => !e.closest('.scroll') && "
            "!e.closest('.hidden') && e.getBoundingClientRect().right > innerWidth + 1).length"
        )
        assert outside == 0


def test_every_control_has_a_name(page: Any) -> None:
    unnamed = page.evaluate(
        "[...document.querySelectorAll('button, input, select, canvas')].filter((e) => !(e.innerText || "
        "e.getAttribute('aria-label') || (e.labels && e.labels.length))).length"
    )
    assert unnamed == 0
    assert page.locator("h1").count() == 1
    assert page.evaluate("document.documentElement.lang") == "en"
