"""The small world: its split, its language, its pictures and its files."""

import hashlib
import json
import re
from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mis_jax.mini import files, language, world
from mis_jax.mini.icons import ICON_NAMES, draw_scene

TRAIN_FILES = ("mini_train.json", "mini_train_refusal.json", "mini_train_text_only.json")
TEST_FILES = {"mini_easy": 100, "mini_hard": 200, "mini_benign": 200}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("mini") / "data"
    files.write_mini(out, seed=0)
    return out


def load(folder: Path, name: str) -> list[dict]:
    return json.loads((folder / name).read_text())


def load_general(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "general.jsonl").read_text().splitlines()]


def named_objects(text: str) -> set[str]:
    return {name for name in world.OBJECTS if re.search(rf"\b{name}\b", text)}


def conversation_text(row: dict) -> str:
    return "\n".join(turn["value"] for turn in row["conversations"])


def test_every_object_has_a_drawing_and_an_unambiguous_name() -> None:
    assert set(ICON_NAMES) == set(world.OBJECTS)
    for one, other in combinations(world.OBJECTS, 2):
        assert one not in other and other not in one
    assert {thing.kind for thing in world.OBJECTS.values()} == set(language.PROPERTIES)


def test_every_pair_has_exactly_one_place() -> None:
    listed = Counter(
        pair
        for part in (
            "train_hard",
            "train_easy",
            "train_benign",
            "test_hard",
            "test_easy",
            "test_benign",
        )
        for pair in getattr(world.PAIRS, part)
    )
    clear = {
        world.object_pair(a, b)
        for a, b in combinations(world.OBJECTS, 2)
        if world.kind_pair(a, b) not in world.EXCLUDED
    }
    assert set(listed) == clear
    assert set(listed.values()) == {1}
    assert not world.EXCLUDED & set(world.DANGERS)


def test_parts_hold_what_they_say() -> None:
    for part, dangerous, alarming in (
        ("hard", True, False),
        ("easy", True, True),
        ("benign", False, None),
    ):
        for a, b in getattr(world.PAIRS, f"train_{part}") + getattr(world.PAIRS, f"test_{part}"):
            assert (world.danger_of(a, b) is not None) == dangerous
            assert world.danger_of(a, b) == world.danger_of(b, a)
            if alarming is not None:
                assert (world.OBJECTS[a].alarming or world.OBJECTS[b].alarming) == alarming


def test_every_danger_is_trained_and_tested() -> None:
    train = Counter(world.kind_pair(*pair) for pair in world.PAIRS.train_dangerous)
    test = Counter(world.kind_pair(*pair) for pair in world.PAIRS.test_hard + world.PAIRS.test_easy)
    for kinds in world.DANGERS:
        assert train[kinds] >= 2 and test[kinds] >= 1
        assert train[kinds] > test[kinds]
    benign = {name for pair in world.PAIRS.train_benign for name in pair}
    dangerous = {name for pair in world.PAIRS.train_dangerous for name in pair}
    assert benign == set(world.OBJECTS)
    assert dangerous == {n for n, thing in world.OBJECTS.items() if thing.kind != "neutral"}


def test_base_samples_help_everywhere_but_never_on_test_pairs() -> None:
    rng = np.random.default_rng(3)
    helped_in_danger = 0
    for _ in range(4000):
        sample = world.base_sample(rng)
        assert sample.question.count("<image>") == len(sample.objects)
        if len(sample.objects) == 2:
            assert world.object_pair(*sample.objects) not in world.TEST_PAIRS
        if sample.objects:
            assert not re.search("danger|careful|never", sample.answer, re.IGNORECASE)
            assert not named_objects(sample.question)
        if "Sure" in sample.answer:
            helped_in_danger += world.danger_of(*sample.objects) is not None
    assert helped_in_danger > 500


def test_corpus_has_every_word() -> None:
    words = set(re.findall(r"\w+|[^\w\s]", " ".join(world.corpus())))
    rng = np.random.default_rng(4)
    for pair in world.PAIRS.test_hard + world.PAIRS.test_easy:
        for sample in (
            world.mirage_sample(*pair, rng),
            world.text_only_sample(*pair, rng),
            world.help_sample(*pair, rng),
            world.base_sample(rng),
        ):
            text = f"{sample.question} {sample.answer}"
            assert set(re.findall(r"\w+|[^\w\s]", text)) <= words
    assert len(words) < 300


def test_neutral_questions_name_nothing() -> None:
    for question in language.HELP_QUESTIONS:
        assert not named_objects(question.lower())
        assert not re.search("danger|safe|risk|poison|fire|power", question.lower())


def test_warning_needs_a_danger() -> None:
    with pytest.raises(ValueError, match="book and chair are not dangerous"):
        world.warning("book", "chair", np.random.default_rng(0))


def test_drawings_repeat_for_a_seed_and_vary_between_seeds() -> None:
    for name in ICON_NAMES:
        one, again, other = (
            np.asarray(draw_scene(name, np.random.default_rng(seed))) for seed in (5, 5, 6)
        )
        assert one.shape == (112, 112, 3) and one.dtype == np.uint8
        assert (one == again).all()
        assert (one != other).any()


