"""The label writer against a teacher on this machine: requests, states, resuming, the review."""

import base64
import csv
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from waiting import DEADLINE, until

from mis_jax.config import Source
from mis_jax.data.chat_template import count_images, from_sharegpt
from mis_jax.data.mixture import read_source
from mis_jax.mini.icons import draw_scene
from mis_jax.storage.jsonl import read_log

sys.path.append(str(Path(__file__).parents[2] / "tools"))
import label_prompt
import label_teacher
import write_labels as tool

MODEL = "teacher-vl"
THINGS = ("toaster", "bathtub", "candle", "umbrella", "book", "apple")
LABEL = (
    "The first picture shows a {a} on a plain background, and the second shows a {b} that is seen "
    "from the side. Taken one by one they are ordinary things of a home. The question puts them "
    "together, and then somebody could get hurt or something could break. I would rather not help "
    "with that part. I am glad to say where each of them is best kept and how it is looked after."
)


class Teacher:
    """A chat endpoint whose replies are chosen by a question's last word.

    Attributes:
        plan: last word -> what to answer, a list of replies one after the other (the last stays).
        seen: (last word, request body, authorization) of every request, in order of arrival.
        most: the largest number of requests at one time.
    """

    def __init__(self):
        self.plan: dict[str, list[dict]] = {}
        self.seen: list[tuple[str, dict, str]] = []
        self.delay, self.most, self._now, self._lock = 0.0, 0, 0, threading.Lock()
        self.answers, self.go_on = 1000, threading.Event()  # so many before it waits to go on
        teacher = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                teacher.answer(self)

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()

    @property
    def asked(self) -> Counter:
        return Counter(word for word, _, _ in self.seen)

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        sent = handler.rfile.read(int(handler.headers["Content-Length"]))
        if not sent:  # the client was stopped before it could write
            return
        body = json.loads(sent)
        text = body["messages"][-1]["content"][-1]["text"]
        word = text.split("<question>")[1].split("</question>")[0].split()[-1]
        with self._lock:
            self._now += 1
            self.most = max(self.most, self._now)
            self.seen.append((word, body, handler.headers["Authorization"]))
            replies = self.plan.get(word, [say(LABEL.format(a=word, b="table"))])
            reply = replies[min(self.asked[word], len(replies)) - 1]
        time.sleep(self.delay)
        if len(self.seen) > self.answers:
            self.go_on.wait(90)
        with self._lock:
            self._now -= 1
        if handler.path != "/v1/chat/completions":
            reply = {"status": 404, "error": {"message": "no such path"}}
        status = reply.get("status", 200)
        content = json.dumps({k: v for k, v in reply.items() if k != "status"}).encode()
        try:
            handler.send_response(status)
            handler.send_header("Content-Type", "application/json")
            handler.send_header("Content-Length", str(len(content)))
            handler.send_header("retry-after-ms", "5")
            handler.end_headers()
            handler.wfile.write(content)
        except OSError:  # the client was killed
            pass


def say(text: str | None, finish: str = "stop", **message) -> dict:
    content = {"role": "assistant", "content": text} | message
    return {
        "id": "c1", "object": "chat.completion", "created": 1, "model": f"{MODEL}-0001",
        "choices": [{"index": 0, "finish_reason": finish, "message": content}],
        "usage": {"prompt_tokens": 700, "completion_tokens": 90, "total_tokens": 790},
    }  # fmt: skip


def fail(status: int, **error) -> dict:
    return {"status": status, "error": {"message": "out of order"} | error}


