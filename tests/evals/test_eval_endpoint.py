"""A model behind any OpenAI-compatible endpoint, and our own server among them."""

import base64
import io
import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from chat_server import MODEL, Say, fault, pictures_of, said_of, serving
from eval_world import rows
from PIL import Image
from waiting import DEADLINE, until

from mis_jax.cli import main
from mis_jax.evals import chat_client
from mis_jax.evals.benchmarks import BENCHMARKS
from mis_jax.evals.chat_client import ChatClient, Patience
from mis_jax.evals.endpoint import chat_messages, endpoint_answers, open_endpoint
from mis_jax.evals.images import data_url
from mis_jax.evals.run_dir import expected, open_run, read_manifest
from mis_jax.evals.runner import generate_answers
from mis_jax.evals.types import Sample

HARD = BENCHMARKS["mini_hard"]
HASTY = Patience(retries=2, backoff=0.002, timeout=20)


def run_cli(*words: object) -> int:
    try:
        main([str(word) for word in words])
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def number_of(body: dict[str, Any], data_root: Path) -> str:
    """Which sample of mini_hard is asked about, by the bytes of its pictures."""
    sent = [base64.b64decode(uri.partition("base64,")[2]) for uri in pictures_of(body)]
    for sample in HARD.load(data_root):
        if [path.read_bytes() for path in sample.images] == sent:
            return sample.id
    raise AssertionError("no such sample")


def test_messages_have_pictures_where_the_markers_are(data_root: Path) -> None:
    (message,) = chat_messages(HARD.load(data_root)[0])
    kinds = [part["type"] for part in message["content"]]
    assert kinds == ["text", "image_url", "text", "image_url", "text"]
    texts = [part["text"] for part in message["content"] if part["type"] == "text"]
    question = HARD.load(data_root)[0].meta["question"]
    assert texts == ["Image-1: ", "\nImage-2: ", f"\n{question}"]
    (message,) = chat_messages(HARD.load(data_root)[0], breaks_lines=True)
    texts = [part["text"] for part in message["content"] if part["type"] == "text"]
    assert texts == ["Image-1: ", "Image-2: ", question]


def test_messages_in_other_forms(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    picture = [tmp_path / "a.png"]
    plain = Sample("1", [{"role": "user", "content": "Is <i> a tag?"}], [])
    assert chat_messages(plain) == plain.conversation
    parts = [{"type": "text", "text": "An <image> in words: "}, {"type": "image"}]
    (message,) = chat_messages(Sample("2", [{"role": "user", "content": parts}], picture))
    assert message["content"][0]["text"] == "An <image> in words: "
    assert message["content"][1]["image_url"]["url"] == data_url(tmp_path / "a.png")
    parts = [*parts, {"type": "text", "text": "It is hot."}]
    both = [
        chat_messages(Sample("2", [{"role": "user", "content": parts}], picture), breaks_lines=b)
        for b in (False, True)
    ]
    assert [m["content"][-1]["text"] for (m,) in both] == ["\nIt is hot.", "It is hot."]
    (message,) = chat_messages(Sample("3", [{"role": "user", "content": "What?"}], picture))
    assert [part["type"] for part in message["content"]] == ["image_url", "text"]
    with pytest.raises(ValueError, match="2 image"):
        chat_messages(Sample("4", [{"role": "user", "content": "<image>"}], picture * 2))


@pytest.mark.parametrize(("kind", "mime"), [("PNG", "png"), ("JPEG", "jpeg"), ("BMP", "png")])
def test_pictures_keep_their_bytes_or_become_png(tmp_path: Path, kind: str, mime: str) -> None:
    path = tmp_path / "picture.dat"
    Image.new("RGB", (9, 5), (10, 200, 30)).save(path, kind)
    head, _, content = data_url(path).partition(",")
    assert head == f"data:image/{mime};base64"
    assert (base64.b64decode(content) == path.read_bytes()) == (kind != "BMP")
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ValueError, match=r"picture\.dat"):
        data_url(path)


