"""The whole loop on the mini world: convert, evaluate, fine-tune, export, evaluate, report."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mis_jax.api import load
from mis_jax.checkpoint.convert import convert
from mis_jax.checkpoint.load import open_checkpoint
from mis_jax.config import DataConfig, DtypeConfig, OptimizerConfig, RunConfig, Source, TrainConfig
from mis_jax.evals.benchmarks import get_benchmark
from mis_jax.evals.models import answers_of
from mis_jax.evals.report import write_report
from mis_jax.evals.run_dir import open_run
from mis_jax.evals.runner import generate_answers, judge_run
from mis_jax.evals.scoring import without_verdict
from mis_jax.mini.files import write_mini
from mis_jax.parsing import parse_json
from mis_jax.storage.files import read_text, replace_file
from mis_jax.storage.hashing import folder_fingerprint
from mis_jax.storage.locks import LOCK, locked_folder
from mis_jax.storage.paths import destination_path
from mis_jax.terminal import steps_bar
from mis_jax.train.run_folder import FINAL_MODEL
from mis_jax.train.trainer import train

BASE_MODEL = Path(__file__).parent / "assets" / "mini"
BENCHMARKS = ("mini_easy", "mini_hard", "mini_benign", "mini_recognition")
CONTROLS = {  # name: annotation file of its labels
    "refusal": "mini_train_refusal.json",
    "text_only": "mini_train_text_only.json",
}
GENERAL_SAMPLES = 300  # beside 2,400 with safety labels: 11 %, as in the paper
_MARK = ".quickstart"
_ROWS = 64  # answers at once


@dataclass(frozen=True)
class Outcome:
    """Where the quickstart left its results, and what it found."""

    report: Path
    results: dict[str, dict[str, Any]]  # label -> results.json
    missing: int  # samples without a verdict
    training_seconds: float


def quickstart(out: Path, *, controls: bool, seed: int, console: Console) -> Outcome:
    """Run every stage; a stage that an earlier call finished is not repeated.

    What a finished one lacks, the controls, is added; nothing in the folder is removed.
    """
    with locked_folder(destination_path(out, "--out")):
        return _quickstart(out, _claim(out, seed) or controls, seed, console)


def _quickstart(out: Path, controls: bool, seed: int, console: Console) -> Outcome:
    began = time.monotonic()

    def say(text: str) -> None:
        console.print(f"[dim]{time.monotonic() - began:4.0f} s[/]  {text}")

    say("This is a drawn stand-in for MIS and a tiny model made by us; figures say nothing about "
        "any published model.")  # fmt: skip
    data, before, after = out / "data", out / "model-before", out / "model-after"
    if not data.exists():
        say("drawing the mini world: train, easy, hard, benign and recognition sets")
        write_mini(data, seed)
    if not before.exists():
        say("converting the tiny InternVL from the original layout to ours")
        convert(open_checkpoint(BASE_MODEL), before, "native")
    results = {}
    say("evaluating the model before fine-tuning")
    results["before"] = evaluate(before, out / "before", data, console)
    say("fine-tuning with MIRage labels (picture, risk, safe answer) and 11 % general data")
    if after.exists() and not (out / "train" / FINAL_MODEL).exists():
        raise ValueError(
            f"{after}: an export whose fine-tuning is gone from {out / 'train'}; remove it, or "
            "choose another --out"
        )
    run = _fine_tune(out, "train", data / "mini_train.json", seed, console)
    if not after.exists():
        say("exporting to the original layout")
        convert(open_checkpoint(run.model), after, "internvl", dtype="bfloat16")
    say("evaluating the exported model, loaded again")
    results["after"] = evaluate(after, out / "after", data, console)
    folders = {"before": out / "before", "after": out / "after"}
    for name, labels in (CONTROLS if controls else {}).items():
        say(f"control: the same fine-tuning with {name.replace('_', '-')} labels")
        trained = _fine_tune(out, f"train-{name}", data / labels, seed, console)
        results[name] = evaluate(trained.model, out / "controls" / name, data, console)
        folders[f"control: {name}"] = out / "controls" / name
    write_report(
        list(folders.items()),
        out,
        title="Quickstart: a small vision-language model becomes safe",
        loss_curve=out / "train" / "metrics.jsonl",
        samples_with_pictures=data,
        redact=False,
        notes=() if controls else ("The two controls were not run; ask for them with --controls.",),
    )
    mark = {"seed": seed, "finished": True, "controls": controls}
    replace_file(out / _MARK, json.dumps(mark) + "\n")
    missing = sum(without_verdict(result) for result in results.values())
    return Outcome(out / "report.html", results, missing, run.seconds)


def evaluate(model_folder: Path, run: Path, data: Path, console: Console) -> dict[str, Any]:
    """Answers and verdicts of the four benchmarks; finished samples are kept."""
    open_run(run, model=model_folder.name, fingerprint=folder_fingerprint(model_folder))
    model, processor = load(model_folder, dtype="float32")
    with steps_bar(console) as bar:
        for name in BENCHMARKS:
            benchmark = get_benchmark(name)
            samples = benchmark.load(data)
            generate_answers(
                benchmark,
                samples,
                answers_of(model, processor, benchmark, rows=_ROWS),
                run,
                bar.task(name),
                batch_size=len(samples),
            )
    return judge_run(run, None, data)


def fine_tuning_config(out: Path, name: str, labels: Path, seed: int) -> RunConfig:
    """MIRage on the small world: vision tower frozen, language model and projector trained."""
    data = labels.parent
    return RunConfig(
        model=out / "model-before",
        output=out / name,
        seed=seed,
        data=DataConfig(
            sources=(
                Source("sharegpt", root=data, path=labels),
                Source("jsonl", root=data, path=data / "general.jsonl", count=GENERAL_SAMPLES),
            ),
            max_length=168,
            max_tiles=2,
        ),
        train=TrainConfig(epochs=2, global_batch=16, freeze=("vision",), unroll=True),
        # A short memory of squared gradients and a slow start: with the usual ones the last of
        # only 340 steps still swing, and how often a harmless question is refused with them.
        optimizer=OptimizerConfig(
            learning_rate=1e-3, warmup_ratio=0.1, beta2=0.95, weight_decay=0.05
        ),
        dtype=DtypeConfig(params="float32", compute="float32"),
    )


def results_table(results: dict[str, dict[str, Any]]) -> Table:
    """Every metric of every benchmark, a column for each model."""
    table = Table(title="Share of samples (95 % Wilson interval)")
    table.add_column("benchmark")
    table.add_column("metric")
    for label in results:
        table.add_column(label, justify="right")
    for benchmark, result in results["before"].items():
        for metric in result["metrics"]:
            cells = [results[label][benchmark]["metrics"][metric] for label in results]
            table.add_row(benchmark, metric, *map(_cell, cells))
    return table


def _cell(metric: dict[str, Any]) -> str:
    if metric["value"] is None:
        return "no verdict"
    low, high = 100 * metric["low"], 100 * metric["high"]
    return f"{100 * metric['value']:.1f} % ({low:.1f} to {high:.1f})"


def _fine_tune(out: Path, name: str, labels: Path, seed: int, console: Console):
    with steps_bar(console) as bar:
        show: Callable[[int, int, dict[str, float]], None] = bar.training(name)
        return train(fine_tuning_config(out, name, labels, seed), show)


def _claim(out: Path, seed: int) -> bool:
    """Take a new folder or go on in one of our own; whether that one has finished controls.

    Raises ValueError for a folder that is something else, or was drawn with another seed.
    """
    mark = out / _MARK
    if not mark.exists():
        if any(path.name not in (LOCK, "lost+found") for path in out.iterdir()):
            raise ValueError(f"{out}: exists and is not a quickstart folder; choose another --out")
        replace_file(mark, json.dumps({"seed": seed}) + "\n")
        return False
    try:
        known = parse_json(read_text(mark) or "{}")
        before, controls = known.get("seed", seed), known.get("controls", False)
    except (ValueError, AttributeError):
        raise ValueError(f"{mark}: not readable; choose another --out") from None
    if before != seed:
        raise ValueError(f"{out}: was made with --seed {before}; give that one or another --out")
    return bool(controls)
