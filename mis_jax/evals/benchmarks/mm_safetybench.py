"""MM-SafetyBench: a key phrase moved from the question into an image, drawn in three ways.

The image is generated (SD), shows the phrase as text (TYPO), or both above each other (SD+TYPO).
The paper reports SD+TYPO, which is `mm_safetybench` here.
"""

from functools import partial
from pathlib import Path

from mis_jax.evals.benchmarks.table import (
    AGAIN,
    Annotation,
    asked_as_mis,
    find_file,
    with_images,
)
from mis_jax.evals.outcomes import guard_outcomes
from mis_jax.evals.types import Benchmark, Sample
from mis_jax.storage.json_files import read_document

# Names of the published files and folders, the misspelling of the first included.
SCENARIOS = (
    "01-Illegal_Activitiy",
    "02-HateSpeech",
    "03-Malware_Generation",
    "04-Physical_Harm",
    "05-EconomicHarm",
    "06-Fraud",
    "07-Sex",
    "08-Political_Lobbying",
    "09-Privacy_Violence",
    "10-Legal_Opinion",
    "11-Financial_Advice",
    "12-Health_Consultation",
    "13-Gov_Decision",
)
# The rewritten question refers to the image, and a generated image needs another wording.
QUESTION_FIELDS = {
    "SD": "Rephrased Question(SD)",
    "TYPO": "Rephrased Question",
    "SD_TYPO": "Rephrased Question",
}


def load_mm_safetybench(variant: str, data_root: Path) -> list[Sample]:
    """All scenarios with one kind of image; a text-only judge is given the original question."""
    samples = []
    for scenario in SCENARIOS:
        file = f"processed_questions/{scenario}.json"
        path = find_file(data_root, "mm_safetybench", (file, f"data/{file}"))
        entries = read_document(path, AGAIN)
        if not isinstance(entries, dict) or not entries:
            raise ValueError(f"{path} does not map ids to questions; {AGAIN}")
        images = path.parent.parent / "imgs" / scenario / variant
        scenario_samples = []
        for number, (key, fields) in enumerate(entries.items()):
            if not isinstance(fields, dict):
                raise ValueError(f"{path}, entry {key!r} is not a row; {AGAIN}")
            annotation = Annotation(path, f"row {number}", f"{scenario}/{key}", fields)
            question = annotation.question(QUESTION_FIELDS[variant])
            meta = {
                "question": annotation.question("Question"),
                "asked": question,
                "category": scenario,
                "group": annotation.id,
            }
            scenario_samples.append(annotation.sample(question, images / f"{key}.jpg", meta))
        samples += with_images(path, scenario_samples)
    return samples


def _benchmark(name: str, variant: str) -> Benchmark:
    return asked_as_mis(
        name=name,
        protocol=f"mm-safetybench-{variant.lower().replace('_', '-')}-1",
        load=partial(load_mm_safetybench, variant),
        metrics=("asr",),
        outcomes=guard_outcomes,
        judging="guard",
        differences={
            "asr": (
                "The authors' judge has stricter rules for political lobbying (08), legal, "
                "financial and health advice (10 to 12) and government decisions (13); a guard has "
                "one rule for all scenarios, and comes out lower in these."
            ),
        },
        published_size=1680,
    )


BENCHMARKS = (
    _benchmark("mm_safetybench", "SD_TYPO"),
    _benchmark("mm_safetybench_sd", "SD"),
    _benchmark("mm_safetybench_typo", "TYPO"),
)
