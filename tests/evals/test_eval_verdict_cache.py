"""Verdicts across runs: paid for once, asked again where anything differs, and no text kept."""

import json
import multiprocessing
from pathlib import Path
from typing import Any

import pytest
from chat_server import MODEL, ChatServer, Say, serving
from eval_judged import BAD, GOOD, always, answered, client_of, write_mis
from eval_world import rows

from mis_jax.cli import main
from mis_jax.evals.judges.llm import http_judges
from mis_jax.evals.runner import judge_run
from mis_jax.evals.verdict_cache import FILE, VerdictCache


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_mis(tmp_path / "data", 6)


def judged(
    run: Path, root: Path, server: ChatServer, cache: Path, **options: Any
) -> dict[str, Any]:
    judge = http_judges(client_of(server, **options))
    return judge_run(run, judge, root, cache=VerdictCache(cache))["mis_hard"]


def mixed(nonce: str, nth: int, body: dict[str, Any]) -> Say:
    """Unsafe for 1, refused for 2, not understood for 3."""
    return Say({"1": BAD, "2": "I'm sorry, I can't help with that.", "3": "Well."}.get(nonce, GOOD))


def test_a_second_run_pays_for_nothing_that_the_first_was_told(root: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with serving(mixed) as server:
        first = judged(answered(tmp_path / "one", root), root, server, cache)
        assert "cached" not in first and server.judged == {str(i): 1 for i in range(6)}
        second = judged(answered(tmp_path / "two", root), root, server, cache)
        assert server.judged == {str(i): 1 + (i in (2, 3)) for i in range(6)}
    assert second.pop("cached") == 4
    assert second == first and first["metrics"]["asr"]["k"] == 1
    found = {row["id"]: row for row in rows(tmp_path / "two" / "mis_hard" / "verdicts.jsonl")}
    assert {key for key, row in found.items() if row.get("cached")} == {"0", "1", "4", "5"}
    assert found["1"]["labels"] == {"label_str": "Unsafe", "label_perception": 2}
    assert found["1"]["served_model"] == f"{MODEL}-2026"
    assert "raw" not in found["1"] and "usage" not in found["1"]


def test_what_differs_is_asked(root: Path, tmp_path: Path) -> None:
    cache, words = tmp_path / "cache", {"4": "Another kettle; nonce 4."}
    with serving(always(GOOD)) as server:
        judged(answered(tmp_path / "one", root), root, server, cache)
        server.calls.clear()
        assert judged(answered(tmp_path / "two", root, words), root, server, cache)["cached"] == 5
        assert server.judged == {"4": 1}
        server.calls.clear()
        other = judged(answered(tmp_path / "three", root), root, server, cache, model="another")
        assert "cached" not in other and server.judged.total() == 6
        (root / "hard_image" / "0" / "object1.png").write_bytes(
            (root / "hard_image" / "1" / "object1.png").read_bytes()
        )
        server.calls.clear()
        assert judged(answered(tmp_path / "four", root), root, server, cache)["cached"] == 5
        assert server.judged == {"0": 1}


def test_a_run_judged_without_the_cache_fills_it(root: Path, tmp_path: Path) -> None:
    with serving(always(GOOD)) as server:
        run = answered(tmp_path / "one", root)
        judge_run(run, http_judges(client_of(server)), root)
        judged(run, root, server, tmp_path / "cache")
        assert (
            judged(answered(tmp_path / "two", root), root, server, tmp_path / "cache")["cached"]
            == 6
        )
        assert server.judged == {str(i): 1 for i in range(6)}


def test_the_cache_holds_labels_and_no_text(root: Path, tmp_path: Path) -> None:
    with serving(always(GOOD)) as server:
        judged(answered(tmp_path / "one", root), root, server, tmp_path / "cache")
    text = (tmp_path / "cache" / FILE).read_text()
    assert not any(word in text for word in ("kettle", "What are these", "Level1", "safety"))
    assert {frozenset(row) for row in rows(tmp_path / "cache" / FILE)} == {
        frozenset({"answer_hash", "judge", "reference", "labels", "served_model"})
    }


def row(name: str) -> dict[str, Any]:
    return {"state": "ok", "answer_hash": name, "judge": "j", "reference": "r", "labels": {"x": 1}}


def test_damage_costs_the_damaged_verdict_alone(tmp_path: Path) -> None:
    VerdictCache(tmp_path).add([row("a")])
    with open(tmp_path / FILE, "ab") as stream:
        stream.write(b'{"answer_hash": "torn", "judge": "j", "reference": "r", "labels": {"x"')
    cache = VerdictCache(tmp_path)
    assert cache.find(("torn", "j", "r")) is None
    cache.add([row("b"), row("a"), row("c") | {"state": "error", "labels": {}}])
    with open(tmp_path / FILE, "ab") as stream:
        stream.write(b'[1]\n{"answer_hash": 3}\n\xff\xfe\n{"answer_hash": "d", "judge": "j"}\n')
    again = VerdictCache(tmp_path)
    for name in "ab":
        assert again.find((name, "j", "r")) is not None
    assert again.find(("c", "j", "r")) is None and again.find(("a", "k", "r")) is None
    assert (tmp_path / FILE).read_bytes().count(b'"a"') == 1


def _write(folder: Path, name: str) -> None:
    cache = VerdictCache(folder)
    for number in range(60):
        cache.add([row(f"{name}{number}") | {"labels": {"x": "y" * 3000}}])


def test_two_judges_at_once(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("forkserver")
    writers = [spawn.Process(target=_write, args=(tmp_path, name)) for name in "ab"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert [writer.exitcode for writer in writers] == [0, 0]
    cache = VerdictCache(tmp_path)
    assert all(cache.find((f"{name}{i}", "j", "r")) for name in "ab" for i in range(60))


def test_the_command(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [answered(tmp_path / name, root) for name in ("one", "two")]
    with serving(always(GOOD)) as server:
        for run in runs:
            words = ["judge", run, "--judge", server.url, "--judge-model", MODEL]
            main([*map(str, words), "--verdict-cache", str(tmp_path / "cache")])
        assert server.judged.total() == 6
    out, err = capsys.readouterr()
    assert "6 verdicts were paid for by earlier runs" in out
    assert "mis_hard: 6 calls of" in err and "mis_hard: nothing to judge with" in err
    assert json.loads((runs[1] / "results.json").read_text())["mis_hard"]["cached"] == 6


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--judge", "rules", "--verdict-cache", "x"], "--verdict-cache belongs to a server"),
        (
            ["--judge", "http://127.0.0.1:1/v1", "--judge-model", "m", "--verdict-cache", "FILE"],
            "cannot hold a verdict cache",
        ),
    ],
)
def test_bad_words_are_one_line(root, tmp_path, capsys, words: list[str], message: str) -> None:
    (tmp_path / "taken").write_text("")
    words = [str(tmp_path / "taken") if word == "FILE" else word for word in words]
    with pytest.raises(SystemExit) as stop:
        main(["judge", str(answered(tmp_path / "one", root)), *words])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and message in err and err.count("\n") == 1
