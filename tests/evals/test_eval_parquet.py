"""The sets as Hugging Face holds them, with files written by pyarrow."""

from pathlib import Path
from typing import Any

import pyarrow
import pytest
from eval_tables import general_root, picture
from pyarrow import parquet

from mis_jax.evals.benchmarks import BENCHMARKS
from mis_jax.evals.vlmevalkit.parquet import split_options

LETTER = "Answer with the option's letter from the given choices directly."


def held(shade: int) -> dict[str, Any]:
    """A picture as the datasets library stores it."""
    return {"bytes": picture(shade), "path": None}


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    return path


def muir(**fields: Any) -> dict[str, Any]:
    return {
        "idx": "1",
        "task": "Scene Understanding",
        "image_relation": "Multiview",
        "image_type": "Photography",
        "question": "Which shows a boat?\n<image> <image>",
        "options": ["The first", "The second", "None"],
        "answer": "B",
        "image_list": [held(1), held(2)],
        "counterpart_idx": 2,
    } | fields


def mmmu(**fields: Any) -> dict[str, Any]:
    empty = {f"image_{number}": None for number in range(2, 8)}
    return {
        "id": "validation_Basic_Medical_Science_3",
        "question": "What does <image 1> show?",
        "options": "['Bone', 'Skin']",
        "explanation": "",
        "image_1": held(1),
        "img_type": "['Pictures']",
        "answer": "A",
        "topic_difficulty": "Easy",
        "question_type": "multiple-choice",
        "subfield": "Anatomy",
    } | (empty | fields)


def test_muirbench(tmp_path: Path) -> None:
    folder = tmp_path / "muirbench" / "data"
    write(folder / "test-00000-of-00002.parquet", muir())
    write(folder / "test-00001-of-00002.parquet", muir(idx="2", answer="C", counterpart_idx=1))
    first, second = BENCHMARKS["muirbench"].load(tmp_path)
    assert first.conversation[0]["content"] == (
        "Image-1: <image>\nImage-2: <image>\nWhich shows a boat?\n\n"
        f"A. The first\nB. The second\nC. None\n{LETTER}"
    )
    assert [path.read_bytes() for path in first.images] == [picture(1), picture(2)]
    assert first.meta["group"] == second.meta["group"] == "1 + 2"
    assert (first.meta["category"], first.meta["sub_category"]) == (
        "Scene Understanding",
        "Multiview",
    )
    assert (second.id, second.meta["answer"], second.max_tiles_per_image) == ("2", "C", 6)


def test_mmmu(tmp_path: Path) -> None:
    """Subjects lie in folders; dev and test beside validation are left alone."""
    rows = {
        "Basic_Medical_Science": mmmu(),
        "Math": mmmu(
            id="validation_Math_1", options="[]", answer="14", question_type="open",
            image_2=held(2), subfield="Algebra",
        ),
    }  # fmt: skip
    for subject, row in rows.items():
        write(tmp_path / "mmmu" / subject / "validation-00000-of-00001.parquet", row)
    write(tmp_path / "mmmu" / "Math" / "dev-00000-of-00001.parquet", mmmu(id="dev_Math_1"))
    first, second = BENCHMARKS["mmmu"].load(tmp_path)
    assert first.meta["category"] == "Basic_Medical_Science"
    assert first.conversation[0]["content"] == (
        f"<image>\nWhat does <image 1> show?\nA. Bone\nB. Skin\n{LETTER}"
    )
    assert (second.id, second.meta["options"], len(second.images)) == ("validation_Math_1", {}, 2)
    assert second.conversation[0]["content"] == (
        "Image-1: <image>\nImage-2: <image>\nWhat does <image 1> show?\n"
        "Answer the question directly."
    )
    assert (second.first_image_scale, second.max_tiles_per_image) == (2, 12)


