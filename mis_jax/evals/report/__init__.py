"""Reports over one or more evaluation runs: HTML, Markdown, JSON, CSV and LaTeX."""

from collections.abc import Sequence
from pathlib import Path

from mis_jax.evals.report.compare import compare
from mis_jax.evals.report.html import as_html
from mis_jax.evals.report.json_csv import as_csv, as_json
from mis_jax.evals.report.markdown_latex import as_markdown, as_tex
from mis_jax.storage.files import replace_text
from mis_jax.storage.json_files import replace_json


def write_report(
    runs: Sequence[tuple[str, Path]],
    out: Path,
    *,
    title: str = "Evaluation report",
    loss_curve: Path | None = None,
    samples_with_pictures: Path | None = None,
    redact: bool = True,
    notes: Sequence[str] = (),
    gold: Path | None = None,
) -> list[Path]:
    """Write `report.{html,md,json,csv,tex}` into `out` and return their paths.

    `runs` are (label, run folder) pairs: the first is the reference, the second is compared
    with it, and any further ones stand beside them, tested against the first. `loss_curve` is a
    training run's `metrics.jsonl`, `samples_with_pictures` the data root that holds the
    evaluated images. With `redact` (the default, since real sets hold harmful text) samples
    appear as ids and hashes only. `notes` are shown as given, before the notes that the report
    adds by itself. `gold` is a file of labels made by people (see `gold.py`), with which
    attack success is corrected for the errors of its judge.
    """
    comparison = compare(runs, notes, gold)
    texts = {
        "report.md": as_markdown(comparison, title),
        "report.csv": as_csv(comparison),
        "report.tex": as_tex(comparison, title),
        "report.html": as_html(
            comparison,
            title=title,
            loss_curve=loss_curve,
            data_root=samples_with_pictures,
            redact=redact,
        ),
    }
    replace_json(out / "report.json", as_json(comparison, title))
    for name, text in texts.items():
        replace_text(out / name, text)
    return [out / name for name in ("report.json", *texts)]
