"""The book builds without a warning, and its pages work in a browser, in light, dark and narrow."""

import json
import re
import runpy
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from chromium import prefer, requested
from reading import READING, badges
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait

HTML = Path("build/book/html")


@pytest.fixture(scope="module")
def book():
    """The built book; what Sphinx warned of, it ends with."""
    found = subprocess.run([sys.executable, "docs/build.py"], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr[-3000:]
    return HTML


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def address(book):
    """The book served on this machine."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(book)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def pages(book):
    """All pages; of those of the library, which are made from one template, the first three."""
    library = sorted(book.glob("library/*.html"))[:3]
    return [path.relative_to(book).as_posix() for path in sorted(book.glob("*.html")) + library]


def test_notebooks_are_pages_with_folded_solutions_and_links(book):
    for notebook in sorted(READING.glob("0*.ipynb")):
        text = (book / f"{notebook.stem}.html").read_text()
        assert "Run this yourself" in text and text.count("Exercise ") >= 3
        assert text.count("tag_hide-input") >= 3
        linked = re.findall(r'href="glossary.html#term-([^"]+)"', text)
        assert len(linked) >= 5 and len(set(linked)) == len(linked)  # each term at its first use
        for page in ("exercises.html", "teaching.html"):
            assert f'href="{notebook.stem}.html"' in (book / page).read_text()
    text = (book / "03_induction_heads.html").read_text()
    assert 'href="02_training.html"' in text and re.search(r'href="references.html#[^"]+"', text)


def test_badges_take_the_address_of_the_repository_from_one_place(tmp_path):
    assert badges({}) == ""
    cited = {"repository-code": "https://github.com/some/where"}
    _, colab, _, binder = re.findall(r"\]\((https:[^)]+)\)", badges(cited))
    assert "/github/some/where/blob/main/notebooks/01" in colab and "/gh/some/where/" in binder
    source = tmp_path / "build/book/source"
    source.mkdir(parents=True)
    for place in ("", "repository-code: https://github.com/some/where"):
        (tmp_path / "CITATION.cff").write_text(f"cff-version: 1.2.0\n{place}\n")
        (source / "conf.py").write_text(Path("docs/conf.py").read_text())
        theme = runpy.run_path(str(source / "conf.py"))["html_theme_options"]
        assert ("launch_buttons" in theme) == bool(place)


def test_every_module_has_a_page_of_its_functions(book):
    for file in Path("lib/latentree").glob("*/[a-z]*.py"):
        page = book / f"library/latentree.{file.parent.name}.{file.stem}.html"
        assert page.read_text().count("sig-name") > 0


def test_every_page_works_in_a_browser(book, address, browser):
    def found(selector):
        return browser.find_elements(By.CSS_SELECTOR, selector)

    assert len(pages(book)) > 15
    loaded = "return document.readyState == 'complete'"
    eager = "for (const image of document.images) image.loading = 'eager'"
    images = "return [...document.images].map(i => [i.alt, i.naturalWidth, i.complete])"
    for page in pages(book):
        browser.get(f"{address}/{page}")
        WebDriverWait(browser, 30).until(lambda b: b.execute_script(loaded))
        if found(".math"):
            WebDriverWait(browser, 60).until(lambda b: found("mjx-container"))
            assert not found("mjx-merror"), page
        browser.execute_script(eager)
        for text, width, complete in browser.execute_script(images):
            assert text and (width > 0 or not complete), page
        assert not [e for e in browser.get_log("browser") if e["level"] == "SEVERE"], page
        own = (address, "data:", "blob:", "chrome:")
        assert not [url for url in requested(browser) if not url.startswith(own)], page


def test_light_and_dark_wide_and_narrow(book, address, browser):
    shades = set()
    shade = "return getComputedStyle(document.body).backgroundColor"
    for scheme in ("light", "dark"):
        prefer(browser, prefers_color_scheme=scheme)
        browser.get(f"{address}/02_training.html")
        shades.add(browser.execute_script(shade))
    assert len(shades) == 2
    narrow = {"width": 420, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", narrow)
    too_wide = "return document.documentElement.scrollWidth - window.innerWidth"
    library = [page for page in pages(book) if page.startswith("library/")]
    for page in ("index.html", "02_training.html", *library):
        browser.get(f"{address}/{page}")
        assert browser.execute_script(too_wide) <= 1, page
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_a_moving_picture_has_its_slider(book, address, browser):
    browser.get(f"{address}/03_induction_heads.html")
    slider = ".film input[type=range]"
    WebDriverWait(browser, 30).until(lambda b: b.find_elements(By.CSS_SELECTOR, slider))


def test_search_finds_a_word(book, address, browser):
    browser.get(f"{address}/search.html?q=induction")
    WebDriverWait(browser, 30).until(
        lambda b: len(b.find_elements(By.CSS_SELECTOR, "ul.search li")) > 2
    )


def test_every_figure_has_an_alternative_text_of_its_own(book):
    for path in READING.glob("0*.ipynb"):
        page = json.loads((book.parent / "source" / path.name).read_text())
        cells = [cell["metadata"].get("mystnb", {}) for cell in page["cells"]]
        texts = [cell["image"]["alt"] for cell in cells if cell]
        figures = list(READING.glob(f"figures/{path.name[:2]}_*.png"))
        assert len(texts) == len(figures) + 1  # its answer, near the top, shows one of them
        assert all(len(text) > 10 for text in texts)
