"""Benign tables in the published formats, written with the csv module and tiny drawn pictures."""

import base64
import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

FILES = {
    "qbench": "Q-Bench1_VAL.tsv",
    "mmstar": "MMStar.tsv",
    "mmmu": "MMMU_DEV_VAL.tsv",
    "muirbench": "MUIRBench.tsv",
    "mmt_mi": "MMT-Bench_VAL_MI.tsv",
}

NUMERALS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def picture(shade: int = 0, size: tuple[int, int] = (12, 8), kind: str = "PNG") -> bytes:
    """The bytes of a picture in one colour."""
    stream = io.BytesIO()
    Image.new("RGB", size, (shade % 256, 90, 160)).save(stream, kind)
    return stream.getvalue()


def b64(content: bytes) -> str:
    """As the TSV holds a picture."""
    return base64.b64encode(content).decode()


def several(*shades: int) -> str:
    """A cell with several pictures, as Python writes a list."""
    return str([b64(picture(shade)) for shade in shades])


def write_table(path: Path, rows: Sequence[Mapping[str, object]]) -> Path:
    """A TSV whose columns are all that any row has; a row without one leaves it empty."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="") as stream:
        table = csv.DictWriter(stream, columns, delimiter="\t", lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
    return path


def general_root(root: Path) -> Path:
    """A data root with all five sets, with the published names of files and columns."""
    one = b64(picture(1))
    write_table(
        root / "qbench" / FILES["qbench"],
        [
            {
                "index": 0,
                "image": one,
                "question": "How is the lighting?",
                "A": "Dark",
                "B": "Bright",
                "C": "Mixed",
                "D": "N/A",
                "answer": "B",
            },
            {
                "index": 1,
                "image": "0",
                "question": "Is it sharp?",
                "A": "Yes",
                "B": "No",
                "answer": "A",
            },
        ],
    )
    write_table(
        root / "mmstar" / FILES["mmstar"],
        [
            {
                "index": 0,
                "question": "Which fruit is on the plate?",
                "image": b64(picture(2, kind="JPEG")),
                "A": "An apple",
                "B": "A pear",
                "C": "A plum",
                "D": "A fig",
                "answer": "C",
                "category": "coarse perception",
                "l2_category": "image topic",
            },
        ],
    )
    write_table(
        root / "mmmu" / FILES["mmmu"],
        [
            {
                "index": 1,
                "id": "dev_Music_1",
                "split": "dev",
                "image": one,
                "image_path": "1.jpg",
                "question": "<image 1> Which key is this?",
                "A": "C major",
                "B": "D minor",
                "answer": "A",
                "category": "Music",
                "l2-category": "Art & Design",
            },
            {
                "index": 2,
                "id": "validation_Music_1",
                "split": "validation",
                "image": several(3, 4),
                "image_path": "['2_1.png', '2_2.png']",
                "question": "Compare <image 1> with <image 2>. Which is faster?",
                "A": "The first",
                "B": "The second",
                "C": "Neither",
                "answer": "B",
                "category": "Music",
                "l2-category": "Art & Design",
            },
            {
                "index": 3,
                "id": "validation_Math_7",
                "split": "validation",
                "image": one,
                "image_path": "3.jpg",
                "question": "How many squares are in <image 1>?",
                "answer": "14",
                "category": "Math",
                "l2-category": "Science",
            },
        ],
    )
    write_table(
        root / "muirbench" / FILES["muirbench"],
        [
            {
                "index": 10,
                "question": "Which picture shows a boat?\n<image> <image> <image>",
                "image": several(5, 6, 7),
                "A": "The first",
                "B": "The second",
                "C": "None of the choices provided",
                "answer": "A",
                "category": "Scene Understanding",
                "counterpart_idx": 11,
            },
            {
                "index": 11,
                "question": "Given <image>, which of these matches?",
                "image": several(5, 8, 9),
                "A": "<image>",
                "B": "<image>",
                "C": "None of the choices provided",
                "answer": "C",
                "category": "Scene Understanding",
                "counterpart_idx": 10,
            },
        ],
    )
    write_table(
        root / "mmt_mi" / FILES["mmt_mi"],
        [
            {
                "index": 100,
                "image": several(10, 11),
                "question": "What changed between the pictures?",
                **dict(zip("ABCDEFGHI", NUMERALS, strict=True)),
                "answer": "I",
                "category": "spot_the_diff",
                "l2-category": "multiple_image_analysis",
                "split": "VAL",
            },
            {
                "index": 101,
                "image": b64(picture(12)),
                "question": "What is the <image> tag for?",
                "A": "pictures",
                "B": "text",
                "answer": "A",
                "category": "web_code",
                "l2-category": "visual_code",
                "split": "VAL",
            },
        ],
    )
    return root
