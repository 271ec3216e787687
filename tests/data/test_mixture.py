"""Annotation files to rows: the kinds, mixtures, sizes, and every kind of bad file and entry."""

import collections
import json
import logging
import pickle
import re
import sys
import tracemalloc
import types
from dataclasses import replace

import numpy as np
import pytest
from tiny_world import sample

import mis_jax.data.mis
from mis_jax.config import Source
from mis_jax.data.mis.annotations import PUBLISHED_SIZES
from mis_jax.data.mis.dataset import RecordImage
from mis_jax.data.mixture import (
    Annotation,
    annotation_file,
    read_mixture,
    read_source,
    read_sources,
    size_note,
)


def write(path, rows, *, lines: bool = False):
    text = "".join(json.dumps(r) + "\n" for r in rows) if lines else json.dumps(rows)
    path.write_text(text, encoding="utf-8")
    return path


def only(source: Source) -> Annotation:
    """The row of a source with a single one."""
    (row,) = read_source(source)
    return row


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
        place = "line 2" if source.kind == "jsonl" else "row 1"
        assert found[1].where == f"{annotation_file(source)}, {place}"
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


def test_an_id_is_always_text_that_can_be_written(tmp_path):
    row = sample(0, []) | {"id": "a\ud83d日本"}
    assert only(Source("sharegpt", path=write(tmp_path / "r.json", [row]))).id == "a\\ud83d日本"


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
    place = np.random.default_rng((0, 0)).permutation(50)[:10]  # runs of earlier versions go on
    assert chosen == [f"s{i}" for i in sorted(place)]
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


# --- mixtures ---


def test_a_mixture_tells_what_was_chosen(tmp_path):
    path = write(tmp_path / "rows.json", some_rows(50))
    write(tmp_path / "mis_train.json", some_rows(3))
    sources = [Source("mis", root=tmp_path), Source("sharegpt", path=path, count=10)]
    mixture = read_mixture(sources, 0)
    assert mixture.annotations == read_sources(sources, 0)
    assert mixture.sources == [
        {
            "file": str(tmp_path / "mis_train.json"),
            "kind": "mis",
            "available": 3,
            "used": 3,
        },
        {
            "file": str(path),
            "kind": "sharegpt",
            "available": 50,
            "used": 10,
            "ids": [row.id for row in mixture.annotations[3:]],
        },
    ]
    assert json.loads(json.dumps(mixture.sources)) == mixture.sources
    assert mixture.notes == [size_note(sources[0], 3)]


def weighted(tmp_path, sizes: dict[str, int], *weights: float) -> list[Source]:
    sources = []
    for (name, size), weight in zip(sizes.items(), weights, strict=True):
        rows = [sample(i, []) | {"id": f"{name}{i}"} for i in range(size)]
        path = write(tmp_path / f"{name}.json", rows)
        sources.append(Source("sharegpt", path=path, weight=weight))
    return sources


def test_weights_share_an_epoch(tmp_path):
    """40 rows by 3 : 1 are 30 of a set of 8, three copies and 6 more, and 10 of one of 32."""
    sources = weighted(tmp_path, {"a": 8, "b": 32}, 0.75, 0.25)
    mixture = read_mixture(sources, 0)
    assert len(mixture.annotations) == 40
    drawn = collections.Counter(row.id for row in mixture.annotations)
    assert sum(drawn[f"a{i}"] for i in range(8)) == 30
    assert sorted(drawn[f"a{i}"] for i in range(8)) == [3, 3, 4, 4, 4, 4, 4, 4]
    assert sum(drawn[f"b{i}"] for i in range(32)) == 10 and max(map(drawn.get, drawn)) == 4
    first, second = mixture.sources
    assert (first["available"], first["used"], first["copies"]) == (8, 30, 3)
    assert (second["available"], second["used"], second["copies"]) == (32, 10, 0)
    assert first["ids"] == [f"a{i}" for i in range(8) if drawn[f"a{i}"] == 4]
    assert second["ids"] == [row.id for row in mixture.annotations[30:]]
    assert read_sources(sources, 0) == mixture.annotations
    assert read_sources(sources, 1) != mixture.annotations
    doubled = [replace(source, weight=source.weight * 2) for source in sources]
    assert read_sources(doubled, 0) == mixture.annotations  # only their proportion matters


