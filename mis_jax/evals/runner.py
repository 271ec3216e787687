"""Ask a model, then have its answers judged; both stages can be killed and resumed.

Each stage appends lines to a log and fsyncs them in batches, or one by one where they come from an
endpoint: what a kill can cost is what was under way. A line counts only while its content
hash is the one that the run expects now, so a changed question, image, protocol or answer
drops what was derived from it without anything being deleted.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mis_jax.evals.async_map import Groups, Stopped, Streaming, groups_of
from mis_jax.evals.benchmarks import check_known, get_benchmark, own_file
from mis_jax.evals.judges import JUDGES
from mis_jax.evals.run_dir import (
    answer_hash,
    expect,
    expected,
    keep_samples,
    manifest_path,
    read_manifest,
    sample_hash,
    update_benchmark,
    write_facts,
)
from mis_jax.evals.scoring import summarise
from mis_jax.evals.types import Answer, Benchmark, CannotJudge, Judge, Sample, Verdict
from mis_jax.evals.verdict_cache import VerdictCache
from mis_jax.storage.hashing import digest
from mis_jax.storage.jsonl import AppendLog, read_log

__all__ = ["Generated", "JudgeOf", "JudgingTask", "generate_answers", "judge_run", "summarise"]

AnswerFn = Callable[[list[Sample]], list[Answer]] | Streaming[Sample, Answer]
JudgeOf = Callable[[Benchmark, Sequence[Sample]], Judge]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Generated:
    """What a generation stage did: `failed` answers are tried again by the next resume.

    `empty` counts answers without a word in them; `problem` is what the last failure says.
    """

    total: int
    reused: int
    answered: int
    failed: int
    empty: int = 0
    problem: str | None = None


def _ask(answer_fn: Callable[[list[Sample]], list[Answer]], batch: list[Sample]) -> list[Answer]:
    """Answers of a batch; a sample that cannot be asked fails alone.

    ValueError and OSError are what bad input raises (an unreadable image, a prompt that is too
    long). Any other exception is a fault of the program or the device: it ends the run, which
    loses nothing since the lines before it are on disk.
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
    part: Mapping[str, Any] | None = None,
) -> Generated:
    """Stage 1: append an answer for each sample to `RUN/<benchmark>/samples.jsonl`.

    The run must have been opened (`run_dir.open_run`). Samples already answered with the same
    content are skipped; failed ones are asked again. `batch_size` is how many samples
    `answer_fn` gets at once and how many answers a kill can cost. `part` says in the manifest
    which part of the benchmark `samples` is (see `Part`).
    """
    read_manifest(run_dir)  # an unopened run is an error before any work
    keep_samples(run_dir, benchmark.name, samples, part)
    hashes = expect(run_dir, benchmark, samples)
    origin = {"file": file} if (file := own_file(benchmark.name)) else {}
    update_benchmark(run_dir, benchmark.name, part=dict(part) if part else None, **origin)
    with AppendLog(run_dir / benchmark.name / "samples.jsonl") as log:
        done = {(line["id"], line["hash"]) for line in log.entries if line["state"] == "ok"}
        waiting = [sample for sample in samples if (sample.id, hashes[sample.id]) not in done]
        finished = reused = len(samples) - len(waiting)
        failed = empty = 0
        problem = None
        if progress:
            progress(finished, len(samples))
        for group in _answers(answer_fn, waiting, batch_size):
            log.append(
                {
                    "id": waiting[place].id,
                    "hash": hashes[waiting[place].id],
                    **_answer_entry(answer),
                }
                for place, answer in group
            )
            finished += len(group)
            for _, answer in group:
                failed += answer.state == "error"
                empty += answer.state == "ok" and not answer.text.strip()
                problem = answer.error or problem
            if progress:
                progress(finished, len(samples))
    return Generated(len(samples), reused, len(waiting) - failed, failed, empty, problem)


