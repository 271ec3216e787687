"""Shards of a benchmark over several runs, and one run out of them."""

import json
from pathlib import Path

import pytest
from eval_world import answering, careful, helpful, rows

from mis_jax.cli import main
from mis_jax.evals.benchmarks import BENCHMARKS
from mis_jax.evals.judges import get_judge
from mis_jax.evals.merge import merge_runs
from mis_jax.evals.report import write_report
from mis_jax.evals.run_dir import expected, known_facts, open_run, read_manifest
from mis_jax.evals.runner import Part, generate_answers, judge_run, part_from
from mis_jax.evals.types import Sample

HARD, BENIGN = BENCHMARKS["mini_hard"], BENCHMARKS["mini_benign"]


def speak(sample: Sample) -> str:
    return (helpful if sample.id == "2" else careful)(sample.meta["objects"])


def evaluated(
    folder: Path, data_root: Path, part: Part, name: str = "mini_hard", model: str = "f",
    judge: bool = True,
) -> Path:  # fmt: skip
    """A run over a part of a benchmark."""
    open_run(folder, model=model, fingerprint=model, data_root=data_root)
    benchmark = BENCHMARKS[name]
    samples = benchmark.load(data_root)
    described = part.described(len(samples))
    generate_answers(benchmark, part.of(samples), answering(speak), folder, part=described)
    if judge:
        judge_run(folder, None, data_root)
    return folder


@pytest.mark.parametrize("n", [1, 2, 3, 7])
@pytest.mark.parametrize("size", [0, 1, 5, 23])
def test_shards_are_a_division(n: int, size: int) -> None:
    samples = [Sample(str(i), [], []) for i in range(size)]
    parts = [part_from(None, f"{i}/{n}").of(samples) for i in range(1, n + 1)]
    ids = [sample.id for part in parts for sample in part]
    assert sorted(ids, key=int) == [sample.id for sample in samples]
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert all(int(s.id) % n == i for i, part in enumerate(parts) for s in part)


def test_a_limit_comes_before_the_division() -> None:
    samples = [Sample(str(i), [], []) for i in range(9)]
    assert [s.id for s in part_from(4, "2/2").of(samples)] == ["1", "3"]
    assert part_from(None, None).described(9) is None
    assert part_from(3, None).described(9) == {"limit": 3, "shard": 1, "shards": 1, "of": 9}


@pytest.mark.parametrize("shard", ["0/2", "3/2", "1", "a/b", "1/0", "-1/2", "1/2/3"])
def test_a_bad_shard_is_named(shard: str) -> None:
    with pytest.raises(ValueError, match=r"--shard is .* such as 1/4"):
        part_from(None, shard)


@pytest.mark.parametrize("judged", [True, False])
def test_merged_shards_are_the_whole_run(data_root: Path, tmp_path: Path, judged: bool) -> None:
    whole = evaluated(tmp_path / "whole", data_root, Part())
    shards = [
        evaluated(tmp_path / f"s{i}", data_root, part_from(None, f"{i}/3"), judge=judged)
        for i in (3, 1, 2)
    ]
    out = tmp_path / "merged"
    results = merge_runs(shards, out)
    assert list(expected(out, "mini_hard").items()) == list(expected(whole, "mini_hard").items())
    if not judged:
        assert results["mini_hard"]["counts"]["missing"] == 4
        results = judge_run(out, None, data_root)
    assert results == json.loads((whole / "results.json").read_text())
    assert results == json.loads((out / "results.json").read_text())
    assert results["mini_hard"]["metrics"]["asr"]["k"] == 1
    assert known_facts(out, "mini_hard") == known_facts(whole, "mini_hard") != {}
    before = rows(out / "mini_hard" / "verdicts.jsonl")
    assert judge_run(out, None, data_root) == results  # nothing is judged again
    assert rows(out / "mini_hard" / "verdicts.jsonl") == before and len(before) == 4
    entry, alone = (read_manifest(r)["benchmarks"]["mini_hard"] for r in (out, whole))
    assert entry["n"] == 4 and entry["part"] is None
    assert {k: v for k, v in entry.items() if k != "groups"} == {
        k: v for k, v in alone.items() if k != "groups"
    }


def test_failed_answers_and_states_survive(data_root: Path, tmp_path: Path) -> None:
    one = evaluated(tmp_path / "s1", data_root, part_from(None, "1/2"))
    two = evaluated(tmp_path / "s2", data_root, part_from(None, "2/2"))
    for run, file, changed in (
        (one, "samples.jsonl", {"state": "error", "answer": "", "finish_reason": "error"}),
        (two, "verdicts.jsonl", {"state": "refused", "labels": {}}),
    ):
        log = run / "mini_hard" / file
        first, *others = rows(log)
        log.write_text("".join(json.dumps(row) + "\n" for row in (first | changed, *others)))
    counts = merge_runs([one, two], tmp_path / "out")["mini_hard"]["counts"]
    assert counts == {"ok": 2, "unparsed": 0, "refused": 1, "error": 1, "missing": 0}


