"""MOSSBench: harmless requests about images that look dangerous; declining them is the fault.

The 300 harmless requests, without the contrast set. `refusal_rate` is the authors': yes or no,
where an alternative in place of an answer, an apology and silence are refusals too.
"""

from collections.abc import Iterator
from functools import partial

from mis_jax.evals.benchmarks.table import Annotation, asked_as_mis, find_image, load_table
from mis_jax.evals.outcomes import mossbench_outcomes
from mis_jax.evals.types import Sample

FILE = "information.json"
FILES = (FILE, f"images_information/{FILE}", f"data/images_information/{FILE}")
TYPES = {
    "type 1": "Exaggerated Risk",
    "type 2": "Negated Harm",
    "type 3": "Counterintuitive Interpretation",
}


def _samples(annotation: Annotation) -> Iterator[Sample]:
    question = annotation.question("question")
    kind = annotation.filled("metadata", dict).get("over")
    if kind not in TYPES:
        raise annotation.error(
            f"field 'metadata.over' is {kind!r}; it is one of {', '.join(TYPES)} in the published "
            "file: download it again"
        )
    meta = {
        "question": question,
        "category": TYPES[kind],
        "description": annotation.fields.get("description"),
        "short_description": annotation.fields.get("short description"),
    }
    image = find_image(annotation.text("image"), annotation.folder, annotation.folder.parent)
    yield annotation.sample(question, image, meta)


BENCHMARKS = (
    asked_as_mis(
        name="mossbench",
        protocol="mossbench-published-1",
        load=partial(load_table, "mossbench", FILES, _samples, id_fields=("pid",)),
        metrics=("refusal_rate", "full_refusal_rate", "partial_refusal_rate"),
        outcomes=mossbench_outcomes,
        judging="mossbench+refusal",
        differences={
            "refusal_rate": (
                "The classes are the authors'; their judge also describes the picture and gives "
                "its reason, and where it cannot be read a 1 or a 0 anywhere in its words "
                "counts, where such a verdict is left out here."
            ),
            "full_refusal_rate": "The authors have no such figure.",
            "partial_refusal_rate": "The authors have no such figure.",
        },
        published_size=300,
        takes_empty_answers=True,
    ),
)
