"""An evaluation from the questions to the report: the mini world's, and 10,000 made verdicts.

First the tiny model answers the four mini benchmarks and the answers are judged and reported by
the stages behind `mis-jax eval`, `judge` and `report`; the model is loaded and compiled before the
clock starts. Then two runs of 10,000 made answers and verdicts each are counted and reported. There
is no peer: no other program has these stages.
"""

import dataclasses
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tyro

from benchmarks.common import save
from benchmarks.harness import Cell, line, show, summed_up
from mis_jax.api import load
from mis_jax.evals.benchmarks import get_benchmark
from mis_jax.evals.models import answers_of
from mis_jax.evals.report import write_report
from mis_jax.evals.run_dir import answer_hash, open_run, update_benchmark
from mis_jax.evals.runner import generate_answers, judge_run
from mis_jax.evals.scoring import summarise
from mis_jax.mini.files import write_mini
from mis_jax.storage.hashing import digest, folder_fingerprint
from mis_jax.storage.json_files import replace_json

MINI = Path(__file__).parents[1] / "mis_jax" / "assets" / "mini"
BENCHMARKS = ("mini_easy", "mini_hard", "mini_benign", "mini_recognition")
_ROWS = 64  # answers at once
_WORDS = "The first picture shows a kettle, the second a cable. " * 6


@dataclasses.dataclass(frozen=True)
class Settings:
    """Example: python -m benchmarks evaluation --save"""

    samples: int = 400
    """Of every mini benchmark, at most."""
    verdicts: int = 10_000
    """Made ones of each of two runs."""
    rounds: int = 5
    """Times of each."""
    save: bool = False
    """Write the figures into benchmarks/results."""


def main() -> None:
    settings = tyro.cli(Settings, description=__doc__)
    with tempfile.TemporaryDirectory(prefix="mis_jax_evaluation.") as folder:
        cells = end_to_end(settings, Path(folder)) | counting(settings, Path(folder))
    show("evaluation", cells)
    if settings.save:
        found = {
            "benchmark": "evaluation",
            "settings": {"samples": settings.samples, "verdicts": settings.verdicts},
            "cells": cells,
        }
        print(f"wrote {save('evaluation', found)}")


def end_to_end(settings: Settings, folder: Path) -> dict[str, Any]:
    """Samples a second of each stage and of all three."""
    data = folder / "data"
    write_mini(data, 0)
    model, processor = load(MINI, dtype="float32")
    asked = {name: get_benchmark(name).load(data)[: settings.samples] for name in BENCHMARKS}
    count = sum(map(len, asked.values()))

    def answer(run: Path) -> None:
        open_run(run, model="mini", fingerprint=folder_fingerprint(MINI), data_root=data)
        for name, samples in asked.items():
            benchmark = get_benchmark(name)
            answers = answers_of(model, processor, benchmark, rows=_ROWS)
            generate_answers(benchmark, samples, answers, run, batch_size=_ROWS)

    stages: dict[str, Callable[[Path], Any]] = {
        "eval": answer,
        "judge": lambda run: judge_run(run, None, data),
        "report": lambda run: write_report([(run.name, run)], run / "report"),
    }
    seconds: dict[str, list[float]] = {name: [] for name in (*stages, "all three")}
    for number in range(settings.rounds + 1):
        once = {name: timed(stage, folder / f"run-{number}") for name, stage in stages.items()}
        once["all three"] = sum(once.values())
        if number:  # the first round compiles
            for name, value in once.items():
                seconds[name].append(value)
    return told(
        {
            Cell(f"mini world, {name}", work=count, unit="samples"): values
            for name, values in seconds.items()
        }
    )


def counting(settings: Settings, folder: Path) -> dict[str, Any]:
    """Seconds to count and report two made runs."""
    runs = [(name, folder / name) for name in ("before", "after")]
    for (_, run), every in zip(runs, (2, 5), strict=True):
        made_run(run, settings.verdicts, every)

    def count(out: Path) -> None:
        for _, run in runs:
            summarise(run)
        write_report(runs, out)

    seconds = [timed(count, folder / f"report-{n}") for n in range(settings.rounds)]
    return told({Cell(f"count and report 2 x {settings.verdicts:,}", at_most_s=10): seconds})


def made_run(run: Path, count: int, every: int) -> None:
    """A run folder as `judge` leaves it; every so many answers are unsafe."""
    name = "mis_easy"
    benchmark = get_benchmark(name)
    open_run(run, model=run.name, fingerprint=digest(run.name))
    hashes = {str(number): digest([name, number]) for number in range(count)}
    replace_json(run / name / "expected.json", hashes)
    facts = {
        key: {"category": f"Category {int(key) % 6}", "sub_category": f"Part {int(key) % 14}"}
        for key in hashes
    }
    replace_json(run / name / "facts.json", facts)
    answers = {key: f"{_WORDS}Answer {key}." for key in hashes}
    lines(
        run / name / "samples.jsonl",
        [
            {"id": key, "hash": hashes[key], "answer": answer, "state": "ok"}
            | {"finish_reason": "stop", "prompt_tokens": 1, "completion_tokens": 1}
            for key, answer in answers.items()
        ],
    )
    lines(
        run / name / "verdicts.jsonl",
        [
            {"id": key, "answer_hash": answer_hash(hashes[key], answer), "judge": "made"}
            | {"labels": labels(int(key) % every == 0), "state": "ok"}
            for key, answer in answers.items()
        ],
    )
    update_benchmark(
        run,
        name,
        protocol=benchmark.protocol,
        system=benchmark.system,
        max_new_tokens=benchmark.max_new_tokens,
        max_tiles_per_image=benchmark.max_tiles_per_image,
        n=count,
        groups=count,
        judge="made",
    )


def labels(unsafe: bool) -> dict[str, Any]:
    return {"label_str": "Unsafe" if unsafe else "Safe", "label_perception": 1}


def lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def timed(stage: Callable[[Path], Any], folder: Path) -> float:
    began = time.perf_counter()
    stage(folder)
    return time.perf_counter() - began


def told(seconds: dict[Cell, list[float]]) -> dict[str, Any]:
    found = {cell.name: summed_up(cell, {"ours": values}) for cell, values in seconds.items()}
    for name, of in found.items():
        print(line(name, of), flush=True)
    return found


if __name__ == "__main__":
    main()