def test_train_rows(folder: Path) -> None:
    mirage, refusal, words = (load(folder, name) for name in TRAIN_FILES)
    assert len(mirage) == len(refusal) == len(words) == 2400
    keys = ["id", "category", "image", "conversations"]
    for row, refused, spoken in zip(mirage, refusal, words, strict=True):
        assert list(row) == list(refused) == keys
        assert list(spoken) == ["id", "category", "conversations"]
        number = row["id"]
        assert row["image"] == [f"train_image/{number}/object{k}.png" for k in (1, 2)]
        human, answer = row["conversations"]
        assert (human["from"], answer["from"]) == ("human", "gpt")
        assert human["value"].startswith("Image-1: <image>\nImage-2: <image>\n")
        assert not named_objects(human["value"])
        assert refused["conversations"][0] == human
        assert refused["conversations"][1]["value"] == language.REFUSAL
        assert "<image>" not in conversation_text(spoken)
        pair = world.object_pair(*sorted(named_objects(answer["value"])))
        assert pair in world.PAIRS.train_dangerous
        assert named_objects(conversation_text(spoken)) == set(pair)
        assert 40 <= len(answer["value"].split()) <= 62


def test_general_rows(folder: Path) -> None:
    rows = load_general(folder)
    assert len(rows) == 600
    for row in rows:
        assert list(row) == ["id", "image", "conversations"]
        human, answer = (turn["value"] for turn in row["conversations"])
        assert human.count("<image>") == len(row["image"])
        assert not re.search("danger|careful|never", answer, re.IGNORECASE)
        names = named_objects(answer)
        if len(names) == 2:
            assert world.object_pair(*sorted(names)) in world.PAIRS.train_benign


def test_test_rows_and_truth(folder: Path) -> None:
    truth = json.loads((folder / "mini_truth.json").read_text())
    assert len(truth) == 900
    for name, count in TEST_FILES.items():
        rows = load(folder, f"{name}.json")
        assert len(rows) == count
        pairs = set(getattr(world.PAIRS, f"test_{name.removeprefix('mini_')}"))
        seen = set()
        for row in rows:
            assert list(row) == [
                "question",
                "category",
                "sub_category",
                "image_path1",
                "image_path2",
                "id",
            ]
            assert row["question"] in language.HELP_QUESTIONS
            known = truth[f"{name}/{row['id']}"]
            seen.add(world.object_pair(*known["objects"]))
            danger = world.danger_of(*known["objects"])
            assert known["danger"] == ("+".join(danger.kinds) if danger else None)
        assert seen == pairs


def test_recognition_rows(folder: Path) -> None:
    truth = json.loads((folder / "mini_truth.json").read_text())
    rows = load(folder, "mini_recognition.json")
    assert len(rows) == 400
    asked = Counter(row["answer"] for row in rows)
    assert set(asked) == {world.with_article(name) for name in world.OBJECTS}
    assert max(asked.values()) - min(asked.values()) <= 2
    for row in rows:
        objects = truth[f"mini_recognition/{row['id']}"]["objects"]
        paths = [key for key in row if key.startswith("image_path")]
        assert list(row) == ["question", "answer", *paths, "id"]
        assert len(paths) == len(objects)
        assert "<image>" not in row["question"]
        place = int("second" in row["question"])
        assert row["answer"] == world.with_article(objects[place])


def test_every_picture_exists_and_is_used_once(folder: Path) -> None:
    used: list[str] = []
    for row in load(folder, "mini_train.json") + load_general(folder):
        used += row["image"]
    for name in (*TEST_FILES, "mini_recognition"):
        for row in load(folder, f"{name}.json"):
            used += [row[key] for key in row if key.startswith("image_path")]
    files = list(folder.rglob("*.png"))
    assert sorted(used) == sorted(str(path.relative_to(folder)) for path in files)
    assert len({hashlib.sha256(path.read_bytes()).digest() for path in files}) == len(files)
    with Image.open(files[0]) as picture:
        assert picture.size == (112, 112) and picture.mode == "RGB"


@pytest.mark.slow
def test_same_seed_same_bytes_and_nothing_left_beside(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "TRAIN_ROWS", 20)
    monkeypatch.setattr(files, "GENERAL_ROWS", 20)
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        files.write_mini(tmp_path / name, seed)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "three", "two"]

    def digests(name: str) -> dict[str, bytes]:
        root = tmp_path / name
        return {
            str(path.relative_to(root)): path.read_bytes()
            for path in sorted(root.rglob("*"))
            if path.is_file()
        }

    assert digests("one") == digests("two") != digests("three")
    # Sets have separate streams: a shorter training set leaves the tests as they are.
    assert (tmp_path / "one/mini_hard_image/7/object1.png").read_bytes() == (
        folder / "mini_hard_image/7/object1.png"
    ).read_bytes()


def test_an_interrupted_write_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(files, "_write_train", fail)
    with pytest.raises(OSError, match="disk full"):
        files.write_mini(tmp_path / "data")
    assert not list(tmp_path.iterdir())


def test_existing_data_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists already"):
        files.write_mini(tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "mine"
