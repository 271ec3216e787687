"""Folders and files that are whole or plainly not: never half-written under their final name."""

import fcntl
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NOTICE = "INCOMPLETE.json"
_JOURNAL = "journal.jsonl"


@contextmanager
def finished_folder(destination: Path) -> Iterator[Path]:
    """A temporary sibling folder that becomes `destination` when the block ends without an error.

    Nothing half-written is ever seen under the final name. An existing destination is refused.
    """
    destination = Path(destination)
    _refuse_existing(destination)
    work = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", dir=destination.parent))
    work.chmod(0o755)
    try:
        yield work
        _put_in_place(work, destination)
    finally:
        shutil.rmtree(work, ignore_errors=True)


class Journal:
    """What has been done in a folder so far, by name; a kill loses at most the line in writing."""

    def __init__(self, path: Path):
        self._path = path
        self._lock = threading.Lock()
        self.done: dict[str, Any] = {}
        whole = 0
        if path.exists():
            for line in path.read_bytes().splitlines(keepends=True):
                if not line.endswith(b"\n"):
                    break
                self.done |= json.loads(line)
                whole += len(line)
            os.truncate(path, whole)

    def record(self, name: str, value: Any) -> None:
        """Enter one thing that is done."""
        with self._lock:
            self.done[name] = value
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({name: value}) + "\n")


@contextmanager
def resumable_folder(destination: Path, plan: dict[str, Any]) -> Iterator[tuple[Path, Journal]]:
    """`DESTINATION.incomplete`, which becomes `destination` when the block ends without an error.

    After an error or a kill it stays, unless nothing was done. The same call with an equal `plan`
    (plain JSON) goes on with its files and journal; another plan starts from nothing. Raises
    ValueError when the destination exists or another process works on it.
    """
    destination = Path(destination)
    _refuse_existing(destination)
    work = destination.with_name(f"{destination.name}.incomplete")
    work.mkdir(exist_ok=True)
    notice = work / NOTICE
    with notice.open("a+", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{work}: another process is writing it; wait for it or choose another folder"
            ) from None
        # What was written before a crash of the machine may not have reached the disk.
        text = _notice(plan | {"boot": _boot_id()})
        lock.seek(0)
        if lock.read() != text:
            for path in work.iterdir():
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                elif path != notice:
                    path.unlink()
            lock.truncate(0)
            lock.write(text)
            lock.flush()
        journal = Journal(work / _JOURNAL)
        try:
            yield work, journal
        except BaseException as error:
            if not journal.done:
                shutil.rmtree(work, ignore_errors=True)
            elif isinstance(error, OSError):
                remedy = f"{work} keeps what is done; make room and run the same command again"
                raise OSError(error.errno, f"{error}; {remedy}") from error
            raise
        _put_in_place(work, destination, without=(_JOURNAL, NOTICE))


def _notice(plan: dict[str, Any]) -> str:
    meaning = "not finished: run the same mis-jax command again to finish it, or remove this folder"
    return json.dumps({"incomplete": meaning, "plan": plan}, indent=2, sort_keys=True) + "\n"


def _boot_id() -> str:
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.exists() else ""


def _refuse_existing(destination: Path) -> None:
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise ValueError(f"{destination}: exists already; remove it or choose another folder")
    destination.parent.mkdir(parents=True, exist_ok=True)


def _put_in_place(work: Path, destination: Path, without: tuple[str, ...] = ()) -> None:
    """Rename a folder whose content is on the disk, so that no crash leaves an empty shell."""
    for path in [*work.rglob("*"), work]:
        _flush(path)
    for name in without:
        (work / name).unlink(missing_ok=True)
    if destination.is_dir():
        destination.rmdir()
    os.replace(work, destination)
    _flush(destination.parent)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def reserve_file(path: Path, size: int) -> None:
    """Make a file `size` bytes long, where it is not; OSError when the disk has no room."""
    with _writing(path) as descriptor:
        os.posix_fallocate(descriptor, 0, size)


def write_file(
    path: Path, content: bytes | memoryview, size: int | None = None, *, offset: int = 0
) -> None:
    """Write bytes at a place of a file, which gets zeros up to `size` behind them."""
    with _writing(path) as descriptor:
        view = memoryview(content)
        while view:
            written = os.pwrite(descriptor, view, offset)
            view, offset = view[written:], offset + written
        if size is not None and size != offset:
            os.truncate(descriptor, size)


@contextmanager
def _writing(path: Path) -> Iterator[int]:
    """A descriptor; errors name the file."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
    try:
        yield descriptor
    except OSError as error:
        raise OSError(error.errno, f"{path}: {error.strerror}") from error
    finally:
        os.close(descriptor)


def replace_file(path: Path, content: str | bytes, *, durable: bool = True) -> None:
    """Write a file so that a reader sees the old content or the new, never a part.

    It is on the disk when this returns. Without `durable` that is left to the system: after a
    loss of power the name may stand there with a part of the content.
    """
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        Path(name).chmod(0o644)  # mkstemp makes private files
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def newest_step(checkpoints: Path) -> int | None:
    """Step of the newest complete checkpoint of a run's `checkpoints` folder."""
    if not checkpoints.is_dir():
        return None
    return max((int(p.name) for p in checkpoints.iterdir() if p.name.isdigit()), default=None)
