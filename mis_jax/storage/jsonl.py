"""Logs of JSON lines, which only grow: what a kill leaves of their last line is never read.

A line ends with a newline byte and with nothing else (text may hold U+2028). One without it was
torn by a kill and was promised to nobody, so it is dropped even where it happens to parse.
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal, Self

from mis_jax.parsing import parse_json
from mis_jax.storage.files import replace_file
from mis_jax.storage.locks import try_flock

Damaged = Literal["refuse", "skip", "end"]


class Entry(dict[str, Any]):
    """An object of a log, which says where it stands when a field is asked for that it lacks."""

    def __init__(self, fields: dict[str, Any], where: str) -> None:
        super().__init__(fields)
        self._where = where

    def __missing__(self, name: str) -> Any:
        raise ValueError(
            f"{self._where}: field {name!r} is missing; restore the file or delete that line and "
            "resume"
        )


def dump_line(value: Mapping[str, Any]) -> bytes:
    """One line of a log; ValueError for a number that is not finite, for which JSON has no word."""
    try:
        return (json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n").encode()
    except UnicodeEncodeError:  # half a surrogate pair, as a model may write: as an escape
        return (json.dumps(value, allow_nan=False) + "\n").encode()


def split_lines(content: bytes) -> tuple[list[bytes], bytes]:
    """The whole lines of a log, without their ends, and what a kill left of another."""
    *lines, torn = content.split(b"\n")
    return lines, torn


def read_log(path: Path, damaged: Damaged = "refuse") -> list[Entry]:
    """The objects of a log; none where there is no file.

    A line that is not a JSON object raises ValueError (`refuse`), is passed over (`skip`), or ends
    the log (`end`).
    """
    return [entry for entry, _ in _parse(path, damaged)]


def _parse(path: Path, damaged: Damaged) -> list[tuple[Entry, bytes]]:
    """The objects of a log, each with its line."""
    if not path.exists():
        return []
    parsed = []
    for number, line in enumerate(split_lines(path.read_bytes())[0], start=1):
        where = f"{path}, line {number}"
        try:
            value = parse_json(line, finite=False)
            if not isinstance(value, dict):
                raise ValueError("a value of another kind")
        except ValueError as error:
            if damaged == "end":
                break
            if damaged == "skip":
                continue
            raise ValueError(
                f"{where}, is not a JSON object ({error}); only a torn last line is repaired by "
                "itself: restore the file or delete that line and resume"
            ) from error
        parsed.append((Entry(value, where), line + b"\n"))
    return parsed


class AppendLog:
    """A log held open by one process: its `entries` at opening, then `append`.

    Args:
        path: the file; its folder is made.
        durable: `append` returns once the disk has the lines, so that a loss of power cannot take
            them. Without it, a kill of the process still loses none.
        damaged: as in `read_log`; what is not refused is taken off the file.
        keep: an entry for which this is false is taken off the file.
    """

    def __init__(
        self,
        path: Path,
        *,
        durable: bool = True,
        damaged: Damaged = "refuse",
        keep: Callable[[Entry], bool] = lambda entry: True,
    ) -> None:
        self.path = path
        self.entries: list[Entry] = []
        self._durable, self._keep = durable, keep
        self._damaged: Damaged = damaged
        self._stream: BinaryIO | None = None

    def __enter__(self) -> Self:
        return self.begin()

    def begin(self) -> Self:
        """Take off what is damaged or not to be kept; ValueError where another process writes."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._stream = self._locked()
        try:
            content = self.path.read_bytes()
            parsed = [pair for pair in _parse(self.path, self._damaged) if self._keep(pair[0])]
            self.entries = [entry for entry, _ in parsed]
            sound = b"".join(line for _, line in parsed)
            if content.startswith(sound):
                self._stream.truncate(len(sound))  # or the next line would be glued to a torn one
            else:
                replace_file(self.path, sound)
                self._stream.close()
                self._stream = self._locked()
        except BaseException:
            self._stream.close()
            raise
        return self

    def _locked(self) -> BinaryIO:
        stream = self.path.open("ab")
        # Two writers would interleave lines and pay for every answer twice.
        if try_flock(stream) is False:
            stream.close()
            raise ValueError(
                f"{self.path} is being written by another process; wait for it, or give this run "
                "another output folder"
            )
        return stream

    def append(self, values: Iterable[Mapping[str, Any]]) -> None:
        """Write one line each, in the order given; OSError where the disk does not take them."""
        if self._stream is None:
            raise RuntimeError("AppendLog is used as a context manager")
        self._stream.write(b"".join(map(dump_line, values)))
        self._stream.flush()
        if self._durable:
            os.fsync(self._stream.fileno())

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; more than once does no harm."""
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.close()


def append_shared(path: Path, values: Iterable[Mapping[str, Any]]) -> None:
    """Add lines to a log that other processes add to as well; each waits for its turn."""
    lines = b"".join(map(dump_line, values))
    with path.open("a+b") as stream:
        try_flock(stream, wait=True)  # let go with the file
        end = stream.seek(0, os.SEEK_END)
        if end:
            stream.seek(end - 1)
            if stream.read(1) != b"\n":  # torn by a kill: what follows must not be glued to it
                lines = b"\n" + lines
        stream.write(lines)
