"""The launch files: they parse, and the docs show what there is."""

import re
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "tools" / "launch").iterdir())


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_the_docs_name_every_launch_file(path):
    page = (ROOT / "docs" / "pods.md").read_text(encoding="utf-8")
    assert f"tools/launch/{path.name}" in page
    assert "mis-jax" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", [p for p in FILES if p.suffix != ".yaml"], ids=lambda p: p.name)
def test_scripts_are_sound_and_explain_themselves(path):
    text = path.read_text(encoding="utf-8")
    shell = "bash" if text.startswith("#!/bin/bash") else "sh"
    subprocess.run([shell, "-n", path], check=True)
    assert re.search(rf"^#   .*{path.name} .*CONFIG", text, re.M)


def test_the_jobset_is_one_run_of_as_many_slices_as_it_says():
    content = yaml.safe_load((ROOT / "tools" / "launch" / "gke_jobset.yaml").read_text())
    (job,) = content["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    words = container["command"]
    assert words[words.index("--mesh.slices") + 1] == str(job["replicas"])
    assert spec["parallelism"] == spec["completions"]
    (rule,) = spec["podFailurePolicy"]["rules"]
    assert 75 not in rule["onExitCodes"]["values"]
