"""Prediction files of VLMEvalKit, out of a run and into one, checked with the csv module."""

import csv
from pathlib import Path
from typing import Any

import pytest
from eval_tables import general_root, write_table

from mis_jax.evals.benchmarks import BENCHMARKS
from mis_jax.evals.run_dir import open_run, read_manifest
from mis_jax.evals.runner import generate_answers, judge_run
from mis_jax.evals.scoring import read_items
from mis_jax.evals.types import Answer
from mis_jax.evals.vlmevalkit.predictions import export_predictions, import_predictions

AWKWARD = 'B\tbecause it says "two",\nand\r\n<Image-2> – 第二'


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return general_root(tmp_path / "data")


@pytest.fixture
def run_dir(tmp_path: Path, root: Path) -> Path:
    open_run(tmp_path / "run", model="m", fingerprint="f", data_root=root)
    return tmp_path / "run"


def answer(run_dir: Path, root: Path, name: str, said: dict[str, str | None]) -> None:
    def ask(batch: list) -> list[Answer]:
        texts = [said[sample.id] for sample in batch]
        return [Answer("", state="error") if text is None else Answer(text) for text in texts]

    generate_answers(BENCHMARKS[name], BENCHMARKS[name].load(root), ask, run_dir)


def read(path: Path) -> list[dict[str, Any]]:
    with open(path, encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream, delimiter="\t"))


def test_export(run_dir: Path, root: Path, tmp_path: Path) -> None:
    answer(run_dir, root, "mmmu", {"2": AWKWARD, "3": "14"})
    out = tmp_path / "out" / "m_MMMU_DEV_VAL.tsv"
    assert export_predictions(run_dir, "mmmu", out) == 2
    assert read(out) == [
        {
            "index": "2",
            "question": "Compare <image 1> with <image 2>. Which is faster?",
            "A": "The first",
            "B": "The second",
            "C": "Neither",
            "answer": "B",
            "category": "Music",
            "l2-category": "Art & Design",
            "split": "validation",
            "prediction": AWKWARD,
        },
        {
            "index": "3",
            "question": "How many squares are in <image 1>?",
            "A": "",
            "B": "",
            "C": "",
            "answer": "14",
            "category": "Math",
            "l2-category": "Science",
            "split": "validation",
            "prediction": "14",
        },
    ]


def test_columns_that_a_set_lacks_are_left_out(run_dir: Path, root: Path, tmp_path: Path) -> None:
    answer(run_dir, root, "qbench", {"0": "B", "1": "A"})
    export_predictions(run_dir, "qbench", tmp_path / "q.tsv")
    assert list(read(tmp_path / "q.tsv")[0]) == [
        "index", "question", "A", "B", "C", "answer", "prediction"
    ]  # fmt: skip


def test_a_run_with_a_gap_is_not_exported(run_dir: Path, root: Path, tmp_path: Path) -> None:
    answer(run_dir, root, "mmmu", {"2": "B", "3": None})
    with pytest.raises(ValueError, match=r"1 of 2 samples of mmmu have no answer \(first: 3\)"):
        export_predictions(run_dir, "mmmu", tmp_path / "out.tsv")
    assert not (tmp_path / "out.tsv").exists()


def test_there_and_back(run_dir: Path, root: Path, tmp_path: Path) -> None:
    answer(run_dir, root, "mmmu", {"2": AWKWARD, "3": "14"})
    export_predictions(run_dir, "mmmu", tmp_path / "p.tsv")
    back = tmp_path / "back"
    open_run(back, model="theirs", fingerprint="p.tsv", data_root=root)
    done = import_predictions(tmp_path / "p.tsv", BENCHMARKS["mmmu"], back)
    assert (done.total, done.answered, done.failed) == (2, 2, 0)
    texts = [[item.answer for item in read_items(d, "mmmu", None)] for d in (run_dir, back)]
    assert texts[0] == texts[1] == [AWKWARD, "14"]
    judged = [judge_run(d, None, root)["mmmu"] for d in (run_dir, back)]
    assert judged[0] == judged[1]
    entry = read_manifest(back)["benchmarks"]["mmmu"]
    assert entry["imported"]["file"] == "p.tsv"
    assert "imported" not in read_manifest(run_dir)["benchmarks"]["mmmu"]