def test_other_benchmarks_of_the_same_model(data_root: Path, tmp_path: Path) -> None:
    hard = evaluated(tmp_path / "hard", data_root, Part())
    benign = evaluated(tmp_path / "benign", data_root, Part(limit=1), "mini_benign")
    results = merge_runs([hard, benign], tmp_path / "out")
    assert {name: entry["n"] for name, entry in results.items()} == {
        "mini_hard": 4, "mini_benign": 1,
    }  # fmt: skip
    assert read_manifest(tmp_path / "out")["benchmarks"]["mini_benign"]["part"]["limit"] == 1


def test_what_does_not_fit_is_refused(data_root: Path, tmp_path: Path) -> None:
    def run(name: str, part: Part, **options) -> Path:
        return evaluated(tmp_path / name, data_root, part, **options)

    first, second = run("s1", Part(None, 1, 2)), run("s2", Part(None, 2, 2))
    out = tmp_path / "out"
    for runs, message in (
        ([first], r"shard 2/2 is missing"),
        ([run("t3", Part(None, 3, 3)), run("t1", Part(None, 1, 3))], r"shard 2/3 is missing"),
        ([first, run("again", Part(None, 1, 2)), second], r"a part occurs twice"),
        ([first, run("third", Part(None, 2, 3))], r"different divisions"),
        ([run("w1", Part()), run("w2", Part())], r"a part occurs twice"),
        ([first, run("other", Part(None, 2, 2), model="g")], r"merge runs of one model"),
        ([first, run("pending", Part(None, 2, 2), judge=False)], r"judge .* merge before judging"),
        ([first, tmp_path / "nowhere"], r"nowhere"),
    ):
        with pytest.raises(ValueError, match=message):
            merge_runs(runs, out)
        assert not out.exists()
    out.mkdir()
    (out / "x").touch()
    with pytest.raises(ValueError, match="not empty"):
        merge_runs([first, second], out)


def test_a_part_never_takes_the_place_of_more(data_root: Path, tmp_path: Path, capsys) -> None:
    """`--limit` into a finished run made 9 of 24 to 2 of 5 without a word."""
    run = evaluated(tmp_path / "run", data_root, Part())
    before = {path: path.read_bytes() for path in run.rglob("*.json*")}
    for part in (Part(limit=3), Part(None, 2, 2)):
        with pytest.raises(ValueError, match=r"owes answers to 4 samples of mini_hard, .*--limit"):
            evaluated(run, data_root, part)
    assert {path: path.read_bytes() for path in run.rglob("*.json*")} == before
    small = evaluated(tmp_path / "small", data_root, Part(limit=2))
    capsys.readouterr()
    main(["judge", str(small), "--judge", "none"])
    assert "mini_hard (2 of 4 asked)" in capsys.readouterr().out
    results = json.loads((small / "results.json").read_text())
    assert (results["mini_hard"]["n"], results["mini_hard"]["of"]) == (2, 4)
    write_report([("small", small), ("whole", run)], tmp_path / "out")
    texts = {path.suffix: path.read_text() for path in (tmp_path / "out").iterdir()}
    asked = "2 of 4 samples asked"
    assert texts[".md"].count(asked) == 4 and texts[".html"].count(asked) == 5  # each rate's cell
    assert "was asked 2 of the set's 4 samples" in texts[".tex"] and ",4\n" in texts[".csv"]
    assert "(small, 0 of 2, with 2 of the set's 4 asked)" in json.loads(texts[".json"])["headline"]
    grown = evaluated(small, data_root, Part())  # more may follow
    assert "of" not in json.loads((grown / "results.json").read_text())["mini_hard"]


def test_a_judge_that_is_refused_leaves_no_name(data_root: Path, tmp_path: Path, capsys) -> None:
    """Its name stood in the manifest of one shard, and merge refused the two for it."""
    shards = [
        evaluated(tmp_path / f"s{i}", data_root, Part(None, i, 2), judge=False) for i in (1, 2)
    ]
    before = read_manifest(shards[0])
    with pytest.raises(SystemExit):
        main(["judge", str(shards[0]), "--judge", "options"])
    assert "is not judged by vlmevalkit-options-1" in capsys.readouterr().err
    assert read_manifest(shards[0]) == before
    assert merge_runs(shards, tmp_path / "out")["mini_hard"]["counts"]["missing"] == 4
    judge_run(shards[1], None, data_root)
    judged = read_manifest(shards[1])
    with pytest.raises(ValueError, match="options"):
        judge_run(shards[1], get_judge("options"), data_root)
    assert read_manifest(shards[1]) == judged  # the one that did judge keeps its place


def test_the_command(data_root: Path, tmp_path: Path, capsys) -> None:
    runs = [evaluated(tmp_path / f"s{i}", data_root, Part(None, i, 2)) for i in (1, 2)]
    main(["merge", str(tmp_path / "out"), *map(str, runs)])
    assert capsys.readouterr().out == "mini_hard: 4 samples (4 ok)\n"
    with pytest.raises(SystemExit) as stopped:
        main(["merge", str(tmp_path / "out2"), str(runs[0])])
    assert stopped.value.code == 2
    assert "at least two" in capsys.readouterr().err
