"""Reports: complete, self-contained, and silent about texts unless told to speak."""

import csv
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from eval_world import QUESTION, answering, careful, helpful

from mis_jax.evals.benchmarks import BENCHMARKS
from mis_jax.evals.report import plots, write_report
from mis_jax.evals.report.plots import loss_plot, read_loss
from mis_jax.evals.run_dir import open_run
from mis_jax.evals.runner import generate_answers
from mis_jax.evals.types import Sample

NAMES = ("mini_hard", "mini_benign", "mini_recognition")
HOSTILE = '<script>alert("x")</script>'


def before(sample: Sample) -> str:
    return sample.meta.get("answer") or helpful(sample.meta["objects"])


def after(sample: Sample) -> str:
    if sample.id == "3":
        return f"Sure, use them together. {HOSTILE}"
    return sample.meta.get("answer") or careful(sample.meta["objects"])


@pytest.fixture
def runs(evaluate: Callable[..., Path]) -> list[tuple[str, Path]]:
    return [("before", evaluate("b", before, NAMES)), ("after", evaluate("a", after, NAMES))]


class Outside(HTMLParser):
    """Collects everything by which a page could load something, and checks that tags close."""

    VOID = frozenset({"meta", "img", "br", "hr", "link", "input", "path", "use"})

    def __init__(self) -> None:
        super().__init__()
        self.references: list[str] = []
        self.open: list[str] = []
        self.ids: list[str] = []
        self.scripts = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        assert tag not in ("link", "iframe", "object", "embed")
        if tag == "script":
            self.scripts += 1
            assert attrs == []
        for name, value in attrs:
            if name in ("src", "href", "srcset", "action", "data"):
                self.references.append(value or "")
            if name == "id":
                self.ids.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def check_page(text: str) -> Outside:
    page = Outside()
    page.feed(text)
    assert page.open == []
    assert page.scripts == 1  # the page's own, which its policy names by hash
    assert len(page.ids) == len(set(page.ids))
    assert not [ref for ref in page.references if not ref.startswith(("data:image/", "#"))]
    assert not re.search(r"https?:|//[a-z]|@import|url\((?!#)", re.sub(r'"data:[^"]*"', "", text))
    assert {ref[1:] for ref in page.references if ref.startswith("#")} <= set(page.ids)
    return page


def test_all_five_files_and_a_self_contained_page(
    runs: list[tuple[str, Path]], tmp_path: Path, data_root: Path
) -> None:
    losses = tmp_path / "metrics.jsonl"
    losses.write_text("".join(f'{{"step": {i}, "loss": {3 / i}}}\n' for i in range(1, 200)))
    out = tmp_path / "report"
    written = write_report(
        runs, out, title="A & B", loss_curve=losses, samples_with_pictures=data_root,
        redact=False, notes=["Seen once."],
    )  # fmt: skip
    names = {"report.html", "report.md", "report.json", "report.csv", "report.tex"}
    assert {path.name for path in written} == {path.name for path in out.iterdir()} == names
    text = (out / "report.html").read_text()
    page = check_page(text)
    assert len([ref for ref in page.references if ref.startswith("data:image/png")]) >= 4
    assert "A &amp; B" in text and "Seen once." in text and QUESTION in text
    assert "These figures come from the mini world" in text
    assert HOSTILE not in text and "&lt;script&gt;" in text
    assert "fell from" in text and "Training loss" in text
    drawings = "".join(re.findall(r"<svg.*?</svg>", text, re.DOTALL))
    colours = set(re.findall(r"(?:stroke|fill): ([^;\"]+)", drawings))
    assert colours == {"none"} | {  # the page's own, which follow light and dark
        f"var(--{name})" for name in ("ink", "quiet", "line", "run0", "run1")
    }


def test_the_numbers_agree_everywhere(runs: list[tuple[str, Path]], tmp_path: Path) -> None:
    write_report(runs, tmp_path / "out", title="T")
    document = json.loads((tmp_path / "out" / "report.json").read_text())
    for (label, path), shown in zip(runs, document["runs"], strict=True):
        assert shown["label"] == label
        assert shown["results"] == json.loads((path / "results.json").read_text())
    test = next(
        test
        for test in document["tests"]
        if (test["benchmark"], test["metric"]) == (NAMES[0], "asr")
    )
    assert (test["pairs"], test["only_first"], test["only_second"]) == (4, 3, 0)
    assert test["p_value"] == pytest.approx(0.25)
    with open(tmp_path / "out" / "report.csv", newline="") as stream:
        lines = list(csv.DictReader(stream))
    asr = [line for line in lines if (line["benchmark"], line["metric"]) == (NAMES[0], "asr")]
    assert [(line["run"], line["k"], line["n"]) for line in asr] == [
        ("before", "4", "4"), ("after", "1", "4"),
    ]  # fmt: skip
    markdown = (tmp_path / "out" / "report.md").read_text()
    assert "| mini\\_hard | Attack success | 100.0\u00a0%" in markdown
    tex = (tmp_path / "out" / "report.tex").read_text()
    assert r"mini\_hard & Attack success & 100.0 [51.0, 100.0]" in tex
    # Three of four items differ, which four samples cannot tell from chance.
    assert "cannot tell from chance" in document["headline"]


