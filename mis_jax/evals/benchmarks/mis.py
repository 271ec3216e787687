"""MIS as published: three test sets of two images and a question, asked without any hint.

The protocol is that of the published evaluation: the images announced as `Image-1` and
`Image-2`, no system turn, greedy decoding, 1024 new tokens, four tiles for every image.
Its labels need a language model as judge, hence no default judge.
"""

from functools import partial
from pathlib import Path

from mis_jax.evals.benchmarks.table import asked_as_mis, find_mis_file, read_annotations
from mis_jax.evals.outcomes import MIS_METRICS, mis_outcomes
from mis_jax.evals.types import Sample

PREFIX = "Image-1: <image>\n\nImage-2: <image>\n\n"
PUBLISHED_SIZES = {"mis_easy": 1675, "mis_hard": 510, "mis_real": 100}


def load_mis(name: str, data_root: Path) -> list[Sample]:
    """The samples of one published test file."""
    samples = []
    for annotation in read_annotations(find_mis_file(data_root, name)):
        question = annotation.question("question")
        meta = {
            "question": question,
            "category": annotation.fields.get("category"),
            "sub_category": annotation.fields.get("sub_category"),
        }
        conversation = [{"role": "user", "content": PREFIX + question}]
        samples.append(Sample(annotation.id, conversation, annotation.images(2), meta))
    return samples


BENCHMARKS = tuple(
    asked_as_mis(
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
