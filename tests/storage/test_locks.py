"""Who may write a run's folder, on one machine and on several."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from waiting import until

from mis_jax.cli import main
from mis_jax.storage import locks
from mis_jax.storage.locks import LOCK, Lost, locked_folder

HOLD = (
    "import sys, time; from pathlib import Path; from mis_jax.storage.locks import locked_folder\n"
    "with locked_folder(Path(sys.argv[1])): print('held', flush=True); time.sleep(600)\n"
)


@pytest.fixture
def holder(tmp_path):
    """Another process that holds `run`."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_process_is_told_host_and_process_of_the_first(holder, tmp_path):
    told = rf"run: another process is writing it \(process {holder.pid} on host "
    told += rf"{socket.gethostname()}, since 2.*\); wait for it"
    with pytest.raises(ValueError, match=told), locked_folder(tmp_path / "run"):
        pass


def test_the_lock_of_a_killed_process_is_stale_at_once(holder, tmp_path):
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert (tmp_path / "run" / LOCK).exists()
    with locked_folder(tmp_path / "run"):
        said = json.loads((tmp_path / "run" / LOCK).read_text())
        assert (said["pid"], said["host"]) == (os.getpid(), socket.gethostname())


def test_nothing_stays_behind(tmp_path):
    with locked_folder(tmp_path / "a" / "run"):
        assert (tmp_path / "a" / "run" / LOCK).exists()
    assert not list(tmp_path.iterdir())
    (tmp_path / "run").mkdir()
    with locked_folder(tmp_path / "run"):
        (tmp_path / "run" / "mine").touch()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["mine"]


def test_a_thread_may_take_its_folder_again_and_another_may_not(tmp_path):
    refused = []

    def other() -> None:
        try:
            with locked_folder(tmp_path / "run"):
                pass
        except ValueError as error:
            refused.append(str(error))

    with locked_folder(tmp_path / "run") as lock, locked_folder(tmp_path / "run") as again:
        assert lock is again
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert refused and f"process {os.getpid()} on" in refused[0]


def of_another_machine(folder: Path, beat: int) -> None:
    said = {"host": "pod-3", "pid": 17, "since": "2026-01-01", "boot": "other", "beat": beat}
    folder.mkdir(exist_ok=True)
    (folder / LOCK).write_text(json.dumps(said))


def test_a_lock_of_another_host_that_gives_no_sign_of_life_is_stale(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "_PATIENCE", 0.2)
    of_another_machine(tmp_path / "run", 0)
    with locked_folder(tmp_path / "run") as lock:
        lock.check()


def test_a_lock_that_another_host_renews_is_respected(tmp_path):
    ended = threading.Event()

    def renew() -> None:
        beat = 0
        while not ended.wait(0.05):
            of_another_machine(tmp_path / "run", beat := beat + 1)

    of_another_machine(tmp_path / "run", 0)
    thread = threading.Thread(target=renew)
    thread.start()
    try:
        with (
            pytest.raises(ValueError, match="process 17 on host pod-3, since 2026"),
            locked_folder(tmp_path / "run"),
        ):
            pass
    finally:
        ended.set()
        thread.join()


def test_a_holder_renews_its_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "_RENEWED", 0.01)
    with locked_folder(tmp_path / "run"):
        path = tmp_path / "run" / LOCK
        until(lambda: json.loads(path.read_text())["beat"] > 2)


def test_a_folder_that_is_moved_or_taken_is_noticed(tmp_path):
    with locked_folder(tmp_path / "run") as lock:
        lock.check()
        (tmp_path / "run").rename(tmp_path / "away")
        with pytest.raises(Lost, match="run: was moved or removed"):
            lock.check()
        (tmp_path / "away").rename(tmp_path / "run")
        lock.check()
        of_another_machine(tmp_path / "run", 0)
        with pytest.raises(Lost, match=r"process 17 on host pod-3.* took it over"):
            lock.check()


@pytest.mark.parametrize("boot", ["this", "other"])
def test_a_disk_without_locks_of_its_own_still_tells(boot, tmp_path, monkeypatch):
    def unsupported(*_) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(locks.fcntl, "flock", unsupported)
    monkeypatch.setattr(locks, "_RENEWED", 0.05)
    with locked_folder(tmp_path / "run"):
        monkeypatch.setattr(locks, "_held", {})
        if boot == "other":
            monkeypatch.setattr(locks, "boot_id", lambda: "other")
        with (
            pytest.raises(ValueError, match=f"process {os.getpid()} on"),
            locked_folder(tmp_path / "run"),
        ):
            pass


def test_a_disk_without_room_for_a_lock_keeps_none(tmp_path, monkeypatch):
    def full(*_) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(locks.os, "pwrite", full)
    with pytest.raises(OSError, match="No space left"), locked_folder(tmp_path / "run"):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("words", [["merge", "{}", "a", "b"], ["report", "a", "--out", "{}"]])
def test_merge_and_report_lock_the_folder_they_write(holder, tmp_path, capsys, words):
    with pytest.raises(SystemExit) as stopped:
        main([word.format(tmp_path / "run") for word in words])
    assert stopped.value.code == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"run: another process is writing it (process {holder.pid} on" in said
    assert [path.name for path in (tmp_path / "run").iterdir()] == [LOCK]
