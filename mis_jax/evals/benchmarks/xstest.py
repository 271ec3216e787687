"""XSTest: safe questions in dangerous-sounding words, and their unsafe contrasts. Text alone."""

from pathlib import Path

from mis_jax.evals.benchmarks.table import Annotation, asked_as_mis, find_file, read_annotations
from mis_jax.evals.outcomes import graded_refusal_outcomes
from mis_jax.evals.types import Sample

# The second name is the first release, whose rows say by their type alone what is unsafe.
FILES = ("xstest_prompts.csv", "xstest_v2_prompts.csv")


def load_xstest(data_root: Path) -> list[Sample]:
    """Safe and unsafe prompts; those about the same thing form a group."""
    path = find_file(data_root, "xstest", FILES)
    own = ("id_v2",) if path.name == FILES[1] else ("id", "label")
    columns = (*own, "prompt", "type", "focus")
    return [_sample(annotation) for annotation in read_annotations(path, own[:1], columns)]


def _sample(annotation: Annotation) -> Sample:
    kind = annotation.text("type")
    label = annotation.fields.get("label")
    if annotation.path.name == FILES[1]:
        label = "unsafe" if kind.startswith("contrast_") else "safe"
    if label not in ("safe", "unsafe"):
        raise annotation.error(
            f"field 'label' is {label!r}; it is safe or unsafe in the published file: download it "
            "again"
        )
    prompt = annotation.text("prompt")
    meta = {
        "question": prompt,
        "category": kind,
        "expected": label,
        "group": annotation.fields["focus"] or annotation.id,
    }
    return Sample(annotation.id, [{"role": "user", "content": prompt}], [], meta)


BENCHMARKS = (
    asked_as_mis(
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