@pytest.mark.parametrize(
    ("sizes", "weights", "shares"),
    [
        ((5, 5), (1, 1), (5, 5)),
        ((1, 9), (0.1, 0.9), (1, 9)),  # exact: a tenth is a tenth
        ((3, 4, 3), (1, 1, 1), (4, 3, 3)),  # of equal remainders the first
        ((50, 40, 10), (1, 3, 1 / 3), (23, 69, 8)),  # 23.08, 69.23, 7.69
        ((7,), (0.2,), (7,)),
    ],
)
def test_shares_are_rounded_so_that_the_sum_is_kept(tmp_path, sizes, weights, shares):
    names = dict(zip("abc", sizes, strict=False))
    mixture = read_mixture(weighted(tmp_path, names, *weights), 0)
    assert tuple(told["used"] for told in mixture.sources) == shares
    assert len(mixture.annotations) == sum(sizes)
    assert ["ids" in told for told in mixture.sources] == [
        share % size > 0 for share, size in zip(shares, sizes, strict=True)
    ]


def test_weights_that_do_not_go_together(tmp_path):
    sources = weighted(tmp_path, {"a": 3, "b": 3}, 1, 1)
    with pytest.raises(ValueError, match=r"^data.sources\[1\] has no weight, but another source"):
        read_mixture([sources[0], replace(sources[1], weight=None)], 0)
    with pytest.raises(ValueError, match=r"^data.sources\[1\].weight 0.001 is less than one of"):
        read_mixture([sources[0], replace(sources[1], weight=0.001)], 0)


def test_tiles_and_augmentation_are_those_of_the_source(tmp_path):
    path = write(tmp_path / "rows.json", some_rows(2))
    for row in read_source(Source("sharegpt", path=path, max_tiles=3, augment=True)):
        assert (row.max_tiles, row.augment) == (3, True)
    for row in read_source(Source("sharegpt", path=path)):
        assert (row.max_tiles, row.augment) == (None, False)


# --- a built set ---


@pytest.fixture
def built(monkeypatch, tmp_path):
    """A stand-in for `mis_jax.data.mis.dataset`, which holds these samples."""
    rows = some_rows(3)
    del rows[2]["id"]
    samples = [
        (
            row,
            tuple(
                RecordImage(tmp_path, "train", index, number, name, 8, 9)
                for number, name in enumerate(row["image"])
            ),
        )
        for index, row in enumerate(rows)
    ]

    def read_built(root, split):
        assert (root, split) == (tmp_path / "built", "train")
        return samples

    module = types.ModuleType("mis_jax.data.mis.dataset")
    module.__dict__.update(is_built=lambda root: root.name == "built", read_built=read_built)
    module.__dict__["RecordImage"] = RecordImage
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(mis_jax.data.mis, "dataset", module, raising=False)
    (tmp_path / "built").mkdir()
    return samples


def test_a_built_set_gives_the_rows_of_the_published_files(tmp_path, built):
    write(tmp_path / "mis_train.json", [row for row, _ in built])
    published = read_source(Source("mis", root=tmp_path))
    source = Source("mis", root=tmp_path / "built", max_tiles=4, augment=True)
    mixture = read_mixture([source], 0)
    assert [(row.id, row.fields) for row in mixture.annotations] == [
        (row.id, row.fields) for row in published
    ]
    assert [row.images for row in mixture.annotations] == [pictures for _, pictures in built]
    assert {(row.max_tiles, row.augment, row.problem) for row in mixture.annotations} == {
        (4, True, "")
    }
    assert mixture.annotations[1].where == f"{tmp_path / 'built'}, split train, row 1"
    assert mixture.sources[0]["file"] == str(tmp_path / "built")
    assert mixture.notes == [f"{tmp_path / 'built'}: 3 samples, the published set has 3927"]
    with pytest.raises(ValueError, match=r"built: count is 4 but .* 3 samples"):
        read_mixture([replace(source, count=4)], 0)


def test_a_built_set_with_something_missing(tmp_path, built):
    source = Source("mis", root=tmp_path / "built")
    built[1] = (built[1][0], built[1][1][:1])
    rows = read_source(source)
    assert "row 1: field 'image' names 2 image(s) but 1 are stored" in rows[1].problem
    assert rows[1].images == () and not rows[0].problem
    built.clear()
    with pytest.raises(ValueError, match="split train: holds no sample"):
        read_source(source)


def test_a_folder_that_is_neither_published_nor_built(tmp_path, built):
    for root in (tmp_path, tmp_path / "none"):
        with pytest.raises(ValueError, match=r"mis_train.json: no such file; check the source's"):
            read_source(Source("mis", root=root))


# --- other people's names of fields ---


def test_llava_and_m4_instruct(tmp_path):
    """One path or several, `sample_id`, fields of their own, null where a table has no value."""
    turns = sample(0, [])["conversations"]
    rows = [
        {"id": "000000033471", "image": "coco/1.jpg", "conversations": turns, "model": "x"},
        {"sample_id": 7, "image": ["a.png", "b.png"], "conversations": turns, "metadata": {}},
        {"id": None, "image": None, "video": None, "conversations": turns},
        {"id": 0, "video": "", "conversations": turns},
    ]
    source = Source("sharegpt", root=tmp_path, path=write(tmp_path / "rows.json", rows))
    found = read_source(source)
    assert [row.id for row in found] == ["000000033471", "7", "2", "0"]
    assert [len(row.images) for row in found] == [1, 2, 0, 0]
    assert [row.fields for row in found] == rows
    assert not any(row.problem for row in found)


