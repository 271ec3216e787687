"""Files that survive a kill: JSON replaced in one step, and append-only logs of JSON lines."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from mis_jax.parsing import parse_json
from mis_jax.storage.files import replace_file
from mis_jax.storage.locks import try_flock
from mis_jax.storage.paths import destination_path


def write_text(path: Path, text: str) -> None:
    """Replace ``path``, whose folder is made; half a surrogate pair is written as its escape."""
    destination_path(path.parent).mkdir(parents=True, exist_ok=True)
    replace_file(path, text.encode("utf-8", "backslashreplace"))


def write_json(path: Path, value: Any) -> None:
    """``write_text`` of a JSON document; not-a-number is refused because JSON has none."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path, remedy: str) -> Any:
    """A JSON document, or a ``ValueError`` that names the file and what to do about it."""
    try:
        return parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; {remedy}") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON ({error}); {remedy}") from error


class _Row(dict[str, Any]):
    """A row of a log, which says where it stands when a field is asked for that it lacks."""

    def __init__(self, fields: dict[str, Any], where: str) -> None:
        super().__init__(fields)
        self._where = where

    def __missing__(self, name: str) -> Any:
        raise ValueError(
            f"{self._where}: field {name!r} is missing; restore the file or delete that line and "
            "resume"
        )


def _parse_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The rows of a log and the length in bytes of its sound part."""
    if not path.exists():
        return [], 0
    rows: list[dict[str, Any]] = []
    sound = 0
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        # A process killed while writing leaves a last line without its newline. It was never
        # promised to anyone, so it is dropped even if it happens to parse.
        if not line.endswith(b"\n"):
            break
        try:
            row = parse_json(line, finite=False)
        except ValueError as error:
            raise ValueError(
                f"{path}, line {number}, is not JSON ({error}); only a torn last line is repaired "
                "by itself: restore the file or delete that line and resume"
            ) from error
        if not isinstance(row, dict):
            raise ValueError(
                f"{path}, line {number}, is not a JSON object; delete that line and resume"
            )
        rows.append(_Row(row, f"{path}, line {number}"))
        sound += len(line)
    return rows, sound


def read_log(path: Path) -> list[dict[str, Any]]:
    """The rows of an append-only log, without a torn last line; empty if there is no file."""
    return _parse_lines(path)[0]


class AppendLog:
    """An append-only log held open by one process: ``rows`` at opening, then ``append``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        self._stream: BinaryIO | None = None

    def __enter__(self) -> Self:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        stream = open(self.path, "ab")
        try:
            # Two writers would interleave rows and pay for every answer twice.
            if try_flock(stream) is False:
                raise ValueError(
                    f"{self.path} is being written by another process; "
                    "wait for it, or give this run another output folder"
                )
            self.rows, sound = _parse_lines(self.path)
            stream.truncate(sound)  # or the next row would be glued to the torn one
        except BaseException:
            stream.close()
            raise
        self._stream = stream
        return self

    def append(self, rows: Iterable[dict[str, Any]]) -> None:
        """Write rows and wait until the disk has them: an answer paid for is kept."""
        if self._stream is None:
            raise RuntimeError("AppendLog is used as a context manager")
        text = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
        # A model's text may hold half a surrogate pair; json.loads reads that back as it was.
        self._stream.write(text.encode("utf-8", "surrogatepass"))
        self._stream.flush()
        os.fsync(self._stream.fileno())

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None
