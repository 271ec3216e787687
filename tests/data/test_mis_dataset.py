"""The published MIS files as one built set: what goes in comes out, and nothing bad goes in."""

import copy
import dataclasses
import json
import multiprocessing
import os
import pickle
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny_world import read_lines

from mis_jax import cli
from mis_jax.config import Source
from mis_jax.data.mis import builder, dataset, verify_images
from mis_jax.data.mis.dataset import build, is_built, read_built
from mis_jax.data.mixture import read_source
from mis_jax.storage.locks import LOCK, locked

Rows = list[Any] | dict[str, Any]


def image(path: Path, width: int = 40, height: int = 30) -> bytes:
    """A noisy PNG or JPEG; the JPEG ends in zeros, which some array types drop."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(len(str(path))).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    if path.suffix == ".jpg":
        path.write_bytes(path.read_bytes() + b"\0\0\0")
    return path.read_bytes()


def train_row(number: int, names: list[str], **changes: Any) -> dict[str, Any]:
    marks = "<image>\n" * len(names)
    turns = [
        {"from": "human", "value": f"{marks}Was tut man mit {number}?\u2028Zeile"},
        {"from": "gpt", "value": f"Die Bilder zeigen {number}. 安全。"},
    ]
    return {"id": number, "category": "A", "image": names, "conversations": turns} | changes


def question_row(split: str, number: int) -> dict[str, Any]:
    names = [f"{split}_image/{number}/object{k}.png" for k in (1, 2)]
    paths = dict(zip(("image_path1", "image_path2"), names, strict=True))
    return {"question": f"q{number}", "category": "B", "sub_category": "b", "id": number} | paths


def names_of(row: dict[str, Any]) -> list[str]:
    given = row["image"] if "image" in row else [row["image_path1"], row["image_path2"]]
    return [given] if isinstance(given, str) else given


def write_published(root: Path, files: dict[str, Rows]) -> Path:
    """The annotation files, and every image they name that is not there yet."""
    root.mkdir(exist_ok=True)
    for split, rows in files.items():
        text = json.dumps(rows, ensure_ascii=split != "easy")
        (root / f"mis_{split}.json").write_text(text, encoding="utf-8")
        for row in list(rows.values()) if isinstance(rows, dict) else rows:
            for place, name in enumerate(names_of(row)):
                if not (root / name).exists():
                    image(root / name, 40 + place)
    return root


def published() -> dict[str, Rows]:
    """All four splits: ids that sort differently from their order, and one row without an id."""
    train = [
        train_row(30, ["t/30/object1.png", "t/30/object2.jpg"], sub_category="a"),
        train_row(4, ["t/4/only.png"], image="t/4/only.png"),
        train_row(100, ["t/30/object2.jpg", "t/bild 5.png"]),
    ]
    del train[2]["id"], train[2]["category"]
    easy = {name: question_row("easy", number) for name, number in (("b", 7), ("a", 3))}
    return {
        "train": train,
        "easy": easy,
        "hard": [question_row("hard", number) for number in range(3)],
        "real": [question_row("real", 0)],
    }


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_published(tmp_path_factory.mktemp("mis") / "root", published())


@pytest.fixture(scope="module")
def report(root: Path) -> dataset.BuildReport:
    with pytest.MonkeyPatch.context() as patch:
        # One record a shard in the train split, whose images come to about 11 kB.
        patch.setattr(builder, "SHARD_BYTES", 1000)
        patch.setattr(socket.socket, "connect", _no_network)
        patch.setattr(socket, "getaddrinfo", _no_network)
        return build(root, root.parent / "built", workers=1)


def _no_network(*args: Any, **options: Any) -> None:
    raise AssertionError("the network was asked")


def rows_of(split: str) -> list[dict[str, Any]]:
    rows = published()[split]
    return list(rows.values()) if isinstance(rows, dict) else rows


def test_the_report_counts_splits_and_notes_sizes(root, report):
    assert report.out == root.parent / "built"
    assert report.splits == {"train": 3, "easy": 2, "hard": 3, "real": 1}
    assert report.missing == [] and report.bad == []
    assert [note.rpartition("; ")[0] or note for note in report.size_notes] == [
        f"{root}/mis_train.json: 3 samples, the published set has 3927",
        f"{root}/mis_easy.json: 2 samples, the published set has 1675",
        f"{root}/mis_hard.json: 3 samples, the published set has 510",
        f"{root}/mis_real.json: 1 samples, the published set has 100",
    ]


@pytest.mark.parametrize("split", ["train", "easy", "hard", "real"])
def test_rows_and_images_come_back_in_order_and_to_the_byte(root, report, split):
    found = read_built(report.out, split)
    assert [row for row, _ in found] == rows_of(split)
    for row, images in found:
        assert [image.name for image in images] == names_of(row)
        for image in images:
            assert image.encoded() == (root / image.name).read_bytes()
            with Image.open(root / image.name) as opened:
                assert image.size == (image.width, image.height) == opened.size
    row, images = found[-1]
    assert row == rows_of(split)[-1] and images[-1].name in str(images[-1])


def test_the_set_is_an_ordinary_one_for_tfds(root, report):
    import tensorflow_datasets as tfds

    folder = report.out / "mis" / "1.0.0"
    builder: Any = tfds.builder_from_directory(os.fspath(folder))
    info = builder.info
    assert {name: split.num_examples for name, split in info.splits.items()} == report.splits
    assert info.redistribution_info.license == "Apache-2.0"
    assert "2501.18533" in info.citation and "Rethinking Bottlenecks" in info.citation
    assert info.disable_shuffling and info.file_format.value == "array_record"
    train = builder.as_data_source("train")
    assert len(train) == 3 and info.splits["train"].num_shards == 3
    for index in (2, 0, 1):
        row, record = rows_of("train")[index], train[index]
        assert record["id"].decode() == str(row.get("id", index))
        assert record["category"].decode() == row.get("category", "")
        assert record["sub_category"].decode() == row.get("sub_category", "")
        assert record["question"] == b""
        turns = zip(record["conversations"]["from"], record["conversations"]["value"], strict=True)
        assert [{"from": a.decode(), "value": b.decode()} for a, b in turns] == row["conversations"]
        assert [name.decode() for name in record["image_names"]] == names_of(row)
        assert list(record["images"]) == [(root / name).read_bytes() for name in names_of(row)]
    assert list(train[0]["widths"]) == [40, 41] and list(train[0]["heights"]) == [30, 30]
    easy = tfds.data_source("mis", data_dir=report.out, split="easy[1:]")
    assert easy[0]["question"] == b"q3" and len(easy[0]["conversations"]["from"]) == 0


def test_the_list_beside_the_records_needs_no_image(report):
    lines = read_lines_of(report.out / "mis" / "1.0.0" / "train.jsonl")
    assert [line["row"] for line in lines] == rows_of("train")
    assert lines[1]["images"] == [{"name": "t/4/only.png", "width": 40, "height": 30}]


def read_lines_of(path: Path) -> list[dict[str, Any]]:
    """As `read_lines`, for texts that hold U+2028."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def test_is_built_knows_its_own_sets(root, report, tmp_path):
    assert is_built(report.out) and is_built(report.out / "mis" / "1.0.0")
    assert read_built(report.out / "mis" / "1.0.0", "real") == read_built(report.out, "real")
    (tmp_path / "dataset_info.json").write_text('{"name": "mnist"}')
    assert not any(is_built(folder) for folder in (root, tmp_path, tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="mis-jax data build"):
        read_built(root, "train")
    with pytest.raises(ValueError, match="no split 'val'; it has train, easy, hard, real"):
        read_built(report.out, "val")


def test_listing_a_set_imports_no_tfds(report):
    program = (
        "import sys; from pathlib import Path; import mis_jax.data.mixture\n"
        "from mis_jax.data.mis.dataset import is_built, read_built\n"
        "assert is_built(Path(sys.argv[1])) and read_built(Path(sys.argv[1]), 'train')\n"
        "print([m for m in ('tensorflow_datasets', 'array_record', 'jax') if m in sys.modules])"
    )
    command = [sys.executable, "-c", program, str(report.out)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_images_are_read_in_spawned_processes(root, report):
    images = read_built(report.out, "train")[0][1]
    assert pickle.loads(pickle.dumps(images)) == images
    wanted = [(root / image.name).read_bytes() for image in images]
    assert [image.encoded() for image in images] == wanted
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.map(dataset.RecordImage.encoded, images) == wanted


def test_a_fork_after_reading_is_refused_and_does_not_hang(report, monkeypatch):
    picture = read_built(report.out, "train")[0][1][0]
    picture.encoded()
    monkeypatch.setattr(os, "getpid", lambda: -1)
    with pytest.raises(RuntimeError, match="'spawn'"):
        picture.encoded()


def test_a_sample_s_record_is_read_once(report, monkeypatch):
    asked = []
    source = dataset._data_source
    monkeypatch.setattr(dataset, "_data_source", lambda *key: asked.append(key) or source(*key))
    dataset._last.__dict__.clear()
    for _, images in read_built(report.out, "hard"):
        for picture in images:
            picture.encoded()
    assert len(asked) == 3


def test_only_present_splits_are_built_and_the_older_report_goes(tmp_path):
    root = write_published(tmp_path / "root", {"real": rows_of("real")})
    (tmp_path / "built.bad_samples.jsonl").write_text("{}\n")
    seen: list[tuple[int, int]] = []
    report = build(root, tmp_path / "built", workers=1, progress=lambda *step: seen.append(step))
    assert report.splits == {"real": 1} and report.missing == ["train", "easy", "hard"]
    assert seen == [(1, 2), (2, 2)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["built", "root"]
    assert sorted(path.name for path in (tmp_path / "built").rglob("*")) == [
        "1.0.0", "LICENSE", "dataset_info.json", "features.json", "mis",
        "mis-real.array_record-00000-of-00001", "real.jsonl",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="no split 'train'; it has real"):
        read_built(tmp_path / "built", "train")


def test_a_set_built_again_is_not_read_as_the_old_one(tmp_path):
    root = write_published(tmp_path / "root", {"real": rows_of("real")})
    contents = []
    for place in ("one", "two"):
        build(root, tmp_path / "built", workers=1)
        contents.append(read_built(tmp_path / "built", "real")[0][1][0].encoded())
        (tmp_path / "built").rename(tmp_path / place)
        image(root / "real_image/0/object1.png", 20)
    assert contents[0] != contents[1]


def damaged(root: Path) -> tuple[Path, dict[tuple[str, int], str]]:
    """A published folder with every kind of bad sample; what each reason must say."""
    good = rows_of("train")[0]
    train: list[Any] = [copy.deepcopy(good)]
    easy: list[Any] = [question_row("easy", 0)]
    said: dict[tuple[str, int], str] = {}

    def add(reason: str, **changes: Any) -> dict[str, Any]:
        said["train", len(train)] = reason
        row = copy.deepcopy(good) | {"id": f"bad{len(train)}"} | changes
        train.append(row)
        return row

    for name, content in {
        "cut.png": image(root / "cut.png")[:-400],
        "empty.jpg": b"",
        "text.png": b"<html>not found</html>",
    }.items():
        (root / name).write_bytes(content)
        add(f"image {root / name} ", image=[good["image"][0], name])
    add(f"image {root / 'gone.png'} does not exist", image=["gone.png", good["image"][0]])
    add("field 'image' names 1 image(s) but the human turns", image=good["image"][:1])
    add("conversations[1].value is an empty answer")["conversations"][1]["value"] = " "
    add("conversations[0].from is 'bot'")["conversations"][0]["from"] = "bot"
    del add("field 'conversations' is missing")["conversations"]
    del add("field 'image' is missing")["image"]
    add("field 'image' is empty", image=[])
    add("field 'image' is ['']; give a path", image=[""])
    add("field 'video' is 'a.mp4', and videos are not supported", video="a.mp4")
    add("field 'category' is 5", category=5)
    add("text that UTF-8 cannot store", note="\ud83d")
    said["train", len(train)] = "expected an object with 'conversations', found 'stray'"
    train.append("stray")
    train.append(copy.deepcopy(good) | {"id": "last"})
    for field, value in (("question", None), ("question", "  "), ("image_path2", None)):
        row = question_row("easy", len(easy))
        if value is None:
            del row[field]
        else:
            row[field] = value
        state = "missing" if value is None else f"{value!r}"
        said["easy", len(easy)] = f"field '{field}' is {state}"
        easy.append(row)
    for split, rows in (("train", train), ("easy", easy)):
        (root / f"mis_{split}.json").write_text(json.dumps(rows))
    for name in [*good["image"], *names_of(easy[0])]:
        image(root / name)
    return root, said


def check_listed(listed: list[dict[str, Any]], said: dict[tuple[str, int], str]) -> None:
    assert [(entry["split"], entry["row"]) for entry in listed] == list(said)
    for entry, words in zip(listed, said.values(), strict=True):
        assert words in entry["reason"], entry
        assert "\n" not in entry["reason"]
    assert listed[0]["id"] == "bad1" and set(listed[0]) == {"split", "row", "id", "reason"}


def test_bad_samples_stop_the_build_and_are_all_listed(tmp_path):
    (tmp_path / "root").mkdir()
    root, said = damaged(tmp_path / "root")
    complaint = tmp_path / "built.bad_samples.jsonl"
    with pytest.raises(ValueError, match="samples are bad") as stopped:
        build(root, tmp_path / "built", workers=2)
    message = str(stopped.value)
    assert message.startswith(f"{len(said)} of 21 samples are bad")
    assert f"{root}/mis_train.json, row 1: image {root}/cut.png" in message
    assert str(complaint) in message and "--on-bad-sample skip" in message and "\n" not in message
    check_listed(read_lines(complaint), said)
    assert sorted(path.name for path in tmp_path.iterdir()) == [complaint.name, "root"]


def test_llama_factory_s_names_are_stored_as_training_reads_them(tmp_path):
    good = rows_of("train")[0]
    roles = {"human": "user", "gpt": "assistant", "system": "system"}
    turns = [{"role": roles[t["from"]], "content": t["value"]} for t in good["conversations"]]
    other = {k: v for k, v in good.items() if k not in ("image", "conversations")}
    other |= {"messages": turns, "images": good["image"]}
    source = Source(kind="mis", root=tmp_path / "root", split="train")
    write_published(tmp_path / "root", {"train": [good]})
    (tmp_path / "root" / "mis_train.json").write_text(json.dumps([other]))
    [trained] = read_source(source)
    build(tmp_path / "root", tmp_path / "built", workers=1)
    [stored] = read_source(dataclasses.replace(source, root=tmp_path / "built"))
    assert trained.problem == stored.problem == ""
    assert stored.fields == trained.fields == good
    assert [image.name for image in stored.images] == good["image"]


def test_bad_samples_are_skipped_and_listed(tmp_path):
    (tmp_path / "root").mkdir()
    root, said = damaged(tmp_path / "root")
    report = build(root, tmp_path / "built", on_bad_sample="skip", workers=2)
    assert report.splits == {"train": 2, "easy": 1}
    check_listed(report.bad, said)
    assert read_lines(tmp_path / "built/mis/1.0.0/bad_samples.jsonl") == report.bad
    assert [row["id"] for row, _ in read_built(tmp_path / "built", "train")] == [30, "last"]
    assert f"{root}/mis_train.json: 17 samples, the published set has 3927" in report.size_notes


def test_a_split_without_a_good_sample_is_left_out(tmp_path):
    bad = [question_row("hard", 0) | {"question": ""}]
    root = write_published(tmp_path / "root", {"hard": bad, "real": rows_of("real")})
    report = build(root, tmp_path / "built", on_bad_sample="skip", workers=1)
    assert report.splits == {"real": 1}
    assert any("every sample is bad" in note for note in report.size_notes)
    (root / "mis_real.json").unlink()
    with pytest.raises(ValueError, match="1 of 1 samples are bad"):
        build(root, tmp_path / "other", on_bad_sample="skip")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "has none of mis_train.json, mis_easy.json, mis_hard.json, mis_real.json"),
        (b"[{", "not valid JSON"),
        (b"\xff\xfe", "not UTF-8 text"),
        (b"[]", "holds no sample"),
        (b"3", "holds int; expected a list of samples"),
    ],
)
def test_folders_that_cannot_be_read_are_refused(tmp_path, content, words):
    if content is not None:
        (tmp_path / "mis_train.json").write_bytes(content)
    with pytest.raises(ValueError, match=words):
        build(tmp_path, tmp_path / "built")
    assert not (tmp_path / "built").exists()


