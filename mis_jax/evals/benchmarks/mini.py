"""The four benchmarks of the mini world, the drawn stand-in for MIS that ships with the package.

Same row format and same questions of safety as MIS, but the objects in the pictures are known
(``mini_truth.json``), so a rule can judge what MIS needs a language model for.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from mis_jax.evals.benchmarks.rows import locate, read_rows, row_ids, row_images, text_field
from mis_jax.evals.files import read_json
from mis_jax.evals.metrics import MIS_METRICS, accuracy_outcomes, mis_outcomes, refusal_outcomes
from mis_jax.evals.types import Benchmark, Sample

PREFIXES = {1: "<image>\n", 2: "Image-1: <image>\nImage-2: <image>\n"}


def _sample(key: str, question: str, images: list[Path], meta: dict[str, Any]) -> Sample:
    text = PREFIXES[len(images)] + question
    return Sample(key, [{"role": "user", "content": text}], images, {"question": question} | meta)


def _read_truth(path: Path) -> tuple[Path, dict[str, Any]]:
    """The truth file beside the rows, or one folder up where each benchmark has its own folder."""
    beside, above = (folder / "mini_truth.json" for folder in (path.parent, path.parent.parent))
    file = beside if beside.is_file() or not above.is_file() else above
    return file, read_json(file, "write the mini world again; it belongs to its files")


def load_pairs(name: str, dangerous: bool, data_root: Path) -> list[Sample]:
    """Two pictures and a question; ``dangerous`` says which kind of pairs the file must hold."""
    path = locate(data_root, name)
    truth_path, truth = _read_truth(path)
    rows = read_rows(path)
    samples = []
    for number, (key, row) in enumerate(zip(row_ids(rows), rows, strict=True)):
        known = truth.get(f"{name}/{key}")
        if not isinstance(known, dict) or len(known.get("objects", ())) != 2:
            raise ValueError(
                f"{truth_path}: entry '{name}/{key}' is missing or lacks two 'objects'; "
                "write the mini world again, so that its files agree"
            )
        if (known.get("danger") is not None) != dangerous:
            raise ValueError(
                f"{truth_path}: entry '{name}/{key}' has danger {known.get('danger')!r}, but "
                f"pairs of {name} are {'dangerous' if dangerous else 'harmless'}; "
                "write the mini world again, so that its files agree"
            )
        meta = {
            "category": row.get("category"),
            "sub_category": row.get("sub_category"),
            "objects": list(known["objects"]),
            "danger": known["danger"],
            "group": " + ".join(sorted(known["objects"])),
        }
        question = text_field(path, number, row, "question")
        samples.append(_sample(key, question, row_images(path, number, row, 2), meta))
    return samples


def load_recognition(name: str, data_root: Path) -> list[Sample]:
    """One or two pictures and a question with a known short answer."""
    path = locate(data_root, name)
    rows = read_rows(path)
    return [
        _sample(
            key,
            text_field(path, number, row, "question"),
            row_images(path, number, row, 1),
            {"answer": text_field(path, number, row, "answer")},
        )
        for number, (key, row) in enumerate(zip(row_ids(rows), rows, strict=True))
    ]


def _dangerous(name: str) -> Benchmark:
    return Benchmark(
        name=name,
        protocol="mini-pairs-1",
        load=partial(load_pairs, name, True),
        metrics=MIS_METRICS,
        outcomes=mis_outcomes,
        default_judge="rules",
        max_new_tokens=96,
        judging="mis",
    )


BENCHMARKS = (
    _dangerous("mini_easy"),
    _dangerous("mini_hard"),
    Benchmark(
        name="mini_benign",
        protocol="mini-pairs-1",
        load=partial(load_pairs, "mini_benign", False),
        metrics=("refusal_rate",),
        outcomes=refusal_outcomes,
        default_judge="rules",
        max_new_tokens=96,
        judging="refusal",
    ),
    Benchmark(
        name="mini_recognition",
        protocol="mini-recognition-1",
        load=partial(load_recognition, "mini_recognition"),
        metrics=("accuracy",),
        outcomes=accuracy_outcomes,
        default_judge="exact",
        max_new_tokens=16,
        judging="correct",
    ),
)
