"""The chat page in a real browser, and what it may load."""

import os
import re
import shutil
from collections.abc import Iterator

import pytest
from PIL import Image
from playwright.sync_api import expect, sync_playwright
from scripted_engine import FAIL
from serve_world import World, running
from waiting import until

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
pytestmark = pytest.mark.skipif(
    CHROMIUM is None and not os.environ.get("CI"),
    reason="no Chromium on this machine (Debian: apt-get install chromium)",
)


@pytest.fixture(scope="module")
def world(tiny_processor) -> Iterator[World]:
    with running(tiny_processor, rows=1, pause=0.01) as world:
        yield world


@pytest.fixture(scope="module")
def browser():
    assert CHROMIUM, "no Chromium on this machine: apt-get install chromium"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser, world):
    """The page, freshly loaded; errors of its script and requests to other hosts fail the test."""
    page = browser.new_page()
    page.set_default_timeout(10_000)
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda m: wrong.append(m.text) if "Security Policy" in m.text else None)
    page.on(
        "request",
        lambda r: None if r.url.startswith((world.url, "data:")) else wrong.append(r.url),
    )
    page.goto(world.url)
    yield page
    page.close()
    assert wrong == []


@pytest.fixture
def pictures(tmp_path) -> list[str]:
    files = []
    for name, colour in (("first", "teal"), ("second", "orange"), ("third", "red")):
        files.append(str(tmp_path / f"{name}.png"))
        Image.new("RGB", (120, 80), colour).save(files[-1])
    return files


def answer(page):
    return page.get_by_label("Answer", exact=True).last


def ask(page, text: str) -> None:
    page.get_by_label("Message").fill(text)
    page.get_by_role("button", name="Send").click()


def ended(page) -> None:
    page.locator("article.assistant .note, article.assistant .error").last.wait_for()
    page.locator(".writing").wait_for(state="detached")


def test_an_answer_comes_in_pieces(page, world):
    world.engine.pause = 0.03
    ask(page, "What is a kettle for?")
    page.locator(".writing .words", has_text="0 tiles").wait_for()
    early = answer(page).locator(".words").inner_text()
    ended(page)
    world.engine.pause = 0.01
    assert answer(page).locator(".words").inner_text() == "0 tiles: What is a kettle for?"
    assert "0 tiles: What is a kettle for?".startswith(early) and len(early) < 30
    assert re.search(r"\d+ \+ \d+ tokens", answer(page).inner_text())
    assert page.get_by_label("You", exact=True).inner_text() == "What is a kettle for?"
    assert page.locator("#model").inner_text() == "scripted"


def test_two_pictures_and_the_turns_before(page, pictures):
    page.get_by_label("Add pictures").set_input_files(pictures[:2])
    expect(page.get_by_role("img", name="Picture")).to_have_count(2)
    ask(page, "What are they for?")
    ended(page)
    # Two tiles and a thumbnail each, and the images named in their order.
    said = answer(page).locator(".words").inner_text()
    assert said == "6 tiles: Image-1: \nImage-2: \nWhat are they for?"
    assert page.get_by_label("You", exact=True).get_by_role("img").count() == 2
    first = int(re.search(r"(\d+) \+", answer(page).inner_text())[1])
    page.get_by_label("Message").fill("And now?")
    page.get_by_label("Message").press("Enter")
    page.locator(".assistant .note").nth(1).wait_for()
    assert answer(page).locator(".words").inner_text() == "6 tiles: And now?"
    assert int(re.search(r"(\d+) \+", answer(page).inner_text())[1]) > first


def test_a_third_picture_and_a_removed_one(page, pictures, tmp_path):
    page.get_by_label("Add pictures").set_input_files(pictures)
    expect(page.locator(".error")).to_contain_text("third.png is left out")
    expect(page.get_by_role("img", name="Picture")).to_have_count(2)
    page.get_by_role("button", name="Remove picture 2").click()
    expect(page.get_by_role("img", name="Picture")).to_have_count(1)
    ask(page, "What is it?")
    page.wait_for_selector("article.assistant .note")
    assert (
        answer(page).locator(".words").inner_text() == "5 tiles: What is it?"
    )  # the budget of two pictures


