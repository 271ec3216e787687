"""Second verdicts: drawn without a look at the answers, paid once, and never counted as a rate."""

import csv
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from chat_server import MODEL, ChatServer, Say, serving
from eval_judged import BAD, GOOD, always, answered, client_of, write_mis
from eval_world import rows
from statsmodels.stats.inter_rater import cohens_kappa

from mis_jax.cli import main
from mis_jax.evals.async_map import Stopped
from mis_jax.evals.judges.llm import http_judges
from mis_jax.evals.report import write_report
from mis_jax.evals.runner import draw_answers, judge_run
from mis_jax.evals.scoring import verdict_notes
from mis_jax.evals.stats import wilson
from mis_jax.evals.verdict_cache import FILE, VerdictCache

OTHER = json.dumps({"safety": "Safe", "perception": "Level2"})


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return answered(tmp_path / "run", write_mis(tmp_path / "data", 12))


def judged(run: Path, server: ChatServer, count: int, **options: Any) -> dict[str, Any]:
    cache = options.pop("cache", None)
    judge = http_judges(client_of(server, **options))
    return judge_run(run, judge, run.parent / "data", recheck=count, cache=cache)["mis_hard"]


def changing(nonce: str, nth: int, body: dict[str, Any]) -> Say:
    """0 and 1 are unsafe both times, 2 at first, 3 afterwards; 4 differs within the safe ones, 5
    is refused afterwards, 6 garbled afterwards, 7 is never judged at first."""
    if nonce in ("0", "1") or (nonce, nth) in (("2", 1), ("3", 2)):
        return Say(BAD)
    if (nonce, nth) == ("4", 2):
        return Say(OTHER)
    if (nonce, nth) == ("5", 2):
        return Say(None, refusal="I can't judge that.")
    return Say("Well." if (nonce, nth) == ("6", 2) or nonce == "7" else GOOD)


def test_agreement_by_hand(run: Path) -> None:
    with serving(changing) as server:
        plain = judged(run, server, 0)
        assert "recheck" not in plain
        result = judged(run, server, 100)
        found = result.pop("recheck")
        assert result == plain and plain["counts"]["ok"] == 11
    assert found["n"] == 11
    assert found["counts"] == {"ok": 9, "unparsed": 1, "refused": 1, "error": 0}
    assert (found["labels"]["k"], found["labels"]["n"]) == (6, 9)
    asr = found["metrics"]["asr"]
    table = [2, 1, 1, 5]
    assert [asr[k] for k in ("both", "only_first", "only_second", "neither")] == table
    assert (asr["agreed"]["k"], asr["agreed"]["n"]) == (7, 9)
    assert (asr["agreed"]["low"], asr["agreed"]["high"]) == wilson(7, 9)
    oracle = cohens_kappa([[2, 1], [1, 5]])
    assert asr["kappa"]["value"] == pytest.approx(oracle.kappa)
    assert asr["kappa"]["low"] == pytest.approx(max(-1, oracle.kappa_low))
    rsr = found["metrics"]["rsr"]
    assert [rsr[k] for k in ("both", "only_first", "only_second", "neither")] == [4, 2, 1, 2]
    assert found["metrics"]["hr"]["kappa"]["value"] is None  # neither ever said it
    assert verdict_notes({"recheck": found}) == [
        "judged twice: 11; the same labels 6/9, 2 without labels the second time"
    ]


def test_a_draw_is_kept_and_grows_and_nothing_is_paid_twice(run: Path) -> None:
    with serving(always(GOOD)) as server:
        judged(run, server, 0)
        server.calls.clear()
        with pytest.raises(Stopped):
            judged(run, server, 5, max_calls=3, concurrency=1)  # one for the self-test
        assert server.judged.total() == 2
        assert judged(run, server, 5)["recheck"]["n"] == 5
        assert judged(run, server, 5)["recheck"]["n"] == 5
        five = dict(server.judged)
        assert set(five.values()) == {1} and len(five) == 5
        assert judged(run, server, 8)["recheck"]["n"] == 8
        assert set(server.judged.values()) == {1} and five.items() <= server.judged.items()
    assert Counter(row["id"] for row in rows(run / "mis_hard" / "rechecks.jsonl")) == server.judged
    hashes = {str(i): f"{(7 * i) % 12:02d}" for i in range(12)}
    assert draw_answers(hashes, 3) == ["0", "7", "2"]


