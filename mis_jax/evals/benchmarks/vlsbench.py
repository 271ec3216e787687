"""VLSBench: questions whose danger is in the picture alone, so that no word gives it away."""

from __future__ import annotations

from pathlib import Path

from mis_jax.evals.benchmarks import published
from mis_jax.evals.benchmarks.rows import read_rows, row_ids, text_field
from mis_jax.evals.metrics import vlsbench_outcomes
from mis_jax.evals.types import Sample


def load_vlsbench(data_root: Path) -> list[Sample]:
    """All rows; the paper reports two of the categories, Privacy and Self-Harm."""
    path = published.find_file(data_root, "vlsbench", ("data.json", "data/data.json"))
    rows = read_rows(path)
    keys = row_ids(rows, "instruction_id")
    samples = []
    for number, (key, row) in enumerate(zip(keys, rows, strict=True)):
        question = text_field(path, number, row, "instruction")
        name = text_field(path, number, row, "image_path")
        meta = {
            "question": question,
            "category": row.get("category"),
            "sub_category": row.get("sub_category"),
            # Only newer copies of the file have these two.
            "image_description": row.get("image_description"),
            "safety_reason": row.get("safety_reason"),
            "group": name,
        }
        image = published.picture((path.parent, path.parent.parent), name)
        samples.append(published.about_one_picture(key, question, image, meta))
    published.check_pictures(path, samples)
    return samples


BENCHMARKS = (
    published.asked_as_mis(
        name="vlsbench",
        protocol="vlsbench-published-1",
        load=load_vlsbench,
        metrics=("asr", "safe_rate", "warn_rate"),
        outcomes=vlsbench_outcomes,
        judging="vlsbench",
        published_size=2241,
    ),
)