def _answers(answer_fn: AnswerFn, samples: list[Sample], size: int) -> Groups[Answer]:
    if isinstance(answer_fn, Streaming):
        return answer_fn.stream(samples)
    return groups_of(lambda batch: _ask(answer_fn, batch), samples, size)


def _answer_entry(answer: Answer) -> dict[str, Any]:
    entry = asdict(answer)
    entry["answer"] = entry.pop("text")
    if entry["error"] is None:
        del entry["error"]
    return entry


@dataclass(frozen=True)
class JudgingTask:
    """What a judge has to do for one benchmark of a run: give a verdict on each of `answers`.

    `keys` are what a verdict must carry to count for an answer.
    """

    benchmark: Benchmark
    judge: Judge
    samples: Mapping[str, Sample]
    answers: Mapping[str, str]
    keys: Mapping[str, tuple[str, str, str, str]]

    def waiting(self, verdicts: Sequence[Mapping[str, Any]]) -> list[str]:
        """The answers without a verdict among these; a refusal to judge is one."""
        settled = {
            (verdict["id"], verdict["answer_hash"], verdict["judge"], verdict["reference"])
            for verdict in verdicts
            if verdict["state"] in ("ok", "refused")
        }
        return [key for key in self.answers if self.keys[key] not in settled]

    def drawn(self, among: Iterable[str], count: int) -> list[str]:
        """`count` of these answers, the same ones every time."""
        return draw_answers({key: self.keys[key][1] for key in among}, count)

    def pairs(self, keys: Sequence[str]) -> list[tuple[Sample, str]]:
        """What the judge gets."""
        return [(self.samples[key], self.answers[key]) for key in keys]


def judge_run(
    run_dir: Path,
    judge: Judge | JudgeOf | None,
    data_root: Path,
    *,
    benchmarks: Sequence[str] | None = None,
    batch_size: int = 32,
    cache: VerdictCache | None = None,
    recheck: int = 0,
    leave_out: Callable[[CannotJudge], None] | None = None,
    announce: Callable[[list[tuple[JudgingTask, list[tuple[Sample, str]]]]], None] | None = None,
    progress: Callable[[str], Progress] | None = None,
) -> dict[str, Any]:
    """Stage 2: append a verdict for each answer to `RUN/<benchmark>/verdicts.jsonl`.

    `judge=None` takes each benchmark's own; a function of a benchmark and its samples gives each
    a judge. Verdicts that exist for the same answer, judge and reference are kept; a judge's
    refusal is one of them, while `unparsed` and `error` are asked again. What `cache` has of
    earlier runs is not asked either, and what is asked goes into it. `recheck` answers of each
    benchmark are then judged a second time, into `rechecks.jsonl` and by the judge alone: see
    `scoring.self_agreement`. A benchmark that the judge does not suit is left out unless it is
    named or nothing else is there: `leave_out` learns why. `announce` learns what is about to be
    judged before it is. Ends with `summarise` and returns its results; a judge that stops does so
    too, and its `Stopped` is raised.
    """
    names = read_manifest(run_dir)["benchmarks"]
    check_known(names, manifest_path(run_dir))
    for name in benchmarks or ():
        if name not in names:
            raise ValueError(
                f"{run_dir} has no answers to {name!r} (it has {', '.join(names) or 'none'}); "
                f"run `mis-jax eval` with --benchmarks {name} first"
            )
    # All that can be wrong with the files or the judge shows before the first verdict is paid for.
    contents = [_read(get_benchmark(name), run_dir, data_root) for name in benchmarks or names]
    tasks, left_out = [], []
    for content in contents:
        try:
            tasks.append(_judging_task(judge, *content))
        except CannotJudge as reason:
            if benchmarks:
                raise
            left_out.append(reason)
    if left_out and not tasks:
        raise left_out[0]
    if leave_out:
        for reason in left_out:
            leave_out(reason)
    if cache:
        for task in tasks:
            _exchange(cache, task, run_dir)
    if announce:
        announce([(task, task.pairs(_ahead(task, run_dir, recheck))) for task in tasks])
    try:
        for task in tasks:
            _judge_benchmark(task, run_dir, batch_size, cache, progress)
        for task in tasks if recheck else ():
            _judge_again(task, run_dir, recheck, batch_size, progress)
    except Stopped:
        summarise(run_dir)
        raise
    return summarise(run_dir)


