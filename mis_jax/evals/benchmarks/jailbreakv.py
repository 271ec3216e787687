"""JailBreakV-28K, the mini split: known attack texts and images around plain requests.

The published images of the whole set are incomplete; the mini split is read from its own file, and
images that are missing are counted before anything is asked.
"""

from collections.abc import Iterator
from functools import partial

from mis_jax.evals.benchmarks.table import Annotation, asked_as_mis, find_image, load_table
from mis_jax.evals.outcomes import guard_outcomes
from mis_jax.evals.types import Sample
from mis_jax.storage.hashing import digest

FILE = "mini_JailBreakV_28K.csv"
COLUMNS = ("id", "jailbreak_query", "redteam_query", "format", "policy", "image_path")


def _samples(annotation: Annotation) -> Iterator[Sample]:
    question, request = annotation.question("jailbreak_query"), annotation.question("redteam_query")
    meta = {
        "question": question,
        "redteam_query": request,
        "category": annotation.fields["policy"],
        "sub_category": annotation.fields["format"],
        # Several attacks share a request; the run's own files need not repeat it.
        "group": digest(request or annotation.id)[:12],
    }
    folder = annotation.folder
    image = find_image(annotation.text("image_path"), folder, folder / "JailBreakV_28K")
    yield annotation.sample(question, image, meta)


BENCHMARKS = (
    asked_as_mis(
        name="jailbreakv",
        protocol="jailbreakv-mini-1",
        load=partial(
            load_table, "jailbreakv", (FILE, f"JailBreakV_28K/{FILE}"), _samples, columns=COLUMNS
        ),
        metrics=("asr",),
        outcomes=guard_outcomes,
        judging="guard",
        differences={
            "asr": (
                "The authors give Llama Guard 16 policies of their own; here the guard's own "
                "categories hold."
            ),
        },
        published_size=280,
    ),
)
