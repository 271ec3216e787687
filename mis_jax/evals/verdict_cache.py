"""Verdicts that were paid for, kept over all runs that are judged with one folder.

A verdict hangs on the judge's id and on what the judge is shown: the question, its images and the
answer (one hash), and the reference. Only what reads well is kept, since another try may do better
where one failed. Labels are kept and nothing else: no question, no answer, and not the judge's own
words, which may quote both.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mis_jax.storage.files import make_folder
from mis_jax.storage.jsonl import append_shared, read_log

FILE = "verdicts.jsonl"
KEY = ("answer_hash", "judge", "reference")
_FIELDS = (*KEY, "labels", "served_model")


class VerdictCache:
    """A folder of verdicts that several judges may read and add to at once.

    What is in it is read when it is opened; a damaged line is passed over, and its verdict asked
    for again. ValueError for a folder that cannot be used.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE
        try:
            make_folder(folder)
            entries = read_log(self._path, damaged="skip")
        except OSError as error:
            raise ValueError(
                f"{folder} cannot hold a verdict cache ({error.strerror}); "
                "name a folder that can be written to with --verdict-cache"
            ) from error
        self._entries = {_key(entry): entry for entry in entries if _is_sound(entry)}

    def find(self, key: tuple[str, ...]) -> dict[str, Any] | None:
        """What a verdict has besides its key (see `KEY`); None for an unknown one."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        return {"state": "ok", "cached": True} | {k: entry[k] for k in _FIELDS if k in entry}

    def add(self, verdicts: Iterable[Mapping[str, Any]]) -> None:
        """Add verdicts; those that are known, and those without labels, are left out."""
        new = {
            _key(verdict): {name: verdict[name] for name in _FIELDS if name in verdict}
            for verdict in verdicts
            if verdict["state"] == "ok" and _key(verdict) not in self._entries
        }
        self._entries |= new
        if new:  # not durable: the run's own log is, and gives them again
            append_shared(self._path, new.values())


def _key(verdict: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(verdict[name] for name in KEY)


def _is_sound(entry: Mapping[str, Any]) -> bool:
    texts = all(isinstance(entry.get(name), str) for name in KEY)
    return texts and isinstance(entry.get("labels"), dict)