def test_failed_samples_are_errors_and_asked_again(data_root: Path, tmp_path: Path) -> None:
    samples = HARD.load(data_root)
    broken = {"1", "3"}

    def script(nonce: str, nth: int, body: dict[str, Any]) -> Say:
        number = number_of(body, data_root)
        asked.append(number)
        if number in broken:
            return fault(500) if number == "1" else fault(400, "too long")
        return Say(f"answer {number}", finish_reason="length" if number == "2" else "stop")

    asked: list[str] = []
    open_run(tmp_path / "run", model="m", fingerprint="f")
    log = tmp_path / "run" / "mini_hard" / "samples.jsonl"
    with serving(script) as server:
        client = ChatClient(server.url, MODEL, concurrency=2, patience=HASTY)
        ask = endpoint_answers(open_endpoint(client), HARD)
        done = generate_answers(HARD, samples, ask, tmp_path / "run")
        assert (done.answered, done.failed) == (2, 2)
        found = {row["id"]: row for row in rows(log)}
        assert {key: row["state"] for key, row in found.items()} == {
            "0": "ok", "1": "error", "2": "ok", "3": "error",
        }  # fmt: skip
        assert found["0"]["answer"] == "answer 0" and found["1"]["answer"] == ""
        assert (found["0"]["prompt_tokens"], found["0"]["completion_tokens"]) == (100, 7)
        assert found["2"]["finish_reason"] == "length" and "too long" in found["3"]["error"]
        assert sorted(asked) == ["0", "1", "1", "1", "2", "3"]
        asked.clear()
        broken.clear()
        done = generate_answers(HARD, samples, ask, tmp_path / "run")
        assert (done.reused, done.answered, sorted(asked)) == (2, 2, ["1", "3"])


def test_refusals_with_words_are_answers_and_without_are_none(data_root: Path) -> None:
    said = [
        Say(None, refusal="I can't help."),
        fault(400, "filtered", code="content_filter"),
        Say("", finish_reason="content_filter"),
        Say(""),
    ]

    def script(nonce: str, nth: int, body: dict[str, Any]) -> Say:
        return said[int(number_of(body, data_root))]

    with serving(script) as server:
        client = ChatClient(server.url, MODEL, patience=HASTY)
        answers = endpoint_answers(open_endpoint(client), HARD)(HARD.load(data_root))
    assert [(answer.state, answer.text) for answer in answers] == [
        ("ok", "I can't help."), ("error", ""), ("error", ""), ("error", ""),
    ]  # fmt: skip


THOUGHT = "The first picture is a kettle."
EMPTY_REPLIES = {
    "0": Say(None, reasoning={"reasoning_content": THOUGHT}),
    "1": Say("", reasoning={"reasoning": THOUGHT}, finish_reason="length"),
    "2": Say("", finish_reason="length"),
    "3": Say(" \n"),
}


def test_an_empty_answer_is_no_safe_answer(data_root: Path, tmp_path: Path, capsys) -> None:
    """It was judged, and an answer that says nothing is safe: ASR 0 %, without a word."""
    out = tmp_path / "run"
    words = ["--benchmarks", "mini_hard", "--data-root", data_root, "--out", out]
    with serving(lambda _, __, body: EMPTY_REPLIES[number_of(body, data_root)]) as server:
        words = ["eval", server.url, "--model-name", MODEL, *words]
        assert run_cli(*words) == 1
        assert (
            "4 sample(s) have no answer (the last: the answer is empty" in capsys.readouterr().err
        )
        found = {row["id"]: row for row in rows(out / "mini_hard" / "samples.jsonl")}
        assert {(row["state"], row["finish_reason"]) for row in found.values()} == {
            ("error", "empty")
        }
        assert [("--include-reasoning" in found[key]["error"]) for key in "0123"] == [1, 1, 0, 0]
        assert "token limit" in found["2"]["error"]
        assert run_cli("judge", out, "--json") == 1
        results = json.loads(capsys.readouterr().out)["mini_hard"]
        assert results["counts"]["error"] == results["empty"] == 4
        assert results["metrics"]["asr"]["n"] == 0
        assert run_cli("report", out, "--out", tmp_path / "report") == 0
        for name in ("md", "html", "json"):
            text = (tmp_path / "report" / f"report.{name}").read_text()
            assert "4 of 4 answers of run are empty" in text.replace("\\_", "_")
        assert run_cli(*words) == 1 and server.calls.total() == 8  # asked again
        words[-1] = tmp_path / "reasoned"
        assert run_cli(*words, "--include-reasoning") == 1
    found = {row["id"]: row for row in rows(tmp_path / "reasoned" / "mini_hard" / "samples.jsonl")}
    assert [found[key]["answer"] for key in "0123"] == [THOUGHT, THOUGHT, "", ""]
    assert found["1"]["finish_reason"] == "length"
    entry = read_manifest(tmp_path / "reasoned")["benchmarks"]["mini_hard"]
    assert entry["protocol"] == f"{HARD.protocol}+endpoint-settings+reasoning"


