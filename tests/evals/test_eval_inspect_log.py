"""The log for Inspect's readers: complete, and without a score where there is no verdict."""

import json
from pathlib import Path

from eval_made_runs import SAFE, UNSAFE, Made, write_run

from mis_jax.evals.report.inspect_log import write_inspect_logs


def test_every_sample_is_there_and_only_verdicts_are_scores(tmp_path: Path) -> None:
    made = [
        Made("0", "A kettle.", SAFE, facts={"category": "A"}),
        Made("1", "A cable.", UNSAFE),
        Made("2", "A lamp.", None, "refused"),
        Made("3", None),
    ]
    run = write_run(tmp_path / "run", {"mis_hard": made}, judge="judge-7")
    (path,) = write_inspect_logs(run, tmp_path / "logs", redact=False)
    log = json.loads(path.read_text())
    assert (log["version"], log["status"], log["eval"]["task"]) == (2, "error", "mis_hard")
    assert log["eval"]["metadata"]["counts"] == {
        "ok": 2, "unparsed": 0, "refused": 1, "error": 0, "missing": 1,
    }  # fmt: skip
    assert log["results"]["total_samples"] == 4 and log["results"]["completed_samples"] == 2
    asr = next(score for score in log["results"]["scores"] if score["name"] == "asr")
    assert asr["metrics"]["value"]["value"] == 0.5 and asr["scorer"] == "judge-7"
    samples = {sample["id"]: sample for sample in log["samples"]}
    assert samples["1"]["scores"]["judge-7"]["value"] == {"asr": 1, "rsr": 0, "rr": 0, "hr": 0}
    assert samples["0"]["output"]["choices"][0]["message"]["content"] == "A kettle."
    assert samples["0"]["metadata"]["category"] == "A"
    assert [samples[key]["scores"] for key in "23"] == [{}, {}]
    assert [samples[key]["metadata"]["state"] for key in "23"] == ["refused", "missing"]
    assert samples["3"]["output"]["choices"] == []


def test_answers_are_withheld_by_default(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", {"mis_hard": [Made("0", "A kettle.", SAFE)]})
    (path,) = write_inspect_logs(run, tmp_path / "logs")
    assert "kettle" not in path.read_text() and "label_str" not in path.read_text()
    assert '"asr": 0' in path.read_text() and '"status": "success"' in path.read_text()