@pytest.mark.parametrize("kind", ["sharegpt", "jsonl"])
def test_llama_factory(tmp_path, kind):
    """`messages` and `images` become `conversations` and `image`."""
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "<image>What?"},
        {"role": "assistant", "content": "A cup."},
    ]
    path = write(
        tmp_path / "rows", [{"messages": messages, "images": ["a.png"]}], lines=kind == "jsonl"
    )
    row = only(Source(kind, path=path))
    assert row.fields == {
        "conversations": [
            {"from": "system", "value": "Be kind."},
            {"from": "human", "value": "<image>What?"},
            {"from": "gpt", "value": "A cup."},
        ],
        "image": ["a.png"],
    }
    assert row.images == (tmp_path / "a.png",)


def test_the_formats_own_names_go_first(tmp_path):
    row = sample(0, ["a.png"]) | {"images": ["b.png"], "messages": "not looked at"}
    assert only(Source("sharegpt", path=write(tmp_path / "r.json", [row]))).fields == row


# --- what cannot be used ---

ROW = sample(0, ["a.png"])
BAD_LISTS = {
    "not JSON": ("[1, ", r"rows.json: not valid JSON .*download"),
    "jsonl": ('{"a": 1}\n{"a": 2}', r"rows.json: not valid JSON .*; read it as kind jsonl"),
    "too deep": ("[" * 100_000, r"rows.json: not valid JSON .*nested deeper than 100"),
    "another type": ("3", r"rows.json: holds int; expected a list"),
    "no sample": ("[]", r"rows.json: holds no sample"),
    "no row at all": ("{}", r"rows.json: holds no sample"),
}


@pytest.mark.parametrize("case", BAD_LISTS)
def test_bad_lists(tmp_path, case):
    content, message = BAD_LISTS[case]
    path = tmp_path / "rows.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_source(Source("sharegpt", path=path))
    assert "\n" not in str(caught.value)


