"""Pages that move: a film with its slider, and a document to point at, in a browser, from files."""

import base64
import json
import re
from pathlib import Path

import pytest
import torch
from chromium import prefer, requested
from latentree.evidence import figures
from latentree.evidence.hover import hover
from matplotlib import pyplot as plt
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.wait import WebDriverWait

SHADES = ["#cc0000", "#00cc00", "#0000cc"]
OWN = ("file:", "data:", "chrome:")
WORDS = ["farmer", "sees", "<bread>", "."]


def shade_of(colour):
    figure = plt.figure(figsize=(1, 1), facecolor=colour)
    return figure


@pytest.fixture
def film(tmp_path):
    """A page with a film of three frames, each of one colour, and a picture that does not move."""
    figures.write_film(map(shade_of, SHADES), tmp_path / "film.webp")
    figures.write_film([shade_of(SHADES[0])], tmp_path / "still.webp")
    images = ""
    for name in ("film", "still"):
        data = base64.b64encode((tmp_path / f"{name}.webp").read_bytes()).decode()
        images += f'<img alt="{name}" src="data:image/webp;base64,{data}">'
    script = Path("docs/_static/film.js").read_text()
    (tmp_path / "page.html").write_text(f"<html>{images}<script>{script}</script></html>")
    return (tmp_path / "page.html").as_uri()


def one(browser, selector):
    return WebDriverWait(browser, 60).until(
        lambda b: b.find_elements(By.CSS_SELECTOR, selector), selector
    )[0]


def drawn(browser):
    """Which of the shades the canvas shows."""
    pixel = "document.querySelector('canvas').getContext('2d').getImageData(40, 40, 1, 1).data"
    red, green, blue, _ = browser.execute_script(f"return [...{pixel}]")
    return [red, green, blue].index(max(red, green, blue))


def wait_for(browser, shade):
    WebDriverWait(browser, 60, 0.02).until(lambda b: drawn(b) == shade)


def test_a_film_plays_and_its_slider_chooses_the_frame(browser, film):
    prefer(browser, prefers_reduced_motion="no-preference")
    browser.get(film)
    button, slider = one(browser, ".film button"), one(browser, ".film input")
    assert one(browser, "canvas").get_attribute("aria-label") == "film"
    for shade in (0, 1, 2, 0):  # and begins again
        wait_for(browser, shade)
    assert button.text == "Pause"
    slider.send_keys(Keys.HOME)
    wait_for(browser, 0)
    slider.send_keys(Keys.ARROW_RIGHT)
    wait_for(browser, 1)
    assert button.text == "Play" and one(browser, "output").text == "2 of 3"
    button.click()
    wait_for(browser, 2)
    # what does not move is left alone, and nothing is asked for
    assert [i.get_attribute("alt") for i in browser.find_elements(By.TAG_NAME, "img")] == ["still"]
    assert not [url for url in requested(browser) if not url.startswith(OWN)]


def test_a_film_stands_still_for_who_asked_for_less_motion(browser, film):
    prefer(browser, prefers_reduced_motion="reduce")
    browser.get(film)
    assert one(browser, ".film button").text == "Play"
    wait_for(browser, 2)
    seen = browser.execute_async_script(
        "const done = arguments[0]; setTimeout(() => done(document.querySelector('output').value), 600)"
    )
    assert seen == "3 of 3"
    prefer(browser)


@pytest.mark.parametrize("motion", ["no-preference", "reduce"])
def test_a_browser_that_cannot_take_it_apart_shows_the_picture(browser, film, motion):
    prefer(browser, prefers_reduced_motion=motion)
    lacking = {"source": "delete window.ImageDecoder"}
    added = browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", lacking)
    browser.get(film)
    if motion == "reduce":
        assert one(browser, 'canvas[aria-label="film"]') and drawn(browser) == 0
    else:
        assert one(browser, 'img[alt="film"]')
    assert not browser.find_elements(By.TAG_NAME, "input")
    browser.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", added)
    prefer(browser)


# ---- a document to point at


def attention():
    """Of a head on four words: the last looks at the third, which belongs to it."""
    paid = torch.tensor([[1, 0, 0, 0], [0.5, 0.5, 0, 0], [0.2, 0.004, 0.796, 0], [0, 0, 0.9, 0.1]])
    belongs = torch.zeros(4, 4, dtype=torch.bool)
    belongs[2, 0] = belongs[3, 2] = True
    return paid, belongs


def test_a_document_to_point_at_holds_what_was_paid_and_asks_for_nothing():
    paid, belongs = attention()
    page = hover(WORDS, ["#111", "#222", "#333", "#444"], paid, belongs).data
    assert "&lt;bread&gt;" in page and "<bread>" not in page
    assert not re.search(r"https?:|src=|import|fetch|url\(", page)
    held, boxed, first = json.loads(re.search(r"first\] = (.+);", page)[1])
    shown = torch.zeros(4, 4)
    for query, row in enumerate(held):
        for key, percent in row.items():
            shown[query, int(key)] = percent / 100
    assert (shown - paid).abs().max() <= 0.005
    assert boxed == [[], [], [0], [2]] and first == 3
    with pytest.raises(ValueError, match=r"belongs: is of shape \(3, 3\) for 4 words"):
        hover(WORDS, ["#111"] * 4, paid, belongs[:3, :3])


def test_words_show_where_the_head_looks_when_pointed_at_and_by_keyboard(browser, tmp_path):
    paid, belongs = attention()
    view = hover(WORDS, ["#111", "#222", "#333", "#444"], paid, belongs).data
    (tmp_path / "page.html").write_text(f"<html>{view}{view}</html>")  # two do not meet
    browser.get((tmp_path / "page.html").as_uri())
    words = browser.find_elements(By.CSS_SELECTOR, "[tabindex]")[:4]

    def state():
        shades = "return [...arguments].map(word => Number(word.style.getPropertyValue('--paid')))"
        boxed = ["belongs" in word.get_attribute("class") for word in words]
        return browser.execute_script(shades, *words), boxed

    assert state() == ([0, 0, 0.9, 0.1], [False, False, True, False])
    told = one(browser, ".told")
    assert told.text == ". looks at <bread> 90 %, . 10 %. Boxed: what belongs to it."
    browser.execute_script("arguments[0].dispatchEvent(new PointerEvent('pointerenter'))", words[2])
    assert state() == ([0.2, 0, 0.8, 0], [True, False, False, False])
    assert "<bread>, before ., looks at <bread> 80 %, farmer 20 %" in told.text
    browser.execute_script("arguments[0].focus()", words[2])
    browser.switch_to.active_element.send_keys(Keys.ARROW_LEFT)
    assert state()[0] == [0.5, 0.5, 0, 0] and "Nothing belongs to it" in told.text
    assert browser.switch_to.active_element == words[1]
    stops = [word.get_attribute("tabindex") for word in words]
    assert stops == ["-1", "0", "-1", "-1"]  # one stop for the Tab key
    assert not [url for url in requested(browser) if not url.startswith(OWN)]
