"""What the benchmarks make of seconds: medians, ratios, comparisons, the table."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
try:
    from benchmarks import compare, table
    from benchmarks.common import run, vectors
    from benchmarks.harness import Cell, best, expect_close, met, shares, summed_up
finally:
    sys.path.pop(0)


def made(ours: list[float], theirs: list[float] | None = None, **options) -> dict:
    sides = {"ours float32": ours} | ({"theirs float32": theirs} if theirs else {})
    return summed_up(Cell("cell", work=10, unit="tokens", **options), sides)


def result(path: Path, cells: dict, **fields) -> Path:
    found = {"date": "2026-01-01 00:00 UTC", "device": "CPU", "benchmark": "made", "cells": cells}
    path.write_text(json.dumps(found | fields))
    return path


def test_medians_spread_and_the_ratio_of_the_better_formats() -> None:
    seconds = {
        "ours float32": [9.0, 9.0, 9.0],
        "ours bfloat16": [2.0, 1.0, 4.0],
        "theirs float32": [3.0, 6.0, 5.0],
        "theirs bfloat16": [7.0, 7.0, 7.0],
    }
    found = summed_up(Cell("cell", work=10, unit="tokens", target=2.0), seconds)
    assert (best(found, "ours"), best(found, "theirs")) == ("ours bfloat16", "theirs float32")
    assert found["sides"]["ours bfloat16"] == {
        "per_second": 5.0, "median_s": 2.0, "low_s": 1.0, "high_s": 4.0, "rounds": 3,
    }  # fmt: skip
    assert found["times_faster"] == 2.5  # medians, not the median of the ratios (1.5)
    assert found["times_faster_rounds"] == [1.25, 6.0]


@pytest.mark.parametrize(
    ("found", "reached"),
    [
        (made([1.0], [1.5], target=1.5), True),
        (made([1.0], [1.4], target=1.5), False),
        (made([1.0, 2.0, 3.0], at_most_s=2.0), True),
        (made([1.0, 2.1, 3.0], at_most_s=2.0), False),
        (made([1.0], target=1.5), None),  # no peer was timed
        (made([1.0], [2.0]), None),
    ],
)
def test_targets(found: dict, reached: bool | None) -> None:
    assert met(found) is reached


def test_the_nearer_limit_is_the_bound() -> None:
    limits = {"float32_flops": 100.0, "bfloat16_flops": 200.0, "bytes": 10.0}
    cells = {
        "compute": made([2.0], flops=100, bytes=5),
        "memory": made([2.0], flops=10, bytes={"float32": 10, "bfloat16": 5}),
        "neither": made([2.0]),
    }
    shares(cells, limits)
    told = {name: (of.get("bound_by"), of.get("share_of_limit")) for name, of in cells.items()}
    assert told == {
        "compute": ("matrix rate", 0.5),
        "memory": ("memory rate", 0.5),
        "neither": (None, None),
    }


def test_outputs_that_differ_stop_a_benchmark() -> None:
    right, near, far = {"sample": [3.0, 4.0]}, {"sample": [3.0, 4.04]}, {"sample": [3.0, 4.1]}
    cell = Cell("cell")
    expect_close(cell, {"ours bfloat16": near, "theirs float32": right}, float32=0, bfloat16=0.01)
    for side, allowed in (("ours bfloat16", 0.01), ("ours float32", 0.1)):
        with pytest.raises(RuntimeError, match=f"{side} differs by 0.02"):
            expect_close(
                cell,
                {side: far, "theirs float32": right},
                float32=0.01,
                bfloat16=allowed,
            )
    bad = {"sample": [float("nan"), 4.0]}
    with pytest.raises(RuntimeError, match="differs by nan"):
        expect_close(cell, {"ours float32": bad, "theirs float32": right}, float32=1, bfloat16=1)


def test_only_changes_beyond_noise_are_marked() -> None:
    old = {name: made([1.0, 1.1, 1.2], [2.0] * 3) for name in ("same", "slow", "fast", "wide")}
    old["small"] = made([1.0, 1.0, 1.0])
    new = {
        "same": made([1.0, 1.1, 1.2], [3.0] * 3),
        "slow": made([1.3, 1.4, 1.5], [2.0] * 3),
        "fast": made([0.5, 0.6, 0.7], [2.0] * 3),
        "wide": made([1.19, 1.4, 1.5], [2.0] * 3),  # the spreads touch
        "small": made([1.02, 1.02, 1.02]),  # 2 %
    }
    changes = {change.cell: change for change in compare.compare(old, new)}
    verdicts = {name: change.verdict for name, change in changes.items()}
    assert verdicts == {"same": "", "slow": "slower", "fast": "faster", "wide": "", "small": ""}
    assert changes["slow"].part == pytest.approx(1.4 / 1.1 - 1, rel=1e-3)
    assert changes["same"].peer == pytest.approx(0.5, rel=1e-3)


def test_runs_over_other_amounts_compare_by_the_unit() -> None:
    twice = summed_up(Cell("cell", work=20, unit="tokens"), {"ours float32": [2.0]})
    (change,) = compare.compare({"cell": made([1.0])}, {"cell": twice})
    assert change.part == pytest.approx(0)


def told(monkeypatch, capsys, *words) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["compare", *map(str, words)])
    try:
        compare.main()
    except SystemExit as stop:
        return int(stop.code or 0), " ".join(capsys.readouterr().out.split())
    return 0, " ".join(capsys.readouterr().out.split())


def test_compare_warns_refuses_and_fails(tmp_path: Path, monkeypatch, capsys) -> None:
    old = result(tmp_path / "old.json", {"cell": made([1.0])}, versions={"jax": "1"})
    new = result(tmp_path / "new.json", {"cell": made([2.0])}, versions={"jax": "2"}, device="GPU")
    other = result(tmp_path / "other.json", {"cell": made([1.0])}, benchmark="another")
    bare = tmp_path / "bare.json"
    bare.write_text('{"benchmark": "made"}')
    code, text = told(monkeypatch, capsys, old, new)
    assert code == 0
    assert "versions: jax was 1 and is 2" in text
    assert "device was 'CPU' and is 'GPU'" in text
    assert "+100.0%" in text
    assert told(monkeypatch, capsys, old, new, "--fail-on-slower")[0] == 1
    assert told(monkeypatch, capsys, new, old, "--fail-on-slower")[0] == 0
    code, text = told(monkeypatch, capsys, old, other)
    assert code == 2 and "is of made and" in text and "of another" in text
    code, text = told(monkeypatch, capsys, old, bare)
    assert code == 2 and "run the benchmark again with --save" in text


def test_the_table_tells_what_was_found() -> None:
    cells = {
        "quick": made([1.0], [2.0], target=1.5),
        "slow": made([2.0], [1.0], target=1.0, reason="a | b"),
        "unknown": made([2.0], [1.0], target=1.0),
        "alone": summed_up(Cell("alone", at_most_s=0.5), {"ours": [0.25]}),
    }
    page = table.as_markdown(
        {"other": {}, "made": {"date": "today", "device": "CPU", "load": 0.1, "cells": cells}}
    )
    assert "**made**: today, CPU, load 0.1" in page
    assert (
        "| quick | 10 tokens/s, float32 | 5 tokens/s, float32 | 2.00 (2.00 to 2.00) | 1.5 | met | |"
        in page.replace("|  |", "| |")
    )
    assert r"missed: a \| b" in page
    assert "missed: reason not known yet" in page
    assert "| alone | 0.25 s (0.25 to 0.25) |" in page and "at most 0.5 s | met" in page
    assert "`other.json`" in page


def test_a_table_is_put_between_its_marks() -> None:
    page = f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n"
    once = table.written_into(page, "new\n")
    assert once == f"before\n{table.BEGIN}\n\nnew\n\n{table.END}\nafter\n"
    assert table.written_into(once, "new\n") == once
    with pytest.raises(ValueError, match="lacks a line"):
        table.written_into("before\n", "new\n")


def test_the_readme_says_what_the_results_say(monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["table", "--check"])
    table.main()


def test_the_best_vector_instructions_are_named(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor : 0\nflags : fpu avx2 avx512f avx512_bf16\n", encoding="utf-8")
    assert vectors(cpuinfo) == ", avx512_bf16"
    cpuinfo.write_text("flags : fpu avx2\n", encoding="utf-8")
    assert vectors(cpuinfo) == ", avx2"
    assert vectors(tmp_path / "none") == ""


def test_the_peak_of_a_child_is_its_own() -> None:
    held = bytearray(b"x") * 2**28
    ran = run([sys.executable, "-c", "import time; x = bytearray(b'x') * 2**26; time.sleep(0.5)"])
    assert 2**-4 < ran.peak_gib < 2**-2 and held[-1]  # GiB; Linux's count begins with the parent's
    with pytest.raises(RuntimeError, match="ended with 3"):
        run([sys.executable, "-c", "raise SystemExit(3)"])
