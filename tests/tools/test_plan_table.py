"""The table of docs/plan.md against the figures that it was written from."""

import json
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "tools"))
import plan_table


def test_the_page_has_the_committed_figures():
    record = json.loads(plan_table.RESULTS.read_text())
    cells = record["cells"]
    page = plan_table.PAGE.read_text()
    assert plan_table.page_with(page, cells) == page, "python tools/plan_table.py render"
    assert (record["length"], record["tiles"]) == (plan_table.LENGTH, plan_table.TILES)
    keys = [(cell["size"], cell["training"], cell["topology"]) for cell in cells]
    assert len(keys) == len(set(keys)) > 50
    for cell in cells:
        assert cell["fits"] == (cell["total_gib"] <= cell["limit_gib"])


def test_the_settings_are_the_official_scripts_with_the_state_of_the_rung():
    full = plan_table.settings("8b", "full", "bfloat16", 8)
    assert (full.dtype.params, full.dtype.moments, full.dtype.gradients) == ("bfloat16",) * 3
    assert (full.train.global_batch, full.train.micro_batch) == (32, 8)
    assert plan_table.settings("8b", "full", "float32", 8).dtype.params == "float32"
    lora = plan_table.settings("8b", "lora", "nf4", 1)
    assert (lora.lora.base, lora.lora.rank, lora.dtype.params) == ("nf4", 16, "bfloat16")
