"""VLGuard, test part: unsafe pictures, and safe pictures with a safe and an unsafe question each.

Three subsets in one set, so that safety and over-refusal stand side by side: attack success
counts ``unsafes`` and ``safe_unsafes``, over-refusal counts ``safe_safes``. The latter need a
judge of refusals; a guard model alone leaves their rate without a denominator.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mis_jax.evals.benchmarks import published
from mis_jax.evals.benchmarks.rows import read_rows, row_ids, text_field
from mis_jax.evals.metrics import graded_refusal_outcomes, guard_outcomes
from mis_jax.evals.types import Sample

# subset: where its question stands, and what is expected of it
SUBSETS = {
    "unsafes": ("instruction", "unsafe"),
    "safe_unsafes": ("unsafe_instruction", "unsafe"),
    "safe_safes": ("safe_instruction", "safe"),
}


def load_vlguard(data_root: Path) -> list[Sample]:
    """All three subsets, in the order of the file."""
    path = published.find_file(data_root, "vlguard", ("test.json", "data/test.json"))
    rows = read_rows(path)
    samples = []
    for number, (key, row) in enumerate(zip(row_ids(rows), rows, strict=True)):
        safe = row.get("safe")
        if not isinstance(safe, bool):
            raise ValueError(
                f"{path}, row {number}: field 'safe' is {safe!r}; it is true or false in the "
                "published file: download it again"
            )
        name = text_field(path, number, row, "image")
        image = published.picture((path.parent / "test", path.parent), name)
        for subset in ("safe_unsafes", "safe_safes") if safe else ("unsafes",):
            field, expected = SUBSETS[subset]
            question = _instruction(path, number, row, field)
            meta = {
                "question": question,
                "category": row.get("harmful_category"),
                "sub_category": row.get("harmful_subcategory"),
                "subset": subset,
                "expected": expected,
                "group": key,
                "judging": "guard" if expected == "unsafe" else "refusal",
            }
            samples.append(published.about_one_picture(f"{key}-{subset}", question, image, meta))
    published.check_pictures(path, samples)
    return samples


def _instruction(path: Path, number: int, row: dict[str, Any], field: str) -> str:
    turns = published.dict_field(path, f"row {number}", row, "instr-resp", list)
    for turn in turns:
        if isinstance(turn, dict) and field in turn:
            return text_field(path, number, turn, field)
    raise ValueError(
        f"{path}, row {number}: no entry of 'instr-resp' has {field!r}, which rows with 'safe' "
        f"{str(row['safe']).lower()} have; download the file again"
    )


def vlguard_outcomes(labels: Mapping[str, Any]) -> dict[str, bool]:
    """Attack success from a guard's label, over-refusal from a refusal judge's."""
    return guard_outcomes(labels) if "unsafe" in labels else graded_refusal_outcomes(labels)


BENCHMARKS = (
    published.asked_as_mis(
        name="vlguard",
        protocol="vlguard-test-1",
        load=load_vlguard,
        metrics=("asr", "refusal_rate", "partial_refusal_rate"),
        outcomes=vlguard_outcomes,
        counted_over={"asr": "unsafe", "refusal_rate": "safe", "partial_refusal_rate": "safe"},
        judging="guard",
        max_new_tokens=256,
        published_size=442 + 2 * 558,
    ),
)
