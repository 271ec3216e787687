"""Logs and documents that survive a kill."""

import json
import os
from pathlib import Path

import pytest

from mis_jax.storage.files import replace_text
from mis_jax.storage.json_files import read_document, replace_json
from mis_jax.storage.jsonl import AppendLog, read_log


def test_a_torn_last_line_is_dropped_and_not_glued_to_the_next(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    with AppendLog(path) as log:
        log.append([{"id": 1}, {"id": 2, "text": "ü\u2028\n"}])
    whole = path.read_bytes()
    for cut in range(len(whole) - 1, whole.index(b"\n") + 1, -1):
        path.write_bytes(whole[:cut])
        assert read_log(path) == [{"id": 1}]
        with AppendLog(path) as log:
            assert log.entries == [{"id": 1}]
            log.append([{"id": 3}])
        assert read_log(path) == [{"id": 1}, {"id": 3}]


def test_damage_elsewhere_is_named_and_not_repaired(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"id": 1}\n{"id"\n{"id": 3}\n')
    with pytest.raises(ValueError, match=r"log\.jsonl, line 2"), AppendLog(path):
        pass
    assert path.read_text().count("\n") == 3
    path.write_text("[1]\n")
    with pytest.raises(ValueError, match="not a JSON object"):
        read_log(path)


def test_two_writers_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    with AppendLog(path), pytest.raises(ValueError, match="another process"), AppendLog(path):
        pass
    with AppendLog(path) as log:  # the lock goes with its holder
        log.append([{"id": 1}])


def test_half_a_surrogate_pair_survives(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    with AppendLog(path) as log:
        log.append([{"answer": "broken \ud83d"}])
    assert read_log(path) == [{"answer": "broken \ud83d"}]


def test_a_failed_write_leaves_the_old_document(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "results.json"
    replace_json(path, {"a": 1})

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space"):
        replace_text(path, "half")
    assert json.loads(path.read_text()) == {"a": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["results.json"]


def test_json_has_no_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        replace_json(tmp_path / "results.json", {"value": float("nan")})
    assert not list(tmp_path.iterdir())


def test_an_unreadable_document_names_file_and_remedy(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"absent\.json does not exist; do this"):
        read_document(tmp_path / "absent.json", "do this")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ValueError, match=r"bad\.json cannot be read.*do this"):
        read_document(tmp_path / "bad.json", "do this")


def test_a_row_that_lacks_a_field_is_named(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    path.write_text('{"id": "a", "hash": "1"}\n{"id": "b"}\n')
    first, second = read_log(path)
    assert first["hash"] == "1" and second.get("hash") is None
    with pytest.raises(ValueError, match=r"samples\.jsonl, line 2: field 'hash' is missing; "):
        second["hash"]
