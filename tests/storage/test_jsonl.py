"""Logs of JSON lines: what a kill, a damaged disk and a second writer leave of them."""

import json

import pytest

from mis_jax.storage.jsonl import AppendLog, append_shared, dump_line, read_log


def test_lines_come_back_whatever_text_they_hold(tmp_path):
    path = tmp_path / "log.jsonl"
    values = [{"text": text} for text in ("a\nb", "\u2028", "\ud83d", "é", "")]
    with AppendLog(path) as log:
        log.append(values)
    assert read_log(path) == values
    assert [json.loads(line) for line in path.read_text().split("\n")[:-1]] == values


def test_a_torn_last_line_is_dropped_even_where_it_parses(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}')
    assert read_log(path) == [{"step": 1}]
    with AppendLog(path) as log:
        assert log.entries == [{"step": 1}]
        log.append([{"step": 3}])
    assert path.read_bytes() == b'{"step": 1}\n{"step": 3}\n'


@pytest.mark.parametrize("damage", [b"{\n", b"\xff\n", b"[1]\n", b"\n"])
def test_a_damaged_line_is_refused_skipped_or_the_end(damage, tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"step": 1}\n' + damage + b'{"step": 2}\n')
    with pytest.raises(ValueError, match=r"log\.jsonl, line 2, .* delete that line"):
        read_log(path)
    with pytest.raises(ValueError, match="line 2"), AppendLog(path):
        pass
    assert read_log(path, "end") == [{"step": 1}]
    assert read_log(path, "skip") == [{"step": 1}, {"step": 2}]
    with AppendLog(path, damaged="skip", keep=lambda entry: entry["step"] > 1) as log:
        log.append([{"step": 3}])
    assert path.read_bytes() == b'{"step": 2}\n{"step": 3}\n'


def test_a_second_writer_is_refused_and_a_shared_log_is_not(tmp_path):
    path = tmp_path / "log.jsonl"
    with AppendLog(path) as log:
        with pytest.raises(ValueError, match="written by another process"), AppendLog(path):
            pass
        log.append([{"step": 1}])
    path.write_bytes(path.read_bytes() + b'{"torn')
    append_shared(path, [{"step": 2}])
    assert read_log(path, "skip") == [{"step": 1}, {"step": 2}]


def test_no_number_is_written_that_json_lacks():
    with pytest.raises(ValueError, match="not JSON compliant"):
        dump_line({"loss": float("nan")})