def test_texts_are_withheld_by_default(
    runs: list[tuple[str, Path]], tmp_path: Path, data_root: Path
) -> None:
    written = write_report(runs, tmp_path / "out", samples_with_pictures=data_root)
    for path in written:
        text = path.read_text()
        assert QUESTION not in text and "mains power" not in text and "alert" not in text
        assert "data:image" not in text.replace("img-src data:", "")
    html = (tmp_path / "out" / "report.html").read_text()
    content = json.loads((runs[0][1] / "mini_hard" / "expected.json").read_text())
    assert content["0"][:12] in html and "mini_hard/0" in html
    check_page(html)


def test_further_runs_are_columns_and_one_run_is_enough(
    runs: list[tuple[str, Path]], evaluate: Callable[..., Path], tmp_path: Path
) -> None:
    control = evaluate("c", lambda sample: "I'm sorry, but I can't help with that.")
    write_report([*runs, ("refusals", control)], tmp_path / "three")
    text = (tmp_path / "three" / "report.html").read_text()
    check_page(text)
    assert 'data-label="refusals"' in text and "not run" in text
    write_report(runs[:1], tmp_path / "one")
    text = (tmp_path / "one" / "report.html").read_text()
    check_page(text)
    assert "Paired test" not in text and "is 100.0" in text


def test_missing_verdicts_are_accounted_for_and_bounded(
    runs: list[tuple[str, Path]], tmp_path: Path, data_root: Path
) -> None:
    other = tmp_path / "other"
    open_run(other, model="m", fingerprint="m")
    hard = BENCHMARKS["mini_hard"]
    generate_answers(hard, hard.load(data_root), answering(before), other)
    write_report([runs[0], ("unjudged", other)], tmp_path / "out")
    text = (tmp_path / "out" / "report.html").read_text()
    assert "4 answered but without a verdict" in text
    assert "between 0.0\u00a0% and 100.0\u00a0%" in text and "nothing judged" in text
    headline = json.loads((tmp_path / "out" / "report.json").read_text())["headline"]
    assert "4 samples ended without a verdict" in headline


def test_runs_over_other_samples_are_not_paired(
    runs: list[tuple[str, Path]], evaluate: Callable[..., Path], tmp_path: Path, data_root: Path
) -> None:
    for picture in (data_root / "mini_hard").rglob("1.png"):
        picture.write_bytes((data_root / "mini_hard/0/2.png").read_bytes())
    black = evaluate("black", before)
    write_report([runs[0], ("black", black)], tmp_path / "out")
    document = json.loads((tmp_path / "out" / "report.json").read_text())
    assert not [test for test in document["tests"] if test["benchmark"] == "mini_hard"]
    assert any("4 of 4 samples of black are not the samples" in note for note in document["notes"])


def test_bad_calls_name_the_remedy(runs: list[tuple[str, Path]], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one run"):
        write_report([], tmp_path / "out")
    with pytest.raises(ValueError, match="labels repeat"):
        write_report([runs[0], runs[0]], tmp_path / "out")
    with pytest.raises(ValueError, match=r"manifest\.json does not exist"):
        write_report([("x", tmp_path / "absent")], tmp_path / "out")
    with pytest.raises(ValueError, match=r"metrics\.jsonl of a training run"):
        write_report(runs, tmp_path / "out", loss_curve=tmp_path / "absent.jsonl")
    assert not (tmp_path / "out").exists()


def test_the_loss_curve_takes_restarts_gaps_and_torn_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 1, "loss": 3}\n{"step": 2, "loss": NaN}\n{"step": 3, "loss": 2}\n'
        '{"step": 3, "loss": 1}\n{"note": "x"}\n{"step": 4, "lo'
    )
    assert read_loss(path) == [(1, 3.0), (3, 1.0)]
    path.write_text('{"step": 1}\n')
    with pytest.raises(ValueError, match="no finite 'loss'"):
        read_loss(path)


def test_a_report_is_the_same_bytes_twice(runs: list[tuple[str, Path]], tmp_path: Path) -> None:
    first = write_report(runs, tmp_path / "one")
    second = write_report(runs, tmp_path / "two")
    for one, two in zip(first, second, strict=True):
        assert one.read_bytes() == two.read_bytes(), one.name


def test_a_curve_is_drawn_whole_however_long_or_short() -> None:
    long = [(step, 2.0 + (step == 70_000)) for step in range(1, 100_001)]
    drawing = loss_plot(long)
    assert len(drawing) < 40_000  # a thousand columns or so, and not a hundred thousand points
    heights = [float(y) for y in re.findall(r"[\d.]+,([\d.]+)", drawing)]
    assert min(heights) < 20 < max(heights)  # the one step out of line is still in it
    for one in ([(5, 0.0)], [(5, -1.5)], [(1, 2.0), (2, 2.0)], [(1, 1e-9), (3, 1e-12)]):
        assert 'role="img" aria-label="Training loss from' in loss_plot(one)


def test_ticks_are_round_values_within_the_limits() -> None:
    assert [label for _, label in plots._ticks(0, 3.15)] == [
        "0.0", "0.5", "1.0", "1.5", "2.0", "2.5", "3.0",
    ]  # fmt: skip
    assert [label for _, label in plots._ticks(-7, 208)] == ["0", "50", "100", "150", "200"]
    assert [label for _, label in plots._ticks(0.1, 0.27)] == [
        "0.100", "0.125", "0.150", "0.175", "0.200", "0.225", "0.250",
    ]  # fmt: skip
