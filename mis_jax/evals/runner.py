"""Ask a model, then have its answers judged; both stages can be killed and resumed.

Each stage appends rows to a log and fsyncs them in batches. A row counts only while its content
hash is the one that the run expects now, so a changed question, picture, protocol or answer
drops what was derived from it without anything being deleted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mis_jax.evals.benchmarks import get_benchmark
from mis_jax.evals.files import AppendLog, read_log
from mis_jax.evals.hashing import answer_hash, digest, sample_hash
from mis_jax.evals.judges import JUDGES
from mis_jax.evals.manifest import expect, expected, read_manifest, update_benchmark, write_facts
from mis_jax.evals.summary import summarise
from mis_jax.evals.types import Answer, Benchmark, Judge, Sample, Verdict

__all__ = ["Generated", "generate_answers", "judge_run", "summarise"]

AnswerFn = Callable[[list[Sample]], list[Answer]]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Generated:
    """What a generation stage did: ``failed`` answers are tried again by the next resume."""

    total: int
    reused: int
    answered: int
    failed: int


def _batches(items: Sequence[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(items), size):
        yield list(items[start : start + size])


def _ask(answer_fn: AnswerFn, batch: list[Sample]) -> list[Answer]:
    """Answers of a batch; a sample that cannot be asked fails alone.

    ValueError and OSError are what bad input raises (an unreadable picture, a prompt that is too
    long). Any other exception is a fault of the program or the device: it ends the run, which
    loses nothing since the rows before it are on disk.
    """
    try:
        answers = answer_fn(batch)
    except (ValueError, OSError) as error:
        if len(batch) == 1:
            return [Answer("", finish_reason="error", state="error", error=str(error))]
        return [answer for sample in batch for answer in _ask(answer_fn, [sample])]
    if len(answers) != len(batch):
        raise RuntimeError(f"answer_fn gave {len(answers)} answers to {len(batch)} samples")
    return answers


def generate_answers(
    benchmark: Benchmark,
    samples: Sequence[Sample],
    answer_fn: AnswerFn,
    run_dir: Path,
    progress: Progress | None = None,
    *,
    batch_size: int = 32,
) -> Generated:
    """Stage 1: append an answer for each sample to ``RUN/<benchmark>/samples.jsonl``.

    The run must have been opened (``manifest.open_run``). Samples already answered with the same
    content are skipped; failed ones are asked again. ``batch_size`` is how many samples
    ``answer_fn`` gets at once and how many answers a kill can cost.
    """
    read_manifest(run_dir)  # an unopened run is an error before any work
    hashes = expect(run_dir, benchmark, samples)
    with AppendLog(run_dir / benchmark.name / "samples.jsonl") as log:
        done = {(row["id"], row["hash"]) for row in log.rows if row["state"] == "ok"}
        waiting = [sample for sample in samples if (sample.id, hashes[sample.id]) not in done]
        finished = reused = len(samples) - len(waiting)
        failed = 0
        if progress:
            progress(finished, len(samples))
        for batch in _batches(waiting, batch_size):
            answers = _ask(answer_fn, batch)
            log.append(
                {"id": sample.id, "hash": hashes[sample.id], **_answer_row(answer)}
                for sample, answer in zip(batch, answers, strict=True)
            )
            finished += len(batch)
            failed += sum(answer.state == "error" for answer in answers)
            if progress:
                progress(finished, len(samples))
    return Generated(len(samples), reused, len(waiting) - failed, failed)


def _answer_row(answer: Answer) -> dict[str, Any]:
    row = asdict(answer)
    row["answer"] = row.pop("text")
    if row["error"] is None:
        del row["error"]
    return row


def judge_run(
    run_dir: Path,
    judge: Judge | None,
    data_root: Path,
    *,
    benchmarks: Sequence[str] | None = None,
    batch_size: int = 32,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Stage 2: append a verdict for each answer to ``RUN/<benchmark>/verdicts.jsonl``.

    ``judge=None`` takes each benchmark's own. Verdicts that exist for the same answer, judge and
    reference are kept; a judge's refusal is one of them, while ``unparsed`` and ``error`` are
    asked again. Ends with ``summarise`` and returns its results.
    """
    known = list(read_manifest(run_dir)["benchmarks"])
    for name in benchmarks or ():
        if name not in known:
            raise ValueError(
                f"{run_dir} has no answers to {name!r} (it has {', '.join(known) or 'none'}); "
                f"run `mis-jax eval` with --benchmarks {name} first"
            )
    for name in benchmarks or known:
        benchmark = get_benchmark(name)
        chosen = judge or _default_judge(benchmark)
        _judge_benchmark(benchmark, chosen, run_dir, data_root, batch_size, progress)
    return summarise(run_dir)


def _default_judge(benchmark: Benchmark) -> Judge:
    if benchmark.default_judge is None:
        raise ValueError(
            f"{benchmark.name} has no built-in judge: its labels need a language model; "
            "pass --judge http://host/v1 --judge-model NAME"
        )
    return JUDGES[benchmark.default_judge]


def _judge_benchmark(
    benchmark: Benchmark,
    judge: Judge,
    run_dir: Path,
    data_root: Path,
    batch_size: int,
    progress: Progress | None,
) -> None:
    owed = expected(run_dir, benchmark.name)
    samples = {sample.id: sample for sample in benchmark.load(data_root) if sample.id in owed}
    _check_same_data(benchmark, samples, owed, run_dir, data_root)
    write_facts(run_dir, benchmark.name, samples.values())
    answers = {
        row["id"]: row["answer"]
        for row in read_log(run_dir / benchmark.name / "samples.jsonl")
        if row["state"] == "ok" and owed.get(row["id"]) == row["hash"]
    }
    # Only now: a judge that cannot start must not take the place of the one that finished.
    keys = {
        key: (key, answer_hash(owed[key], text), judge.id, digest(samples[key].meta))
        for key, text in answers.items()
    }
    with AppendLog(run_dir / benchmark.name / "verdicts.jsonl") as log:
        settled = {
            (row["id"], row["answer_hash"], row["judge"], row["reference"])
            for row in log.rows
            if row["state"] in ("ok", "refused")
        }
        waiting = [key for key in answers if keys[key] not in settled]
        finished = len(answers) - len(waiting)
        update_benchmark(run_dir, benchmark.name, judge=judge.id)
        if progress:
            progress(finished, len(answers))
        for batch in _batches(waiting, batch_size):
            verdicts = judge.judge([(samples[key], answers[key]) for key in batch])
            log.append(
                _verdict_row(keys[key], verdict)
                for key, verdict in zip(batch, verdicts, strict=True)
            )
            finished += len(batch)
            if progress:
                progress(finished, len(answers))


def _verdict_row(key: tuple[str, str, str, str], verdict: Verdict) -> dict[str, Any]:
    fields = dict(zip(("id", "answer_hash", "judge", "reference"), key, strict=True))
    return fields | {name: value for name, value in asdict(verdict).items() if value is not None}


def _check_same_data(
    benchmark: Benchmark,
    samples: dict[str, Sample],
    owed: dict[str, str],
    run_dir: Path,
    data_root: Path,
) -> None:
    """Refuse to judge answers against questions that the model was not asked."""
    for key, content in owed.items():
        if key not in samples:
            problem = "is not in"
        elif sample_hash(benchmark, samples[key]) != content:
            problem = "differs in"
        else:
            continue
        raise ValueError(
            f"{benchmark.name}, sample {key}, of {run_dir} {problem} {data_root}; judge with the "
            "--data-root that was evaluated, or run `mis-jax eval` again with this one"
        )
