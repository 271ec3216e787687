"""The page's list of samples: in a real browser, and how large it may become."""

import base64
import io
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from eval_made_runs import SAFE, UNSAFE, Made, write_run
from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright

from mis_jax.evals.benchmarks import get_benchmark
from mis_jax.evals.images import thumbnails
from mis_jax.evals.report import samples as sample_browser
from mis_jax.evals.report import write_report
from mis_jax.evals.run_dir import sample_hash

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None and not os.environ.get("CI"),
    reason="no Chromium on this machine (Debian: apt-get install chromium)",
)
HOSTILE = '<img src=x onerror="document.title=1"></td><script>document.title=2</script>'


def made_data(root: Path, n: int, size: tuple[int, int], kinds: int) -> dict[str, str]:
    """MIS hard in its published form over generated pictures; returns ``{id: hash}``."""
    rng = np.random.default_rng(4)
    encoded = []
    for _ in range(kinds):  # rough shapes with noise over them, harder to compress than a photo
        coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8)).resize(size)
        noise = rng.normal(0, 12, (size[1], size[0], 3))
        pixels = np.clip(np.asarray(coarse) + noise, 0, 255).astype(np.uint8)
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, "JPEG", quality=80)
        encoded.append(stream.getvalue())
    rows = []
    for number in range(n):
        folder = root / "hard_image" / str(number)
        folder.mkdir(parents=True)
        for place in (1, 2):
            (folder / f"object{place}.jpg").write_bytes(encoded[(2 * number + place) % kinds])
        paths = {f"image_path{k}": f"hard_image/{number}/object{k}.jpg" for k in (1, 2)}
        row = {"id": number, "question": f"What of number {number}?", "category": "ABC"[number % 3]}
        rows.append(row | {"sub_category": None} | paths)
    (root / "mis_hard.json").write_text(json.dumps(rows))
    benchmark = get_benchmark("mis_hard")
    return {sample.id: sample_hash(benchmark, sample) for sample in benchmark.load(root)}


def made_runs(root: Path, hashes: dict[str, str], words: int) -> list[tuple[str, Path]]:
    """Before: all unsafe but every fifth; after: all safe but 7, and 8 without a verdict."""

    def run(label: str, unsafe: Any) -> tuple[str, Path]:
        rows = [
            Made(
                key,
                f"Answer {key} of {label}. " + "More of the same words. " * words,
                None if label == "after" and key == "8" else UNSAFE if unsafe(int(key)) else SAFE,
                "unparsed",
                {"category": "ABC"[int(key) % 3]},
                hashes[key],
            )
            for key in hashes
        ]
        if label == "after":
            rows[1] = Made(**(vars(rows[1]) | {"answer": HOSTILE}))
        return label, write_run(root / label, {"mis_hard": rows})

    return [run("before", lambda n: n % 5 != 0), run("after", lambda n: n == 7)]


@pytest.mark.slow
def test_two_thousand_samples_with_pictures_stay_under_5_mb(tmp_path: Path) -> None:
    hashes = made_data(tmp_path / "data", 2000, (96, 72), 24)
    runs = made_runs(tmp_path, hashes, 60)  # 1,500 characters an answer, 6 MB in all
    out = tmp_path / "out"
    write_report(runs, out, samples_with_pictures=tmp_path / "data", redact=False)
    page = (out / "report.html").read_bytes()
    assert len(page) < 5_000_000
    assert page.count(b"<img ") >= 4000 and page.count(b"<tr data-b=") == 2000
    assert b"long texts are cut" in page and b"What of number 1999?" in page


def test_more_samples_than_a_page_holds_are_chosen_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample_browser, "MOST_SAMPLES", 12)
    few = [Made(str(n), "A kettle.", {"unsafe": False}) for n in range(3)]
    many = [Made(str(n), "A kettle.", {"unsafe": n in (31, 37)}) for n in range(40)]
    run = write_run(tmp_path / "run", {"figstep": few, "mm_safetybench": many})
    write_report([("run", run)], tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text()
    shown = re.findall(r'<tr data-b[^>]*><th scope="row">([\w/]+)', page)
    assert shown[:3] == ["figstep/0", "figstep/1", "figstep/2"]
    assert shown[3:] == [f"mm_safetybench/{n}" for n in (*range(7), 31, 37)]
    assert "12 of 43 samples, so that the page stays small" in page


def test_thumbnails_keep_to_their_budget_and_are_the_picture(tmp_path: Path) -> None:
    paths = []
    for number, colour in enumerate(("teal", "orange", "red")):
        paths.append(tmp_path / f"{number}.png")
        Image.new("RGB", (600, 300), colour).save(paths[-1])
    urls = thumbnails([*paths, paths[0]], 3000)
    assert list(urls) == paths and sum(map(len, urls.values())) <= 3000
    small = Image.open(io.BytesIO(base64.b64decode(urls[paths[2]].partition(",")[2])))
    assert small.size[0] == 2 * small.size[1] and small.size[0] <= 160
    red, green, blue = small.convert("RGB").getpixel((5, 5))  # type: ignore[misc]
    assert red > 240 and green < 15 and blue < 15
    assert thumbnails(paths, 60) == {}  # no picture fits into 20 characters


def test_an_unreadable_picture_is_left_out_and_its_sample_stays(tmp_path: Path) -> None:
    made_data(tmp_path / "data", 4, (64, 48), 3)
    (tmp_path / "data/hard_image/0/object2.jpg").write_bytes(b"no picture")
    benchmark = get_benchmark("mis_hard")
    hashes = {s.id: sample_hash(benchmark, s) for s in benchmark.load(tmp_path / "data")}
    runs = [("one", write_run(tmp_path / "one", {"mis_hard": [
        Made(key, "A kettle.", UNSAFE, hash=hashes[key]) for key in hashes
    ]}))]  # fmt: skip
    write_report(runs, tmp_path / "out", samples_with_pictures=tmp_path / "data", redact=False)
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<tr data-b=") == 4 and page.count("loading=") == 7


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    assert CHROMIUM, "no Chromium on this machine: apt-get install chromium"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("browser")
    hashes = made_data(root / "data", 20, (320, 240), 5)
    runs = made_runs(root, hashes, 2)
    write_report(runs, root / "out", samples_with_pictures=root / "data", redact=False)
    write_report(runs, root / "redacted", samples_with_pictures=root / "data")
    return root


@pytest.fixture
def page(chromium: Browser, pages: Path) -> Iterator[Page]:
    """The page with its texts; errors of its script and any request fail the test."""
    page = chromium.new_page()
    page.set_default_timeout(10_000)
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(message.text))
    page.on(
        "request",
        lambda r: None if r.url.startswith(("file:", "data:")) else wrong.append(r.url),
    )
    page.goto((pages / "out" / "report.html").as_uri())
    yield page
    page.close()
    assert wrong == []


