"""The documentation site: it builds without a warning, is complete, and loads nothing from other servers."""

import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser

from tests.needs import ROOT

LOADED = re.compile(r"<(?:script|img|iframe|source|link)\b[^>]*?\b(?:src|href)=[\"']?([^\"' >]+)")
"""Addresses that a page loads by itself, in contrast to links that a reader may follow."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site that `make docs` builds, in a folder of its own."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=quiet, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    return folder


@pytest.mark.slow
def test_every_document_is_a_page_and_every_error_has_its_place(site: Path) -> None:
    pages = {path.stem for path in site.glob("*.html")}
    assert pages == {path.stem for path in (ROOT / "docs").glob("*.md")} | {"404"}
    errors = (site / "errors.html").read_text("utf-8")
    assert all(f'id="{name}"' in errors for name in ("configerror", "dataerror", "modelerror", "runfoldererror"))
    api = (site / "api.html").read_text("utf-8")
    assert all(
        f'id="fedmide.{name}"' in api
        for name in ("config.loading.load", "data.records.Record", "methods.method.Method")
    )


@pytest.mark.slow
def test_pages_name_nothing_to_load_from_elsewhere(site: Path) -> None:
    loaded = {url for path in site.glob("*.html") for url in LOADED.findall(path.read_text("utf-8"))}
    assert len(loaded) > 5
    assert {url for url in loaded if urlsplit(url).netloc or url.startswith("//")} == set()


class Quiet(SimpleHTTPRequestHandler):
    """A file server that prints no log."""

    def log_message(self, format: str, *args: object) -> None:
        """Prints nothing."""


@pytest.fixture
def address(site: Path) -> Iterator[str]:
    """The address of a server on loopback that serves the site."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.browser
@pytest.mark.needs("chromium")
@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_loads_nothing_from_elsewhere_and_draws_the_picture(
    browser: Browser, address: str, scheme: str
) -> None:
    asked, said = [], []
    page = browser.new_context(color_scheme=scheme).new_page()  # type: ignore[arg-type]
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: said.append(message.text))
    for name in ("index", "start", "concepts", "api", "configuration"):
        page.goto(f"{address}/{name}.html", wait_until="networkidle")
        width, inner = page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
        assert width <= inner, f"{name} scrolls sideways"
        if name == "concepts":
            assert page.evaluate("document.querySelector('img[src$=\"dataflow.svg\"]').naturalWidth") > 0
    assert len(asked) > 5 and [url for url in asked if not url.startswith((address, "data:"))] == []
    assert said == []
    assert page.evaluate("document.body.dataset.mdColorScheme") == {"light": "default", "dark": "slate"}[scheme]


@pytest.mark.slow
def test_the_run_from_python_runs(tmp_path: Path, tiny_folder: Path) -> None:
    program = (ROOT / "docs" / "api.md").read_text("utf-8").split("```python\n")[1].split("```")[0]
    (tmp_path / "examples").mkdir()
    shutil.copy(ROOT / "examples" / "tiny.toml", tmp_path / "examples")
    variables = {**os.environ, "FEDMIDE_CACHE": str(tiny_folder.parent)}
    command = [sys.executable, "-c", f'{program}\nassert metrics["over_clients"]']
    done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "tiny" / "report.html").is_file()
