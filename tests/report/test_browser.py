"""The page in a real browser: it is drawn, its controls work, it asks for nothing, and everyone can use it."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page

from fedmide import report
from fedmide.journal.creation import reopen
from fedmide.journal.folder import RunFolder

pytestmark = [pytest.mark.browser, pytest.mark.needs("chromium")]

SHOWN = """key => [...document.querySelectorAll(`#figure-${key} .drawing`)].filter(each => each.offsetParent)"""


@dataclass
class Opened:
    """A page with what it said and asked for since it was opened."""

    page: Page
    said: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)

    def values(self, key: str, name: str = "x") -> list[Any]:
        """The values of every trace that a figure's visible drawings show."""
        found: list[Any] = self.page.evaluate(
            f"([key, name]) => ({SHOWN})(key).map(each => each.data.map(trace => trace[name]))", [key, name]
        )
        return found

    def color(self, key: str) -> str:
        """The color of a figure's text."""
        found: str = self.page.evaluate(f"key => ({SHOWN})(key)[0].layout.font.color", key)
        return found

    def count(self, key: str, selector: str) -> int:
        """Number of matching elements in a figure's visible drawings."""
        found: int = self.page.evaluate(
            f"([key, css]) => ({SHOWN})(key).flatMap(each => [...each.querySelectorAll(css)]).length", [key, selector]
        )
        return found


def show(browser: Browser, path: Path, scheme: Any = "light", width: int = 1280) -> Opened:
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    opened = Opened(page)
    page.on("console", lambda message: opened.said.append(message.text))
    page.on("pageerror", lambda error: opened.said.append(str(error)))
    page.on("request", lambda request: opened.asked.append(request.url))
    page.goto(path.as_uri())
    page.wait_for_selector("html[data-drawn=true]")
    return opened


