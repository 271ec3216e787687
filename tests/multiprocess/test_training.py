"""`mis-jax train` in 2 and 4 processes: the numbers of one, and an end that can be gone on from."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from several_processes import Job, free_port
from tiny_world import TIMES, read_lines, run_config, write_yaml

from mis_jax.checkpoint.inspect import inspect_checkpoint
from mis_jax.checkpoint.load import read_checkpoint
from mis_jax.checkpoint.native import DIGESTS
from mis_jax.config import load_config
from mis_jax.data.loader import TrainingData
from mis_jax.train.trainer import train

pytestmark = pytest.mark.slow
STEPS = 24


@pytest.fixture(scope="module")
def one(tiny_checkpoint, tiny_data, tmp_path_factory) -> Path:
    """The folder of a run in one process."""
    output = tmp_path_factory.mktemp("one") / "run"
    train(settings(tiny_checkpoint, tiny_data, output))
    return output


def settings(checkpoint: Path, data: Path, output: Path, **changes):
    changes = {"train__steps": STEPS, "train__save_every": 4, "mesh__fsdp": -1} | changes
    return run_config(checkpoint, data, output, **changes)


def lines_of(output: Path) -> list[dict]:
    path = output / "metrics.jsonl"
    return read_lines(path) if path.exists() else []


def logged(output: Path) -> int:
    """Lines of the log; the last one may be in the making."""
    path = output / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def saved(output: Path) -> int:
    steps = [int(p.name) for p in (output / "checkpoints").glob("*") if p.name.isdigit()]
    return max(steps, default=0)


def assert_like_one(output: Path, one: Path) -> None:
    """The losses of one process up to the order of sums, the same samples, nothing twice."""
    ours, theirs = lines_of(output), lines_of(one)
    assert [line["step"] for line in ours] == list(range(1, STEPS + 1))
    for name, tolerance in (("loss", 1e-5), ("tokens", 0), ("samples", 0), ("learning_rate", 0)):
        values = [np.array([line[name] for line in lines]) for lines in (ours, theirs)]
        np.testing.assert_allclose(*values, rtol=tolerance, err_msg=name)
    assert (output / "samples.jsonl").read_bytes() == (one / "samples.jsonl").read_bytes()


def assert_same_bits(a: Path, b: Path) -> None:
    times = TIMES
    numbers = [
        [{k: v for k, v in x.items() if k not in times} for x in lines_of(p)] for p in (a, b)
    ]
    assert numbers[0] == numbers[1]
    ours, theirs = (read_checkpoint(folder / "final").arrays for folder in (a, b))
    for name, value in theirs.items():
        assert np.array_equal(ours[name], value), name


def rehearse(config: Path, count: int) -> None:
    """What docs/pods.md shows."""
    script = Path(__file__).resolve().parents[2] / "tools" / "launch" / "local.sh"
    found = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PORT": str(free_port()),
    }
    done = subprocess.run(["sh", script, str(count), config], env=os.environ | found, timeout=180)
    assert done.returncode == 0


def test_a_lost_worker_and_the_same_bits_afterwards(one, tiny_checkpoint, tiny_data, tmp_path):
    straight = settings(tiny_checkpoint, tiny_data, tmp_path / "straight")
    rehearse(write_yaml(straight, tmp_path / "straight.yaml"), 2)
    assert_like_one(straight.output, one)

    config = settings(tiny_checkpoint, tiny_data, tmp_path / "run")
    path = write_yaml(config, tmp_path / "run.yaml")
    step, victim = random.randrange(5, STEPS - 4), random.randrange(2)
    print(f"process {victim} is killed once step {step} is logged")
    with Job(path, 2) as job:
        job.wait_for(lambda: logged(config.output) >= step)
        job.processes[victim].kill()
        began = time.monotonic()
        codes = job.codes(60)
        assert time.monotonic() - began < 60
        assert codes[victim] == -signal.SIGKILL and codes[1 - victim] == 75
        (line,) = job.errors()[1 - victim].splitlines()
        assert "lost contact with another process" in line
        assert f"newest checkpoint is of step {saved(config.output)}: run the same" in line
    assert saved(config.output) < STEPS
    with Job(path, 2) as job:
        assert job.codes() == [0, 0], job.errors()
    assert_same_bits(config.output, straight.output)
    assert (config.output / "samples.jsonl").read_bytes() == (one / "samples.jsonl").read_bytes()
    # What two processes wrote together: the last checkpoint, and the digests of the final model.
    assert inspect_checkpoint(config.output / "final")["problems"] == []
    assert (config.output / "final" / DIGESTS).exists()
    final = read_checkpoint(config.output / "final").arrays
    last = read_checkpoint(config.output / "checkpoints" / str(STEPS)).arrays
    assert all(np.array_equal(last[name], value) for name, value in final.items())


def test_four_processes_then_two_then_one(one, tiny_checkpoint, tiny_data, tmp_path):
    """SIGTERM reaches one process, and all of them stop at one step."""
    config = settings(tiny_checkpoint, tiny_data, tmp_path / "run")
    path = write_yaml(config, tmp_path / "run.yaml")
    before = 0
    for count in (4, 2):
        with Job(path, count) as job:
            job.wait_for(lambda: logged(config.output) > before)  # noqa: B023
            job.processes[-1].terminate()
            assert job.codes() == [75] * count, job.errors()
            before = saved(config.output)
            assert 0 < before < STEPS and before == len(lines_of(config.output))
            for text in job.errors():
                assert text.splitlines()[-1].endswith(
                    f"stopped at step {before}, saved; run the same command again to go on"
                )
    train(load_config(path))
    assert_like_one(config.output, one)


def test_a_refusal_on_one_process_is_the_line_of_all(
    tiny_checkpoint, tiny_data, tiny_processor, tmp_path
):
    """A picture that only one process reads is damaged; with `skip` process 0 tells of it."""
    data = tmp_path / "data"
    shutil.copytree(tiny_data, data)
    config = settings(tiny_checkpoint, data, tmp_path / "run", train__steps=2)
    first = TrainingData(config, tiny_processor).ids(0)
    rows = {row["id"]: row for row in read_lines(data / "samples.jsonl")}
    bad = next(i for i in first[2:] if "image" in rows[i])  # rows 2 and 3 are of process 1
    picture = data / rows[bad]["image"][0]
    picture.write_bytes(picture.read_bytes()[:200])
    with Job(write_yaml(config, tmp_path / "stop.yaml"), 2) as job:
        assert job.codes() == [2, 2], job.errors()
        (start, theirs), (own,) = (text.splitlines() for text in job.errors())
        assert "2 steps of 4 sequences" in start
        assert f"image {picture}" in own
        assert theirs == own.replace("error: ", "error: process 1: ")
    assert not config.output.exists()
    skip = settings(
        tiny_checkpoint, data, tmp_path / "run", train__steps=2, data__on_bad_sample="skip"
    )
    with Job(write_yaml(skip, tmp_path / "skip.yaml"), 2) as job:
        assert job.codes() == [0, 0], job.errors()
    line, numbers = read_lines(config.output / "samples.jsonl")[0], lines_of(config.output)[0]
    assert line["ids"] == [i for i in first if i != bad]
    assert f"image {picture}" in line["skipped"][0]
    assert (numbers["samples"], numbers["skipped"]) == (3, 1)
