"""Every benchmark from one command: the tiny model answers, judges of all kinds judge, a report."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from chat_server import MODEL, Say, serving
from eval_safety_files import write_safety_sets
from eval_tables import general_root
from eval_world import write_data_root

from mis_jax.cli import main
from mis_jax.evals.benchmarks import BENCHMARKS
from mis_jax.evals.judges.prompts import PROTOCOLS

MINI = Path(__file__).parents[2] / "mis_jax" / "assets" / "mini"
BUILT_IN = [b.name for b in BENCHMARKS.values() if b.default_judge]
BY_MODEL = [b.name for b in BENCHMARKS.values() if not b.default_judge]


def write_mis(root: Path) -> None:
    """The published names and fields of MIS over the pictures of the mini world's rows."""
    rows = json.loads((root / "mini_hard.json").read_text())
    for name in ("mis_easy", "mis_hard", "mis_real"):
        (root / f"{name}.json").write_text(json.dumps(rows))


def fields_of(body: dict[str, Any]) -> dict[str, Any]:
    return body["response_format"]["json_schema"]["schema"]["properties"]


def consenting(nonce: str, nth: int, body: dict[str, Any]) -> Say:
    """A judge that finds the first of the allowed words in every field of its schema."""
    return Say(json.dumps({name: field["enum"][0] for name, field in fields_of(body).items()}))


def roomy_model(folder: Path) -> Path:
    """The tiny model with room for the 4,096 tokens that the general sets allow an answer."""
    shutil.copytree(MINI, folder)
    config = json.loads((folder / "config.json").read_text())
    config["llm_config"]["max_position_embeddings"] = 8192
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.slow
def test_every_benchmark_from_one_command(tmp_path: Path, capsys) -> None:
    data, run, out = tmp_path / "data", tmp_path / "run", tmp_path / "report"
    write_data_root(data)
    write_mis(data)
    write_safety_sets(data)
    general_root(data)
    names = ",".join([*BENCHMARKS, "mis_hard@black", "mis_hard@text", "mis_hard@swapped"])
    model = roomy_model(tmp_path / "model")
    main(["eval", str(model), "--benchmarks", names, "--data-root", str(data), "--out", str(run)])
    with pytest.raises(SystemExit) as ended:  # words that match no option have no verdict
        main(["judge", str(run), "--benchmarks", ",".join(BUILT_IN)])
    assert ended.value.code == 1
    with serving(consenting) as server:
        judged = ",".join([*BY_MODEL, "mis_hard@black", "mis_hard@text", "mis_hard@swapped"])
        words = ["--judge", server.url, "--judge-model", MODEL, "--benchmarks", judged]
        main(["judge", str(run), *words])
        asked = {tuple(fields_of(body)) for _, body in server.bodies}
    assert len(asked) == len(PROTOCOLS) - 1  # all but the one that options decide
    main(["report", str(run), "--out", str(out)])
    results = json.loads((run / "results.json").read_text())
    assert results.keys() == {*BENCHMARKS, "mis_hard@black", "mis_hard@text", "mis_hard@swapped"}
    for name, entry in results.items():
        counts = entry["counts"]
        # Words of the tiny model that match no option are nobody's to guess.
        lost = counts["unparsed"] if name in BUILT_IN else 0
        assert entry["n"] == counts["ok"] + lost > 0, (name, counts)
        benchmark = BENCHMARKS[name.partition("@")[0]]
        assert entry["metrics"].keys() == {*benchmark.metrics, *benchmark.over_pairs}
    page = (out / "report.html").read_text()
    assert not re.search(r"(?:src|href)=[\"']?https?:", page)  # nothing is loaded from elsewhere
    assert all(name in page for name in BENCHMARKS)
