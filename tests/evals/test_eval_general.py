"""The five general sets: prompts letter by letter, tiles, labels, sizes, and how they are asked."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from eval_tables import FILES, b64, general_root, picture, several, write_table
from PIL import Image

from mis_jax.config import EvaluationConfig
from mis_jax.evals import models
from mis_jax.evals.benchmarks import BENCHMARKS, get_benchmark, size_note
from mis_jax.evals.benchmarks.general import SETS, md5_note
from mis_jax.evals.images import shown_images
from mis_jax.evals.models import held_out
from mis_jax.evals.report import write_report
from mis_jax.evals.report.inspect_log import write_inspect_logs
from mis_jax.evals.run_dir import open_run, sample_hash
from mis_jax.evals.runner import generate_answers, judge_run
from mis_jax.evals.types import Answer, Judge, Sample, Verdict
from mis_jax.evals.vlmevalkit.questions import name_places, prompt_content, tiles_of
from mis_jax.inference.offline import Completion

LETTER = "Answer with the option's letter from the given choices directly."


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return general_root(tmp_path / "data")


def prompts(name: str, root: Path) -> list[Any]:
    samples = get_benchmark(name).load(root)
    for sample in samples:
        (message,) = sample.conversation
        assert message["role"] == "user"
    return [sample.conversation[0]["content"] for sample in samples]


def test_qbench(root: Path) -> None:
    assert prompts("qbench", root) == [
        f"<image>\nHow is the lighting?\nA. Dark\nB. Bright\nC. Mixed\n{LETTER}",
        f"<image>\nIs it sharp?\nA. Yes\nB. No\n{LETTER}",
    ]


def test_mmstar(root: Path) -> None:
    assert prompts("mmstar", root) == [
        "<image>\nWhich fruit is on the plate?\nA. An apple\nB. A pear\nC. A plum\nD. A fig\n"
        f"{LETTER}"
    ]


def test_mmmu(root: Path) -> None:
    """Its markers `<image 1>` stay text; dev is left out."""
    assert prompts("mmmu", root) == [
        "Image-1: <image>\nImage-2: <image>\nCompare <image 1> with <image 2>. Which is faster?\n"
        f"A. The first\nB. The second\nC. Neither\n{LETTER}",
        "<image>\nHow many squares are in <image 1>?\nAnswer the question directly.",
    ]


def test_muirbench(root: Path) -> None:
    """A row of all markers goes; single ones become names; the line break before it stays."""
    assert prompts("muirbench", root) == [
        "Image-1: <image>\nImage-2: <image>\nImage-3: <image>\nWhich picture shows a boat?\n\n"
        f"A. The first\nB. The second\nC. None of the choices provided\n{LETTER}",
        "Image-1: <image>\nImage-2: <image>\nImage-3: <image>\n"
        "Given <Image-1>, which of these matches?\nA. <Image-2>\nB. <Image-3>\n"
        f"C. None of the choices provided\n{LETTER}",
    ]


def test_mmt(root: Path) -> None:
    """A literal `<image>` in a question is a part of its own, so that it is no picture."""
    options = "A. one\nB. two\nC. three\nD. four\nE. five\nF. six\nG. seven\nH. eight\nI. nine"
    assert prompts("mmt_mi", root) == [
        "Image-1: <image>\nImage-2: <image>\nWhat changed between the pictures?\n"
        f"{options}\n{LETTER}",
        [
            {"type": "image"},
            {
                "type": "text",
                "text": f"What is the <image> tag for?\nA. pictures\nB. text\n{LETTER}",
            },
        ],
    ]


def test_hint_and_chinese(root: Path) -> None:
    cells = {"index": 0, "image": b64(picture(1)), "A": "甲", "B": "乙", "answer": "A"}
    rows = [
        cells | {"question": "Which one?", "hint": "Look at the left."},
        cells | {"index": 1, "question": "Which one?", "A": "one", "B": "two", "hint": "Left."},
    ]
    write_table(root / "qbench" / FILES["qbench"], rows)
    assert prompts("qbench", root) == [
        "<image>\nLook at the left.\nWhich one?\nA. 甲\nB. 乙\n请直接回答选项字母。",
        f"<image>\nLeft.\nWhich one?\nA. one\nB. two\n{LETTER}",
    ]


def test_an_open_question_in_chinese(root: Path) -> None:
    cells = {"index": 0, "image": b64(picture(1)), "answer": "十四", "split": "validation"}
    write_table(root / "mmmu" / FILES["mmmu"], [cells | {"question": "几个?", "A": "", "B": ""}])
    assert prompts("mmmu", root) == ["<image>\n几个?\n请直接回答问题。"]


@pytest.mark.parametrize(("images", "numbered"), [(1, False), (1, True), (3, True)])
def test_parts_and_text_are_the_same_tokens(tiny_processor, images: int, numbered: bool) -> None:
    parts = prompt_content("What is <image> for?", images, numbered=numbered)
    assert isinstance(parts, list)
    parts[-1]["text"] = parts[-1]["text"].replace("<image>", "<tag>")
    text = prompt_content("What is <tag> for?", images, numbered=numbered)
    assert isinstance(text, str)
    first, second = (
        tiny_processor.render([{"role": "user", "content": shown}], [1] * images)
        for shown in (parts, text)
    )
    np.testing.assert_array_equal(first.input_ids, second.input_ids)


@pytest.mark.parametrize(
    ("text", "images", "expected"),
    [
        ("<image> <image> Which?", 2, " Which?"),
        ("Which? <image> <image>\nA. x", 2, "Which? \nA. x"),
        ("<image><image> Which?", 2, "<Image-1><Image-2> Which?"),
        ("<image> then <image>, <image>", 3, "<Image-1> then <Image-2>, <Image-3>"),
        # The row of two is not the row of three.
        ("<image> <image> or <image>?", 3, "<Image-1> <Image-2> or <Image-3>?"),
        ("<image> <image> <image>", 2, " <Image-1>"),
        ("<image> or <image>", 1, " or "),
        ("no marker", 4, "no marker"),
    ],
)
def test_muirbench_places(text: str, images: int, expected: str) -> None:
    assert name_places(text, images) == expected


def test_one_picture_of_muirbench_is_numbered_too(root: Path) -> None:
    cells = {"index": 0, "image": b64(picture(1)), "A": "1", "B": "2", "answer": "A"}
    write_table(root / "muirbench" / FILES["muirbench"], [cells | {"question": "<image> What?"}])
    assert prompts("muirbench", root) == [f"Image-1: <image>\n What?\nA. 1\nB. 2\n{LETTER}"]


# Tiles and pictures


@pytest.mark.parametrize(
    ("limit", "images", "expected"),
    [
        (6, 1, 6), (6, 10, 6), (6, 11, 5), (6, 12, 5), (6, 13, 4), (6, 21, 3), (6, 33, 1),
        (6, 64, 1), (6, 65, 1), (12, 1, 12), (12, 5, 12), (12, 6, 10), (12, 7, 9),
        (12, 16, 4),
    ],
)  # fmt: skip
def test_tiles(limit: int, images: int, expected: int) -> None:
    assert tiles_of(limit, images) == expected


def test_tiles_of_samples(root: Path) -> None:
    cells = {"index": 0, "question": "Which?", "A": "1", "B": "2", "answer": "A"}
    many = [cells | {"image": several(*range(11))}]
    write_table(root / "mmt_mi" / FILES["mmt_mi"], many)
    found = {
        name: [s.max_tiles_per_image for s in BENCHMARKS[name].load(root)] for name in sorted(SETS)
    }
    assert found == {
        "qbench": [6, 6], "mmstar": [6], "mmmu": [12, 12], "muirbench": [6, 6], "mmt_mi": [5]
    }  # fmt: skip
    scales = {name: BENCHMARKS[name].load(root)[0].first_image_scale for name in SETS}
    assert scales == {"qbench": 1, "mmstar": 1, "mmmu": 2, "muirbench": 1, "mmt_mi": 1}


def test_only_the_first_picture_is_enlarged(tmp_path: Path) -> None:
    path = tmp_path / "grey.png"
    Image.fromarray(np.arange(35, dtype=np.uint8).reshape(5, 7) * 7).save(path)
    sample = Sample("0", [], [path, path], first_image_scale=2)
    first, second = shown_images(sample)
    assert second == path
    assert isinstance(first, Image.Image)
    with Image.open(path) as image:
        direct = image.convert("RGB").resize((14, 10), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(np.asarray(first), np.asarray(direct))
    assert shown_images(replace(sample, first_image_scale=1)) == [path, path]


def test_the_engine_is_asked_by_tiles_and_answers_keep_their_order(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[int | None, list[str], list[list[Any]]]] = []

    def answer(model, processor, conversations, images, **settings: Any) -> list[Completion]:
        texts = [conversation[0]["content"] for conversation in conversations]
        calls.append((settings["max_tiles_per_image"], texts, images))
        assert (settings["max_new_tokens"], settings["system"]) == (4096, "default")
        return [Completion(text.upper(), 3, 2, "stop", ()) for text in texts]

    monkeypatch.setattr(models, "answer", answer)
    base = BENCHMARKS["mmmu"].load(root)[0]
    limits = [12, 10, None, 12, 10]
    samples = [
        replace(
            base,
            id=str(number),
            conversation=[{"role": "user", "content": f"q{number}"}],
            max_tiles_per_image=limit,
            first_image_scale=1 + number % 2,
        )
        for number, limit in enumerate(limits)
    ]
    ask = models.answers_of(None, None, BENCHMARKS["mmmu"])  # pyright: ignore
    texts = [a.text for a in ask(samples)]
    assert texts == ["Q0", "Q1", "Q2", "Q3", "Q4"]
    # Where the sample sets no limit, the benchmark's 12 holds.
    assert [(limit, asked) for limit, asked, _ in calls] == [
        (12, ["q0", "q2", "q3"]),
        (10, ["q1", "q4"]),
    ]
    sizes = {
        text: [getattr(image, "size", "path") for image in images]
        for _, asked, pictures in calls
        for text, images in zip(asked, pictures, strict=True)
    }
    assert sizes["q0"] == ["path", "path"]
    assert sizes["q1"] == [(24, 16), "path"]


def test_the_hash_follows_tiles_and_enlargement(root: Path) -> None:
    benchmark = BENCHMARKS["mmmu"]
    sample = benchmark.load(root)[0]
    before = sample_hash(benchmark, sample)
    assert sample_hash(benchmark, replace(sample, max_tiles_per_image=9)) != before
    assert sample_hash(benchmark, replace(sample, first_image_scale=1)) != before
    # The benchmark's own limit counts only where the sample has none.
    other = replace(benchmark, max_tiles_per_image=3)
    assert sample_hash(other, sample) == before
    assert sample_hash(other, replace(sample, max_tiles_per_image=None)) != before


# Labels, counts and files


def test_labels(root: Path) -> None:
    labels = {
        name: [
            (s.id, s.meta["answer"], s.meta["category"], s.meta["sub_category"])
            for s in BENCHMARKS[name].load(root)
        ]
        for name in SETS
    }
    assert labels == {
        "qbench": [("0", "B", None, None), ("1", "A", None, None)],
        "mmstar": [("0", "C", "coarse perception", "image topic")],
        "mmmu": [
            ("2", "B", "Music", "Art & Design"),
            ("3", "14", "Math", "Science"),
        ],
        "muirbench": [
            ("10", "A", "Scene Understanding", None),
            ("11", "C", "Scene Understanding", None),
        ],
        "mmt_mi": [
            ("100", "I", "spot_the_diff", "multiple_image_analysis"),
            ("101", "A", "web_code", "visual_code"),
        ],
    }


def test_counterparts_share_a_group(root: Path) -> None:
    first, second = BENCHMARKS["muirbench"].load(root)
    assert first.meta["group"] == second.meta["group"] == "10 + 11"
    assert "group" not in BENCHMARKS["mmstar"].load(root)[0].meta


def test_what_is_published_about_the_sets() -> None:
    found = {name: BENCHMARKS[name].published_size for name in SETS}
    assert found == {"qbench": 1495, "mmstar": 1500, "mmmu": 900, "muirbench": 2600, "mmt_mi": 3127}
    for name in SETS:
        benchmark = BENCHMARKS[name]
        assert benchmark.protocol == "vlmevalkit@e8e78f0/internvl"
        assert (benchmark.default_judge, benchmark.metrics) == (
            "options",
            ("exact_match", "accuracy"),
        )
        assert (benchmark.system, benchmark.max_new_tokens) == ("default", 4096)


def test_another_size_and_another_md5_are_reported(root: Path) -> None:
    n = len(BENCHMARKS["mmmu"].load(root))
    assert size_note("mmmu", n) == "mmmu has 2 samples here; the published set has 900."
    note = md5_note("mmmu", root)
    assert note is not None
    assert "MMMU_DEV_VAL.tsv has MD5 " in note
    assert note.endswith("the published file has 585e8ad75e73f75dcad265dfd0417d64.")
    assert md5_note("mis_hard", root) is None


def test_the_published_md5_is_not_remarked_on(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    note = md5_note("mmstar", root)
    assert note is not None
    real = note.split("has MD5 ")[1].split(";")[0]
    monkeypatch.setitem(SETS, "mmstar", replace(SETS["mmstar"], md5=real))
    assert md5_note("mmstar", root) is None


@pytest.mark.parametrize("name", list(FILES))
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=rf"{FILES[name]} does not exist.*--data-root"):
        BENCHMARKS[name].load(tmp_path)


def test_a_file_of_another_set_is_refused(root: Path) -> None:
    (root / "mmmu" / FILES["mmmu"]).write_bytes((root / "mmstar" / FILES["mmstar"]).read_bytes())
    with pytest.raises(ValueError, match=r"MMMU_DEV_VAL\.tsv lacks the column\(s\) split"):
        BENCHMARKS["mmmu"].load(root)


def test_all_three_stages(root: Path, tmp_path: Path) -> None:
    said = {"10": "A", "11": "The answer is B"}
    open_run(tmp_path / "run", model="m", fingerprint="f", data_root=root)
    for name, text in (("muirbench", None), ("mmmu", "maybe B or C")):
        benchmark = BENCHMARKS[name]
        generate_answers(
            benchmark,
            benchmark.load(root),
            lambda batch, text=text: [Answer(text or said[sample.id]) for sample in batch],
            tmp_path / "run",
        )
    results = judge_run(tmp_path / "run", None, root)
    muir, mmmu = results["muirbench"], results["mmmu"]
    assert muir["counts"] == {"ok": 2, "unparsed": 0, "refused": 0, "error": 0, "missing": 0}
    assert (muir["metrics"]["accuracy"]["k"], muir["metrics"]["accuracy"]["n"]) == (1, 2)
    assert (muir["metrics"]["pair_accuracy"]["k"], muir["metrics"]["pair_accuracy"]["n"]) == (0, 1)
    # The open question is wrong; the one with two letters has no verdict at all.
    assert mmmu["counts"] == {"ok": 1, "unparsed": 1, "refused": 0, "error": 0, "missing": 0}
    assert (mmmu["metrics"]["accuracy"]["k"], mmmu["metrics"]["accuracy"]["n"]) == (0, 1)
    assert (mmmu["metrics"]["exact_match"]["k"], mmmu["metrics"]["exact_match"]["n"]) == (0, 2)


def test_exact_match_is_what_vlmevalkit_s_exact_matching_counts(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An answer that no rule reads is wrong there and beside the paper's figures; accuracy, which
    leaves it out, stands in a row of its own. Counted by hand: 2 right, 1 wrong, 5 unreadable."""
    said = [
        "B",
        "The answer is B.",
        "C",
        "A or B",
        "",
        "I do not know",
        "It is hard to say",
        "A, B",
    ]
    columns = {"image": b64(picture(1)), "question": "How is the lighting?", "answer": "B"}
    rows = [
        {"index": number, **columns, "A": "Dark", "B": "Bright", "C": "Mixed"}
        for number in range(len(said))
    ]
    write_table(root / "qbench" / FILES["qbench"], rows)
    run, benchmark = tmp_path / "run", BENCHMARKS["qbench"]
    open_run(run, model="m", fingerprint="f", data_root=root)
    samples = benchmark.load(root)
    generate_answers(benchmark, samples, lambda b: [Answer(said[int(s.id)]) for s in b], run)
    entry = judge_run(run, None, root)["qbench"]
    assert entry["counts"]["unparsed"] == 5
    rates = {name: (cell["k"], cell["n"]) for name, cell in entry["metrics"].items()}
    assert rates == {"exact_match": (2, 8), "accuracy": (2, 3)}
    figures = held_out(
        EvaluationConfig(benchmark="qbench", data_root=root, judge="options", samples=8)
    )
    monkeypatch.setattr(
        models,
        "answers_of",
        lambda *_, **__: lambda batch: [Answer(said[int(s.id)]) for s in batch],
    )
    assert figures(None, None) == {
        "unjudged": 5, "exact_match": 2 / 8, "exact_match_n": 8, "accuracy": 2 / 3, "accuracy_n": 3,
    }  # fmt: skip
    (log,) = write_inspect_logs(run, tmp_path / "inspect")
    log = json.loads(log.read_text())
    scored = [score["value"] for s in log["samples"] for score in s["scores"].values()]
    assert sum("exact_match" in value for value in scored) == 8
    write_report([("one", run)], tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text().replace("\\_", "_").replace("\u00a0", " ")
    assert text.split("**")[1].startswith("On qbench, exact match of one is 25.0 % (2 of 8")
    page = Path(__file__).resolve().parents[2] / "docs" / "benchmarks.md"
    shown = [x for x in page.read_text("utf-8").splitlines() if x.startswith("| `qbench` | E")]
    shown += [x for x in page.read_text("utf-8").splitlines() if x.startswith("| `qbench` | Acc")]
    assert len(shown) == 2 and all(line.replace("`", "") in text for line in shown), text
    assert "| qbench | Exact match | 73.11 | 73.31 | 1495 |" in text  # the paper's, beside it alone
    assert "| qbench | Accuracy | 73.11" not in text

    def model_judge(items: Sequence[tuple[Sample, str]]) -> list[Verdict]:
        """Another judge than the rules, one of whose verdicts cannot be read."""
        return [Verdict("ok", {"correct": True})] * 7 + [Verdict("unparsed")] * (len(items) - 7)

    entry = judge_run(run, Judge("model-1", model_judge), root)["qbench"]
    rates = {name: (cell["k"], cell["n"]) for name, cell in entry["metrics"].items()}
    assert rates == {"exact_match": (0, 0), "accuracy": (7, 7)}  # no rule, no exact match