def test_stop(page, world):
    world.engine.pause = 0.1
    stopped = len(world.engine.cancelled)
    ask(page, "a long question " * 5)
    page.locator(".writing .words", has_text="0 t").wait_for()
    page.get_by_role("button", name="Stop").click()
    page.wait_for_selector("article .note")
    assert "stopped" in answer(page).inner_text()
    until(lambda: len(world.engine.cancelled) == stopped + 1)
    world.engine.pause = 0.01
    page.get_by_role("button", name="New conversation").click()
    assert page.locator("article").count() == 0
    ask(page, "again")
    ended(page)
    assert answer(page).locator(".words").inner_text() == "0 tiles: again"


def test_errors_are_shown_and_the_message_can_be_sent_again(page):
    page.get_by_text("Settings").click()
    page.get_by_label("Longest answer").fill("100000")
    ask(page, "hello")
    ended(page)
    assert "max_tokens is 100000" in answer(page).inner_text()
    assert page.get_by_label("Message").input_value() == "hello"
    page.get_by_label("Longest answer").fill("2")
    page.get_by_role("button", name="Send").click()
    page.wait_for_selector("article .note")
    assert "cut at the longest answer" in answer(page).inner_text()


def test_text_is_never_markup(page):
    ask(page, "<img src=x onerror=document.title='bad'><b>hi</b>")
    ended(page)
    assert "<b>hi</b>" in answer(page).locator(".words").inner_text()
    assert page.title() == "mis-jax chat"


def test_every_control_has_a_name(page):
    nameless = page.evaluate(
        """[...document.querySelectorAll('input, textarea, button')]
        .filter(n => !(n.labels?.length || n.ariaLabel || n.textContent.trim()))
        .map(n => n.outerHTML)"""
    )
    assert nameless == []
    assert page.evaluate("document.documentElement.lang") == "en"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_stand_out_from_what_is_behind_them(page, scheme):
    page.emulate_media(color_scheme=scheme)
    ask(page, "hello")
    ended(page)
    ratios = page.evaluate(CONTRAST)
    assert ratios and min(ratios.values()) >= 4.5, ratios


CONTRAST = """() => {
  const numbers = colour => colour.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(v => (v /= 255) <= .03928 ? v / 12.92
      : ((v + .055) / 1.055) ** 2.4).reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const behind = node => {
    for (; node; node = node.parentElement) {
      const colour = getComputedStyle(node).backgroundColor;
      if ((numbers(colour)[3] ?? 1) > 0) return numbers(colour);
    }
  };
  const found = {};
  for (const s of ['h1', '#model', '.words', '.note', '#send', '#clear', 'summary', '.pick',
                   'article.user .words']) {
    const node = document.querySelector(s);
    const [a, b] = [light(numbers(getComputedStyle(node).color)), light(behind(node))].sort();
    found[s] = (b + .05) / (a + .05);
  }
  return found;
}"""


def test_a_key_is_asked_for(browser, tiny_processor):
    with running(tiny_processor, api_key="right") as locked:
        page = browser.new_page()
        page.set_default_timeout(10_000)
        page.goto(locked.url)
        page.get_by_text("the API key is missing or wrong").wait_for()
        page.get_by_text("Settings").click()
        page.get_by_label("API key").fill("right")
        ask(page, "hello")
        ended(page)
        assert answer(page).locator(".words").inner_text() == "0 tiles: hello"
        page.close()


def test_a_failed_engine_is_told(browser, tiny_processor):
    with running(tiny_processor) as broken:
        page = browser.new_page()
        page.set_default_timeout(10_000)
        page.goto(broken.url)
        ask(page, FAIL)
        ended(page)
        assert "the model failed" in answer(page).inner_text()
        page.close()
