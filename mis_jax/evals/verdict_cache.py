"""Verdicts that were paid for, kept over all runs that are judged with one folder.

A verdict hangs on the judge's id and on what the judge is shown: the question, its pictures and
the answer (one hash), and the reference. Only what reads well is kept, since another try may do
better where one failed. Labels are kept and nothing else: no question, no answer, and not the
judge's own words, which may quote both.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mis_jax.parsing import parse_json
from mis_jax.storage.locks import try_flock

FILE = "verdicts.jsonl"
KEY = ("answer_hash", "judge", "reference")
_KEPT = (*KEY, "labels", "served_model")


class VerdictCache:
    """A folder of verdicts that several judges may read and add to at once.

    What is in it is read when it is opened. ValueError for a folder that cannot be used.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._known = {_key(row): row for row in _sound_rows(self._path)}
        except OSError as error:
            raise ValueError(
                f"{folder} cannot hold a verdict cache ({error.strerror}); "
                "name a folder that can be written to with --verdict-cache"
            ) from error

    def find(self, key: tuple[str, ...]) -> dict[str, Any] | None:
        """What a verdict row has besides its key (see ``KEY``); None for an unknown one."""
        row = self._known.get(key)
        if row is None:
            return None
        return {"state": "ok", "cached": True} | {k: row[k] for k in _KEPT if k in row}

    def keep(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add verdict rows; those that are known, and those without labels, are left out."""
        new = [
            {name: row[name] for name in _KEPT if name in row}
            for row in rows
            if row["state"] == "ok" and _key(row) not in self._known
        ]
        if not new:
            return
        self._known |= {_key(row): row for row in new}
        text = "".join(json.dumps(row) + "\n" for row in new).encode()
        with open(self._path, "a+b") as stream:
            try_flock(stream, wait=True)  # let go with the file
            end = stream.seek(0, os.SEEK_END)
            if end:
                stream.seek(end - 1)
                if stream.read(1) != b"\n":  # torn by a kill: what follows must not be glued to it
                    text = b"\n" + text
            stream.write(text)  # no fsync: the run's own log has it, and gives it again


def _key(row: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(row[name] for name in KEY)


def _sound_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows that are whole. A damaged one is passed over: its verdict is asked for again."""
    if not path.exists():
        return
    with open(path, "rb") as stream:
        for line in stream:
            try:
                row = parse_json(line)
            except ValueError:
                continue
            if (
                isinstance(row, dict)
                and all(isinstance(row.get(name), str) for name in KEY)
                and isinstance(row.get("labels"), dict)
            ):
                yield row
