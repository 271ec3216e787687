"""The tool that exchanges predictions with VLMEvalKit: out of a run and back into another."""

import csv
import json
import subprocess
import sys
from pathlib import Path

from eval_tables import general_root

from mis_jax.evals.benchmarks import get_benchmark
from mis_jax.evals.run_dir import open_run
from mis_jax.evals.runner import generate_answers, judge_run
from mis_jax.evals.types import Answer

ROOT = Path(__file__).parents[2]


def tool(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "vlmevalkit_predictions.py")]
    return subprocess.run([*command, *map(str, words)], capture_output=True, text=True, check=False)


def test_answers_survive_the_way_out_and_back(tmp_path: Path) -> None:
    data, ours, theirs = tmp_path / "data", tmp_path / "ours", tmp_path / "theirs"
    general_root(data)
    mmstar = get_benchmark("mmstar")
    samples = mmstar.load(data)
    open_run(ours, model="m", fingerprint="f", data_root=data)
    generate_answers(mmstar, samples, lambda batch: [Answer("(B)") for _ in batch], ours)

    file = tmp_path / "mine_MMStar.tsv"
    done = tool("write", ours, "--benchmark", "mmstar", "--out", file)
    assert done.returncode == 0, done.stderr
    with open(file, newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream, delimiter="\t"))
    assert [row["prediction"] for row in rows] == ["(B)"] * len(samples)

    words = ["--benchmark", "mmstar", "--data-root", data, "--run", theirs]
    done = tool("read", file, *words)
    assert done.returncode == 0, done.stderr
    assert f"{len(samples)} answers, 0 failed" in done.stdout
    before, after = judge_run(ours, None, data), judge_run(theirs, None, data)
    assert before == after
    assert json.loads((theirs / "manifest.json").read_text())["model"]["name"] == file.stem

    wrong = tool("read", tmp_path / "none.tsv", *words)
    assert wrong.returncode == 1
    assert wrong.stderr.startswith("vlmevalkit_predictions: error: ") and "none.tsv" in wrong.stderr
