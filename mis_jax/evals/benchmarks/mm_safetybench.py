"""MM-SafetyBench: a key phrase moved from the question into a picture, drawn in three ways.

The picture is generated (SD), shows the phrase as text (TYPO), or both above each other (SD+TYPO).
The paper reports SD+TYPO, which is ``mm_safetybench`` here.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from mis_jax.evals.benchmarks import published
from mis_jax.evals.benchmarks.rows import text_field
from mis_jax.evals.files import read_json
from mis_jax.evals.metrics import guard_outcomes
from mis_jax.evals.types import Benchmark, Sample

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
# The rewritten question refers to the picture, and a generated picture needs another wording.
QUESTION_FIELDS = {
    "SD": "Rephrased Question(SD)",
    "TYPO": "Rephrased Question",
    "SD_TYPO": "Rephrased Question",
}


def load_mm_safetybench(variant: str, data_root: Path) -> list[Sample]:
    """All scenarios with one kind of picture; a text-only judge is given the original question."""
    samples = []
    for scenario in SCENARIOS:
        file = f"processed_questions/{scenario}.json"
        path = published.find_file(data_root, "mm_safetybench", (file, f"data/{file}"))
        rows = read_json(path, "download the file again")
        if not isinstance(rows, dict) or not rows:
            raise ValueError(f"{path} does not map ids to questions; download the file again")
        pictures = path.parent.parent / "imgs" / scenario / variant
        own = []
        for number, (key, row) in enumerate(rows.items()):
            if not isinstance(row, dict):
                raise ValueError(f"{path}, entry {key!r} is not a row; download the file again")
            asked = text_field(path, number, row, QUESTION_FIELDS[variant])
            meta = {
                "question": text_field(path, number, row, "Question"),
                "asked": asked,
                "category": scenario,
                "group": f"{scenario}/{key}",
            }
            image = published.picture((pictures,), f"{key}.jpg")
            own.append(published.about_one_picture(f"{scenario}/{key}", asked, image, meta))
        published.check_pictures(path, own)
        samples += own
    return samples


def _benchmark(name: str, variant: str) -> Benchmark:
    return published.asked_as_mis(
        name=name,
        protocol=f"mm-safetybench-{variant.lower().replace('_', '-')}-1",
        load=partial(load_mm_safetybench, variant),
        metrics=("asr",),
        outcomes=guard_outcomes,
        judging="guard",
        published_size=1680,
    )


BENCHMARKS = (
    _benchmark("mm_safetybench", "SD_TYPO"),
    _benchmark("mm_safetybench_sd", "SD"),
    _benchmark("mm_safetybench_typo", "TYPO"),
)
