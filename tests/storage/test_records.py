"""Byte strings in a temporary file that several processes read."""

import os
import resource

import pytest

from mis_jax.storage.records import Records


@pytest.mark.parametrize("items", [[], [b""], [b"", b""], [b"", b"ab", b""]])
def test_records_may_be_empty(items):
    records = Records(items)
    assert [records[number] for number in range(len(records))] == items


@pytest.mark.filterwarnings("ignore:.*fork")
def test_a_forked_process_leaves_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    records = Records([b"ab"])
    child = os.fork()
    if not child:
        del records
        os._exit(0)
    os.waitpid(child, 0)
    assert records[0] == b"ab"
    del records
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_told_with_the_file_and_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"mis-jax-records-\w+: .*; make room, or set TMPDIR"):
            Records([b"a" * 20_000])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