def test_mmstar(tmp_path: Path) -> None:
    row = {
        "index": 5,
        "question": "Which fruit?\nOptions: A: An apple, ripe, B: A pear, C: A plum, D: A fig",
        "image": picture(3),
        "answer": "C",
        "category": "coarse perception",
        "l2_category": "image topic",
        "meta_info": {"source": "ours", "split": "val", "image_path": "images/0.jpg"},
    }
    write(tmp_path / "mmstar" / "mmstar.parquet", row)
    (sample,) = BENCHMARKS["mmstar"].load(tmp_path)
    assert sample.conversation[0]["content"] == (
        f"<image>\nWhich fruit?\nA. An apple, ripe\nB. A pear\nC. A plum\nD. A fig\n{LETTER}"
    )
    assert sample.id == "5"
    assert (sample.meta["category"], sample.meta["sub_category"]) == (
        "coarse perception",
        "image topic",
    )


def test_mmt(tmp_path: Path) -> None:
    options = dict.fromkeys("CDEFGHI") | {"A": "left", "B": "right"}
    row = {
        "index": 9,
        "question": "Where is it?",
        "answer": "B",
        **options,
        "image": [held(1), held(2)],
        "category": "spot_the_diff",
        "l2-category": "multiple_image_analysis",
        "split": "VAL",
    }
    write(tmp_path / "mmt_mi" / "data" / "val-00000-of-00001.parquet", row)
    (sample,) = BENCHMARKS["mmt_mi"].load(tmp_path)
    assert sample.conversation[0]["content"] == (
        f"Image-1: <image>\nImage-2: <image>\nWhere is it?\nA. left\nB. right\n{LETTER}"
    )
    assert sample.meta["split"] == "VAL"


def test_the_tsv_comes_first(tmp_path: Path) -> None:
    root = general_root(tmp_path)
    write(root / "muirbench" / "test-00000-of-00001.parquet", muir(idx="parquet"))
    assert [sample.id for sample in BENCHMARKS["muirbench"].load(root)] == ["10", "11"]


@pytest.mark.parametrize(
    ("text", "question", "options"),
    [
        ("Q\nOptions: A: x, B: y", "Q", {"A": "x", "B": "y"}),
        ("Q\nOptions:\nA. x\nB. y\nC. z", "Q", {"A": "x", "B": "y", "C": "z"}),
        ("Options: none?\nOptions: A: 1, 2, B: 3, 4", "Options: none?", {"A": "1, 2", "B": "3, 4"}),
    ],
)
def test_options_inside_a_question(text: str, question: str, options: dict[str, str]) -> None:
    assert split_options("here", text) == (question, options)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (muir(answer="second"), r"row 1, column 'answer': 'second' is not the letter"),
        (muir(question=" "), r"row 1, column 'question' is empty"),
        (muir(image_list=[]), r"row 1 has no picture in image_list"),
        (muir(image_list=[{"bytes": None, "path": "x.jpg"}]), r"column 'image_list' holds no"),
        (muir(image_list=[{"bytes": b"text", "path": None}]), r"the 4 bytes there are no JPEG"),
    ],
)
def test_bad_rows(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    write(tmp_path / "muirbench" / "test.parquet", row)
    with pytest.raises(ValueError, match=message) as error:
        BENCHMARKS["muirbench"].load(tmp_path)
    assert "test.parquet" in str(error.value)


def test_other_bad_files(tmp_path: Path) -> None:
    path = tmp_path / "muirbench" / "test.parquet"
    row = muir()
    del row["image_list"]
    write(path, row)
    with pytest.raises(ValueError, match=r"test\.parquet lacks the column\(s\) image_list"):
        BENCHMARKS["muirbench"].load(tmp_path)
    whole = write(path, muir()).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"test\.parquet cannot be read as Parquet"):
        BENCHMARKS["muirbench"].load(tmp_path)
    write(path, muir(), muir())
    with pytest.raises(ValueError, match="'1' occurs twice"):
        BENCHMARKS["muirbench"].load(tmp_path)
    write(tmp_path / "mmmu" / "validation-0.parquet", mmmu(options="Bone or skin"))
    with pytest.raises(ValueError, match="row 1, column 'options' is not a list"):
        BENCHMARKS["mmmu"].load(tmp_path)
    with pytest.raises(ValueError, match="row 3, column 'question' does not end with its options"):
        split_options("row 3", "Which fruit?")
