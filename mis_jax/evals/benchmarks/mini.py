"""The four benchmarks of the mini world, the drawn stand-in for MIS that ships with the package.

Same file format and same questions of safety as MIS, but the objects in the images are known
(`mini_truth.json`), so a rule can judge what MIS needs a language model for.
"""

from functools import partial
from pathlib import Path
from typing import Any

from mis_jax.evals.benchmarks.table import Annotation, find_mis_file, read_annotations
from mis_jax.evals.outcomes import MIS_METRICS, accuracy_outcomes, mis_outcomes, refusal_outcomes
from mis_jax.evals.types import Benchmark, Sample
from mis_jax.storage.json_files import read_document

PREFIXES = {1: "<image>\n", 2: "Image-1: <image>\nImage-2: <image>\n"}


def _sample(annotation: Annotation, least: int, meta: dict[str, Any]) -> Sample:
    question, images = annotation.text("question"), annotation.images(least)
    conversation = [{"role": "user", "content": PREFIXES[len(images)] + question}]
    return Sample(annotation.id, conversation, images, {"question": question} | meta)


def _read_truth(path: Path) -> tuple[Path, dict[str, Any]]:
    """The truth file beside the annotations, or one folder up from a benchmark's own."""
    beside, above = (folder / "mini_truth.json" for folder in (path.parent, path.parent.parent))
    file = beside if beside.is_file() or not above.is_file() else above
    return file, read_document(file, "write the mini world again; it belongs to its files")


def load_pairs(name: str, dangerous: bool, data_root: Path) -> list[Sample]:
    """Two images and a question; `dangerous` says which kind of pairs the file must hold."""
    path = find_mis_file(data_root, name)
    truth_path, truth = _read_truth(path)
    samples = []
    for annotation in read_annotations(path):
        key = f"{name}/{annotation.id}"
        entry = truth.get(key)
        if not isinstance(entry, dict) or len(entry.get("objects", ())) != 2:
            raise ValueError(
                f"{truth_path}: entry {key!r} is missing or lacks two 'objects'; "
                "write the mini world again, so that its files agree"
            )
        if (entry.get("danger") is not None) != dangerous:
            raise ValueError(
                f"{truth_path}: entry {key!r} has danger {entry.get('danger')!r}, but "
                f"pairs of {name} are {'dangerous' if dangerous else 'harmless'}; "
                "write the mini world again, so that its files agree"
            )
        meta = {
            "category": annotation.fields.get("category"),
            "sub_category": annotation.fields.get("sub_category"),
            "objects": list(entry["objects"]),
            "danger": entry["danger"],
            "group": " + ".join(sorted(entry["objects"])),
        }
        samples.append(_sample(annotation, 2, meta))
    return samples


def load_recognition(name: str, data_root: Path) -> list[Sample]:
    """One or two images and a question with a known short answer."""
    return [
        _sample(annotation, 1, {"answer": annotation.text("answer")})
        for annotation in read_annotations(find_mis_file(data_root, name))
    ]


def _dangerous(name: str) -> Benchmark:
    return Benchmark(
        name=name,
        protocol="mini-pairs-1",
        load=partial(load_pairs, name, True),
        metrics=MIS_METRICS,
        outcomes=mis_outcomes,
        default_judge="rules",
        max_new_tokens=96,
        judging="mis",
    )


BENCHMARKS = (
    _dangerous("mini_easy"),
    _dangerous("mini_hard"),
    Benchmark(
        name="mini_benign",
        protocol="mini-pairs-1",
        load=partial(load_pairs, "mini_benign", False),
        metrics=("refusal_rate",),
        outcomes=refusal_outcomes,
        default_judge="rules",
        max_new_tokens=96,
        judging="refusal",
    ),
    Benchmark(
        name="mini_recognition",
        protocol="mini-recognition-1",
        load=partial(load_recognition, "mini_recognition"),
        metrics=("accuracy",),
        outcomes=accuracy_outcomes,
        default_judge="exact",
        max_new_tokens=16,
        judging="correct",
    ),
)
