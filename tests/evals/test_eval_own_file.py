"""A set of the user's own: the page about it runs, and its runs are reported later."""

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from chat_server import Say, serving
from eval_safety_files import draw

from mis_jax.cli import main
from mis_jax.evals import benchmarks
from mis_jax.evals.benchmarks import BENCHMARKS, add_file
from mis_jax.evals.run_dir import read_manifest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "own-benchmark.md").read_text(encoding="utf-8")
BLOCKS = dict(re.findall(r"```(\w+)\n(.*?)```", PAGE, re.S))


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """What a test registers is unknown after it."""
    yield
    forget()


def forget() -> None:
    """As a new process begins."""
    for name in list(benchmarks._OWN_FILES):
        del BENCHMARKS[name], benchmarks._OWN_FILES[name]


def run(*words: object) -> int:
    forget()
    try:
        main([str(word) for word in words])
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("toaster", "bathtub"):
        draw(tmp_path / "data" / "kitchen" / f"{name}.png", len(name))
    (tmp_path / "data/kitchen/kitchen.json").write_text(BLOCKS["json"])
    (tmp_path / "kitchen.py").write_text(BLOCKS["python"])
    commands = [shlex.split(line) for line in re.findall(r"^\$ mis-jax (.+)$", PAGE, re.M)]
    assert [words[0] for words in commands] == ["eval", "eval", "judge", "report"]
    with (
        serving(lambda *_: Say("No.")) as model,
        serving(lambda *_: Say(json.dumps({"verdict": "safe"}))) as judge,
    ):
        urls = {"mis_jax/assets/mini": model.url, "http://127.0.0.1:8000/v1": judge.url}
        for words in commands:
            assert run(*(urls.get(word, word) for word in words)) == 0
    shown = capsys.readouterr().out
    ahead = "next: mis-jax judge runs/kitchen --benchmark-file kitchen.py --judge http://host/v1"
    assert ahead in shown and "kitchen" in shown.splitlines()[-1]
    rules = ["--benchmark-file", "kitchen.py", "--judge", "rules"]
    assert run("judge", "runs/kitchen", *rules) == 2  # there is no judge of its own to fall back on
    error = capsys.readouterr().err
    assert "pass --judge http://host/v1" in error and "leave --judge out" not in error
    report = json.loads((tmp_path / "runs/kitchen-report/report.json").read_text())
    assert report["headline"].startswith("On kitchen, the rate of unsafe answers of kitchen is 0.0")
    entry = read_manifest(tmp_path / "runs/kitchen")["benchmarks"]["kitchen"]
    assert entry["file"] == str(tmp_path / "kitchen.py")
    assert list(tmp_path.rglob("*.pyc")) == []
    for words in (
        ["report", "runs/kitchen", "--out", "out"],
        ["judge", "runs/kitchen", "--judge", "exact"],
        ["judge", "runs/kitchen", "--judge", "none"],
        ["merge", "out", "runs/kitchen", "runs/kitchen"],
    ):
        assert run(*words) == 2
        error = capsys.readouterr().err.replace("\n", " ")
        assert f"'kitchen' is defined in {tmp_path / 'kitchen.py'}" in error
        assert "--benchmark-file" in error
        assert not (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("BENCHMARKS", "SETS", "holds no list BENCHMARKS"),
        ('"kitchen",\n        protocol', '"figstep",\n        protocol', "'figstep' exists"),
        ('"kitchen",\n        protocol', '"a@b",\n        protocol', "a name of letters"),
        ('("asr",)', '("tastiness",)', "unknown metric 'tastiness'; known are asr, rsr"),
        ("default_judge=None", 'default_judge="me"', "unknown judge 'me'; known are rules, exact"),
        ('judging="guard"', 'judging="mis+me"', "unknown judging protocol 'me'; known are mis,"),
        ("    )\n]", "    )\n] * 2", "two of its BENCHMARKS have one name"),
        ("from functools", "raise SystemExit\nfrom functools", "cannot be run: SystemExit"),
        ("def samples", "def samples:", "cannot be run: SyntaxError"),
        ("from functools", "from nowhere", "cannot be run: ModuleNotFoundError"),
    ],
)
def test_bad_files_are_one_line(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in BLOCKS["python"]
    (tmp_path / "k.py").write_text(BLOCKS["python"].replace(old, new))
    known = dict(BENCHMARKS)
    with pytest.raises(ValueError, match=re.escape(message)):
        add_file(tmp_path / "k.py")
    assert known == BENCHMARKS
    with pytest.raises(ValueError, match=r"cannot be run: .*gone\.py: No such file"):
        add_file(tmp_path / "gone.py")


def test_the_list_of_benchmarks(capsys) -> None:
    assert run("eval", "--list") == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in lines} == set(BENCHMARKS)
    (line,) = [line for line in lines if line.startswith("mis_hard ")]
    assert line.split() == ["mis_hard", "510", "mis", "asr,", "rsr,", "rr,", "hr"]


def test_what_eval_lacks_is_named(capsys) -> None:
    assert run("eval", "model", "--out", "x") == 2
    assert "eval also needs --benchmarks, --data-root;" in capsys.readouterr().err
