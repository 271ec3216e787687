"""Hosts that do not run the same thing, or do not share a disk, and a failure on one of them."""

import os
import shutil
import signal
import time
from pathlib import Path

import pytest
from several_processes import Job
from tiny_world import read_lines, run_config, write_yaml
from waiting import until

import mis_jax
from mis_jax.data.loader import TrainingData

pytestmark = pytest.mark.slow


def test_what_differs_on_one_host_is_named_before_anything_is_written(
    tiny_checkpoint, tiny_data, tmp_path
):
    """Another learning rate, two rows changed places, other vision weights, a stale clone."""
    data, model, code = tmp_path / "data", tmp_path / "model", tmp_path / "clone"
    shutil.copytree(tiny_data, data)
    lines = (data / "samples.jsonl").read_text().splitlines(keepends=True)
    (data / "samples.jsonl").write_text("".join([lines[1], lines[0], *lines[2:]]))
    shutil.copytree(tiny_checkpoint, model)
    weights = model / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    shutil.copytree(Path(mis_jax.__file__).parent, code / "mis_jax")
    with (code / "mis_jax" / "parallel" / "sharding.py").open("a") as file:
        file.write("# as it was last week\n")
    output = tmp_path / "run"
    first = run_config(tiny_checkpoint, tiny_data, output)
    second = run_config(model, data, output, optimizer__learning_rate=3e-4)
    paths = [write_yaml(c, tmp_path / f"{i}.yaml") for i, c in enumerate((first, second))]
    began = time.monotonic()
    places = [{}, {"PYTHONPATH": str(code)}]
    with Job(paths, 2, folders=[tmp_path, tmp_path], environments=places) as job:
        assert job.codes(30) == [2, 2], job.errors()
        own, theirs = (text.splitlines()[-1] for text in job.errors())
    assert time.monotonic() - began < 30
    for name in (
        "optimizer.learning_rate (process 0 on ",
        "code of mis_jax (",
        "file of model: model.safetensors (",
        "data.sources[0]: samples.jsonl (",
        "order of the samples (",
    ):
        assert name in own
    assert "process 1 on" in own and ": 0.0003)" in own
    assert theirs == own.replace("error: ", "error: process 0: ")
    assert not output.exists()


def test_an_output_that_is_not_shared_is_refused_on_all(tiny_checkpoint, tiny_data, tmp_path):
    config = run_config(tiny_checkpoint, tiny_data, Path("run"))
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    with Job(write_yaml(config, tmp_path / "run.yaml"), 2, folders=folders) as job:
        assert job.codes(30) == [2, 2], job.errors()
        theirs, own = (text.splitlines()[-1] for text in job.errors())
    assert f"output {folders[1] / 'run'}: on " in own and "is not the folder that process 0" in own
    assert theirs == own.replace("error: ", "error: process 1: ")
    assert not [path for folder in folders for path in folder.iterdir()]


@pytest.mark.parametrize("reason", ["a damaged picture", "a killed reader"])
def test_steps_are_saved_when_one_process_has_no_samples(
    tiny_checkpoint, tiny_data, tiny_processor, tmp_path, reason
):
    """All processes stop at one step, save it and end with one line."""
    data = tmp_path / "data"
    shutil.copytree(tiny_data, data)
    lost = reason == "a killed reader"
    config = run_config(
        tiny_checkpoint, data, tmp_path / "run", mesh__fsdp=-1, train__steps=400 if lost else 12,
        train__save_every=1000, data__workers=1 if lost else 0,
    )  # fmt: skip
    at = 6
    if not lost:
        ids = TrainingData(config, tiny_processor).ids
        rows = {row["id"]: row for row in read_lines(data / "samples.jsonl")}
        at, bad = next(
            (step + 1, i)
            for step in range(2, 12)
            for i in ids(step)[2:]  # rows 2 and 3 are of process 1
            if "image" in rows[i] and not any(i in ids(earlier) for earlier in range(step))
        )
        picture = data / rows[bad]["image"][0]
        picture.write_bytes(picture.read_bytes()[:200])
    with Job(write_yaml(config, tmp_path / "run.yaml"), 2, group=True) as job:
        if lost:
            log = config.output / "metrics.jsonl"
            job.wait_for(lambda: log.exists() and log.read_text().count("\n") > at)
            os.kill(readers(job.processes[1].pid)[0], signal.SIGKILL)
        assert job.codes(60) == ([75, 75] if lost else [2, 2]), job.errors()
        theirs, own = (text.splitlines()[-1] for text in job.errors())
    (saved,) = (int(p.name) for p in (config.output / "checkpoints").iterdir())
    assert saved == at - 1 or (lost and saved > at)
    assert len(read_lines(config.output / "metrics.jsonl")) == saved
    assert ("ended (SIGKILL)" if lost else f"image {picture}") in own
    assert f"; step {saved} is saved: " in own
    assert theirs == own and own.startswith("mis-jax: error: process 1: ")


def readers(process: int) -> list[int]:
    """Processes that read data, below one."""
    found: list[int] = []

    def look() -> bool:
        found[:] = [p for p in below(process) if "spawn_main" in command(p)]
        return bool(found)

    until(look)
    return found


def below(process: int) -> list[int]:
    children = [
        int(word)
        for path in Path(f"/proc/{process}/task").glob("*/children")
        for word in path.read_text().split()
    ]
    return children + [p for child in children for p in below(child)]


def command(process: int) -> str:
    return Path(f"/proc/{process}/cmdline").read_text()
