"""JailBreakV-28K, the mini split: known attack texts and pictures around plain requests.

The published pictures of the whole set are incomplete; the mini split is read from its own file,
and pictures that are missing are counted before anything is asked.
"""

from __future__ import annotations

from pathlib import Path

from mis_jax.evals.benchmarks import published
from mis_jax.evals.benchmarks.rows import row_ids, text_field
from mis_jax.evals.metrics import guard_outcomes
from mis_jax.evals.types import Sample
from mis_jax.storage.hashing import digest

FILE = "mini_JailBreakV_28K.csv"
COLUMNS = ("id", "jailbreak_query", "redteam_query", "format", "policy", "image_path")


def load_jailbreakv(data_root: Path) -> list[Sample]:
    """The samples of the mini split."""
    path = published.find_file(data_root, "jailbreakv", (FILE, f"JailBreakV_28K/{FILE}"))
    rows = published.read_csv(path, COLUMNS)
    samples = []
    for number, (key, row) in enumerate(zip(row_ids(rows), rows, strict=True)):
        asked = text_field(path, number, row, "jailbreak_query")
        request = text_field(path, number, row, "redteam_query")
        meta = {
            "question": asked,
            "redteam_query": request,
            "category": row["policy"],
            "sub_category": row["format"],
            # Several attacks share a request; the run's own files need not repeat it.
            "group": digest(request)[:12],
        }
        name = text_field(path, number, row, "image_path")
        image = published.picture((path.parent, path.parent / "JailBreakV_28K"), name)
        samples.append(published.about_one_picture(key, asked, image, meta))
    published.check_pictures(path, samples)
    return samples


BENCHMARKS = (
    published.asked_as_mis(
        name="jailbreakv",
        protocol="jailbreakv-mini-1",
        load=load_jailbreakv,
        metrics=("asr",),
        outcomes=guard_outcomes,
        judging="guard",
        published_size=280,
    ),
)
