"""review.csv: what a human reads and decides, and how the decisions come back."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from label_prompt import find_flags
from label_rows import Sample

from mis_jax.storage.files import replace_text
from mis_jax.storage.hashing import digest

_COLUMNS: tuple[str, ...] = (
    "id", "label", "flags", "ok", "note", "question", "image1", "image2", "reply",
)  # fmt: skip
_ANSWERS = {
    "": "", "yes": "yes", "y": "yes", "1": "yes", "true": "yes",
    "no": "no", "n": "no", "0": "no", "false": "no",
}  # fmt: skip
#: States whose text a human can judge or replace; the others have nothing to read.
SHOWN = ("ok", "harmless", "refused", "truncated")

Entries = dict[str, dict[str, str]]


@dataclass(frozen=True)
class Reviewed:
    """A teacher's reply with what a human made of it."""

    sample: Sample
    state: str  # of the reply
    label: str  # the teacher's text, or the human's in its place
    edited: bool
    ok: str  # yes, no or empty
    note: str
    code: str

    @property
    def is_label(self) -> bool:
        """It goes into the training file."""
        return self.ok != "no" and (self.state == "ok" or self.edited)

    @property
    def flags(self) -> list[str]:
        state = [] if self.state == "ok" or self.edited else [self.state]
        return state + (find_flags(self.label) if self.label else [])


def read_entries(path: Path) -> Entries:
    """The rows of an edited review file by their `reply`; ValueError when it is no such file."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); check --review") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not UTF-8; save it as comma-separated UTF-8 text") from None
    reader = csv.DictReader(io.StringIO(text, newline=""))
    for column in ("label", "ok", "note", "reply"):
        if column not in (reader.fieldnames or ()):
            raise ValueError(
                f"{path}: column {column!r} is missing; edit the review.csv that was written and "
                "save it comma-separated, with all its columns"
            )
    entries: Entries = {}
    for row in reader:
        entry = {column: row.get(column) or "" for column in _COLUMNS}
        answer = entry["ok"].strip().lower()
        if answer not in _ANSWERS:
            raise ValueError(
                f"{path}, id {entry['id']}: column 'ok' is {entry['ok']!r}; write yes or no"
            )
        entries[entry["reply"]] = entry | {"ok": _ANSWERS[answer]}
    return entries


def merge_entries(own: Entries, given: Entries) -> Entries:
    """`given` over `own`; a row that its reader left open takes no decision away."""
    decided = {
        code: entry
        for code, entry in given.items()
        if code not in own or entry["ok"] or entry["note"].strip()
    }
    return own | decided


def review(sample: Sample, row: dict[str, Any], entries: Entries) -> Reviewed:
    """A row of the log with the human's entry for this very reply, if there is one.

    Raises:
        ValueError: a changed text without a decision, or a yes to what is no label.
    """
    said = row["label"]
    # Tied to the text: a decision must not pass to what is answered at the next attempt.
    code = f"r{digest([sample.id, row['key'], said])[:16]}"
    entry = entries.get(code)
    if entry is None:
        return Reviewed(sample, row["state"], said, False, "", "", code)
    label = entry["label"].replace("\r\n", "\n").replace("\r", "\n").strip()
    edited = label != said
    if edited and not entry["ok"]:
        raise ValueError(
            f"review, id {sample.id}: the label was changed but 'ok' is empty; write yes to take "
            "the changed one, or restore it"
        )
    if entry["ok"] == "yes" and (not label or (row["state"] != "ok" and not edited)):
        raise ValueError(
            f"review, id {sample.id}: 'ok' is yes but there is no label ({row['state']}); "
            "write one into the column 'label', or write no"
        )
    return Reviewed(sample, row["state"], label, edited, entry["ok"], entry["note"], code)


def write_review(path: Path, reviewed: Sequence[Reviewed], entries: Entries) -> int:
    """Write the file with all decisions so far; gives how many fit no reply any more.

    Those are kept at the end, flagged `outdated`: they cost somebody's time.
    """
    known = {item.code for item in reviewed}
    outdated = [
        entry | {"flags": "outdated"}
        for code, entry in entries.items()
        if code not in known and (entry["ok"] or entry["note"].strip())
    ]
    stream = io.StringIO(newline="")
    writer = csv.DictWriter(stream, _COLUMNS, lineterminator="\n")
    writer.writeheader()
    for item in reviewed:
        first, second = item.sample.images
        values = (
            item.sample.id, item.label, " ".join(item.flags), item.ok, item.note,
            item.sample.question, first, second, item.code,
        )  # fmt: skip
        writer.writerow(dict(zip(_COLUMNS, values, strict=True)))
    writer.writerows(outdated)
    # The mark in front makes spreadsheets read it as UTF-8.
    replace_text(path, f"\ufeff{stream.getvalue()}")
    return len(outdated)
