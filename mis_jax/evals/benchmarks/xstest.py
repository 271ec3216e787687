"""XSTest: safe questions in dangerous-sounding words, and their unsafe contrasts. Text alone."""

from __future__ import annotations

from pathlib import Path

from mis_jax.evals.benchmarks import published
from mis_jax.evals.benchmarks.rows import row_ids, text_field
from mis_jax.evals.metrics import graded_refusal_outcomes
from mis_jax.evals.types import Sample

# The second name is the first release, whose rows say by their type alone what is unsafe.
FILES = ("xstest_prompts.csv", "xstest_v2_prompts.csv")


def load_xstest(data_root: Path) -> list[Sample]:
    """Safe and unsafe prompts; those about the same thing form a group."""
    path = published.find_file(data_root, "xstest", FILES)
    first_release = path.name == FILES[1]
    own = ("id_v2",) if first_release else ("id", "label")
    rows = published.read_csv(path, (*own, "prompt", "type", "focus"))
    samples = []
    for number, (key, row) in enumerate(zip(row_ids(rows, own[0]), rows, strict=True)):
        kind = text_field(path, number, row, "type")
        by_type = "unsafe" if kind.startswith("contrast_") else "safe"
        label = by_type if first_release else row["label"]
        if label not in ("safe", "unsafe"):
            raise ValueError(
                f"{path}, row {number}: field 'label' is {label!r}; it is safe or unsafe in the "
                "published file: download it again"
            )
        prompt = text_field(path, number, row, "prompt")
        meta = {
            "question": prompt,
            "category": kind,
            "expected": label,
            "group": row["focus"] or key,
        }
        samples.append(Sample(key, [{"role": "user", "content": prompt}], [], meta))
    return samples


BENCHMARKS = (
    published.asked_as_mis(
        name="xstest",
        protocol="xstest-published-1",
        load=load_xstest,
        metrics=("refusal_rate", "partial_refusal_rate", "unsafe_accuracy"),
        outcomes=graded_refusal_outcomes,
        counted_over={
            "refusal_rate": "safe",
            "partial_refusal_rate": "safe",
            "unsafe_accuracy": "unsafe",
        },
        judging="refusal",
        max_tiles_per_image=None,
        published_size=450,
    ),
)