def test_an_existing_destination_is_refused(root, tmp_path):
    (tmp_path / "mine").write_text("kept")
    with pytest.raises(ValueError, match="exists already"):
        build(root, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_one_process_builds_a_set(root, tmp_path):
    out, refused = tmp_path / "built", []

    def second() -> None:
        with pytest.raises(ValueError, match="built: another process is writing it") as caught:
            build(root, out)
        refused.append(caught.value)

    with locked(tmp_path / f".built{LOCK}", out):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
    assert refused and not list(tmp_path.iterdir())


@pytest.mark.parametrize("options", [{"workers": 0}, {"on_bad_sample": "ask"}])
def test_unusable_options_are_refused(root, tmp_path, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        build(root, tmp_path / "built", **options)


def _die(paths: tuple[str, ...]) -> None:
    os._exit(3)


def _no_memory(paths: tuple[str, ...]) -> None:
    raise MemoryError


@pytest.mark.parametrize(
    ("work", "words"), [(_die, "ended without an answer"), (_no_memory, "no memory left")]
)
def test_a_crash_of_a_worker_is_told(root, tmp_path, monkeypatch, capsys, work, words):
    monkeypatch.setattr(verify_images, "_sizes_or_reason", work)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["data", "build", "--mis-root", str(root), "--out", str(tmp_path / "built")])
    assert stopped.value.code == 1
    told = capsys.readouterr().err
    assert words in told and "'train', row 0" in told and "a fault of mis-jax" not in told
    assert list(tmp_path.iterdir()) == []


def test_damaged_records_are_told(tmp_path):
    root = write_published(tmp_path / "root", {"real": rows_of("real")})
    build(root, tmp_path / "built", workers=1)
    folder = tmp_path / "built" / "mis" / "1.0.0"
    picture = read_built(folder, "real")[0][1][1]
    record = next(folder.glob("*array_record*"))
    os.truncate(record, 1000)
    with pytest.raises(
        ValueError, match=r"object2\.png \(record 0 of 'real' .* build the set again"
    ):
        picture.encoded()
    listed = folder / "real.jsonl"
    listed.write_text(listed.read_text() * 2)
    with pytest.raises(ValueError, match="has 2 lines for 1 records"):
        read_built(folder, "real")
    listed.unlink()
    with pytest.raises(ValueError, match="build the set again"):
        read_built(folder, "real")


def test_the_verb_builds_and_reports(root, tmp_path, capsys):
    words = ["data", "build", "--mis-root", str(root), "--workers", "1", "--out"]
    cli.main([*words, str(tmp_path / "built")])
    said = capsys.readouterr().out
    assert "3 samples of train" in said and f"wrote {tmp_path / 'built'}" in said
    with pytest.raises(SystemExit) as stopped:
        cli.main([*words, str(tmp_path / "built")])
    assert stopped.value.code == 2 and "exists already" in capsys.readouterr().err


def test_the_verb_prints_json(tmp_path, capsys):
    (tmp_path / "root").mkdir()
    root, said = damaged(tmp_path / "root")
    words = ["data", "build", "--mis-root", str(root), "--out", str(tmp_path / "built"), "--json"]
    with pytest.raises(SystemExit) as stopped:
        cli.main(words)
    assert stopped.value.code == 2
    told = capsys.readouterr()
    assert told.out == "" and "samples are bad" in told.err
    cli.main([*words, "--on-bad-sample", "skip"])
    printed = json.loads(capsys.readouterr().out)
    assert printed["splits"] == {"train": 2, "easy": 1} and printed["missing"] == ["hard", "real"]
    check_listed(printed["bad"], said)
    assert printed["out"] == str(tmp_path / "built") and len(printed["size_notes"]) == 2
