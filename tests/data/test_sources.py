"""Annotation files to rows: the three kinds, `count`, sizes, and every kind of bad file."""

import json
import logging

import pytest
from tiny_world import sample

from mis_jax.config import Source
from mis_jax.data.sources import (
    PUBLISHED_SIZES,
    annotation_file,
    read_source,
    read_sources,
    size_note,
)


def write(path, rows, *, lines: bool = False):
    text = "".join(json.dumps(r) + "\n" for r in rows) if lines else json.dumps(rows)
    path.write_text(text, encoding="utf-8")
    return path


def some_rows(count: int) -> list[dict]:
    return [sample(index, [f"{index}/object{k}.png" for k in (1, 2)]) for index in range(count)]


def test_the_three_kinds_read_the_same_rows(tmp_path):
    rows = some_rows(3)
    write(tmp_path / "mis_train.json", rows)
    write(tmp_path / "rows.jsonl", rows, lines=True)
    sources = (
        Source("mis", root=tmp_path),
        Source("sharegpt", path=tmp_path / "mis_train.json"),
        Source("jsonl", root=tmp_path, path=tmp_path / "rows.jsonl"),
    )
    for source in sources:
        found = read_source(source)
        assert [row.id for row in found] == ["s0", "s1", "s2"]
        assert [row.fields for row in found] == rows
        assert found[1].images == (tmp_path / "1/object1.png", tmp_path / "1/object2.png")
        assert found[1].where == f"{annotation_file(source)}, row 1"
    assert len(read_sources(sources, seed=0)) == 9


def test_splits_of_mis(tmp_path):
    write(tmp_path / "mis_extra.json", some_rows(2))
    assert annotation_file(Source("mis", root=tmp_path, split="extra")).name == "mis_extra.json"
    assert len(read_source(Source("mis", root=tmp_path, split="extra"))) == 2


def test_an_object_of_rows_counts_as_a_list(tmp_path):
    path = write(tmp_path / "rows.json", {"a": some_rows(2)[0], "b": some_rows(2)[1]})
    assert [row.id for row in read_source(Source("sharegpt", path=path))] == ["s0", "s1"]


def test_image_may_be_one_path_or_absent(tmp_path):
    rows = [sample(0, ["a.png"]) | {"image": "a.png"}, sample(1, [])]
    del rows[1]["id"]
    found = read_source(Source("jsonl", path=write(tmp_path / "r.jsonl", rows, lines=True)))
    assert [row.images for row in found] == [(tmp_path / "a.png",), ()]
    assert [row.id for row in found] == ["s0", "1"]  # its place, where the file gives no id


def test_blank_lines_a_byte_order_mark_and_unusual_line_ends(tmp_path):
    """JSON allows U+2028 inside a string; it is not the end of a line."""
    row = sample(0, [])
    row["conversations"][1]["value"] = "one\u2028two\x85three"
    text = "\ufeff" + json.dumps(row, ensure_ascii=False) + "\r\n\n" + json.dumps(sample(1, []))
    path = tmp_path / "rows.jsonl"
    path.write_bytes(text.encode())
    found = read_source(Source("jsonl", path=path))
    assert [r.id for r in found] == ["s0", "s1"]
    assert found[0].fields["conversations"][1]["value"] == "one\u2028two\x85three"


def test_count_picks_by_seed_and_place(tmp_path):
    path = write(tmp_path / "rows.json", some_rows(50))
    source = Source("sharegpt", path=path, count=10)

    def ids(seed: int, *sources: Source) -> list[str]:
        return [row.id for row in read_sources(sources, seed)]

    chosen = ids(0, source)
    assert len(set(chosen)) == 10
    assert chosen == sorted(chosen, key=lambda name: int(name[1:]))  # in the order of the file
    assert ids(0, source) == chosen
    assert ids(1, source) != chosen
    both = ids(0, source, source)
    assert both[:10] == chosen
    assert both[10:] != chosen  # twice the same file is not twice the same choice
    assert len(ids(0, Source("sharegpt", path=path, count=50))) == 50


def test_count_beyond_the_file(tmp_path):
    path = write(tmp_path / "rows.json", some_rows(3))
    plain, greedy = Source("sharegpt", path=path), Source("sharegpt", path=path, count=4)
    with pytest.raises(ValueError, match=r"rows.json: count is 4 but .* 3 .*sources\[1\].count"):
        read_sources([plain, greedy], 0)


def test_size_note(tmp_path, caplog):
    source = Source("mis", root=tmp_path)
    assert size_note(source, PUBLISHED_SIZES["train"]) is None
    note = size_note(source, 3)
    assert note == f"{tmp_path / 'mis_train.json'}: 3 samples, the published set has 3927"
    assert size_note(Source("mis", root=tmp_path, split="own"), 3) is None
    assert size_note(Source("sharegpt", path=tmp_path / "mis_train.json"), 3) is None
    write(tmp_path / "mis_train.json", some_rows(3))
    with caplog.at_level(logging.WARNING):
        read_sources([Source("mis", root=tmp_path, count=2)], 0)
    assert [record.message for record in caplog.records] == [note]  # of the file, not the choice


ROW = sample(0, ["a.png"])
BAD_LISTS = {
    "not JSON": ("[1, ", r"rows.json: not valid JSON .*download"),
    "another type": ("3", r"rows.json: holds int; expected a list"),
    "no sample": ("[]", r"rows.json: holds no sample"),
    "no object": (json.dumps([ROW, "text"]), r"rows.json, row 1: expected an object .*'text'"),
    "no conversations": (
        json.dumps([{"id": "a"}]),
        r"rows.json, row 0: field 'conversations' is missing",
    ),
    "image of a wrong type": (
        json.dumps([ROW, ROW | {"image": [1]}]),
        r"rows.json, row 1: field 'image' is \[1\]; give a path",
    ),
    "empty list of images": (
        json.dumps([ROW | {"image": []}]),
        r"rows.json, row 0: field 'image' is empty",
    ),
}


@pytest.mark.parametrize("case", BAD_LISTS)
def test_bad_lists(tmp_path, case):
    content, message = BAD_LISTS[case]
    path = tmp_path / "rows.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_source(Source("sharegpt", path=path))
    assert "\n" not in str(caught.value)


def test_a_row_of_mis_without_images(tmp_path):
    write(tmp_path / "mis_train.json", [ROW, sample(1, [])])
    with pytest.raises(ValueError, match=r"mis_train.json, row 1: field 'image' is missing"):
        read_source(Source("mis", root=tmp_path))


def test_a_bad_line_of_jsonl_is_told_by_its_number(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{json.dumps(ROW)}\n\n{{broken\n")
    with pytest.raises(ValueError, match=r"rows.jsonl, line 3: not valid JSON") as caught:
        read_source(Source("jsonl", path=path))
    assert "\n" not in str(caught.value)


def test_missing_and_unreadable_files(tmp_path):
    with pytest.raises(ValueError, match=r"mis_train.json: no such file; check the source's root"):
        read_source(Source("mis", root=tmp_path))
    path = tmp_path / "rows.json"
    path.write_bytes(b'["\xff"]')
    with pytest.raises(ValueError, match=r"rows.json: not UTF-8 text"):
        read_source(Source("sharegpt", path=path))