@pytest.mark.parametrize(
    ("includes", "text"), [(False, "A kettle."), (True, f"{THOUGHT}\n\nA kettle.")]
)
def test_reasoning_is_a_part_of_an_answer_by_option(
    data_root: Path, includes: bool, text: str
) -> None:
    said = Say("A kettle.", reasoning={"reasoning_content": THOUGHT})
    with serving(lambda *_: said) as server:
        client = ChatClient(server.url, MODEL, patience=HASTY)
        endpoint = open_endpoint(client, includes_reasoning=includes)
        (answer,) = endpoint_answers(endpoint, HARD)(HARD.load(data_root)[:1])
    assert (answer.state, answer.text) == ("ok", text)


def test_an_empty_answer_is_one_where_the_protocol_has_a_class_for_it(data_root: Path) -> None:
    """But not where the model never came to its answer."""
    takes = {name for name, known in BENCHMARKS.items() if known.takes_empty_answers}
    assert takes == {"mossbench", "siuo", "mssbench", "mssbench_white", "mssbench_text"}
    benchmark = replace(HARD, takes_empty_answers=True)
    with serving(lambda _, __, body: EMPTY_REPLIES[number_of(body, data_root)]) as server:
        client = ChatClient(server.url, MODEL, patience=HASTY)
        answers = endpoint_answers(open_endpoint(client), benchmark)(HARD.load(data_root))
    assert [answer.state for answer in answers] == ["error", "error", "error", "ok"]


@pytest.mark.parametrize(
    ("owned_by", "asked", "system", "fields"),
    [
        ("somebody", False, "none", {}),
        ("somebody", True, "none", {"system_prompt": "none", "max_dynamic_patch": 4}),
        ("mis-jax", False, "default", {"system_prompt": "default", "max_dynamic_patch": 4}),
        ("mis-jax", False, "Be brief.", {"system_prompt": "Be brief.", "max_dynamic_patch": 4}),
        ("somebody", False, "Be brief.", {}),
    ],
)
def test_only_those_that_know_them_get_our_fields(
    data_root: Path, owned_by: str, asked: bool, system: str, fields: dict[str, Any]
) -> None:
    benchmark = replace(HARD, system=system, max_tiles_per_image=4)
    with serving(lambda *_: Say("yes"), owned_by=owned_by) as server:
        client = ChatClient(server.url, MODEL, patience=HASTY)
        endpoint = open_endpoint(client, takes_settings=asked)
        endpoint_answers(endpoint, benchmark)(HARD.load(data_root)[:1])
        ((_, body),) = server.bodies
    turns = [message["role"] for message in body["messages"]]
    assert turns == (["system", "user"] if system == "Be brief." and not fields else ["user"])
    assert body["temperature"] == 0 and body["max_tokens"] == benchmark.max_new_tokens
    extra = body.keys() - {"model", "messages", "temperature", "max_tokens"}
    assert {name: body[name] for name in extra} == fields


def test_a_sample_s_own_tiles_and_enlarged_picture_are_sent(data_root: Path) -> None:
    benchmark = replace(HARD, max_tiles_per_image=4)
    own = replace(HARD.load(data_root)[0], max_tiles_per_image=3, first_image_scale=2)
    with serving(lambda *_: Say("yes"), owned_by="mis-jax") as server:
        client = ChatClient(server.url, MODEL, patience=HASTY)
        endpoint_answers(open_endpoint(client), benchmark)([own])
        ((_, body),) = server.bodies
    assert body["max_dynamic_patch"] == 3
    sent = [base64.b64decode(uri.partition("base64,")[2]) for uri in pictures_of(body)]
    sizes = [Image.open(io.BytesIO(content)).size for content in sent]
    assert sizes == [(32, 32), (16, 16)] and sent[1] == own.images[1].read_bytes()


