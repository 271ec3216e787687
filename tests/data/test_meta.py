"""InternVL's meta json: sets of jsonl with their repetition, tiles and augmentation."""

import json
import logging

import pytest
from tiny_world import sample

from mis_jax.config import Source
from mis_jax.data.mixture import read_mixture, read_source, read_sources


def write_lines(path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def meta_source(tmp_path, sets: dict[str, dict], **fields) -> Source:
    path = tmp_path / "meta.json"
    path.write_text(json.dumps(sets))
    return Source("meta", path=path, **fields)


@pytest.fixture
def two_sets(tmp_path):
    for name, size in (("a", 4), ("b", 10)):
        rows = [sample(i, ["x.png"]) | {"id": f"{name}{i}"} for i in range(size)]
        write_lines(tmp_path / f"{name}.jsonl", rows)
    return tmp_path


def test_the_sets_of_a_meta_file(two_sets, monkeypatch):
    """`repeat_time`, `max_dynamic_patch` and `data_augment`; two ways to write a path."""
    (two_sets / "pictures").mkdir()
    sets = {
        "first": {
            "root": str(two_sets / "pictures"),
            "annotation": str(two_sets / "a.jsonl"),
            "data_augment": True,
            "repeat_time": 2,
            "length": 4,
            "max_dynamic_patch": 3,
        },
        "second": {
            "root": "pictures",
            "annotation": "b.jsonl",
            "data_augment": False,
            "repeat_time": 0.35,
            "length": 10,
        },
        "third": {"annotation": "a.jsonl"},
    }
    source = meta_source(two_sets, sets)
    mixture = read_mixture([source], 0)
    rows = mixture.annotations
    a = [f"a{i}" for i in range(4)]
    assert [row.id for row in rows] == a + a + ["b0", "b1", "b2"] + a  # int(0.35 * 10) from b
    assert {row.max_tiles for row in rows[:8]} == {3}
    assert {row.max_tiles for row in rows[8:]} == {None}
    assert [row.augment for row in rows] == [True] * 8 + [False] * 7
    assert rows[0].images == rows[8].images == (two_sets / "pictures" / "x.png",)
    assert rows[-1].images == (two_sets / "x.png",)
    assert rows[9].where == f"{two_sets / 'b.jsonl'}, line 2"
    assert mixture.notes == []
    (told,) = mixture.sources
    assert (told["kind"], told["available"], told["used"]) == ("meta", 15, 15)
    assert told["sets"][1] == {
        "name": "second",
        "file": str(two_sets / "b.jsonl"),
        "available": 10,
        "used": 3,
    }
    assert "ids" not in told

    elsewhere = two_sets / "elsewhere"  # what exists there goes first, as upstream
    (elsewhere / "pictures").mkdir(parents=True)
    write_lines(elsewhere / "a.jsonl", [sample(0, ["0/object1.png"])])
    monkeypatch.chdir(elsewhere)
    (row,) = read_source(
        meta_source(two_sets, {"x": {"root": "pictures", "annotation": "a.jsonl"}})
    )
    assert row.id == "s0" and str(row.images[0]) == "pictures/0/object1.png"
    assert read_source(meta_source(two_sets, {"x": {"annotation": "b.jsonl"}}))[0].id == "b0"


def test_a_source_fills_in_what_a_set_leaves_open(two_sets):
    sets = {
        "open": {"annotation": "a.jsonl"},
        "own": {"annotation": "b.jsonl", "data_augment": False, "max_dynamic_patch": 9},
    }
    rows = read_source(meta_source(two_sets, sets, max_tiles=2, augment=True))
    assert [(row.max_tiles, row.augment) for row in rows] == [(2, True)] * 4 + [(9, False)] * 10
    some = read_sources([meta_source(two_sets, sets, count=5)], 0)
    assert len({row.id for row in some}) == 5


def test_a_wrong_length_is_noted(two_sets, caplog):
    sets = {"x": {"annotation": "a.jsonl", "length": 5, "repeat_time": 3}}
    with caplog.at_level(logging.WARNING):
        mixture = read_mixture([meta_source(two_sets, sets)], 0)
    assert mixture.notes == [
        f"{two_sets / 'meta.json'}, set 'x': length is 5, {two_sets / 'a.jsonl'} has 4 samples"
    ]
    assert [record.message for record in caplog.records] == mixture.notes
    assert len(mixture.annotations) == 12


BAD_SETS = {
    "unknown fields": (
        {"anotation": "a.jsonl", "seed": 1},
        r"set 'x': unknown field 'anotation', 'seed'; known are root, annotation",
    ),
    "no annotation": ({"root": "a"}, "set 'x': field 'annotation' is missing"),
    "another type": ({"annotation": 3}, "set 'x': field 'annotation' is 3; give a path"),
    "a list": (
        {"annotation": "a.json"},
        "set 'x': field 'annotation' is 'a.json'; name a .jsonl file, or .* kind sharegpt",
    ),
    "no file": ({"annotation": "c.jsonl"}, "c.jsonl: no such file"),
    "half a copy": (
        {"annotation": "a.jsonl", "repeat_time": 1.5},
        "set 'x': field 'repeat_time' is 1.5; give a whole number",
    ),
    "no copy": ({"annotation": "a.jsonl", "repeat_time": 0}, "field 'repeat_time' is 0"),
    "true copies": ({"annotation": "a.jsonl", "repeat_time": True}, "'repeat_time' is True"),
    "endless copies": (
        {"annotation": "a.jsonl", "repeat_time": float("inf")},
        "Infinity is no JSON",
    ),
    "more copies than are held": (
        {"annotation": "a.jsonl", "repeat_time": 1e15},
        "is 1000000000000000.0; give",
    ),
    "more rows than there are": ({"annotation": "a.jsonl", "length": 10**30}, "'length' is 1000"),
    "next to nothing": (
        {"annotation": "a.jsonl", "repeat_time": 0.2},
        "set 'x': repeat_time 0.2 leaves none of its 4 samples",
    ),
    "no tiles": ({"annotation": "a.jsonl", "max_dynamic_patch": 0}, "'max_dynamic_patch' is 0"),
    "a length in words": ({"annotation": "a.jsonl", "length": "4"}, "field 'length' is '4'"),
    "augment in words": ({"annotation": "a.jsonl", "data_augment": "no"}, "'data_augment' is 'no'"),
    "a root of another type": ({"annotation": "a.jsonl", "root": []}, r"field 'root' is \[\]"),
    "no object": ("a.jsonl", "set 'x': is 'a.jsonl'; give an object"),
}


@pytest.mark.parametrize("case", BAD_SETS)
def test_bad_sets(two_sets, case):
    fields, message = BAD_SETS[case]
    with pytest.raises(ValueError, match=message) as caught:
        read_source(meta_source(two_sets, {"x": fields}))
    assert str(two_sets) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1", "meta.json: not valid JSON"),
        ("[]", r"meta.json: holds \[\]; expected an object of sets"),
        ("{}", "meta.json: holds {}; expected"),
        (None, "meta.json: no such file"),
    ],
)
def test_bad_meta_files(tmp_path, content, message):
    path = tmp_path / "meta.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_source(Source("meta", path=path))
    (tmp_path / "meta").mkdir()
    with pytest.raises(ValueError, match="meta: cannot be read"):
        read_source(Source("meta", path=tmp_path / "meta"))