@pytest.fixture
def teacher(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("OPENAI_API_KEY", "the-users-own-key")
    server = Teacher()
    yield server
    server.close()


@pytest.fixture
def data(tmp_path) -> Path:
    """Six samples of the test style, last words w0 to w5, with pictures of household objects."""
    rng = np.random.default_rng(0)
    rows = []
    for i, name in enumerate(THINGS):
        (tmp_path / "img" / str(i)).mkdir(parents=True)
        names = [f"img/{i}/object{k}.png" for k in (1, 2)]
        for path, thing in zip(names, (name, THINGS[i - 1]), strict=True):
            draw_scene(thing, rng, 56).save(tmp_path / path)
        rows.append(
            {
                "question": f"How do the thing and the other thing go together, w{i}",
                "category": "Household", "sub_category": "Kitchen",
                "image_path1": names[0], "image_path2": names[1], "id": 10 + i,
            }
        )  # fmt: skip
    return write(tmp_path / "mine.json", rows)


def write(path: Path, rows) -> Path:
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def words(data: Path, teacher: Teacher, *more: str) -> list[str]:
    out = str(data.parent / "labels")
    return [str(data), out, "--base-url", teacher.url, "--model", MODEL, *more]


def go(data: Path, teacher: Teacher, *more: str) -> int:
    return tool.main(words(data, teacher, *more))


def trained(data: Path) -> list[dict]:
    return json.loads((data.parent / "labels" / "mis_train.json").read_text())


def log(data: Path) -> list[dict]:
    return read_log(data.parent / "labels" / "labels.jsonl")


def table(path: Path) -> list[dict]:
    return list(csv.DictReader(io.StringIO(path.read_text("utf-8-sig"), newline="")))


def save_table(path: Path, rows: list[dict]) -> None:
    """As a spreadsheet would: \\r\\n between rows, and in the cells."""
    stream = io.StringIO(newline="")
    writer = csv.DictWriter(stream, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    path.write_bytes(stream.getvalue().encode("utf-8"))


def test_the_request_and_the_files(data, teacher, capsys):
    assert go(data, teacher, "--concurrency", "3") == 0
    assert teacher.asked == Counter(f"w{i}" for i in range(6))
    for word, body, key in teacher.seen:
        assert key == "Bearer none"  # not the user's own, to whoever listens there
        assert body["model"] == MODEL and body["max_tokens"] == 1024 and body["temperature"] == 0
        assert len(body["messages"]) == 1 and body["messages"][0]["role"] == "user"
        *pictures, text = body["messages"][0]["content"]
        assert text["type"] == "text" and "HARMLESS" in text["text"]
        assert [picture["type"] for picture in pictures] == ["image_url", "image_url"]
        for k, picture in enumerate(pictures, start=1):
            head, _, content = picture["image_url"]["url"].partition(",")
            assert head == "data:image/png;base64"
            stored = data.parent / f"img/{word[1:]}/object{k}.png"
            assert base64.b64decode(content) == stored.read_bytes()
    rows = trained(data)
    assert [row["id"] for row in rows] == [10, 11, 12, 13, 14, 15]
    assert rows[2] == {
        "id": 12,
        "category": "Household",
        "sub_category": "Kitchen",
        "image": ["img/2/object1.png", "img/2/object2.png"],
        "conversations": [
            {
                "from": "human",
                "value": "<image>\n<image>\nHow do the thing and the other thing go together, w2",
            },
            {"from": "gpt", "value": LABEL.format(a="w2", b="table")},
        ],
    }
    found = read_source(
        Source("sharegpt", path=data.parent / "labels/mis_train.json", root=data.parent)
    )
    assert [row.id for row in found] == [str(10 + i) for i in range(6)]
    for row in found:
        assert all(Path(str(image)).is_file() for image in row.images)
        assert count_images(from_sharegpt(row.fields)) == 2
    first = next(row for row in log(data) if row["id"] == "10")
    assert first["state"] == "ok" and first["finish_reason"] == "stop" and first["flags"] == []
    assert first["model"] == MODEL and first["served_model"] == f"{MODEL}-0001"
    assert first["usage"]["completion_tokens"] == 90 and len(first["key"]) == 64
    sheet = table(data.parent / "labels/review.csv")
    assert list(sheet[0])[:5] == ["id", "label", "flags", "ok", "note"]
    assert [(row["id"], row["ok"], row["note"]) for row in sheet] == [
        (str(10 + i), "", "") for i in range(6)
    ]
    said = capsys.readouterr().err
    assert "6 of 6 samples" in said and "review.csv" in said
    assert "go together" not in said and "ordinary things" not in said  # ids and counts only


def test_the_key_comes_from_the_named_variable(data, teacher, monkeypatch, capsys):
    monkeypatch.setenv("TEACHER_KEY", "sesame")
    assert go(data, teacher, "--api-key-env", "TEACHER_KEY", "--limit", "1") == 0
    assert [key for _, _, key in teacher.seen] == ["Bearer sesame"]
    monkeypatch.delenv("TEACHER_KEY")
    assert go(data, teacher, "--api-key-env", "TEACHER_KEY") == 2
    assert "TEACHER_KEY: this variable is not set" in capsys.readouterr().err


def test_every_kind_of_reply_has_its_state(data, teacher, capsys):
    sorry = "I’m sorry, but I can’t assist with that."
    teacher.plan = {
        "w0": [fail(500), fail(429), say("The pictures show an apple and a key. Enjoy them.")],
        "w1": [say(sorry)],
        "w2": [say("  ")],
        "w3": [say("The first picture shows", "length")],
        "w4": [say("HARMLESS: an umbrella and a candle are only put on a shelf.")],
        "w5": [fail(400, code="content_filter")],
    }
    assert go(data, teacher) == 1
    assert teacher.asked == Counter(w0=3, w1=1, w2=1, w3=1, w4=1, w5=1)
    states = {row["id"]: row["state"] for row in log(data)}
    assert states == {
        "10": "ok", "11": "refused", "12": "empty", "13": "truncated", "14": "harmless",
        "15": "refused",
    }  # fmt: skip
    assert [row["id"] for row in trained(data)] == [10]
    flags = {row["id"]: row["flags"].split() for row in table(data.parent / "labels/review.csv")}
    assert flags["10"] == ["short"] and flags["15"] == ["refused"] and "12" not in flags
    assert flags["11"][0] == "refused" and "apology-first" in flags["11"]
    assert flags["13"][0] == "truncated" and flags["14"][0] == "harmless"
    said = capsys.readouterr().err
    assert "no label: 2 refused (id 11, 15)" in said and "no label: 1 truncated (id 13)" in said

    # The teacher's answers stay, its refusals too; the rest is asked again.
    assert go(data, teacher) == 1
    assert teacher.asked == Counter(w0=3, w1=1, w2=2, w3=2, w4=1, w5=1)
    teacher.plan = {"w4": teacher.plan["w4"]}
    assert go(data, teacher, "--retry-refused") == 1
    assert [row["id"] for row in trained(data)] == [10, 11, 12, 13, 15]
    assert teacher.asked == Counter(w0=3, w1=2, w2=3, w3=3, w4=1, w5=2)


def test_errors_are_bounded_and_asked_again(data, teacher, capsys):
    teacher.plan = {"w1": [fail(500)], "w3": [say(None) | {"choices": []}]}
    assert go(data, teacher, "--retries", "1") == 1
    assert teacher.asked["w1"] == 2 and teacher.asked["w3"] == 1
    said = capsys.readouterr().err
    assert "1 error (HTTP 500) (id 11)" in said and "1 error (no chat completion) (id 13)" in said
    assert len(trained(data)) == 4
    teacher.plan = {}
    assert go(data, teacher) == 0
    assert [row["id"] for row in trained(data)] == [10, 11, 12, 13, 14, 15]


def test_a_server_that_is_down_ends_the_run(data, teacher, monkeypatch, capsys):
    monkeypatch.setattr(label_teacher, "_ERRORS_IN_A_ROW", 2)
    teacher.plan = {f"w{i}": [fail(503)] for i in range(1, 6)}
    assert go(data, teacher, "--retries", "0", "--concurrency", "1") == 1
    assert teacher.asked == Counter(w0=1, w1=1, w2=1)
    assert [row["id"] for row in trained(data)] == [10]
    said = capsys.readouterr().err
    assert "2 errors in a row, the last: HTTP 503" in said and "3 not asked" in said


@pytest.mark.parametrize(("status", "option"), [(401, "--api-key-env"), (404, "--model")])
def test_a_wrong_key_or_model_is_bad_input(data, teacher, status, option, capsys):
    teacher.plan = {"w2": [fail(status)]}
    assert go(data, teacher, "--concurrency", "1") == 2
    assert option in capsys.readouterr().err
    assert teacher.asked == Counter(w0=1, w1=1, w2=1)
    assert len(log(data)) == 2


def test_requests_at_one_time_are_bounded(data, teacher):
    teacher.delay = 0.1
    teacher.plan = {"w0": [fail(500), fail(500), say(LABEL)]}  # the first is done last
    assert go(data, teacher, "--concurrency", "3") == 0
    assert 2 <= teacher.most <= 3
    assert [row["id"] for row in log(data)] != [str(10 + i) for i in range(6)]
    assert [row["id"] for row in trained(data)] == [10, 11, 12, 13, 14, 15]


def start(data: Path, teacher: Teacher) -> subprocess.Popen:
    """The script in a process of its own, once two labels are on disk."""
    teacher.answers = 2
    command = [sys.executable, tool.__file__, *words(data, teacher)]
    process = subprocess.Popen(
        [*command, "--concurrency", "1"], stderr=subprocess.PIPE, text=True, env=dict(os.environ)
    )
    path = data.parent / "labels" / "labels.jsonl"
    until(
        lambda: path.exists() and path.read_bytes().count(b"\n") >= 2,
        still=lambda: process.poll() is None,
    )
    return process


def test_a_killed_run_goes_on(data, teacher):
    process = start(data, teacher)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    teacher.go_on.set()
    path = data.parent / "labels" / "labels.jsonl"
    kept = [row["id"] for row in log(data)]
    assert len(kept) == 2 and not (data.parent / "labels/mis_train.json").exists()
    whole = path.read_bytes()
    path.write_bytes(whole + whole[: len(whole) // 3].split(b"\n")[0][:50])  # torn in writing
    teacher.seen.clear()
    assert go(data, teacher) == 0
    assert teacher.asked == Counter(f"w{i}" for i in range(6) if str(10 + i) not in kept)
    assert [row["id"] for row in trained(data)] == [10, 11, 12, 13, 14, 15]
    assert sorted(row["id"] for row in log(data)) == [str(10 + i) for i in range(6)]


def test_ctrl_c_keeps_what_is_done(data, teacher):
    process = start(data, teacher)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=DEADLINE)
    teacher.go_on.set()
    assert process.returncode == 1 and "run the same command again" in said
    assert "Traceback" not in said
    assert len(log(data)) == 2
    assert go(data, teacher) == 0 and len(trained(data)) == 6


def test_only_what_has_changed_is_asked_again(data, teacher, monkeypatch):
    assert go(data, teacher) == 0
    rows = json.loads(data.read_text())
    rows[1]["question"] += " again w1b"
    rows[4]["category"] = "Garden"  # not part of what is asked
    write(data, rows)
    draw_scene("key", np.random.default_rng(9), 56).save(data.parent / "img/3/object2.png")
    teacher.seen.clear()
    assert go(data, teacher) == 0
    assert teacher.asked == Counter(w1b=1, w3=1)
    assert trained(data)[4]["category"] == "Garden" and len(log(data)) == 8
    assert go(data, teacher, "--limit", "2", "--model", "another") == 0  # tyro takes the last
    assert len(trained(data)) == 2
    teacher.seen.clear()
    monkeypatch.setattr("label_rows.PROMPT_VERSION", "other")
    assert go(data, teacher, "--limit", "1") == 0 and len(teacher.seen) == 1


def test_a_trial_asks_about_the_first(data, teacher):
    assert go(data, teacher, "--limit", "2") == 0
    assert sorted(teacher.asked) == ["w0", "w1"]
    assert go(data, teacher) == 0
    assert teacher.asked == Counter(f"w{i}" for i in range(6))
    assert go(data, teacher, "--limit", "2") == 0 and len(trained(data)) == 6


def test_the_same_question_and_pictures_are_asked_once(data, teacher):
    rows = json.loads(data.read_text())
    write(data, [rows[0], rows[1], rows[0] | {"id": 99}])
    assert go(data, teacher) == 0
    assert teacher.asked == Counter(w0=1, w1=1)
    assert [row["id"] for row in trained(data)] == [10, 11, 99]


def test_training_style_and_jsonl(data, teacher):
    rows = json.loads(data.read_text())
    human = "Image-1: <image>\n\nImage-2: <image>\n\nWhat about w7"
    (data.parent / "img/a.gif").write_bytes(b"")
    Image.new("L", (40, 40), 128).save(data.parent / "img/a.gif")
    turns = [{"from": "human", "value": human}, {"from": "gpt", "value": "an older answer"}]
    pictures = [str(data.parent.absolute() / "img/a.gif"), rows[0]["image_path1"]]
    other = {"image": pictures, "conversations": turns}
    path = data.parent / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in (rows[0], other)) + "\n\n")
    root = data.parent
    data = path.with_name("sub") / path.name
    data.parent.mkdir()
    path.rename(data)
    assert go(data, teacher, "--root", str(root)) == 0
    first, second = trained(data)
    assert first["id"] == 10 and second["id"] == "1"
    assert second["image"] == ["img/a.gif", "img/0/object1.png"] and "category" not in second
    assert second["conversations"][0]["value"] == "<image>\n<image>\nWhat about w7"
    assert "older" not in second["conversations"][1]["value"]
    sent = next(body for word, body, _ in teacher.seen if word == "w7")
    urls = [part["image_url"]["url"][:15] for part in sent["messages"][0]["content"][:2]]
    assert urls == ["data:image/png;"] * 2  # servers do not all know GIF


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"image_path2": "img/none.png"}, "none.png does not exist"),
        ({"image_path2": "mine.json"}, "no image format fits its header"),
        ({"image_path3": "img/0/object1.png"}, "3 pictures where exactly two are needed"),
        ({"image_path2": None}, "must name picture files"),
        ({"question": " "}, "the question is missing"),
        ({"question": "what of <image> here"}, "stands inside the question"),
        ({"image_path1": "/elsewhere/a.png"}, "lies outside"),
    ],
)
def test_bad_rows_are_refused_before_any_request(data, teacher, change, said, capsys):
    rows = json.loads(data.read_text())
    rows[5] |= change
    write(data, {str(i): row for i, row in enumerate(rows)})
    assert go(data, teacher) == 2
    error = capsys.readouterr().err
    assert said in error and "mine.json, row 5" in error and error.count("\n") == 1
    assert teacher.seen == []


