"""The page as a file: self-contained, free of what stays on the sites, and safe whatever the records hold."""

import json
import math
import re
import shutil
from collections.abc import Callable, Mapping
from html.parser import HTMLParser
from pathlib import Path

import pytest

from fedmide import report
from fedmide.errors import DataError
from fedmide.journal.creation import reopen
from fedmide.journal.folder import RunFolder

MAX_BYTES = 6_000_000


class Page(HTMLParser):
    """The links of a page, and the names of its elements."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.opened: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.opened.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "action", "data", "poster")]


def written(folder: RunFolder, out: Path, **options: bool) -> str:
    return report.write(folder, out, **options).read_text("utf-8")


def figures(page: str) -> Mapping[str, object]:
    found = re.search(r'<script type="application/json" id="figures">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    values: Mapping[str, object] = json.loads(found[1])
    return values


def test_the_page_needs_nothing_but_itself(run_folder: RunFolder, tmp_path: Path) -> None:
    page = written(run_folder, tmp_path / "page.html")
    links = Page(page).links
    assert links and all(link.startswith("#") or link == "data:," for link in links)
    assert (tmp_path / "page.html").stat().st_size < MAX_BYTES
    assert "@import" not in page.split("<script")[0] and "url(" not in page.split("<script")[0]
    assert set(figures(page)) >= {"gain", "nll", "loss", "enrollment", "scores", "length", "convergence", "cost"}


def test_subtitle_and_number_count_the_same_rounds(run_folder: RunFolder, tmp_path: Path) -> None:
    page = written(run_folder, tmp_path / "page.html")
    rounds = "1 warm-up round + 2 rounds"
    assert re.search(rf'class="subtitle">[^<]*2 sites, {re.escape(rounds)}, ', page)
    assert f"<span>2 sites, {rounds}</span>" in page


def test_no_text_and_no_id_is_on_the_page(run_folder: RunFolder, texts: tuple[str, ...], tmp_path: Path) -> None:
    page = written(run_folder, tmp_path / "page.html")
    assert len(texts) > 40
    assert [text for text in texts if len(text) > 3 and text in page] == []
    assert "Private to the sites" not in page


def test_no_single_score_is_on_the_page(run_folder: RunFolder, tmp_path: Path) -> None:
    page = written(run_folder, tmp_path / "page.html")
    told = [each.score for client in "ab" for each in run_folder.read_ledger(client)]
    scores = {score for score in told if score is not None}
    assert len(scores) > 15
    shown = [f"{value:.7f}"[:-1] for score in scores for value in (score, math.log(score))]
    assert [score for score in shown if score in page] == []


def test_with_records_the_page_is_marked_and_has_texts_but_no_ids(
    run_folder: RunFolder, texts: tuple[str, ...], tmp_path: Path
) -> None:
    page = written(run_folder, tmp_path / "page.html", with_records=True)
    assert "Private to the sites" in page and page.count("<article") == 2 * (9 + 3)
    ids = {str(each.record_id) for client in "ab" for each in run_folder.read_ledger(client)}
    assert [record for record in ids if record in page] == []
    assert sum(text in page for text in texts if text not in ids) > 20


def test_records_are_searched_in_the_split_of_the_run(finished_run: Callable[..., Path], tmp_path: Path) -> None:
    folder = reopen(finished_run(tmp_path, ["data.seed=7"]))
    page = written(folder, tmp_path / "page.html", with_records=True)
    assert page.count("<article") == 2 * (9 + 3), "every trained record and every prediction is found"


def test_texts_are_only_texts(copied: Path, tmp_path: Path) -> None:
    line = {
        "record_id": "x",
        "instruction": "<img src=x onerror=alert(1)>",
        "reference": "</script>",
        "prediction": "&",
    }
    (copied / "predictions" / "a.jsonl").write_text(json.dumps(line) + "\n")
    page = written(reopen(copied), tmp_path / "page.html", with_records=True)
    opened = Page(page).opened
    assert "img" not in opened and opened.count("script") == 3
    assert "&lt;img src=x onerror=alert(1)&gt;" in page and "&lt;/script&gt;" in page


def test_records_that_are_gone_are_reported(copied: Path, tmp_path: Path) -> None:
    config = copied / "config.toml"
    config.write_text(re.sub(r'path = ".*data"', f'path = "{tmp_path}/gone"', config.read_text()))
    with pytest.raises(DataError, match="no such folder"):
        report.write(reopen(copied), with_records=True)


def test_the_default_places_are_in_the_run(copied: Path) -> None:
    folder = reopen(copied)
    assert report.write(folder) == copied / "report.html"
    assert report.write(folder, with_records=True) == copied / "report-with-records.html"


def test_a_page_of_the_servers_part_alone_lists_what_is_missing(copied: Path) -> None:
    for name in ("clients", "predictions"):
        shutil.rmtree(copied / name)
    page = written(reopen(copied), copied / "report.html")
    assert "No scores are shown" in page and not {"scores", "length", "gain"} & set(figures(page))
    assert "nll" in figures(page)


def test_a_comparison_is_self_contained_too(run_folder: RunFolder, copied: Path, tmp_path: Path) -> None:
    page = report.compare([run_folder, reopen(copied)], tmp_path / "page.html").read_text("utf-8")
    assert all(link.startswith("#") or link == "data:," for link in Page(page).links)
    assert set(figures(page)) == {"runs-nll", "runs-gain", "runs-loss"}


def test_the_drawing_library_is_the_published_one() -> None:
    """The file is that of the npm package plotly.js-basic-dist-min 4.1.1, with its license next to it."""
    import hashlib
    from importlib import resources

    folder = resources.files("fedmide.report").joinpath("page")
    digest = hashlib.sha256(folder.joinpath("plotly-basic.min.js").read_bytes()).hexdigest()
    assert digest == "99784e3abfb07b142a15e521a439e6d9addceadb3f79553fd24c72774f0649ba"
    assert "MIT" in folder.joinpath("plotly-LICENSE.txt").read_text()
