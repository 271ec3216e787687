"""The control label sets: what changes, what stays, what is refused."""

import copy
import json
import sys
from pathlib import Path

import pytest

from mis_jax.config import Source
from mis_jax.data.chat_template import count_images, from_sharegpt
from mis_jax.data.mixture import read_source

sys.path.append(str(Path(__file__).parents[2] / "tools"))
import control_labels as tool


def row(i: int, human: str = "<image>\n<image>\nWhere do they go?") -> dict:
    return {
        "id": i,
        "category": "Household",
        "image": [f"{i}/object1.png", f"{i}/object2.png"],
        "conversations": [
            {"from": "human", "value": human},
            {"from": "gpt", "value": f"The pictures show a cup and a plate, number {i}."},
        ],
    }


ROWS = [row(0), row(1, "Image-1: <image>\n\nImage-2: <image>\n\nWhich is older?")]


@pytest.fixture
def src(tmp_path) -> Path:
    path = tmp_path / "mis_train.json"
    path.write_text(json.dumps(ROWS))
    return path


def test_refusal_changes_the_answers_alone(src, tmp_path, capsys):
    out = tmp_path / "refusal.json"
    assert tool.main([str(src), str(out), "--kind", "refusal"]) == 0
    assert "2 samples" in capsys.readouterr().err
    expected = copy.deepcopy(ROWS)
    for sample in expected:
        sample["conversations"][1]["value"] = tool.REFUSAL
    assert json.loads(out.read_text()) == expected


def test_text_only_takes_pictures_and_markers(src, tmp_path):
    out = tmp_path / "text.json"
    assert tool.main([str(src), str(out), "--kind", "text-only"]) == 0
    rows = json.loads(out.read_text())
    assert [r["conversations"][0]["value"] for r in rows] == [
        "Where do they go?",
        "Which is older?",
    ]
    for before, after in zip(ROWS, rows, strict=True):
        assert "image" not in after and after["category"] == "Household"
        assert after["conversations"][1] == before["conversations"][1]
    for found in read_source(Source("sharegpt", path=out)):
        assert found.images == () and count_images(from_sharegpt(found.fields)) == 0


def test_several_turns(src, tmp_path):
    long = row(0)
    long["conversations"] += [
        {"from": "human", "value": "And now?"},
        {"from": "gpt", "value": "The same."},
    ]
    src.write_text(json.dumps({"a": long}))
    tool.write(src, tmp_path / "a.json", "refusal")
    tool.write(src, tmp_path / "b.json", "text-only")
    values = [t["value"] for t in json.loads((tmp_path / "a.json").read_text())[0]["conversations"]]
    assert values[1::2] == [tool.REFUSAL] * 2 and values[2] == "And now?"
    values = [t["value"] for t in json.loads((tmp_path / "b.json").read_text())[0]["conversations"]]
    assert values[::2] == ["Where do they go?", "And now?"] and values[3] == "The same."


@pytest.mark.parametrize("kind", ["refusal", "text-only"])
@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"image": []}, "'image' names no picture"),
        ({"image": ["a.png"]}, "1 pictures but 2 <image> markers"),
        ({"conversations": []}, "'conversations' must be a list"),
        ({"conversations": ROWS[0]["conversations"][:1]}, "without a 'gpt' turn"),
    ],
)
def test_bad_rows_leave_nothing_behind(src, tmp_path, kind, bad, said, capsys):
    src.write_text(json.dumps([ROWS[0], ROWS[1] | bad]))
    assert tool.main([str(src), str(tmp_path / "out.json"), "--kind", kind]) == 2
    error = capsys.readouterr().err
    assert said in error and "mis_train.json, row 1" in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["mis_train.json"]


def test_what_cannot_be_made_text(src, tmp_path):
    for human in ("See <image> and <image>, please", "<image>\n<image>\n"):
        src.write_text(json.dumps([row(0, human)]))
        with pytest.raises(ValueError, match="row 0: "):
            tool.write(src, tmp_path / "out.json", "text-only")


def test_an_existing_file_is_refused(src, tmp_path, capsys):
    out = tmp_path / "out.json"
    out.write_text("mine")
    assert tool.main([str(src), str(out), "--kind", "refusal"]) == 2
    assert "exists already" in capsys.readouterr().err and out.read_text() == "mine"


def test_help(capsys):
    with pytest.raises(SystemExit) as stopped:
        tool.main(["--help"])
    assert stopped.value.code == 0 and "--kind text-only" in capsys.readouterr().out
