"""`python -m benchmarks gpu` on this machine, with a tiny model."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import gpu
from benchmarks.gpu_sections import SECTIONS, model_of
from benchmarks.noise import noise


def test_a_section_that_takes_too_long_is_cut_off() -> None:
    found, problem = gpu._in_a_process("train_full", gpu.Settings(smoke=True), 0.05)
    assert not found and problem == "cut off after 0 s"


def test_what_other_sections_found_stays(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(gpu, "RESULTS", tmp_path)
    cells = {"a": {"section": "decode"}, "b": {"section": "prefill"}}
    old = {"limits": {"bytes": 1.0}, "cells": cells, "section_seconds": {"decode": 3.0}}
    (tmp_path / "gpu-nvidia-h100.json").write_text(json.dumps(old), encoding="utf-8")
    run = {"device": "NVIDIA H100", "limits": {}, "cells": {}, "section_seconds": {}}
    kept = gpu._earlier(gpu.Settings(save=True, only=("prefill",)), run)
    assert kept["cells"] == {"a": {"section": "decode"}} and kept["limits"] == {"bytes": 1.0}
    assert gpu._earlier(gpu.Settings(save=True), run) == run  # everything is measured anew


def test_a_goal_is_met_missed_or_unknown() -> None:
    def cell(goal: float, reached: float | None) -> dict:
        return {"goals": [{"of": "share_of_limit", "goal": goal, "reached": reached}]}

    cells = {"a": cell(0.7, 0.8), "b": cell(0.7, 0.6), "c": cell(0.5, None)}
    cells["d"] = cell(0.5, None) | {"share_of_limit": 0.9}
    assert [line.rsplit(" ", 1)[1] for line in gpu.goals(cells)] == [
        "met", "missed", "unknown", "met"
    ]  # fmt: skip


def test_rows_of_noise_hold_what_they_say() -> None:
    model = model_of(smoke=True)
    batch = noise(model, rows=2, length=1024, tiles=2, samples=2, used=400, passes=3)
    assert batch.input_ids.shape == (3, 2, 1024) and batch.tiles.shape[:2] == (3, 4)
    segments, images = np.asarray(batch.segment_ids), np.asarray(batch.input_ids)
    assert sorted(np.unique(segments)) == [0, 1, 2]
    assert (segments == 2).sum() == 3 * 2 * 400
    assert ((images == model.image_token_id) & (segments > 0)).sum() == 3 * 2 * 512
    weights = np.asarray(batch.loss_weights)
    assert weights.sum() == 3 * 2 * 2 * 100 and not weights[segments == 0].any()


@pytest.mark.slow
def test_sections_run_and_are_written(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(gpu, "RESULTS", tmp_path)
    monkeypatch.setattr("benchmarks.common.RESULTS", tmp_path)
    only = ("limits", "train_full", "decode")
    run = gpu.measure(gpu.Settings(smoke=True, save=True, only=only, dump=tmp_path / "hlo"))
    assert run["problems"] == {} and set(only) <= set(SECTIONS)
    (written,) = tmp_path.glob("gpu-*.json")
    cells = json.loads(written.read_text(encoding="utf-8"))["cells"]
    assert {cell["section"] for cell in cells.values()} == set(only) - {"limits"}
    assert all(cell["share_of_limit"] > 0 for cell in cells.values())
    assert np.isfinite(cells["full fine-tuning"]["loss"])
    for section, program in (("train_full", "jit_step"), ("decode", "jit_decode")):
        assert list((tmp_path / "hlo" / section).glob(f"*{program}*after_optimizations.txt"))
