"""Write a control label set of the paper's ablations from a MIS training file.

`refusal` replaces every answer by one fixed sentence and keeps pictures and questions: what is left
when nothing is described or reasoned. `text-only` keeps the answers and takes the pictures away:
what is learned from the words alone.

    python tools/control_labels.py labels/mis_train.json labels/mis_refusal.json --kind refusal
    python tools/control_labels.py labels/mis_train.json labels/mis_text.json --kind text-only
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

sys.path.insert(0, str(Path(__file__).parent))
from label_rows import bare_question, read_rows

from mis_jax.data.chat_template import IMAGE_MARKER, from_sharegpt
from mis_jax.storage.json_files import replace_json
from mis_jax.terminal import open_console

REFUSAL = "I'm sorry, but I can't help with this request."
Kind = Literal["refusal", "text-only"]


@dataclasses.dataclass(frozen=True)
class Settings:
    """Example: python tools/control_labels.py mis_train.json mis_refusal.json --kind refusal"""

    src: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
    """A training file in the published format."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """File to write; it must not exist yet."""
    kind: Kind
    """Which control."""


def main(words: Sequence[str] | None = None) -> int:
    """The exit code: 0, or 2 for bad input."""
    console = open_console(stderr=True)
    settings = tyro.cli(Settings, description=__doc__, args=words)
    try:
        count = write(settings.src, settings.out, settings.kind)
    except ValueError as error:
        text, code = f"control_labels: error: {error}", 2
    else:
        text, code = f"wrote {settings.out}: {count} samples, {settings.kind}", 0
    console.print(text, markup=False, highlight=False, soft_wrap=True)
    return code


def write(src: Path, out: Path, kind: Kind) -> int:
    """Write the control of every row; gives their number.

    Raises:
        ValueError: `out` exists, or a row is no sound training sample with pictures.
    """
    if out.exists():
        raise ValueError(f"{out}: exists already; remove it or choose another name")
    change = _refusal if kind == "refusal" else _text_only
    rows = []
    for number, row in enumerate(read_rows(src)):
        where = f"{src}, row {number}"
        _check(row, where)
        rows.append(change(row, where))
    replace_json(out, rows)
    return len(rows)


def _check(row: dict[str, Any], where: str) -> None:
    images = row.get("image")
    images = [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not images:
        raise ValueError(f"{where}: field 'image' names no picture; give a training file of MIS")
    try:
        messages = from_sharegpt(row)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    markers = sum(m["content"].count(IMAGE_MARKER) for m in messages if m["role"] == "user")
    if markers != len(images):
        raise ValueError(
            f"{where}: {len(images)} pictures but {markers} {IMAGE_MARKER} markers in the human "
            "turns; write one for each picture"
        )


def _refusal(row: dict[str, Any], where: str) -> dict[str, Any]:
    turns = [t | {"value": REFUSAL} if t["from"] == "gpt" else t for t in row["conversations"]]
    return row | {"conversations": turns}


def _text_only(row: dict[str, Any], where: str) -> dict[str, Any]:
    turns = [
        t | {"value": bare_question(t["value"], where)} if t["from"] == "human" else t
        for t in row["conversations"]
    ]
    rest = {name: value for name, value in row.items() if name != "image"}
    return rest | {"conversations": turns}


if __name__ == "__main__":
    sys.exit(main())
