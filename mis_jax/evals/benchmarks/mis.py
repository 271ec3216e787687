"""MIS as published: three test sets of two pictures and a question, asked without any hint.

The protocol is that of the published evaluation: the pictures announced as ``Image-1`` and
``Image-2``, no system turn, greedy decoding, 1024 new tokens, four tiles for every picture.
Its labels need a language model as judge, hence no default judge.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from mis_jax.evals.benchmarks import published
from mis_jax.evals.benchmarks.rows import locate, read_rows, row_ids, row_images, text_field
from mis_jax.evals.metrics import MIS_METRICS, mis_outcomes
from mis_jax.evals.types import Sample

PREFIX = "Image-1: <image>\n\nImage-2: <image>\n\n"
PUBLISHED_SIZES = {"mis_easy": 1675, "mis_hard": 510, "mis_real": 100}


def load_mis(name: str, data_root: Path) -> list[Sample]:
    """The samples of one published test file."""
    path = locate(data_root, name)
    rows = read_rows(path)
    samples = []
    for number, (key, row) in enumerate(zip(row_ids(rows), rows, strict=True)):
        question = text_field(path, number, row, "question")
        meta = {
            "question": question,
            "category": row.get("category"),
            "sub_category": row.get("sub_category"),
        }
        conversation = [{"role": "user", "content": PREFIX + question}]
        samples.append(Sample(key, conversation, row_images(path, number, row, 2), meta))
    return samples


BENCHMARKS = tuple(
    published.asked_as_mis(
        name=name,
        protocol="mis-published-1",
        load=partial(load_mis, name),
        metrics=MIS_METRICS,
        outcomes=mis_outcomes,
        judging="mis",
        published_size=size,
    )
    for name, size in PUBLISHED_SIZES.items()
)