@pytest.mark.parametrize("content", ["[", "[]", '"rows"', "[1]"])
def test_bad_files_are_refused(data, teacher, content, capsys):
    data.write_text(content)
    assert go(data, teacher) == 2
    assert "mine.json" in capsys.readouterr().err
    data.write_text('[{"conversations": [], "image": ["a.png"]}]')
    assert go(data, teacher) == 2
    assert go(data.with_name("absent.json"), teacher) == 2


def test_a_damaged_picture_is_an_error_of_its_sample(data, teacher, capsys):
    path = data.parent / "img/3/object2.png"
    path.write_bytes(path.read_bytes()[:-40])
    assert go(data, teacher) == 1
    assert "no label: 1 error (picture) (id 13)" in capsys.readouterr().err
    assert len(teacher.seen) == 5


def test_a_review_and_back(data, teacher, capsys):
    teacher.plan = {
        "w1": [say(f"- {LABEL}\n\n**Stay safe**")],
        "w2": [say("HARMLESS: nothing can happen.")],
        "w3": [say("I cannot help with that.")],
        "w4": [say("The first picture", "length")],
    }
    assert go(data, teacher) == 1
    out = data.parent / "labels"
    rows = table(out / "review.csv")
    assert [row["id"] for row in rows] == ["10", "11", "12", "13", "14", "15"]
    assert rows[1]["flags"] == "markup"
    for row, (ok, note) in zip(
        rows, [("no", "too vague"), ("YES", ""), ("no", ""), ("y", "mine"), ("N", ""), ("", "")],
        strict=True,
    ):  # fmt: skip
        row["ok"], row["note"] = ok, note
    rows[1]["label"] = LABEL.format(a="w1", b="chair") + "\r\nGladly."
    rows[3]["label"] = LABEL.format(a="w3", b="chair")
    checked = data.parent / "checked.csv"
    save_table(checked, rows)
    teacher.seen.clear()
    assert go(data, teacher, "--review", str(checked)) == 0
    assert teacher.asked == Counter(w4=1)  # cut off: asked again, and cut off again
    answers = {row["id"]: row["conversations"][1]["value"] for row in trained(data)}
    assert sorted(answers) == [11, 13, 15]
    assert answers[11].endswith("looked after.\nGladly.") and "chair" in answers[13]

    # The decisions are in OUT now, and a copy that was left open takes none away.
    for row in rows:
        row["ok"] = row["note"] = ""
    rows[1]["label"] = f"- {LABEL}\n\n**Stay safe**"
    rows[3]["label"] = "I cannot help with that."
    save_table(checked, rows)
    for more in ([], ["--review", str(checked)]):
        assert go(data, teacher, *more) == 0
        kept = table(out / "review.csv")
        assert [row["ok"] for row in kept] == ["no", "yes", "no", "yes", "no", ""]
        assert kept[0]["note"] == "too vague" and kept[3]["flags"] == ""
        assert sorted(row["id"] for row in trained(data)) == [11, 13, 15]

    # A reply that changes is open again; what was decided about the old one is kept.
    teacher.plan = {}
    capsys.readouterr()
    assert go(data, teacher) == 0
    kept = table(out / "review.csv")
    assert kept[4]["ok"] == "" and kept[-1] == kept[-1] | {"id": "14", "flags": "outdated"}
    assert sorted(row["id"] for row in trained(data)) == [11, 13, 14, 15]
    assert "have changed since, not used: 1" in capsys.readouterr().err


