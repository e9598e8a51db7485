"""The book builds without a warning, and every page of it works in headless Chromium, light and dark, wide and narrow."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from latentree.run.record import output_folder
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait

HTML = Path("build/book/html")
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--window-size=1400,1000",
)


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


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip(
            "needs Debian's packages chromium and chromium-driver, which `make test` installs as root"
        )
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    yield driver
    driver.quit()


def pages(book):
    return sorted(
        path.relative_to(book).as_posix()
        for path in book.rglob("*.html")
        if "_static" not in path.parts
    )


def requested(browser):
    """The addresses that the browser has asked for since the last call."""
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return [
        m["params"]["request"]["url"]
        for m in messages
        if m["method"] == "Network.requestWillBeSent"
    ]


def test_every_notebook_is_a_page_with_exercises_folded_solutions_and_the_way_to_run_it(book):
    for notebook in sorted(output_folder("laptop").glob("0*.ipynb")):
        text = (book / f"{notebook.stem}.html").read_text()
        assert (
            "Run this yourself" in text
            and text.count("Exercise ") >= 3
            and text.count("tag_hide-input") >= 3
        )
        assert f'href="{notebook.stem}.html"' in (book / "exercises.html").read_text()
        assert f'href="{notebook.stem}.html"' in (book / "teaching.html").read_text()
    assert (
        'href="teaching.html"' in (book / "exercises.html").read_text()
        and 'href="exercises.html"' in (book / "teaching.html").read_text()
    )


def test_notebooks_link_to_each_other_and_to_the_literature(book):
    text = (book / "03_induction_heads.html").read_text()
    assert 'href="02_training.html"' in text and re.search(r'href="references.html#[^"]+"', text)
    assert (
        "Olsson" in (book / "references.html").read_text()
        and "recovered share" in (book / "glossary.html").read_text()
    )


def test_every_page_works_in_a_browser(book, address, browser):
    assert len(pages(book)) > 20
    for page in pages(book):
        browser.get(f"{address}/{page}")
        WebDriverWait(browser, 30).until(
            lambda b: b.execute_script("return document.readyState") == "complete"
        )
        if browser.find_elements(By.CSS_SELECTOR, ".math"):
            WebDriverWait(browser, 60).until(
                lambda b: b.find_elements(By.CSS_SELECTOR, "mjx-container")
            )
            assert not browser.find_elements(By.CSS_SELECTOR, "mjx-merror"), page
        pictures = browser.execute_script(
            "return [...document.images].map(i => (i.loading = 'eager', [i.src, i.alt, i.naturalWidth, i.complete]))"
        )
        assert all(width > 0 or not complete for _, _, width, complete in pictures), (
            page,
            pictures,
        )
        assert all(alt for _, alt, _, _ in pictures), (
            page,
            [src for src, alt, _, _ in pictures if not alt],
        )
        assert [
            entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"
        ] == [], page
        assert [
            url
            for url in requested(browser)
            if not url.startswith((address, "data:", "blob:", "chrome:"))
        ] == [], page


def test_light_and_dark_wide_and_narrow(book, address, browser):
    shades = {}
    for scheme in ("light", "dark"):
        browser.execute_cdp_cmd(
            "Emulation.setEmulatedMedia",
            {"features": [{"name": "prefers-color-scheme", "value": scheme}]},
        )
        browser.get(f"{address}/02_training.html")
        shades[scheme] = browser.execute_script(
            "return getComputedStyle(document.body).backgroundColor"
        )
    assert shades["light"] != shades["dark"]
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": 420, "height": 900, "deviceScaleFactor": 1, "mobile": False},
    )
    for page in (
        "index.html",
        "02_training.html",
        *(page for page in pages(book) if page.startswith("library/")),
    ):
        browser.get(f"{address}/{page}")
        assert (
            browser.execute_script(
                "return document.documentElement.scrollWidth - window.innerWidth"
            )
            <= 1
        ), page
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_search_finds_a_word(book, address, browser):
    browser.get(f"{address}/search.html?q=induction")
    WebDriverWait(browser, 30).until(
        lambda b: len(b.find_elements(By.CSS_SELECTOR, "ul.search li")) > 2
    )


def test_notebooks_without_a_picture_description_would_be_told():
    """The builder takes alternative texts from the figures themselves: one for each figure of the reading copy."""
    build = importlib.util.spec_from_file_location("build", "docs/build.py")
    module = importlib.util.module_from_spec(build)
    build.loader.exec_module(module)
    folder = output_folder("laptop")
    names = {path.name[:2]: path.stem for path in folder.glob("0*.ipynb")}
    for path in folder.glob("0*.ipynb"):
        alts = [
            cell.metadata["mystnb"]["image"]["alt"]
            for cell in module.page_of(path, names).cells
            if "mystnb" in cell.metadata
        ]
        assert len(alts) == len(list((folder / "figures").glob(f"{path.name[:2]}_*.png"))) and all(
            len(alt) > 10 for alt in alts
        )