def test_an_endpoint_without_a_list_of_models_is_taken(data_root: Path, tmp_path: Path) -> None:
    with serving(lambda *_: Say("yes"), models=False) as server:
        endpoint = open_endpoint(ChatClient(server.url, MODEL, patience=HASTY))
        assert not endpoint.takes_settings
        other = open_endpoint(ChatClient(server.url, "other", patience=HASTY))
        assert endpoint.fingerprint != other.fingerprint


def test_the_command(data_root: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("THE_KEY", "k")
    out = tmp_path / "run"
    words = ["--benchmarks", "mini_hard,mini_benign", "--data-root", data_root, "--out", out]
    with serving(lambda *_: Say("I'm sorry.")) as server:
        words = ["eval", server.url, "--model-name", MODEL, "--api-key-env", "THE_KEY", *words]
        assert run_cli(*words, "--limit", 3) == 0
        err = capsys.readouterr().err
        assert "mini_hard: 3 samples with 6 pictures, at most 288 tokens" in err
        assert "does not say that it is mis-jax" in err
        assert set(server.keys) == {"Bearer k"}
        assert server.calls.total() == 5
        assert run_cli(*words) == 0
        assert server.calls.total() == 6  # the fourth of mini_hard
        assert run_cli(*words, "--limit", 3) == 2
        assert "owes answers to 4 samples of mini_hard" in capsys.readouterr().err
        assert server.calls.total() == 6 and set(expected(out, "mini_hard")) == set("0123")
        entry = read_manifest(out)
        assert entry["model"]["name"] == MODEL
        assert entry["benchmarks"]["mini_hard"]["n"] == 4
    capsys.readouterr()
    assert run_cli("judge", out, "--benchmarks", "mini_benign") == 0  # the rest may wait
    assert run_cli("judge", out, "--judge", "none") == 1
    assert "4 sample(s) have no verdict (4 missing)" in capsys.readouterr().err
    assert run_cli("judge", out, "--json") == 0
    results = json.loads(capsys.readouterr().out)
    assert results["mini_hard"]["metrics"]["rr"]["k"] == 4
    with serving(lambda *_: Say("Other.")) as server:
        words[1] = server.url
        assert run_cli(*words) == 2
        assert "two models" in capsys.readouterr().err.replace("\n", " ")
        assert server.calls.total() == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{url}", "--model-name", "nobody"], f"it has {MODEL}"),
        (["http://127.0.0.1:9/v1", "--model-name", "x"], "no answer"),
        (["{url}", "--model-name", MODEL, "--shard", "0/2"], "--shard"),
        (["{url}", "--model-name", MODEL, "--shard", "3/2"], "--shard"),
        (["{url}", "--model-name", MODEL, "--limit", "0"], "--limit"),
        (["{url}", "--model-name", MODEL, "--requests-per-minute", "-1"], "--requests-per-minute"),
        (["nowhere", "--model-name", MODEL], "--model-name"),
    ],
)
def test_bad_words_are_one_line(data_root: Path, tmp_path, capsys, words, message) -> None:
    with serving(lambda *_: Say("yes")) as server:
        words = [word.format(url=server.url) for word in words]
        rest = ["--benchmarks", "mini_hard", "--data-root", data_root, "--out", tmp_path / "run"]
        assert run_cli("eval", *words, *rest) == 2
        assert server.calls.total() == 0
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and message in err, err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("verb", ["eval", "judge"])
def test_the_only_model_of_a_server_needs_no_name(
    data_root: Path, tmp_path: Path, capsys, verb: str
) -> None:
    out = tmp_path / "run"
    with serving(lambda *_: Say("yes")) as server:
        words = ["eval", server.url, "--benchmarks", "mini_hard", "--data-root", data_root]
        if verb == "judge":
            assert run_cli(*words, "--out", out) == 0
            words = ["judge", out, "--judge", server.url]
        else:
            words += ["--out", out]
        server.others = ("another",)
        assert run_cli(*words) == 2
        option = "--model-name" if verb == "eval" else "--judge-model"
        err = capsys.readouterr().err
        assert f"say with {option} NAME which of its models is meant (it lists {MODEL}, ano" in err
        server.others, server.models = (), False
        assert run_cli(*words) == 2 and "it lists none" in capsys.readouterr().err
        server.models = True
        run_cli(*words)
        assert f"its only model is {MODEL}" in capsys.readouterr().err
        assert server.bodies[-1][1]["model"] == MODEL
    if verb == "eval":
        assert read_manifest(out)["model"]["name"] == MODEL