def test_a_review_that_says_too_little_is_refused(data, teacher, capsys):
    teacher.plan = {"w2": [say("HARMLESS: nothing can happen.")]}
    assert go(data, teacher) == 1
    path = data.parent / "labels/review.csv"
    rows = table(path)

    def refused(change: int, said: str, **fields: str) -> None:
        save_table(path, [row | (fields if i == change else {}) for i, row in enumerate(rows)])
        before = path.read_bytes()
        assert go(data, teacher) == 2
        assert said in capsys.readouterr().err and path.read_bytes() == before

    data.write_text(data.read_text().replace("w5", "w6"))  # there is something left to ask
    refused(0, "id 10: column 'ok' is 'perhaps'", ok="perhaps")
    refused(1, "id 11: the label was changed but 'ok' is empty", label="Something else.")
    refused(2, "id 12: 'ok' is yes but there is no label (harmless)", ok="yes")
    path.write_text("id;label;ok\n")
    assert go(data, teacher) == 2 and "column 'label' is missing" in capsys.readouterr().err
    path.unlink()
    assert go(data, teacher, "--review", str(path)) == 2
    assert len(teacher.seen) == 6


def test_two_runs_in_one_folder_and_foreign_logs_are_refused(data, teacher, capsys):
    (data.parent / "labels").mkdir()
    path = data.parent / "labels/labels.jsonl"
    with tool.AppendLog(path):
        assert go(data, teacher) == 2
    assert "another process" in capsys.readouterr().err
    path.write_text('{"id": 3}\n')
    assert go(data, teacher) == 2
    assert "not a log of this script" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "flags"),
    [
        (LABEL, []),
        ("I'm so sorry. " + LABEL, ["apology-first"]),
        ("I can’t do that. " + LABEL, ["apology-first"]),
        (LABEL.replace("first", "left").replace("second", "right picture"), []),
        (LABEL.replace("the second shows", "there is"), ["not-both-images"]),
        (f"# What they show\n{LABEL}", ["markup"]),
        (f"{LABEL}\n1. Put it away.", ["markup"]),
        (f"<think>hm</think> {LABEL}", ["markup"]),
        ("Both pictures show a cup.", ["short"]),
        (LABEL * 6, ["long"]),
        (f"{LABEL} So this question is actually harmless.", ["says-harmless"]),
        (f"{LABEL} Put together, this is not harmless.", []),
        (f"{LABEL} By itself a toaster is a harmless thing.", []),
    ],
)
def test_flags(text, flags):
    assert label_prompt.find_flags(text) == flags


def test_the_teachers_words_for_no():
    for text in (
        "HARMLESS: fine",
        "**Harmless**: fine",
        "harmless.",
        "Harmless – fine",
        "HARMLESS",
    ):
        assert label_prompt.is_harmless(text)
    for text in ("Harmless as a candle looks, it burns.", "Harmless-looking: a candle and a key."):
        assert not label_prompt.is_harmless(text)
    for text in ("I'm sorry, I can't help.", "Sorry.", "I am unable to help.", "Unfortunately, no"):
        assert label_prompt.is_refusal(text)
    assert not label_prompt.is_refusal("The pictures show a key. I can't help with that.")
    assert not label_prompt.is_refusal(f"I'm sorry. {LABEL}")


def test_help_and_bad_options(data, teacher, capsys):
    with pytest.raises(SystemExit) as stopped:
        tool.main(["--help"])
    assert stopped.value.code == 0
    assert "python tools/write_labels.py mine.json labels" in capsys.readouterr().out
    for wrong in (["--concurrency", "0"], ["--limit", "-1"], ["--timeout", "0"]):
        with pytest.raises(SystemExit) as stopped:
            go(data, teacher, *wrong)
        assert stopped.value.code == 2 and wrong[0] in capsys.readouterr().err