def _default_judge(benchmark: Benchmark) -> Judge:
    if benchmark.default_judge is None:
        raise CannotJudge(
            f"{benchmark.name} has no built-in judge: its labels need a language model; "
            "pass --judge http://host/v1 --judge-model NAME"
        )
    return JUDGES[benchmark.default_judge]


_RunAnswers = tuple[Benchmark, dict[str, Sample], dict[str, str], dict[str, str]]


def _read(benchmark: Benchmark, run_dir: Path, data_root: Path) -> _RunAnswers:
    """A benchmark with the samples, hashes and answers of a run."""
    hashes = expected(run_dir, benchmark.name)
    samples = {sample.id: sample for sample in benchmark.load(data_root) if sample.id in hashes}
    _check_same_data(benchmark, samples, hashes, run_dir, data_root)
    write_facts(run_dir, benchmark.name, samples.values())
    answers = {
        entry["id"]: entry["answer"]
        for entry in read_log(run_dir / benchmark.name / "samples.jsonl")
        if entry["state"] == "ok" and hashes.get(entry["id"]) == entry["hash"]
    }
    return benchmark, samples, hashes, answers


def _judging_task(
    judge: Judge | JudgeOf | None,
    benchmark: Benchmark,
    samples: dict[str, Sample],
    hashes: dict[str, str],
    answers: dict[str, str],
) -> JudgingTask:
    if judge is None:
        judge = _default_judge(benchmark)
    elif not isinstance(judge, Judge):
        judge = judge(benchmark, list(samples.values()))
    for key in judge.needs:
        if lacking := [sample.id for sample in samples.values() if sample.meta.get(key) is None]:
            own = "leave --judge out, or " if benchmark.default_judge else ""
            raise CannotJudge(
                f"{benchmark.name} is not judged by {judge.id}, which needs meta[{key!r}]: sample "
                f"{lacking[0]} has none; {own}pass --judge http://host/v1"
            )
    keys = {
        key: (key, answer_hash(hashes[key], text), judge.id, digest(samples[key].meta))
        for key, text in answers.items()
    }
    return JudgingTask(benchmark, judge, samples, answers, keys)


def _ahead(task: JudgingTask, run_dir: Path, recheck: int) -> list[str]:
    """The answers that are about to be judged, those for the second time at the end."""
    folder = run_dir / task.benchmark.name
    waiting = task.waiting(read_log(folder / "verdicts.jsonl"))
    if not recheck:
        return waiting
    unchecked = set(task.waiting(read_log(folder / "rechecks.jsonl")))
    return [*waiting, *(key for key in task.drawn(task.answers, recheck) if key in unchecked)]


def _exchange(cache: VerdictCache, task: JudgingTask, run_dir: Path) -> None:
    """Give the cache what the run has of this judge, and the run what the cache has for it.

    A run that was judged without the cache, or killed before it was written, adds to it too.
    """
    with AppendLog(run_dir / task.benchmark.name / "verdicts.jsonl") as log:
        cache.add(verdict for verdict in log.entries if verdict["judge"] == task.judge.id)
        waiting = task.waiting(log.entries)
        verdicts = [(key, cache.find(task.keys[key][1:])) for key in waiting]
        log.append({"id": key} | verdict for key, verdict in verdicts if verdict is not None)