def shown(page: Page) -> list[str]:
    rows = page.locator("#sample-list tbody tr:visible th")
    return [text.split("\n")[0].removeprefix("mis_hard/") for text in rows.all_inner_texts()]


@needs_chromium
def test_filters_narrow_the_list_and_reset(page: Page) -> None:
    status, filters = page.get_by_role("status"), page.get_by_role("search")
    expect(status).to_have_text("20 of 20 samples")
    filters.get_by_label("Category").select_option("B")
    expect(status).to_have_text("7 of 20 samples")
    assert shown(page) == [str(n) for n in range(20) if n % 3 == 1]
    filters.get_by_role("button", name="Reset").click()
    expect(status).to_have_text("20 of 20 samples")

    filters.get_by_label("Outcome").select_option("Unsafe")
    filters.get_by_label("Run").select_option("after")
    expect(status).to_have_text("1 of 20 samples")
    assert shown(page) == ["7"]
    filters.get_by_label("Run").select_option("before")
    expect(status).to_have_text("16 of 20 samples")
    filters.get_by_label("Outcome").select_option("no verdict: unparsed")
    expect(status).to_have_text("0 of 20 samples")
    filters.get_by_label("Run").select_option("any")
    expect(status).to_have_text("1 of 20 samples")
    assert shown(page) == ["8"]
    filters.get_by_label("Outcome").select_option("changed for the better")
    expect(status).to_have_text("14 of 20 samples")
    filters.get_by_label("Outcome").select_option("changed for the worse")
    expect(status).to_have_text("0 of 20 samples")


@needs_chromium
def test_search_by_keyboard_finds_questions_and_answers(page: Page) -> None:
    page.get_by_role("search").get_by_label("Benchmark").focus()
    for _ in range(4):
        page.keyboard.press("Tab")
    page.keyboard.type("NUMBER 13")
    expect(page.get_by_role("status")).to_have_text("1 of 20 samples")
    assert shown(page) == ["13"]
    page.get_by_role("search").get_by_label("Search").fill("answer 4 before")
    expect(page.get_by_role("status")).to_have_text("2 of 20 samples")  # 4 and 14
    page.keyboard.press("Enter")  # must not leave the page
    assert shown(page) == ["4", "14"]


@needs_chromium
def test_pictures_are_seen_and_answers_stay_words(page: Page) -> None:
    assert page.title() == "Evaluation report"
    expect(page.locator("#sample-list")).to_contain_text(HOSTILE)
    picture = page.locator("#sample-list img").first
    picture.scroll_into_view_if_needed()
    assert picture.evaluate("image => image.decode().then(() => image.naturalWidth)") > 20
    assert picture.get_attribute("alt") == "picture 1"
    assert page.locator("#sample-list img").count() == 40


@needs_chromium
@pytest.mark.parametrize(("scheme", "width"), [("light", 390), ("dark", 1200)])
def test_no_width_overflows_and_words_stand_out(
    chromium: Browser, pages: Path, scheme: Any, width: int
) -> None:
    page = chromium.new_page(color_scheme=scheme, viewport={"width": width, "height": 800})
    page.goto((pages / "out" / "report.html").as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") == width
    colours = page.evaluate(
        "() => { const c = getComputedStyle(document.body); return [c.color, c.backgroundColor] }"
    )
    light = [sum(map(int, re.findall(r"\d+", colour)[:3])) / 765 for colour in colours]
    assert (light[1] - light[0] if scheme == "light" else light[0] - light[1]) > 0.6
    page.close()


@needs_chromium
def test_without_a_script_the_list_is_a_plain_table(chromium: Browser, pages: Path) -> None:
    page = chromium.new_page(java_script_enabled=False)
    page.goto((pages / "redacted" / "report.html").as_uri())
    assert len(shown(page)) == 20
    expect(page.locator("#filters")).to_be_hidden()
    text = page.content()
    assert "What of number" not in text and "Answer 3" not in text and "<img" not in text
    page.close()