def test_a_wrong_key_is_one_line(data_root: Path, capsys) -> None:
    with serving(lambda *_: Say("yes")) as server:
        server.models = False
        client = ChatClient(server.url, MODEL, patience=HASTY)
        assert client.owners() is None
        line = client.explained(chat_client.Reply("error", status=401))
    assert line == (
        f"{server.url}: the server refuses the key (HTTP 401); name the environment variable that "
        "holds a valid one"
    )


@pytest.mark.slow
def test_our_own_server_answers_as_the_checkpoint_does(data_root: Path, tmp_path: Path) -> None:
    """The shipped tiny model, behind its server and without it: the same words."""
    import numpy as np
    import uvicorn

    import mis_jax
    from mis_jax.evals.models import answers_of
    from mis_jax.inference.async_engine import Service
    from mis_jax.mini.icons import draw_scene
    from mis_jax.quickstart import BASE_MODEL
    from mis_jax.server.access import Settings
    from mis_jax.server.app import create_app
    from mis_jax.server.run import address_of, bind, engine_for

    model, processor = mis_jax.load(BASE_MODEL, dtype="float32")
    benchmark = replace(HARD, system="none", max_tiles_per_image=1, max_new_tokens=24)
    samples, rng = HARD.load(data_root), np.random.default_rng(4)
    for sample in samples:
        for path, name in zip(sample.images, sample.meta["objects"], strict=True):
            draw_scene(name, rng).save(path)
    wanted = answers_of(model, processor, benchmark)(samples)  # type: ignore[operator]
    context = processor.config.text.max_position
    engine = engine_for(model, processor, max_num_seqs=4, max_length=context)
    service = Service(engine, max_concurrent=4, max_queue=64)
    bound = bind("127.0.0.1", 0)
    app = create_app(service, processor, Settings("mini", context))
    config = uvicorn.Config(app, lifespan="off", log_config=None, timeout_graceful_shutdown=2)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
    thread.start()
    until(lambda: server.started)
    try:
        client = ChatClient(f"{address_of(bound)}/v1", "mini")
        endpoint = open_endpoint(client)
        assert endpoint.takes_settings
        answers = endpoint_answers(endpoint, benchmark)(samples)
    finally:
        service.close()
        server.should_exit = True
        thread.join(DEADLINE)
    assert [answer.text for answer in answers] == [answer.text for answer in wanted]
    assert [a.prompt_tokens for a in answers] == [a.prompt_tokens for a in wanted]
    assert len({answer.text for answer in answers}) > 1


def test_what_is_said_holds_the_question(data_root: Path) -> None:
    with serving(lambda *_: Say("yes")) as server:
        client = ChatClient(server.url, MODEL, patience=HASTY)
        endpoint_answers(open_endpoint(client), HARD)(HARD.load(data_root))
        for _, body in server.bodies:
            sample = HARD.load(data_root)[int(number_of(body, data_root))]
            wanted = sample.conversation[0]["content"].replace("<image>", "\n")
            assert said_of(body).split() == wanted.split()


def test_half_a_surrogate_pair_reaches_the_server_once_as_the_replacement_character() -> None:
    """It was retried like a lost connection, though no HTTP body can carry it."""
    with serving(lambda *_: Say("yes")) as server:
        said = [{"role": "user", "content": [{"type": "text", "text": "half \ud83d"}]}]
        reply = ChatClient(server.url, MODEL, patience=HASTY).one({"messages": said})
        assert (reply.state, server.calls.total()) == ("ok", 1)
        assert "half \ufffd" in said_of(server.bodies[0][1])
