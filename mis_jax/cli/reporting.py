"""Verbs that read evaluation runs, merge and report, and the table of a run's results."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, arg

from mis_jax.cli.common import Failed, console, print_json
from mis_jax.storage.locks import locked_folder
from mis_jax.storage.paths import destination_path

BenchmarkFile = Annotated[
    Path | None,
    arg(
        metavar="FILE",
        help="Python file of your own with a list BENCHMARKS, whose ids can be used then. The file "
        "is run.",
    ),
]

if TYPE_CHECKING:
    from rich.table import Table


def merge(
    out: Annotated[Positional[Path], arg(metavar="OUT")],
    runs: Annotated[Positional[tuple[Path, ...]], arg(metavar="RUN RUN [RUN ...]")],
    *,
    benchmark_file: BenchmarkFile = None,
) -> None:
    """Merge the shards of an evaluation, or runs over different benchmarks, into one run.

    Example: mis-jax merge runs/eval runs/eval-1 runs/eval-2

    Args:
        out: Output folder; it must not exist yet.
        runs: Evaluation runs of one model; every shard of a benchmark must be included.
    """
    from mis_jax.evals.merge import merge_runs

    if len(runs) < 2:
        raise ValueError("name the new folder and at least two evaluation runs")
    use_benchmark_file(benchmark_file)
    with locked_folder(destination_path(out, "OUT")):
        merged = merge_runs(runs, out)
    for name, result in merged.items():
        states = ", ".join(f"{count} {state}" for state, count in result["counts"].items() if count)
        whole = f" of {result['of']}" if "of" in result else ""
        console.print(f"{name}: {result['n']}{whole} samples ({states})", highlight=False)


def report(
    runs: Annotated[Positional[tuple[Path, ...]], arg(metavar="RUN [RUN ...]")],
    *,
    out: Path,
    reveal: Annotated[bool, arg(aliases=["--show-samples"])] = False,
    data_root: Path | None = None,
    gold: Path | None = None,
    inspect_log: bool = False,
    benchmark_file: BenchmarkFile = None,
) -> None:
    """Write a report on evaluation runs: tables with confidence intervals and paired tests.

    Example: mis-jax report runs/eval-before runs/eval-after --out runs/report

    Args:
        runs: Evaluation runs; the first is the baseline for the paired comparisons.
        out: Output folder for report.html, .md, .json, .csv and .tex.
        reveal: Show prompts and answers, which are redacted by default.
        data_root: Folder of the benchmark data, to show the images as well with --reveal.
        gold: JSON file of human labels, {run: {benchmark: {sample id: "unsafe" or "safe"}}}, used
            to correct attack success rates for judge errors.
        inspect_log: Also write every run as Inspect logs, to OUT/inspect/RUN.
    """
    from mis_jax.evals.report import write_report
    from mis_jax.evals.report.inspect_log import write_inspect_logs

    if not runs:
        raise ValueError("name at least one evaluation run")
    use_benchmark_file(benchmark_file)
    with locked_folder(destination_path(out, "--out")):  # refused before the runs are read
        written = write_report(
            [(run.name, run) for run in runs],
            out,
            redact=not reveal,
            samples_with_pictures=data_root if reveal else None,
            gold=gold,
        )
        for run in runs if inspect_log else ():
            written += write_inspect_logs(run, out / "inspect" / run.name, redact=not reveal)
    for path in written:
        console.print(str(path))


def use_benchmark_file(path: Path | None) -> None:
    """Make the benchmarks of the user's own file known."""
    from mis_jax.evals.benchmarks import add_file

    if path is not None:
        add_file(path)


def show_results(
    results: dict[str, Any], run: Path, as_json: bool, judged: list[str] | None = None
) -> None:
    """Print results; Failed where a sample of the benchmarks that were judged has no verdict."""
    from mis_jax.evals.scoring import verdict_notes, without_verdict

    if as_json:
        print_json(results)
    else:
        console.print(_rates(results))
        for benchmark, result in results.items():
            for note in verdict_notes(result):
                console.print(f"{benchmark}: {note}", highlight=False)
    meant = {name: results[name] for name in judged or results}
    missing = without_verdict(meant)
    if missing:
        states = {
            state: sum(result["counts"][state] for result in meant.values())
            for state in ("unparsed", "refused", "error", "missing")
        }
        shown = ", ".join(f"{count} {state}" for state, count in states.items() if count)
        raise Failed(
            f"{missing} sample(s) have no verdict ({shown}); see the counts in {run}/results.json"
        )


def _rates(results: dict[str, Any]) -> "Table":
    """Rates with their intervals; what has no verdict stands beside what was judged."""
    from rich.table import Table

    table = Table(box=None)
    for column in ("benchmark", "metric", "rate", "95 % interval", "judged", "no verdict"):
        table.add_column(column, justify="left" if column in ("benchmark", "metric") else "right")
    for benchmark, result in results.items():
        states = (f"{n} {state}" for state, n in result["counts"].items() if n and state != "ok")
        without = ", ".join(states) or "0"
        share = f" ({result['n']} of {result['of']} asked)" if "of" in result else ""
        for index, (metric, value) in enumerate(result["metrics"].items()):
            known = value["value"] is not None
            table.add_row(
                "" if index else benchmark + share,
                metric,
                f"{100 * value['value']:.2f} %" if known else "-",
                f"{100 * value['low']:.1f} to {100 * value['high']:.1f}" if known else "-",
                str(value["n"]),
                "" if index else without,
            )
    return table