@pytest.fixture(scope="module")
def path(whole_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of the whole small run."""
    return report.write(reopen(whole_run), tmp_path_factory.mktemp("page") / "report.html")


@pytest.fixture
def opened(browser: Browser, path: Path) -> Iterator[Opened]:
    """The report, open; at the end it has said nothing and has asked for nothing but itself."""
    shown = show(browser, path)
    yield shown
    assert shown.said == [] and shown.asked == [path.as_uri()]
    shown.page.close()


def serious(page: Page) -> list[tuple[str, str]]:
    violations = Axe().run(page).response["violations"]
    return [(each["id"], each["nodes"][0]["html"]) for each in violations if each["impact"] in ("serious", "critical")]


def test_every_figure_is_drawn(opened: Opened, path: Path) -> None:
    keys = opened.page.evaluate("Object.keys(JSON.parse(document.getElementById('figures').textContent))")
    assert set(keys) == {"gain", "nll", "loss", "enrollment", "shared-part", "scores", "length", "convergence", "cost"}
    for key in keys:
        assert opened.count(key, ".main-svg") > 0, key
        assert opened.count(key, ".trace, .bars path") > 0, key
    assert opened.count("gain", ".points path") == 3  # two clients and their mean
    assert opened.count("loss", ".scatterlayer .js-line") == 2


def test_the_drawings_fit_and_no_text_is_cut(opened: Opened) -> None:
    assert opened.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    cut = opened.page.evaluate(
        """() => [...document.querySelectorAll('.drawing svg text')].filter(text => {
            const own = text.getBoundingClientRect(), all = text.closest('.drawing').getBoundingClientRect();
            return own.width && (own.left < all.left - 1 || own.right > all.right + 1);
        }).map(text => text.textContent)"""
    )
    assert cut == []


def test_a_narrow_screen_needs_no_scrolling_sideways(browser: Browser, path: Path) -> None:
    shown = show(browser, path, width=380)
    assert shown.page.evaluate("document.documentElement.scrollWidth") <= 380
    shown.page.close()


def test_the_filter_leaves_out_a_client_everywhere(opened: Opened) -> None:
    opened.page.click("#filter summary")
    opened.page.uncheck("#filter input[value=a]")
    assert opened.page.inner_text("#shown") == "1 of 2"
    opened.page.wait_for_function(f"() => ({SHOWN})('gain')[0].data[1].y.length === 1")
    assert opened.values("gain", "y") == [[["mean of the sites"], ["b"]]]
    assert [len(traces) for traces in opened.values("enrollment")] == [3]
    assert opened.values("loss", "name") == [["b"]] and len(opened.values("scores")) == 1
    assert opened.page.locator("tbody tr[data-client=a]:visible").count() == 0
    assert opened.page.locator("#outcome tbody tr[data-client=b]:visible").count() == 2
    opened.page.click("#all")
    opened.page.wait_for_function(f"() => ({SHOWN})('gain')[0].data[1].y.length === 2")
    assert opened.page.inner_text("#shown") == "all 2" and len(opened.values("scores")) == 2
    opened.page.keyboard.press("Escape")
    assert not opened.page.locator("#filter fieldset").is_visible()


def test_with_no_client_nothing_breaks(opened: Opened) -> None:
    opened.page.click("#filter summary")
    opened.page.click("#none")
    assert opened.page.inner_text("#shown") == "0 of 2"
    opened.page.wait_for_function(f"() => ({SHOWN})('loss')[0].data.length === 0")
    assert opened.values("scores") == []


def test_the_round_of_the_scores_can_be_chosen(opened: Opened, run_folder: RunFolder) -> None:
    def counted() -> int:
        traces = [ys for plot in opened.values("scores", "y") for ys in plot[:2]]
        return sum(sum(ys) for ys in traces)

    def scored(round_number: int) -> int:
        judged = [each for client in "ab" for each in run_folder.read_ledger(client) if each.reason != "own-nll"]
        return sum(each.round == round_number for each in judged)

    assert counted() == scored(0) == 18
    opened.page.select_option("select[data-figure=scores]", "round-001")
    assert 0 < counted() == scored(1) < 18


def test_the_theme_goes_by_the_system_and_can_be_chosen(browser: Browser, path: Path, opened: Opened) -> None:
    dark = show(browser, path, "dark")
    assert dark.color("gain") != opened.color("gain")
    opened.page.select_option("#theme", "dark")
    assert opened.color("gain") == dark.color("gain")
    background = "getComputedStyle(document.body).backgroundColor"
    assert opened.page.evaluate(background) == dark.page.evaluate(background)
    dark.page.select_option("#theme", "light")
    opened.page.select_option("#theme", "auto")
    assert dark.color("gain") == opened.color("gain")
    assert dark.page.evaluate(background) == opened.page.evaluate(background) == "rgb(255, 255, 255)"
    assert dark.said == []
    dark.page.close()


def test_a_table_is_sorted_by_keyboard_and_means_stay_below(opened: Opened) -> None:
    table = opened.page.locator("#outcome table").nth(2)
    header = table.locator("thead th").nth(2)
    header.locator("button").focus()
    for direction in ("ascending", "descending"):
        opened.page.keyboard.press("Enter")
        assert header.get_attribute("aria-sort") == direction
        cells = [float(each) for each in table.locator("tr[data-client] td:nth-child(3)").all_inner_texts()]
        assert cells == sorted(cells, reverse=direction == "descending")
        names = table.locator("tbody th").all_inner_texts()
        assert names[2:] == ["mean of the sites", "worst site", "spread (st. dev.)"]


def test_every_table_opens_by_keyboard(opened: Opened) -> None:
    for summary in opened.page.locator("details.table > summary").all():
        summary.focus()
        opened.page.keyboard.press("Enter")
    assert opened.page.locator("details.table:not([open])").count() == 0
    assert opened.page.locator("details.table table:visible").count() == 9


def test_nothing_keeps_anyone_out(opened: Opened) -> None:
    opened.page.evaluate("for (const each of document.querySelectorAll('details')) each.open = true")
    for theme in ("light", "dark"):
        opened.page.select_option("#theme", theme)
        assert serious(opened.page) == []


def test_it_prints_light_and_without_controls(browser: Browser, path: Path, tmp_path: Path) -> None:
    shown = show(browser, path, "dark")
    shown.page.emulate_media(media="print")
    assert not shown.page.locator("nav.bar").is_visible() and not shown.page.locator("details.table").first.is_visible()
    shown.page.evaluate("dispatchEvent(new Event('beforeprint'))")
    widths = shown.page.evaluate("[...document.querySelectorAll('.drawing .main-svg')].map(each => each.clientWidth)")
    assert max(widths) <= 690  # an A4 page within its margins
    assert shown.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    shown.page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert shown.page.evaluate("document.documentElement.dataset.theme") is None
    shown.page.pdf(path=tmp_path / "page.pdf", format="A4")
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")
    shown.page.close()


def test_records_are_searched(browser: Browser, run_folder: RunFolder, tmp_path: Path) -> None:
    shown = show(browser, report.write(run_folder, tmp_path / "page.html", with_records=True))
    assert shown.page.locator(".private").is_visible() and shown.page.locator("article:visible").count() == 24
    shown.page.fill("#search", "site 1")
    visible = shown.page.locator("article:visible")
    assert 0 < visible.count() < 24 and all("site 1" in text for text in visible.all_inner_texts())
    assert shown.page.inner_text("#found") == f"{visible.count()} shown"
    assert serious(shown.page) == [] and shown.said == []
    shown.page.close()


def test_a_comparison_works_too(browser: Browser, run_folder: RunFolder, copied: Path, tmp_path: Path) -> None:
    shown = show(browser, report.compare([run_folder, reopen(copied)], tmp_path / "page.html"))
    for key in ("runs-nll", "runs-gain", "runs-loss"):
        assert shown.count(key, ".trace") == len(shown.values(key)[0]) > 0
    shown.page.click("#filter summary")
    shown.page.uncheck("#filter input[value=b]")
    shown.page.wait_for_function(f"() => ({SHOWN})('runs-gain')[0].data[0].y.length === 1")
    assert serious(shown.page) == [] and shown.said == []
    shown.page.close()


def test_hostile_names_and_texts_do_nothing(browser: Browser, copied: Path, tmp_path: Path) -> None:
    line = {
        "record_id": "x",
        "instruction": "<img src=x onerror=alert(1)></script>",
        "reference": "r",
        "prediction": "p",
    }
    (copied / "predictions" / "a.jsonl").write_text(json.dumps(line) + "\n")
    shown = show(browser, report.write(reopen(copied), tmp_path / "page.html", with_records=True))
    assert "<img src=x onerror=alert(1)></script>" in shown.page.inner_text("#records")
    assert shown.page.locator("#records img").count() == 0 and shown.said == []
    shown.page.close()
