"""Processes that read ahead: in order, taking no signals, missed when killed, never left over."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import pytest
from waiting import until

from mis_jax.data.readers import in_order
from mis_jax.signals import LostWorker

SIZE = 300_000  # bytes: more than a pipe holds


@dataclass(frozen=True)
class Item:
    number: int
    content: np.ndarray


def make(number: int) -> Item:
    return Item(int(number), np.full(SIZE, number % 256, np.uint8))


def make_or_fail(number: int) -> int:
    if number == 3:
        raise ValueError("the third one")
    return int(number)


def workers_of(process: int) -> list[int]:
    """Child processes that run Python's spawned code, but its tracker of resources."""
    with open(f"/proc/{process}/task/{process}/children") as file:
        children = [int(word) for word in file.read().split()]
    return [child for child in children if "spawn_main" in command_of(child)]


def command_of(process: int) -> str:
    try:
        with open(f"/proc/{process}/cmdline") as file:
            return file.read()
    except OSError:
        return ""


def test_two_processes_give_the_items_of_threads_in_order_and_miss_no_signal():
    """Signals of the group are for the run: 17 items come after all three of them."""
    with closing(in_order(make, np.arange(23), 2, ahead=2)) as items:
        first = [next(items) for _ in range(6)]
        for worker in multiprocessing.active_children():
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                os.kill(worker.pid, number)
        found = first + list(items)
    expected = list(in_order(make, np.arange(23), 0))
    assert [item.number for item in found] == [item.number for item in expected] == list(range(23))
    assert all(np.array_equal(a.content, b.content) for a, b in zip(found, expected, strict=True))
    assert not multiprocessing.active_children()
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == set()


def test_a_process_that_is_killed_in_the_middle_of_an_item_is_missed_at_once():
    with closing(in_order(make, np.arange(1000), 2, ahead=2)) as items:
        next(items)
        time.sleep(0.3)  # both wait in the middle of an item: their pipes are full
        worker = multiprocessing.active_children()[0]
        os.kill(worker.pid, signal.SIGKILL)
        began = time.monotonic()
        with pytest.raises(LostWorker, match=r"ended \(SIGKILL\); lower data\.workers"):
            list(items)
        assert time.monotonic() - began < 5
    assert not multiprocessing.active_children()


def test_what_work_raises_comes_in_its_place_and_a_process_that_stands_still_is_closed():
    with closing(in_order(make_or_fail, np.arange(8), 2)) as items:
        assert [next(items) for _ in range(3)] == [0, 1, 2]
        with pytest.raises(ValueError, match="the third one"):
            next(items)
        for worker in multiprocessing.active_children():
            os.kill(worker.pid, signal.SIGSTOP)
        began = time.monotonic()
    assert time.monotonic() - began < 5 and not multiprocessing.active_children()


@pytest.mark.parametrize("end", ["killed", "without a close"])
def test_no_process_is_left_over(end):
    program = (
        "import numpy as np, sys\n"
        "from test_readers import make\n"
        "from mis_jax.data.readers import in_order\n"
        "if __name__ == '__main__':\n"
        "    items = in_order(make, np.arange(1000), 2, ahead=2)\n"
        "    next(items)\n"
        "    print('reads', flush=True)\n"
        "    sys.stdin.readline()\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, "-c", program],
        env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as run:  # fmt: skip
        assert run.stdout and run.stdout.readline() == "reads\n"
        workers = workers_of(run.pid)
        assert len(workers) == 2
        if end == "killed":
            run.kill()
        run.communicate("\n", timeout=20)
    until(lambda: not any("spawn_main" in command_of(worker) for worker in workers))
