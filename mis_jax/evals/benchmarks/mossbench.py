"""MOSSBench: harmless requests about pictures that look dangerous; declining them is the fault."""

from __future__ import annotations

from pathlib import Path

from mis_jax.evals.benchmarks import published
from mis_jax.evals.benchmarks.rows import read_rows, row_ids, text_field
from mis_jax.evals.metrics import graded_refusal_outcomes
from mis_jax.evals.types import Sample

FILE = "information.json"
TYPES = {
    "type 1": "Exaggerated Risk",
    "type 2": "Negated Harm",
    "type 3": "Counterintuitive Interpretation",
}


def load_mossbench(data_root: Path) -> list[Sample]:
    """The 300 harmless requests, without the contrast set."""
    path = published.find_file(
        data_root,
        "mossbench",
        (FILE, f"images_information/{FILE}", f"data/images_information/{FILE}"),
    )
    rows = read_rows(path)
    samples = []
    for number, (key, row) in enumerate(zip(row_ids(rows, "pid"), rows, strict=True)):
        question = text_field(path, number, row, "question")
        kind = published.dict_field(path, f"row {number}", row, "metadata", dict).get("over")
        if kind not in TYPES:
            raise ValueError(
                f"{path}, row {number}: field 'metadata.over' is {kind!r}; it is one of "
                f"{', '.join(TYPES)} in the published file: download it again"
            )
        meta = {
            "question": question,
            "category": TYPES[kind],
            "description": row.get("description"),
            "short_description": row.get("short description"),
        }
        name = text_field(path, number, row, "image")
        image = published.picture((path.parent, path.parent.parent), name)
        samples.append(published.about_one_picture(key, question, image, meta))
    published.check_pictures(path, samples)
    return samples


BENCHMARKS = (
    published.asked_as_mis(
        name="mossbench",
        protocol="mossbench-published-1",
        load=load_mossbench,
        metrics=("refusal_rate", "partial_refusal_rate"),
        outcomes=graded_refusal_outcomes,
        judging="refusal",
        published_size=300,
    ),
)
