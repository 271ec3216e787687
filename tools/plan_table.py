"""What fits where: a train step of every published size, compiled for some hardware.

    python tools/plan_table.py compile [SIZE ...]    # adds to docs/assets/plan.json, minutes
    python tools/plan_table.py render                # writes the table of docs/plan.md from it

Settings are those of configs/internvl2_5/ in sequences of 4,096 tokens and 12 tiles (as
configs/hardware/ has them), one sequence a device at a time, FSDP over all devices. Of each
rung of `RUNGS` the first that fits is kept, else the last.
"""

import json
import sys
from dataclasses import replace
from datetime import date
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import Any

from mis_jax.config import DtypeConfig, RunConfig, load_config
from mis_jax.plan import plan

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "assets" / "plan.json"
PAGE = ROOT / "docs" / "plan.md"
SIZES = ("1b", "2b", "4b", "8b", "26b", "38b", "78b")
TOPOLOGIES = ("h100:1", "h200:1", "h100:8", "v6e:2x4", "v5e:4x4")
RUNGS = {"full": ("float32", "bfloat16"), "lora": ("bfloat16", "nf4")}
LENGTH, TILES = 4096, 12
BEGIN, END = "<!-- plan_table: begin -->", "<!-- plan_table: end -->"


def settings(size: str, training: str, rung: str, chips: int) -> RunConfig:
    """A shipped configuration with the state of a rung, four sequences a device a step."""
    config = load_config(ROOT / "configs" / "internvl2_5" / f"{size}_{training}.yaml")
    train = replace(
        config.train, global_batch=4 * chips, micro_batch=chips, remat="full",
        loss_average="global", loss_group=None, epoch_multiple=None,  # of the script's own batch
    )  # fmt: skip
    dtype, lora = DtypeConfig(), config.lora
    if training == "lora":
        dtype = replace(dtype, params="bfloat16")
        lora = replace(lora, base=rung if rung == "nf4" else "none")
    elif rung == "bfloat16":
        dtype = replace(dtype, params=rung, moments=rung, gradients=rung)
    return replace(
        config, model=Path(f"internvl2_5-{size}"), train=train, dtype=dtype, lora=lora
    )  # fmt: skip


def compiled(size: str, training: str, topology: str) -> dict[str, Any]:
    """One cell of the table; the compiler decides."""
    chips = prod(int(side) for side in topology.split(":")[1].split("x"))
    cell: dict[str, Any] = {"size": size, "training": training, "topology": topology}
    for rung in RUNGS[training]:
        config = settings(size, training, rung, chips)
        result = plan(config, topology, length=LENGTH, tiles=TILES).as_json()
        memory = result["memory_gib"]
        cell |= {
            "state": rung,
            "fits": result["fits"],
            "total_gib": memory["total"],
            "limit_gib": memory["limit"],
            "step_s": result["predicted_step_s"],
            "tokens_per_s": result["steps"]["train"].get("tokens_per_s"),
            "compile_s": result["steps"]["train"]["compile_s"],
        }
        if result["fits"]:
            break
    return cell


def compile_sizes(sizes: list[str]) -> None:
    """Compile what the file lacks of these sizes; each cell is written as it is known."""
    record = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"cells": []}
    record |= {"date": date.today().isoformat(), "length": LENGTH, "tiles": TILES}
    record["versions"] = {name: version(name) for name in ("jax", "jaxlib", "libtpu")}
    known = {(cell["size"], cell["training"], cell["topology"]) for cell in record["cells"]}
    for topology in TOPOLOGIES:
        for size in sizes:
            for training in RUNGS:
                if (size, training, topology) in known:
                    continue
                try:
                    cell = compiled(size, training, topology)
                except ValueError as error:
                    print(f"{size} {training} {topology}: {error}", file=sys.stderr)
                    continue
                record["cells"].append(cell)
                RESULTS.write_text(json.dumps(record, indent=1) + "\n")
                print(cell, flush=True)


def table(cells: list[dict[str, Any]]) -> str:
    """Markdown: a line for each size and training, a column for each topology."""
    by_key = {(cell["size"], cell["training"], cell["topology"]): cell for cell in cells}
    lines = [
        "| InternVL2.5 | training | " + " | ".join(f"`{name}`" for name in TOPOLOGIES) + " |",
        "| --- | --- |" + " --- |" * len(TOPOLOGIES),
    ]
    for size in SIZES:
        for training in RUNGS:
            shown = [_cell(by_key.get((size, training, name))) for name in TOPOLOGIES]
            lines.append(f"| {size.upper()} | {training} | {' | '.join(shown)} |")
    return "\n".join(lines)


def _cell(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return "–"
    if not cell["fits"]:
        return f"no ({cell['total_gib']:,.0f})"
    return f"{cell['state']}: {cell['total_gib']:.0f}, {cell['tokens_per_s'] / 1000:,.0f}k/s"


def page_with(text: str, cells: list[dict[str, Any]]) -> str:
    """The page's text with the table of these cells."""
    begin, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    return f"{text[:begin]}\n\n{table(cells)}\n\n{text[end:]}"


def main() -> None:
    """Compile or render."""
    if sys.argv[1:2] == ["compile"]:
        compile_sizes(sys.argv[2:] or list(SIZES))
    elif sys.argv[1:] == ["render"]:
        PAGE.write_text(page_with(PAGE.read_text(), json.loads(RESULTS.read_text())["cells"]))
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main()
