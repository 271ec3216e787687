"""SIGKILL at random moments of a run that saves often: every restart goes on, to the same bits.

MIS_JAX_KILLS=20 kills so often; the seed of the moments is printed.
"""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tiny_world import TIMES, read_lines, run_config, write_yaml

from mis_jax.checkpoint.load import read_checkpoint
from mis_jax.train.trainer import train

KILLS = int(os.environ.get("MIS_JAX_KILLS", "5"))
STEPS = 40
# Imports once, then makes a process a line of its input: what a fresh process would do, sooner.
STARTER = """
import os, sys
from mis_jax.config import load_config
from mis_jax.train.trainer import train

for line in sys.stdin:
    if not (child := os.fork()):
        train(load_config(sys.argv[1]))
        os._exit(0)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Starter:
    """Makes processes that train, one after the other."""

    def __init__(self, config: Path):
        self._process = subprocess.Popen(
            [sys.executable, "-c", STARTER, str(config)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdin and self._process.stdout
        self._in, self._out = self._process.stdin, self._process.stdout

    def start(self) -> int:
        """A training process, by its number."""
        print("start", file=self._in, flush=True)
        return int(self._out.readline())

    def code(self) -> int:
        """Exit code of the process that was started last."""
        return int(self._out.readline())

    def close(self) -> None:
        self._in.close()
        self._out.close()
        self._process.wait()


def saving(output: Path) -> bool:
    """Whether a checkpoint is in the making."""
    folder = output / "checkpoints"
    return folder.is_dir() and any("tmp" in path.name for path in folder.iterdir())


def logged(output: Path) -> int:
    path = output / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def moments(rng: random.Random, output: Path) -> list[Callable[[int], Callable[[], bool]]]:
    """Kinds of moments: given the steps logged so far, whether the time has come."""

    def during_a_save(before: int) -> Callable[[], bool]:
        step = before + rng.randrange(1, 4)
        return lambda: logged(output) >= step and saving(output)

    def after_a_step(before: int) -> Callable[[], bool]:
        step = before + rng.randrange(1, 5)
        return lambda: logged(output) >= step

    def at_any_time(before: int) -> Callable[[], bool]:
        end = time.monotonic() + rng.uniform(0, 4)
        return lambda: time.monotonic() > end

    return [during_a_save, after_a_step, at_any_time]


@pytest.mark.slow
def test_sigkill_at_random_moments(tiny_checkpoint, tiny_data, tmp_path):
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    often = dict(train__steps=STEPS, train__save_every=1)
    straight = run_config(tiny_checkpoint, tiny_data, tmp_path / "straight", **often)
    train(straight)
    config = run_config(tiny_checkpoint, tiny_data, tmp_path / "run", **often)
    starter = Starter(write_yaml(config, tmp_path / "run.yaml"))
    kinds, hit_saves, kills = moments(rng, config.output), 0, 0
    for number in range(KILLS):
        before = logged(config.output)
        come = kinds[number % len(kinds)](min(before, STEPS - 6))
        child = starter.start()
        while not come():
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.02))
        hit_saves += saving(config.output)
        os.kill(child, signal.SIGKILL)
        code = starter.code()
        assert code in (-signal.SIGKILL, 0), "a restart failed"
        kills += code != 0
        print(f"kill {number} with {logged(config.output)} steps logged, {before} before")
    starter.start()
    assert starter.code() == 0
    starter.close()
    print(f"{kills} kills, {hit_saves} of them during a save")
    assert hit_saves and kills > KILLS // 2
    times = TIMES
    for ours, theirs in zip(
        *(read_lines(run.output / "metrics.jsonl") for run in (config, straight)), strict=True
    ):
        assert {k: v for k, v in ours.items() if k not in times} == {
            k: v for k, v in theirs.items() if k not in times
        }
    finals = [read_checkpoint(run.output / "final").arrays for run in (config, straight)]
    for name, value in finals[1].items():
        assert np.array_equal(finals[0][name], value), name