def _judge_benchmark(
    task: JudgingTask,
    run_dir: Path,
    batch_size: int,
    cache: VerdictCache | None,
    progress: Callable[[str], Progress] | None,
) -> None:
    name = task.benchmark.name
    with AppendLog(run_dir / name / "verdicts.jsonl") as log:
        waiting = task.waiting(log.entries)
        show = progress(name) if progress else None
        chosen = False
        for verdicts in _verdicts(task, waiting, len(task.answers), batch_size, show):
            if not chosen:  # only now: one that cannot judge must not take another's place
                update_benchmark(run_dir, name, judge=task.judge.id)
                chosen = True
            log.append(verdicts)
            if cache:
                cache.add(verdicts)
    if not waiting:
        update_benchmark(run_dir, name, judge=task.judge.id)


def _judge_again(
    task: JudgingTask,
    run_dir: Path,
    count: int,
    batch_size: int,
    progress: Callable[[str], Progress] | None,
) -> None:
    """Second verdicts on `count` of the answers that have labels."""
    name = task.benchmark.name
    verdicts = read_log(run_dir / name / "verdicts.jsonl")
    unlabelled = set(task.waiting([verdict for verdict in verdicts if verdict["state"] == "ok"]))
    chosen = task.drawn([key for key in task.answers if key not in unlabelled], count)
    with AppendLog(run_dir / name / "rechecks.jsonl") as log:
        unchecked = set(task.waiting(log.entries))
        waiting = [key for key in chosen if key in unchecked]
        show = progress(f"{name} again") if progress else None
        for second in _verdicts(task, waiting, len(chosen), batch_size, show):
            log.append(second)


def _verdicts(
    task: JudgingTask, waiting: list[str], total: int, batch_size: int, show: Progress | None
) -> Iterator[list[dict[str, Any]]]:
    """Verdicts as they come; the next ones are asked for when these are dealt with."""
    finished = total - len(waiting)
    if show:
        show(finished, total)
    for group in groups_of(task.judge.judge, task.pairs(waiting), batch_size):
        yield [_verdict_entry(task.keys[waiting[place]], verdict) for place, verdict in group]
        finished += len(group)
        if show:
            show(finished, total)


def _verdict_entry(key: tuple[str, str, str, str], verdict: Verdict) -> dict[str, Any]:
    fields = dict(zip(("id", "answer_hash", "judge", "reference"), key, strict=True))
    return fields | {name: value for name, value in asdict(verdict).items() if value is not None}


def _check_same_data(
    benchmark: Benchmark,
    samples: dict[str, Sample],
    hashes: dict[str, str],
    run_dir: Path,
    data_root: Path,
) -> None:
    """Refuse to judge answers against questions that the model was not asked."""
    for key, content in hashes.items():
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


def draw_answers(answer_hashes: Mapping[str, str], count: int) -> list[str]:
    """The ids of `count` answers, drawn by their hashes.

    The draw says nothing of what the answers are like, is the same every time, and a larger one
    holds the smaller: so it can be resumed and enlarged.
    """
    return sorted(answer_hashes, key=lambda key: (answer_hashes[key], key))[:count]


@dataclass(frozen=True)
class Part:
    """The first `limit` samples, and of those every `shards`-th, from number `shard` on.

    Neighbours in a file are alike, so every shard has some of everything.
    """

    limit: int | None = None
    shard: int = 1
    shards: int = 1

    def of(self, samples: Sequence[Sample]) -> list[Sample]:
        """The samples of this part."""
        return list(samples)[: self.limit][self.shard - 1 :: self.shards]

    def described(self, size: int) -> dict[str, Any] | None:
        """What a manifest says of it; `size` is the whole set's. None for the whole."""
        if self == Part():
            return None
        return {"limit": self.limit, "shard": self.shard, "shards": self.shards, "of": size}


def part_from(limit: int | None, shard: str | None) -> Part:
    """The part that `--limit` and `--shard i/n` mean."""
    if limit is not None and limit < 1:
        raise ValueError(f"--limit is {limit}; give at least 1")
    if shard is None:
        return Part(limit)
    match = re.fullmatch(r"(\d+)/(\d+)", shard)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise ValueError(f"--shard is {shard!r}; write i/n with i from 1 to n, such as 1/4")
    return Part(limit, int(match[1]), int(match[2]))