def theirs(path: Path, *rows: dict[str, Any]) -> Path:
    """As VLMEvalKit writes it: every column of the table but the picture, all rows quoted."""
    return write_table(path, rows)


def test_gaps_and_failures_are_errors_of_their_samples(
    run_dir: Path, root: Path, tmp_path: Path
) -> None:
    path = theirs(
        tmp_path / "m_MUIRBench.tsv",
        {"index": 10, "prediction": "Failed to obtain answer via API. "},
        {"index": 999, "prediction": "of another part"},
    )
    done = import_predictions(path, BENCHMARKS["muirbench"], run_dir)
    assert (done.total, done.answered, done.failed) == (2, 0, 2)
    items = read_items(run_dir, "muirbench", None)
    assert [(item.id, item.state) for item in items] == [("10", "error"), ("11", "error")]
    results = judge_run(run_dir, None, root)["muirbench"]
    assert results["counts"]["error"] == 2
    assert results["metrics"]["accuracy"]["n"] == 0


def test_answers_of_two_sources_do_not_mix(run_dir: Path, root: Path, tmp_path: Path) -> None:
    first = theirs(tmp_path / "one.tsv", {"index": 10, "prediction": "A"})
    other = theirs(tmp_path / "two.tsv", {"index": 10, "prediction": "B"})
    import_predictions(first, BENCHMARKS["muirbench"], run_dir)
    import_predictions(first, BENCHMARKS["muirbench"], run_dir)  # resumes
    with pytest.raises(ValueError, match=r"not from .*two\.tsv; answers of two sources do not mix"):
        import_predictions(other, BENCHMARKS["muirbench"], run_dir)
    answer(run_dir, root, "qbench", {"0": "B", "1": "A"})
    asked = theirs(tmp_path / "q.tsv", {"index": 0, "prediction": "B"})
    with pytest.raises(ValueError, match="do not mix"):
        import_predictions(asked, BENCHMARKS["qbench"], run_dir)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"index": 10}], r"lacks the column\(s\) prediction"),
        ([{"index": 10, "prediction": "A"}] * 2, r"row 2, column 'index': '10' occurs twice"),
        ([{"index": 999, "prediction": "A"}], "has no index of this benchmark"),
        (
            [{"index": 10, "question": "Another question?", "prediction": "A"}],
            r"index 10, column 'question' differs",
        ),
    ],
)
def test_files_that_do_not_fit(
    run_dir: Path, tmp_path: Path, rows: list[dict[str, Any]], message: str
) -> None:
    path = theirs(tmp_path / "p.tsv", *rows)
    with pytest.raises(ValueError, match=message):
        import_predictions(path, BENCHMARKS["muirbench"], run_dir)
    assert read_manifest(run_dir)["benchmarks"] == {}


def test_files_that_cannot_be_read(run_dir: Path, tmp_path: Path) -> None:
    muirbench = BENCHMARKS["muirbench"]
    with pytest.raises(ValueError, match=r"p\.xlsx is no TSV; .*PRED_FORMAT=tsv"):
        import_predictions(tmp_path / "p.xlsx", muirbench, run_dir)
    with pytest.raises(ValueError, match=r"p\.tsv does not exist"):
        import_predictions(tmp_path / "p.tsv", muirbench, run_dir)
    (tmp_path / "p.tsv").write_text("index\tprediction\n10\n")
    with pytest.raises(ValueError, match="row 1 has another number of cells"):
        import_predictions(tmp_path / "p.tsv", muirbench, run_dir)