TURNS = ROW["conversations"]
BAD_ENTRIES = {
    "no object": ("text", "expected an object with 'conversations', found 'text'; check that"),
    "a list": ([ROW], r"expected an object with 'conversations', found \[\{"),
    "no conversations": ({"id": "s1"}, "field 'conversations' is missing"),
    "null": ({"conversations": None}, "field 'conversations' is missing"),
    "image of a wrong type": (ROW | {"image": [1]}, r"field 'image' is \[1\]; give a path"),
    "image without a name": (ROW | {"image": ["a.png", ""]}, "field 'image' is .*; give a path"),
    "image as an object": (ROW | {"image": {"path": "a"}}, "field 'image' is {'path': 'a'}; give"),
    "a video": (ROW | {"video": "a.mp4"}, "field 'video' is 'a.mp4', and videos are not supported"),
    "videos": (ROW | {"videos": ["a"]}, r"field 'videos' is \['a'\], and videos are not"),
    "messages of another type": ({"messages": "a"}, "field 'messages' is 'a'; give a list"),
    "a message of parts": (
        {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
        r"field 'messages\[0\]' must be an object with 'role' and a text 'content'",
    ),
    "a message from a tool": (
        {"messages": [{"role": "tool", "content": "4"}]},
        r"field 'messages\[0\].role' is 'tool'; use 'user', 'assistant' or 'system'",
    ),
    "half a character": (
        ROW | {"conversations": [{"from": "human", "value": "\ud83d"}]},
        r"holds '\\ud83d', half of a surrogate pair",
    ),
    "half a character in a name": (ROW | {"image": "a\udc00"}, "half of a surrogate pair"),
}


@pytest.mark.parametrize("kind", ["sharegpt", "jsonl", "mis"])
@pytest.mark.parametrize("case", BAD_ENTRIES)
def test_bad_entries_are_rows_with_a_problem(tmp_path, case, kind):
    """The rows around them are read as ever."""
    entry, message = BAD_ENTRIES[case]
    path = write(tmp_path / "mis_train.json", [ROW, entry, ROW], lines=kind == "jsonl")
    good, bad, last = read_source(Source(kind, root=tmp_path, path=path))
    assert not good.problem and not last.problem
    places = ["line 2", "line 3"] if kind == "jsonl" else ["row 1", "row 2"]
    assert [bad.where, last.where] == [f"{path}, {place}" for place in places]
    assert bad.images == ()
    assert bad.id == (str(entry.get("id", 1)) if isinstance(entry, dict) else "1")
    assert bad.problem.startswith(f"{bad.where}: ") and "\n" not in bad.problem
    assert re.search(message, bad.problem), bad.problem


def test_a_row_of_mis_without_images(tmp_path):
    write(tmp_path / "mis_train.json", [ROW, sample(1, [])])
    good, bad = read_source(Source("mis", root=tmp_path))
    assert not good.problem
    assert bad.problem == (
        f"{tmp_path / 'mis_train.json'}, row 1: field 'image' is missing; "
        "name the images or remove the row"
    )


def test_bad_lines_of_jsonl_are_told_by_their_numbers(tmp_path):
    """A line that is no text or no JSON, between blank ones, and all others read."""
    path = tmp_path / "rows.jsonl"
    good = json.dumps(ROW).encode()
    endless = b'{"id": ' + b"1" * 5000 + b"}"  # more digits than Python takes
    lines = [good, b"", b"{broken", b'{"id": "\xff"}', good, b"[" * 100_000, endless, b" \r", good]
    path.write_bytes(b"\n".join(lines))
    rows = read_source(Source("jsonl", path=path))
    assert [bool(row.problem) for row in rows] == [False, True, True, False, True, True, False]
    assert [row.where for row in rows] == [
        f"{path}, {place}"
        for place in ("line 1", "line 3", "line 4", "line 5", "line 6", "line 7", "line 9")
    ]
    for row in rows:
        assert "\n" not in row.problem
        if row.problem:
            assert row.problem.startswith(f"{row.where}: not ")
            assert row.problem.endswith("remove the line")
            assert (row.images, row.fields) == ((), {})
    assert "not UTF-8 text" in rows[2].problem
    assert "not valid JSON" in rows[1].problem
    assert [row.id for row in rows] == ["s0", "1", "2", "s0", "4", "5", "s0"]


def test_bad_entries_do_not_change_what_is_chosen(tmp_path):
    rows = some_rows(20)
    source = Source("jsonl", path=write(tmp_path / "rows.jsonl", rows, lines=True), count=7)
    before = read_mixture([source], 3)
    broken = [row if i % 2 else {"id": row["id"]} for i, row in enumerate(rows)]
    write(tmp_path / "rows.jsonl", broken, lines=True)
    after = read_mixture([source], 3)
    assert after.sources == before.sources
    assert any(row.problem for row in after.annotations)


def test_missing_and_unreadable_files(tmp_path):
    with pytest.raises(ValueError, match=r"mis_train.json: no such file; check the source's root"):
        read_source(Source("mis", root=tmp_path))
    path = tmp_path / "rows.json"
    path.write_bytes(b'["\xff"]')
    with pytest.raises(ValueError, match=r"rows.json: not UTF-8 text"):
        read_source(Source("sharegpt", path=path))
    for kind in ("sharegpt", "jsonl"):
        with pytest.raises(ValueError, match=r"cannot be read \(Is a directory\); give a file"):
            read_source(Source(kind, path=tmp_path))
    path.write_bytes(b"\n \n")
    with pytest.raises(ValueError, match=r"rows.json: holds no sample"):
        read_source(Source("jsonl", path=path))


# --- many annotations ---


def test_annotations_are_once_on_the_machine(tmp_path):
    """5,000 of them are 7 MB of objects; what stays here and what goes to a worker is little."""
    path = tmp_path / "samples.jsonl"
    with path.open("w") as file:
        for index in range(5_000):
            file.write(json.dumps(sample(index, []) | {"id": f"s{index}"}) + "\n")
    source = Source("jsonl", path=path)
    read_source(source)  # what is allocated once
    tracemalloc.start()
    try:
        annotations = read_mixture([source, source], 0).annotations
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(annotations) == 10_000 and kept < 5e5 and peak < 2e6
    sent = pickle.dumps(annotations[1::4])
    assert len(sent) < 2e5
    here = pickle.loads(sent)
    assert len(here) == 2_500 and here[2_499] == annotations[9_997]
    assert [row.id for row in (here[0], here[1_250])] == ["s1", "s1"]
    (file, _) = annotations._files
    place = file._path
    assert place.exists()
    del annotations, file
    assert not place.exists()  # and `here`, which another process would hold, removes nothing
    assert here[1].id == "s5"  # mapped already


def test_the_sets_of_a_meta_file_share_one_file(tmp_path):
    """Each mapped file costs a descriptor, and a process has 1,024."""
    for name in "ab":
        write(tmp_path / f"{name}.jsonl", [sample(0, []) | {"id": name}] * 3, lines=True)
    sets = {n: {"annotation": f"{n}.jsonl", "repeat_time": r} for n, r in (("a", 2), ("b", 0.5))}
    write(tmp_path / "meta.json", sets)
    annotations = read_source(Source("meta", path=tmp_path / "meta.json"))
    assert [annotation.id for annotation in annotations] == ["a"] * 6 + ["b"]
    assert len(annotations._files) == 1