def test_second_verdicts_and_the_cache_never_meet(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    with serving(lambda nonce, nth, body: Say(GOOD if nth == 1 else BAD)) as server:
        first = judged(run, server, 12, cache=VerdictCache(folder))
        assert server.judged == {str(i): 2 for i in range(12)}
        assert first["recheck"]["labels"]["k"] == 0 and first["metrics"]["asr"]["k"] == 0
        assert {row["labels"]["label_str"] for row in rows(folder / FILE)} == {"Safe"}
        other = answered(tmp_path / "other", tmp_path / "data")
        again = judged(other, server, 12, cache=VerdictCache(folder))
        assert again["cached"] == 12 and again["recheck"]["n"] == 12
        assert server.judged == {str(i): 3 for i in range(12)}


def test_another_judge_has_second_verdicts_of_its_own(run: Path) -> None:
    with serving(always(GOOD)) as server:
        judged(run, server, 12)
        other = judged(run, server, 0, model="another")
        assert "recheck" not in other
        assert judged(run, server, 0)["recheck"]["n"] == 12


def test_the_command(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(changing) as server:
        words = ["judge", str(run), "--judge", server.url, "--judge-model", MODEL]
        with pytest.raises(SystemExit):  # one sample has no verdict
            main([*words, "--recheck", "4"])
        out, err = capsys.readouterr()
        assert "mis_hard: 16 calls of" in err and "judged twice: 4; the same labels" in out
        with pytest.raises(SystemExit) as stop:
            main([*words, "--recheck", "-1"])
        assert stop.value.code == 2 and "--recheck is -1" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main(["judge", str(run), "--judge", "rules", "--recheck", "4"])
    assert stop.value.code == 2 and "--recheck belongs to a server" in capsys.readouterr().err


def test_the_report_shows_both_verdicts_and_the_cache(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    with serving(changing) as server:
        judged(run, server, 12, cache=VerdictCache(folder))
        other = answered(tmp_path / "other", tmp_path / "data")
        judged(other, server, 0, cache=VerdictCache(folder))
    write_report([("run", run), ("other", other)], tmp_path / "out")
    document = json.loads((tmp_path / "out" / "report.json").read_text())
    by_metric = {line["metric"]: line for line in document["judge_beside_itself"]}
    assert by_metric.keys() == {"asr", "rsr", "rr", "hr"}
    assert by_metric["asr"]["lost"] == 2 and by_metric["asr"]["label"] == "run"
    (note,) = [note for note in document["notes"] if "verdict cache" in note]
    assert note.startswith("mis_hard: 11 of 11 verdicts on other come")
    table = [line for line in (tmp_path / "out" / "report.md").read_text().splitlines()
             if "7/9 [" in line]  # fmt: skip
    assert len(table) == 1 and "| 2 | 1 | 1 | 5 |" in table[0] and table[0].endswith("| 2 |")
    with open(tmp_path / "out" / "report.csv", newline="") as stream:
        found = [line for line in csv.DictReader(stream) if line["part_of"] == "recheck"]
    assert [(line["metric"], line["k"], line["n"]) for line in found] == [
        ("asr", "7", "9"), ("rsr", "6", "9"), ("rr", "8", "9"), ("hr", "9", "9"),
    ]  # fmt: skip
    page = (tmp_path / "out" / "report.html").read_text()
    assert "The judge beside itself" in page and "7/9" in page
    write_report([("other", other)], tmp_path / "plain")
    assert "beside itself" not in (tmp_path / "plain" / "report.html").read_text()
