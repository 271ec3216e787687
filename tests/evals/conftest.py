"""Fixtures over the few rows of ``eval_world``."""

from collections.abc import Callable
from pathlib import Path

import pytest
from eval_world import Speak, answering, write_data_root

from mis_jax.evals.benchmarks import BENCHMARKS
from mis_jax.evals.run_dir import open_run
from mis_jax.evals.runner import generate_answers, judge_run


@pytest.fixture
def data_root(tmp_path: Path) -> Path:
    """A data root in the mini world's layout."""
    write_data_root(tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture
def evaluate(tmp_path: Path, data_root: Path) -> Callable[..., Path]:
    """Run all three stages with a given way to answer; returns the run folder."""

    def run(name: str, speak: Speak, benchmarks: tuple[str, ...] = ("mini_hard",)) -> Path:
        run_dir = tmp_path / name
        open_run(run_dir, model=name, fingerprint=name)
        for benchmark in benchmarks:
            samples = BENCHMARKS[benchmark].load(data_root)
            generate_answers(BENCHMARKS[benchmark], samples, answering(speak), run_dir)
        judge_run(run_dir, None, data_root)
        return run_dir

    return run
