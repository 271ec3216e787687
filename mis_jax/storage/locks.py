"""The one owner of locks: one process at a time writes a run's folder, on one host or on many.

The system's own lock (flock) tells processes of one machine apart, and ends with its process
however that ends. Whether it reaches other machines depends on the file system, so the file also
says who holds it, and its holder renews it every few seconds: what another machine wrote and no
longer renews is stale.
"""

import errno
import fcntl
import itertools
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO

from mis_jax.parsing import parse_json

_log = logging.getLogger(__name__)
LOCK = ".mis-jax.lock"  # in a run's folder
_RENEWED = 3.0  # seconds between two signs of life
_PATIENCE = 15.0  # seconds without one after which a holder on another machine is gone
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
_held: dict[str, "Lock"] = {}  # by this process: who holds a folder may take it again


def try_flock(file: Any, *, wait: bool = False) -> bool | None:
    """Take the system's lock on an open file, which goes with the file; False where it is taken.

    None where the file system has no such locks: everyone may go on then.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        return None
    return True


class Lost(OSError):
    """The folder that a process writes is no longer there, or no longer its own."""


class Lock:
    """A lock that is held; `locked_folder` and `locked` make it."""

    def __init__(self, path: Path, what: Path, file: BinaryIO):
        self._path, self._what, self._file = path, what, file
        self._said = _who() | {"key": uuid.uuid4().hex}
        self._beats = itertools.count()
        self._ended = threading.Event()
        self.thread = threading.get_ident()
        self._renew()
        threading.Thread(target=self._stay, name="lock", daemon=True).start()

    def check(self) -> None:
        """Raise Lost, an OSError, if the folder was moved or removed, or another one took it."""
        if not _same(self._path, self._file):
            raise Lost(
                f"{self._what}: was moved or removed while it was written; put it back, or what is "
                "left of it"
            )
        said = _read(self._file)
        if said and said.get("key") != self._said["key"]:
            raise Lost(f"{self._what}: {_holder(said)} took it over; end one of the two")

    @property
    def key(self) -> str:
        """What `key_of_folder` finds there, and in no other folder."""
        return self._said["key"]

    def release(self) -> None:
        """Let go; the file goes too."""
        self._ended.set()
        with suppress(OSError), self._file:
            os.truncate(self._file.fileno(), 0)  # also where it was moved away
            if _same(self._path, self._file):
                self._path.unlink()

    def _stay(self) -> None:
        while not self._ended.wait(_RENEWED):
            with suppress(OSError, ValueError):  # a full disk, or just released
                said = _read(self._file)
                if said and said.get("key") != self._said["key"]:
                    return  # `check` tells
                self._renew()

    def _renew(self) -> None:
        content = json.dumps(self._said | {"beat": next(self._beats)}).encode().ljust(300) + b"\n"
        os.pwrite(self._file.fileno(), content, 0)


@contextmanager
def locked_folder(folder: Path) -> Iterator[Lock]:
    """Hold a folder that several commands write into; it is made where it is not.

    ValueError names host and process of who holds it. Folders made here go again if they stay
    empty. A thread that holds the folder may take it again.
    """
    made = _make(folder)
    try:
        with locked(folder / LOCK, folder) as lock:
            yield lock
    finally:
        for path in made:
            with suppress(OSError):  # it is not empty
                path.rmdir()


@contextmanager
def locked(path: Path, what: Path) -> Iterator[Lock]:
    """Hold `what`, by the lock file `path`."""
    name = os.path.realpath(path)
    if (lock := _held.get(name)) and lock.thread == threading.get_ident():
        yield lock
        return
    lock = _take(path, what)
    _held[name] = lock
    try:
        yield lock
    finally:
        _held.pop(name, None)
        lock.release()


def key_of_folder(folder: Path) -> str | None:
    """Key of the lock that a process, perhaps on another machine, holds a folder by."""
    try:
        os.listdir(folder)  # network disks look anew then
        with (folder / LOCK).open("rb") as file:
            return _read(file).get("key")
    except OSError:
        return None


def _take(path: Path, what: Path) -> Lock:
    while True:
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+b", buffering=0)
        try:
            if (taken := try_flock(file)) is False:
                raise _refusal(path, what, _read(file))
            if not _same(path, file):  # its holder has just removed it
                file.close()
                continue
            said = _read(file)
            if said and not (taken and said.get("boot") == boot_id()):
                _log.info("%s: %s left a lock; is it still there?", what, _holder(said))
                if _lives(path, said):
                    raise _refusal(path, what, said)
            try:
                return Lock(path, what, file)
            except OSError:  # no room for its few words
                path.unlink()
                raise
        except BaseException:
            file.close()
            raise


def _lives(path: Path, said: dict[str, Any]) -> bool:
    """Whether a holder that flock does not tell of gives a sign of life, by nobody's clock."""
    end = time.monotonic() + _PATIENCE
    while time.monotonic() < end:
        time.sleep(min(0.2, _PATIENCE / 10))
        with suppress(FileNotFoundError), path.open("rb") as again:  # network disks look anew then
            if (now := _read(again)) and now != said:
                return True
    return False


def _refusal(path: Path, what: Path, said: dict[str, Any]) -> ValueError:
    return ValueError(
        f"{what}: another process is writing it ({_holder(said)}); wait for it or end it, or "
        f"choose another folder (its lock is {path})"
    )


def _holder(said: dict[str, Any]) -> str:
    if not said:
        return "it did not leave its name"
    return f"process {said.get('pid')} on host {said.get('host')}, since {said.get('since')}"


def _who() -> dict[str, Any]:
    since = datetime.now().astimezone().isoformat(timespec="seconds")
    return {"host": socket.gethostname(), "pid": os.getpid(), "since": since, "boot": boot_id()}


def boot_id() -> str:
    """One for each start of a machine; processes of one share flock."""
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.exists() else socket.gethostname()


def _read(file: Any) -> dict[str, Any]:
    """Who a lock names; nothing where it is empty or no lock of ours."""
    try:
        said = parse_json(os.pread(file.fileno(), 4096, 0))
    except ValueError:
        return {}
    return said if isinstance(said, dict) else {}


def _same(path: Path, file: BinaryIO) -> bool:
    """Whether a path still leads to the open file."""
    try:
        found = path.stat()
    except OSError:
        return False
    held = os.fstat(file.fileno())
    return (found.st_dev, found.st_ino) == (held.st_dev, held.st_ino)


def _make(folder: Path) -> list[Path]:
    """Make a folder; the folders that were made, the innermost first."""
    made: list[Path] = []
    for path in (folder, *folder.parents):
        if path.exists():
            break
        made.append(path)
    folder.mkdir(parents=True, exist_ok=True)
    return made
