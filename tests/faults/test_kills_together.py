"""Signals at random moments to a run of two processes with two reading processes each.

MIS_JAX_KILLS=30 sends so many; the seed of the moments is printed.
"""

import os
import random
import signal
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from several_processes import Job
from tiny_world import TIMES, read_lines, run_config, write_yaml
from waiting import until

from mis_jax.checkpoint.load import read_checkpoint

KILLS = int(os.environ.get("MIS_JAX_KILLS", "1"))
STEPS = 10 * KILLS + 10
END = 30.0  # seconds in which every end is complete


def processes_with(mark: str) -> list[int]:
    """Living processes that were started by a job, directly or not."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (path / "environ").read_bytes():
                found.append(int(path.name))
        except OSError:  # it has just ended, or is nobody's
            continue
    return found


def children(process: int) -> list[int]:
    try:
        tasks = list(Path(f"/proc/{process}/task").glob("*/children"))
        found = [int(word) for path in tasks for word in path.read_text().split()]
        return [
            p for p in found if "resource_tracker" not in Path(f"/proc/{p}/cmdline").read_text()
        ]
    except OSError:
        return []


def to_group(number: int) -> Callable[[Job, random.Random, bool], None]:
    def send(job: Job, rng: random.Random, starting: bool) -> None:
        victims = rng.sample(job.processes, rng.choice([1, 2]))
        for process in job.processes if starting else victims:
            os.killpg(process.pid, number)

    return send


def kill_one(job: Job, rng: random.Random, starting: bool) -> None:
    """The process that was started, the one below it that trains, or one that reads."""
    depth = rng.randrange(3)
    victims = [rng.choice(job.processes).pid]
    for _ in range(depth):
        victims = [c for v in victims for c in children(v)] or victims
    os.kill(rng.choice(victims), signal.SIGKILL)


WAYS = {
    "SIGTERM to groups": (to_group(signal.SIGTERM), {75}),
    "SIGKILL to one": (kill_one, {75, -signal.SIGKILL}),
    "SIGINT to groups": (to_group(signal.SIGINT), {75}),
    "SIGHUP to groups": (to_group(signal.SIGHUP), {75}),
}


def logged(output: Path) -> int:
    path = output / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


@pytest.mark.slow
def test_signals_to_processes_and_groups_at_random_moments(tiny_checkpoint, tiny_data, tmp_path):
    """Every end is complete within 30 s and leaves no process; the bits are of a straight run."""
    seed = int(os.environ.get("MIS_JAX_SEED", random.randrange(2**32)))
    print("seed", seed)
    rng = random.Random(seed)
    mark = f"MIS_JAX_JOB={uuid.uuid4().hex}"
    name, _, value = mark.partition("=")

    def job(config) -> Job:
        path = write_yaml(config, tmp_path / f"{config.output.name}.yaml")
        return Job(path, 2, group=True, environments=[{name: value}] * 2)

    # A process that is killed while it starts is waited for that long.
    often = dict(mesh__fsdp=-1, data__workers=2, train__steps=STEPS, train__save_every=4)
    often |= dict(distributed__timeout=20)
    straight = run_config(tiny_checkpoint, tiny_data, tmp_path / "straight", **often)
    with job(straight) as one:
        assert one.codes() == [0, 0], one.errors()
    config = run_config(tiny_checkpoint, tiny_data, tmp_path / "run", **often)
    log = config.output
    first = rng.randrange(len(WAYS))
    for number in range(KILLS):
        way, (send, allowed) = list(WAYS.items())[(first + number) % len(WAYS)]
        before = logged(log)
        with job(config) as one:
            starting = number % 5 == 4  # one that waits for the other waits for a minute
            if starting:
                time.sleep(rng.uniform(0.5, 8))
            else:
                goal = min(before + rng.randrange(1, 8), STEPS - 4)
                one.wait_for(lambda: logged(log) >= goal)  # noqa: B023
            send(one, rng, starting)
            began = time.monotonic()
            codes = one.codes(END)
            until(lambda: not processes_with(mark))
            took = time.monotonic() - began
            print(f"{number}: {way} at step {logged(log)} ({before} before): {codes}, {took:.1f} s")
            assert took < END
            early = {-signal.SIGTERM, -signal.SIGINT, -signal.SIGHUP}  # Python itself was starting
            assert set(codes) <= (allowed | early if starting else allowed)
            assert not any("Traceback" in text for text in one.errors()), one.errors()
    with job(config) as one:
        assert one.codes() == [0, 0], one.errors()
    until(lambda: not processes_with(mark))
    ours, theirs = (
        [{k: v for k, v in line.items() if k not in TIMES} for line in read_lines(path)]
        for path in (log / "metrics.jsonl", straight.output / "metrics.jsonl")
    )
    assert ours == theirs and len(ours) == STEPS
    finals = [read_checkpoint(run.output / "final").arrays for run in (config, straight)]
    for key, array in finals[1].items():
        assert np.array_equal(finals[0][key], array), key
