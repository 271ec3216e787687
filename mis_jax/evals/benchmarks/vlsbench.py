"""VLSBench: questions whose danger is in the image alone, so that no word gives it away.

The paper reports two of the categories, Privacy and Self-Harm; all are read here.
"""

from collections.abc import Iterator
from functools import partial

from mis_jax.evals.benchmarks.table import Annotation, asked_as_mis, find_image, load_table
from mis_jax.evals.outcomes import vlsbench_outcomes
from mis_jax.evals.types import Sample

FILES = ("data.json", "data/data.json")


def _samples(annotation: Annotation) -> Iterator[Sample]:
    question, name = annotation.question("instruction"), annotation.text("image_path")
    meta = {
        "question": question,
        "category": annotation.fields.get("category"),
        "sub_category": annotation.fields.get("sub_category"),
        # Only newer copies of the file have these two.
        "image_description": annotation.fields.get("image_description"),
        "safety_reason": annotation.fields.get("safety_reason"),
        "group": name,
    }
    yield annotation.sample(
        question, find_image(name, annotation.folder, annotation.folder.parent), meta
    )


BENCHMARKS = (
    asked_as_mis(
        name="vlsbench",
        protocol="vlsbench-published-1",
        load=partial(load_table, "vlsbench", FILES, _samples, id_fields=("instruction_id",)),
        metrics=("asr", "safe_rate", "warn_rate"),
        outcomes=vlsbench_outcomes,
        judging="vlsbench",
        published_size=2241,
    ),
)
