"""VLMEvalKit's prediction files: its scorer over our answers, and our scorer over its answers.

Such a file is the benchmark's table without images and with a column `prediction`. VLMEvalKit
writes it as xlsx unless `PRED_FORMAT=tsv` is set; the TSV is read and written here.
"""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mis_jax.evals.benchmarks import get_benchmark
from mis_jax.evals.run_dir import data_root_of, read_manifest, update_benchmark
from mis_jax.evals.runner import Generated, generate_answers
from mis_jax.evals.scoring import read_items
from mis_jax.evals.types import Answer, Benchmark, Sample
from mis_jax.evals.vlmevalkit.tsv import LONGEST_CELL
from mis_jax.storage.files import open_text, replace_text
from mis_jax.storage.hashing import file_digest

NO_ANSWER = "Failed to obtain answer"
"""What VLMEvalKit puts into a prediction where its model gave none."""

_COLUMNS = {"category": "category", "l2-category": "sub_category", "split": "split"}


def export_predictions(run_dir: Path, name: str, out: Path) -> int:
    """Write a run's answers to a benchmark as `<model>_<dataset>.tsv`; returns how many.

    For `run.py --mode eval` of VLMEvalKit. Its ids are those of the TSV, so the run must have been
    made with it. An answer that reads "None", "NA" or nothing becomes "nan" there.

    Raises:
        ValueError: a sample has no answer; VLMEvalKit would count without it and not say so.
    """
    benchmark = get_benchmark(name)
    samples = {sample.id: sample for sample in benchmark.load(data_root_of(run_dir))}
    items = read_items(run_dir, name, None)
    unanswered = [item.id for item in items if item.answer is None]
    if unanswered:
        raise ValueError(
            f"{run_dir}: {len(unanswered)} of {len(items)} samples of {name} have no answer "
            f"(first: {unanswered[0]}); finish the run with `mis-jax eval` first"
        )
    strange = [item.id for item in items if item.id not in samples]
    if strange:
        raise ValueError(
            f"{run_dir}: sample {strange[0]} of {name} is not in its data root any more; "
            "export with the files that were evaluated"
        )
    questions = [samples[item.id] for item in items]
    letters = sorted({letter for s in questions for letter in s.meta["options"]} | {"A", "B"})
    extra = {
        column: field
        for column, field in _COLUMNS.items()
        if any(sample.meta.get(field) for sample in questions)
    }
    text = io.StringIO(newline="")
    table = csv.writer(text, delimiter="\t", lineterminator="\n")
    table.writerow(["index", "question", *letters, "answer", *extra, "prediction"])
    for sample, item in zip(questions, items, strict=True):
        meta = sample.meta
        options = [meta["options"].get(letter, "") for letter in letters]
        labels = [meta.get(field) or "" for field in extra.values()]
        row = [sample.id, meta["question"], *options, meta["answer"], *labels, item.answer]
        table.writerow(row)
    replace_text(out, text.getvalue())
    return len(items)


def import_predictions(path: Path, benchmark: Benchmark, run_dir: Path) -> Generated:
    """Take another kit's answers into an opened run, as if its model had just been asked.

    A prediction that is missing, or that says that the model failed, is an error of that sample.
    The manifest names the file; how the model was asked is only known to who wrote it.

    Raises:
        ValueError: the file cannot be read, repeats an index, has no question of the benchmark, or
            other words for a question of the same index; or the run has answers from elsewhere.
    """
    predictions = _read(path)
    source = {"file": path.name, "sha256": file_digest(path)}
    entry = read_manifest(run_dir)["benchmarks"].get(benchmark.name)
    if entry is not None and entry.get("imported") != source:
        raise ValueError(
            f"{run_dir} has answers to {benchmark.name} that are not from {path}; answers of two "
            "sources do not mix: import into a new run folder"
        )
    samples = benchmark.load(data_root_of(run_dir))
    _check_questions(path, predictions, samples)

    def answers(batch: Sequence[Sample]) -> list[Answer]:
        return [_answer(path, sample, predictions.get(sample.id)) for sample in batch]

    update_benchmark(run_dir, benchmark.name, imported=source)
    return generate_answers(benchmark, samples, answers, run_dir)


def _answer(path: Path, sample: Sample, entry: dict[str, Any] | None) -> Answer:
    if entry is None:
        return _failed(f"{path} has no prediction for index {sample.id}")
    if NO_ANSWER in entry["prediction"]:
        return _failed(f"{path} says that the model failed on index {sample.id}")
    return Answer(entry["prediction"])


def _failed(reason: str) -> Answer:
    return Answer("", finish_reason="error", state="error", error=reason)


def _read(path: Path) -> dict[str, dict[str, Any]]:
    """The entries of a prediction file by index."""
    if path.suffix != ".tsv":
        raise ValueError(
            f"{path} is no TSV; let VLMEvalKit write one (PRED_FORMAT=tsv) or save the table so"
        )
    before = csv.field_size_limit(LONGEST_CELL)
    predictions: dict[str, dict[str, Any]] = {}
    try:
        with open_text(path, encoding="utf-8-sig", newline="") as stream:
            table = csv.DictReader(stream, delimiter="\t")
            missing = {"index", "prediction"} - set(table.fieldnames or ())
            if missing:
                raise ValueError(
                    f"{path} lacks the column(s) {', '.join(sorted(missing))}; "
                    "give a prediction file of VLMEvalKit"
                )
            for number, prediction in enumerate(table, start=1):
                if None in prediction or None in prediction.values():
                    raise ValueError(
                        f"{path}, row {number} has another number of cells than the header; "
                        "the file is cut short or damaged: write it again"
                    )
                index = prediction["index"]
                if index in predictions:
                    raise ValueError(
                        f"{path}, row {number}, column 'index': {index!r} occurs twice; "
                        "keep one prediction for each"
                    )
                predictions[index] = prediction
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; give a prediction file of VLMEvalKit") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read as a TSV ({error}); write it again") from error
    finally:
        csv.field_size_limit(before)
    return predictions


def _check_questions(
    path: Path, predictions: dict[str, dict[str, Any]], samples: Sequence[Sample]
) -> None:
    """Refuse a file about other questions, which indices alone would not show."""
    shared = [sample for sample in samples if sample.id in predictions]
    if not shared:
        raise ValueError(
            f"{path} has no index of this benchmark; give the prediction file of the same set"
        )
    for sample in shared:
        question = predictions[sample.id].get("question")
        if question is not None and question.split() != sample.meta["question"].split():
            raise ValueError(
                f"{path}, index {sample.id}, column 'question' differs from the benchmark's; "
                "give the prediction file of the same set"
            )
