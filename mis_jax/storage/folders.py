"""Folders and files that are whole or plainly not: never half-written under their final name."""

import json
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mis_jax.parsing import parse_json
from mis_jax.storage.files import os_error_text
from mis_jax.storage.jsonl import AppendLog, append_shared
from mis_jax.storage.locks import LOCK, boot_id, locked
from mis_jax.storage.paths import destination_path, is_mount

NOTICE = "INCOMPLETE.json"
JOURNAL = "journal.jsonl"


def _new_folder(path: Path) -> Path:
    """`destination_path` of a folder that is to be renamed into place, its parents made."""
    destination = destination_path(path)
    _refuse_existing(destination)
    if destination.is_dir() and is_mount(destination):
        raise ValueError(
            f"destination {path}: is a mount point, and a finished folder cannot be renamed over "
            f"one; give a folder inside it, such as {path / 'model'}"
        )
    destination.parent.mkdir(parents=True, exist_ok=True)
    return destination


def remove_abandoned(destination: Path) -> None:
    """Remove what a killed `finished_folder(destination)` left; nobody may be in one now."""
    destination = destination_path(destination)
    ours = re.compile(rf"\.{re.escape(destination.name)}\.[a-z0-9_]{{8}}")  # as mkdtemp names it
    for path in destination.parent.glob(f".{destination.name}.*"):
        if ours.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)


def remove_new(folder: Path, names: Iterable[str], before: set[str]) -> None:
    """Remove the files and folders of these names that were not in a folder `before`."""
    for name in names:
        path = folder / name
        if name in before:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


@contextmanager
def finished_folder(destination: Path) -> Iterator[Path]:
    """A temporary sibling folder that becomes `destination` when the block ends without an error.

    Nothing half-written is ever seen under the final name. An existing destination is refused.
    """
    destination = _new_folder(destination)
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
        if path.exists():
            with AppendLog(path, durable=False, damaged="end") as log:
                for entry in log.entries:  # what follows damage is done again
                    self.done |= entry

    def record(self, name: str, value: Any) -> None:
        """Enter one thing that is done."""
        with self._lock:
            self.done[name] = value
            append_shared(self._path, [{name: value}])

    def write_again(self) -> None:
        """Enter everything once more, where the file was taken away."""
        for name, value in self.done.items():
            self.record(name, value)


@contextmanager
def resumable_folder(destination: Path, plan: dict[str, Any]) -> Iterator[tuple[Path, Journal]]:
    """`DESTINATION.incomplete`, which becomes `destination` when the block ends without an error.

    After an error or a kill it stays, unless nothing was done. The same call with an equal `plan`
    (plain JSON) goes on with its files and journal; another plan starts from nothing. Raises
    ValueError when the destination exists or another process works on it.
    """
    destination = _new_folder(destination)
    work = destination.with_name(f"{destination.name}.incomplete")
    with locked(destination.with_name(f".{destination.name}{LOCK}"), work):
        _refuse_existing(destination)  # by a process that has just finished it
        _begin(work, _set_aside(destination), plan)
        journal = Journal(work / JOURNAL)
        try:
            yield work, journal
        except BaseException as error:
            if not journal.done:
                shutil.rmtree(work, ignore_errors=True)
            elif isinstance(error, OSError):
                remedy = f"{work} keeps what is done; make room and run the same command again"
                raise OSError(error.errno, f"{os_error_text(error)}; {remedy}") from error
            raise
        _flush_all(work)
        # The notice goes last and not far: a kill before the renaming must leave a folder that is
        # known to be ours.
        (work / JOURNAL).unlink(missing_ok=True)
        os.replace(work / NOTICE, _set_aside(destination))
        try:
            _rename(work, destination)
        except OSError as error:  # what stands there came while we worked
            os.replace(_set_aside(destination), work / NOTICE)
            journal.write_again()
            raise OSError(
                error.errno,
                f"{destination}: cannot be put in place ({error.strerror}); {work} keeps what is "
                "done: remove what stands there and run the same command again",
            ) from error
        _set_aside(destination).unlink()


def _set_aside(destination: Path) -> Path:
    return destination.with_name(f".{destination.name}.{NOTICE}")


def _begin(work: Path, aside: Path, plan: dict[str, Any]) -> None:
    """Make an empty folder with a notice, or keep what one of the same plan holds.

    A folder that merely has this name is refused.
    """
    notice = work / NOTICE
    if aside.exists():  # a kill between the last byte and the renaming
        if work.is_dir() and not notice.exists():
            os.replace(aside, notice)
        else:
            aside.unlink()
    if work.exists() or work.is_symlink():
        _refuse_of_others(work)
    work.mkdir(exist_ok=True)
    # What was written before a crash of the machine may not have reached the disk.
    text = _notice(plan | {"boot": boot_id()})
    if notice.exists() and notice.read_text(encoding="utf-8") == text:
        return
    for path in work.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path != notice:
            path.unlink()
    notice.write_text(text, encoding="utf-8")


def _refuse_of_others(work: Path) -> None:
    """ValueError for what no conversion of ours has begun: it is not to be written or removed."""
    if work.is_dir() and not work.is_symlink():
        names = {path.name for path in work.iterdir()}
        if not names:
            return
        try:
            text = (work / NOTICE).read_text(encoding="utf-8")
            if names == {NOTICE} and not text:  # a kill before its first word
                return
            said = parse_json(text)
            if isinstance(said, dict) and said.keys() == {"incomplete", "plan"}:
                return
        except (OSError, ValueError):
            pass
    raise ValueError(
        f"{work}: exists and is not an unfinished folder of mis-jax (no {NOTICE} of one): it "
        "is left alone; rename it or choose another destination"
    )


def _notice(plan: dict[str, Any]) -> str:
    meaning = "not finished: run the same mis-jax command again to finish it, or remove this folder"
    return json.dumps({"incomplete": meaning, "plan": plan}, indent=2, sort_keys=True) + "\n"


def _refuse_existing(destination: Path) -> None:
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise ValueError(f"{destination}: exists already; remove it or choose another folder")


def _put_in_place(work: Path, destination: Path) -> None:
    """Rename a folder whose content is on the disk, so that no crash leaves an empty shell."""
    _flush_all(work)
    _rename(work, destination)


def _flush_all(work: Path) -> None:
    for path in [*work.rglob("*"), work]:
        _flush(path)


def _rename(work: Path, destination: Path) -> None:
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
