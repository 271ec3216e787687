"""Pages of the docs that state figures or promise to run: checkpoints.md, own-data.md."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from mis_jax import cli
from mis_jax.checkpoint import nnx_state
from mis_jax.mini.icons import draw_scene
from mis_jax.model.family import FAMILY

ROOT = Path(__file__).resolve().parent.parent


def test_the_table_of_checkpoints_is_that_of_the_family() -> None:
    text = (ROOT / "docs" / "checkpoints.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `OpenGVLab/(\S+)` \|[^|]+\| ([\d.]+) B \| ([\d.]+) GB \|$", text, re.M)
    expected = []
    for name, config in FAMILY.items():
        shapes = nnx_state.flat(nnx_state.abstract_model(config)).values()
        parameters = sum(int(np.prod(array.shape)) for array in shapes)
        expected.append((name, f"{parameters / 1e9:.2f}", f"{2 * parameters / 1e9:.1f}"))
    assert [(name.lower(), *sizes) for name, *sizes in rows] == expected


@pytest.mark.slow
def test_the_page_about_own_data_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its files are written and its commands run as shown, but the server, tested elsewhere."""
    text = (ROOT / "docs" / "own-data.md").read_text(encoding="utf-8")
    blocks = dict(re.findall(r"```(\w+)\n(.*?)```", text, re.S))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mis_jax").symlink_to(ROOT / "mis_jax")
    images = tmp_path / "data" / "mine" / "images"
    images.mkdir(parents=True)
    for name in ("toaster", "bathtub"):
        draw_scene(name, np.random.default_rng(0)).save(images / f"{name}.png")
    (images.parent / "train.jsonl").write_text(blocks["json"], encoding="utf-8")
    (tmp_path / "mine.yaml").write_text(blocks["yaml"], encoding="utf-8")
    for line in re.findall(r"^\$ mis-jax (.+)$", text, re.M):
        words = [word.strip('"') for word in re.findall(r'"[^"]*"|\S+', line)]
        if words[0] != "serve":
            cli.main(words + (["--json"] if words[0] == "generate" else []))
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert answer["text"]
    assert (tmp_path / "runs" / "mine" / "metrics.jsonl").is_file()
