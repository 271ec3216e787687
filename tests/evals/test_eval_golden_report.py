"""Reports over fixed answers and verdicts, byte for byte as they were when this test was written.

What may differ from machine to machine is made alike first: dates, versions, paths, the encoders of
images and the last digits of floats. A change that means to alter a report writes its hashes anew:
the failure shows them.
"""

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path

from eval_made_runs import suite, write_run
from test_eval_report import NAMES, after, before

from mis_jax.evals.judges import JUDGES
from mis_jax.evals.report import write_report
from mis_jax.evals.report.inspect_log import write_inspect_logs

SUITE = {
    "report.csv": "0a3fcc0e279b74be",
    "report.html": "44c68d4794d955ef",
    "report.json": "7e7a7c03488e782b",
    "report.md": "01a658d235a1533f",
    "report.tex": "86258558844190e9",
    "drawings": "63e24cadf240d0f4",
    "inspect logs": "512813f90ef46261",
}
MINI = {
    "report.csv": "05a6e5249bffa5cb",
    "report.html": "2e82f573ed78dfc3",
    "report.json": "b1239db42314e077",
    "report.md": "45526c0565d01fee",
    "report.tex": "37d248b845e417cd",
    "drawings": "b61d796d99503e24",
    "inspect logs": "e3b0c44298fc1c14",
}


def _alike(text: str, tmp_path: Path) -> str:
    text = text.replace(str(tmp_path), "TMP").replace(JUDGES["rules"].id, "RULES")
    text = re.sub(r'"data:image/(\w+);base64,[^"]*"', r'"data:image/\1"', text)
    return re.sub(r"\d+\.\d{9,}(?:e-?\d+)?", lambda number: f"{float(number[0]):.8g}", text)


def _hashes(out: Path, tmp_path: Path) -> dict[str, str]:
    """The hash of every file; the drawings of the page have their own, all Inspect logs one."""
    texts = {
        path.name: _alike(path.read_text(encoding="utf-8"), tmp_path)
        for path in sorted(out.glob("report.*"))
    }
    drawing = re.compile(r"<svg.*?</svg>", re.DOTALL)
    page = texts["report.html"]
    texts["report.html"] = drawing.sub("", page)
    texts["drawings"] = "".join(drawing.findall(page))
    logs = sorted(out.glob("inspect/*.json"))
    texts["inspect logs"] = "".join(
        _alike(log.read_text(encoding="utf-8"), tmp_path) for log in logs
    )
    return {name: hashlib.sha256(text.encode()).hexdigest()[:16] for name, text in texts.items()}


def _judged_again(run_dir: Path) -> None:
    """Second verdicts on a dozen answers, and first ones that partly come from a cache."""
    path = run_dir / "mis_hard" / "verdicts.jsonl"
    verdicts = [json.loads(line) | {"reference": "r"} for line in path.read_text().splitlines()]
    cached = [verdict | ({"cached": True} if n % 3 else {}) for n, verdict in enumerate(verdicts)]
    path.write_text("".join(json.dumps(verdict) + "\n" for verdict in cached))
    other = {"label_str": "Safe", "label_perception": 2}
    again = [
        verdict | ({"labels": other} if n % 2 else {}) | ({"state": "unparsed"} if n == 4 else {})
        for n, verdict in enumerate(verdicts[:12])
    ]
    (path.parent / "rechecks.jsonl").write_text("".join(json.dumps(v) + "\n" for v in again))


def test_a_report_on_the_papers_sets_with_everything_that_can_stand_in_one(tmp_path: Path) -> None:
    rates = {"before": (0.5, 0.1), "after": (0.2, 0.3), "control": (0.4, 0.2)}
    runs = [
        (label, write_run(tmp_path / label, suite(*pair, seed, 0.05)))
        for seed, (label, pair) in enumerate(rates.items())
    ]
    _judged_again(runs[0][1])
    manifest = json.loads((runs[2][1] / "manifest.json").read_text())
    manifest["model"]["conditions"] = ["int8-cache"]
    (runs[2][1] / "manifest.json").write_text(json.dumps(manifest))
    labels = {str(n): ("unsafe", "safe")[n % 3 > 0] for n in range(20)}
    gold = tmp_path / "gold.json"
    gold.write_text(json.dumps({"before": {"figstep": labels}, "after": {"mis_hard": labels}}))
    write_report(runs, tmp_path / "out", title="A & B", gold=gold, notes=["Seen once."])
    write_inspect_logs(runs[1][1], tmp_path / "out" / "inspect")
    assert _hashes(tmp_path / "out", tmp_path) == SUITE


def test_a_report_with_answers_and_images(
    evaluate: Callable[..., Path], tmp_path: Path, data_root: Path
) -> None:
    runs = [("before", evaluate("b", before, NAMES)), ("after", evaluate("a", after, NAMES))]
    for _, run in runs:
        manifest = json.loads((run / "manifest.json").read_text())
        manifest |= {"date": "2026-01-01T00:00:00+00:00", "versions": {"jax": "0"}}
        (run / "manifest.json").write_text(json.dumps(manifest))
    curve = tmp_path / "metrics.jsonl"
    curve.write_text("".join(f'{{"step": {i}, "loss": {3 / i}}}\n' for i in range(1, 200)))
    out = tmp_path / "out"
    write_report(
        runs, out, title="T", loss_curve=curve, samples_with_pictures=data_root, redact=False
    )
    assert _hashes(out, tmp_path) == MINI
