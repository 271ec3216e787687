"""Verbs of an evaluation: eval, judge, report."""

from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from mis_jax.cli.common import (
    Dtype,
    Failed,
    MeshSizes,
    console,
    err_console,
    load_quietly,
    print_json,
)


def eval_(
    model: Annotated[Positional[Path], arg(metavar="MODEL")],
    *,
    benchmarks: str,
    data_root: Path,
    out: Path,
    batch_size: int = 32,
    dtype: Dtype | None = None,
    mesh: MeshSizes = MeshSizes(),  # noqa: B008  frozen
) -> None:
    """Ask a model the questions of benchmarks. Finished answers are kept when called again.

    Example: mis-jax eval runs/mirage/final --benchmarks mis_hard --data-root data --out runs/eval

    Args:
        model: Checkpoint folder in any of the three formats.
        benchmarks: Ids, separated by commas.
        data_root: Folder with the published files, a folder for each benchmark.
        out: Folder of the evaluation run.
        batch_size: Questions answered at once.
        dtype: Number format; float32 on a CPU and the file's own elsewhere without it.
        mesh: Devices that share the model.
    """
    from mis_jax.evals.answering import answers_of
    from mis_jax.evals.benchmarks import get_benchmark, size_note
    from mis_jax.evals.hashing import folder_fingerprint
    from mis_jax.evals.manifest import open_run
    from mis_jax.evals.runner import generate_answers
    from mis_jax.terminal import steps_bar

    if str(model).startswith(("http:", "https:")):
        raise ValueError(f"{model}: evaluating an HTTP endpoint is not available in this version")
    chosen = [get_benchmark(name) for name in benchmarks.split(",")]
    sets = [benchmark.load(data_root) for benchmark in chosen]
    fingerprint = folder_fingerprint(model)
    open_run(out, model=model.name, fingerprint=fingerprint, data_root=data_root)
    network, processor = load_quietly(model, dtype, mesh)
    failed = 0
    with steps_bar(err_console) as bar:
        for benchmark, samples in zip(chosen, sets, strict=True):
            note = size_note(benchmark.name, len(samples))
            if note:
                err_console.print(note)
            ask = answers_of(network, processor, benchmark, rows=batch_size)
            show = bar.task(benchmark.name)
            done = generate_answers(benchmark, samples, ask, out, show, batch_size=batch_size)
            failed += done.failed
    if failed:
        raise Failed(f"{failed} sample(s) have no answer; call again to retry them")
    console.print(f"answers in {out}; next: mis-jax judge {out}")


def judge(
    run: Annotated[Positional[Path], arg(metavar="RUN")],
    *,
    judge: str = "default",
    data_root: Path | None = None,
    json: bool = False,
) -> None:
    """Judge the answers of an evaluation run. Finished verdicts are kept when called again.

    Example: mis-jax judge runs/eval --judge rules

    Args:
        run: Folder given to `mis-jax eval --out`.
        data_root: Where the data root of the evaluation is now, if it was moved.
        judge: rules (the mini world), exact (recognition), or each benchmark's own.
        json: Print results.json.
    """
    from mis_jax.evals.judges import get_judge
    from mis_jax.evals.manifest import data_root_of
    from mis_jax.evals.runner import judge_run
    from mis_jax.evals.summary import without_verdict

    chosen = None if judge == "default" else get_judge(judge)
    results = judge_run(run, chosen, data_root or data_root_of(run))
    if json:
        print_json(results)
    else:
        for benchmark, result in results.items():
            for metric, value in result["metrics"].items():
                shown = "-" if value["value"] is None else f"{100 * value['value']:6.2f} %"
                bounds = f"{100 * value['low']:.1f} to {100 * value['high']:.1f}"
                console.print(f"{benchmark:>18} {metric:<13} {shown}  ({bounds}; n {value['n']})")
    missing = without_verdict(results)
    if missing:
        raise Failed(f"{missing} sample(s) have no verdict; see the counts in {run}/results.json")


def report(
    runs: Annotated[Positional[tuple[Path, ...]], arg(metavar="RUN [RUN ...]")],
    *,
    out: Path,
    show_samples: bool = False,
    data_root: Path | None = None,
) -> None:
    """Tables with intervals, paired tests and a self-contained page over evaluation runs.

    Example: mis-jax report runs/eval-before runs/eval-after --out runs/report

    Args:
        runs: Evaluation runs; the first is the reference, the second is compared with it.
        out: Folder for report.html, .md, .json, .csv and .tex.
        show_samples: Show prompts and answers, which are redacted without it.
        data_root: With --show-samples, the data root whose pictures are shown beside them.
    """
    from mis_jax.evals.report import write_report

    if not runs:
        raise ValueError("name at least one evaluation run")
    written = write_report(
        [(run.name, run) for run in runs],
        out,
        redact=not show_samples,
        samples_with_pictures=data_root if show_samples else None,
    )
    for path in written:
        console.print(str(path))
