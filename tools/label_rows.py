"""Two-picture samples from MIS files of either style, and training rows back."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from label_prompt import PROMPT_VERSION

from mis_jax.data.chat_template import IMAGE_MARKER
from mis_jax.data.images import image_size
from mis_jax.evals.benchmarks.table import unique_ids
from mis_jax.parsing import parse_json
from mis_jax.storage.hashing import digest, file_digest

_PREFIX = re.compile(r"\A(?:\s*(?:image-\d+:\s*)?<image>)+", re.IGNORECASE)
_KEPT = ("category", "sub_category")


@dataclass(frozen=True)
class Sample:
    """A question about two pictures."""

    id: str  # unique in its file
    question: str  # without image markers
    images: tuple[str, str]  # relative to the root
    paths: tuple[Path, Path]
    kept: dict[str, Any]  # fields that go unchanged into the training row


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON list or mapping, or of a .jsonl file; ValueError names file and row."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error}); save it as UTF-8") from None
    if path.suffix == ".jsonl":
        # Only "\n" ends a line: splitlines() would also cut at U+2028, which JSON allows.
        lines = enumerate(text.split("\n"), start=1)
        rows = [_parse(line, f"{path}, line {n}") for n, line in lines if line.strip()]
    else:
        rows = _parse(text, str(path))
        rows = list(rows.values()) if isinstance(rows, dict) else rows
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{path}: holds no list of samples; give a MIS file")
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(f"{path}, row {number}: not an object with fields; give a MIS file")
    return rows


def _parse(text: str, where: str) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        raise ValueError(f"{where}: not valid JSON ({error}); repair it") from None


def bare_question(text: str, where: str) -> str:
    """A human turn without the image markers in front of it; ValueError when more are inside."""
    question = _PREFIX.sub("", text).strip()
    if IMAGE_MARKER in question:
        raise ValueError(
            f"{where}: {IMAGE_MARKER} stands inside the question; move it to the front"
        )
    if not question:
        raise ValueError(f"{where}: the question is missing; write one or remove the row")
    return question


def read_samples(path: Path, root: Path) -> list[Sample]:
    """The samples of a file of either style, every picture looked for and its header read.

    Raises:
        ValueError: a row without a question, with other than two pictures, or with one that is
            missing, not an image or outside `root`; file, row and remedy are named.
    """
    rows = read_rows(path)
    samples = []
    for number, (name, row) in enumerate(zip(unique_ids(rows), rows, strict=True)):
        where = f"{path}, row {number}"
        images = [_relative(image, root, where) for image in _images(row, where)]
        first, second = images
        for image in images:
            _look_at(root / image, where)
        own = row.get("id")
        kept = {"id": own if str(own) == name else name}
        kept |= {field: row[field] for field in _KEPT if field in row}
        paths = (root / first, root / second)
        samples.append(Sample(name, _question(row, where), (first, second), paths, kept))
    return samples


def _question(row: dict[str, Any], where: str) -> str:
    text = row.get("question")
    if "question" not in row and "conversations" in row:
        turns = row["conversations"]
        turns = turns if isinstance(turns, list) else []
        asked = [t for t in turns if isinstance(t, dict) and t.get("from") == "human"]
        if len(asked) != 1:
            raise ValueError(
                f"{where}: field 'conversations' has {len(asked)} human turns; leave exactly one"
            )
        text = asked[0].get("value")
    if not isinstance(text, str) or not text.strip():
        raise ValueError(
            f"{where}: the question is missing; fill in the field 'question' or the human turn"
        )
    return bare_question(text, where)


def _images(row: dict[str, Any], where: str) -> list[str]:
    numbered = sorted(field for field in row if re.fullmatch(r"image_path\d+", field))
    found = [row[field] for field in numbered] if numbered else row.get("image", [])
    found = [found] if isinstance(found, str) else found
    if not isinstance(found, list) or not all(isinstance(name, str) and name for name in found):
        raise ValueError(f"{where}: field {(numbered or ['image'])[0]!r} must name picture files")
    if len(found) != 2:
        raise ValueError(
            f"{where}: {len(found)} pictures where exactly two are needed; name them in "
            "'image_path1' and 'image_path2', or as a list in 'image'"
        )
    return found


def _relative(image: str, root: Path, where: str) -> str:
    if not Path(image).is_absolute():
        return image
    try:
        return Path(image).relative_to(root.absolute()).as_posix()
    except ValueError:
        raise ValueError(f"{where}: {image} lies outside {root}; give another --root") from None


def _look_at(path: Path, where: str) -> None:
    """Only the header: decoding ten thousand pictures would hold up every restart."""
    try:
        image_size(path)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def sample_key(sample: Sample, model: str) -> str:
    """Everything that decides what is asked of whom: with any change it is another request."""
    return digest(
        {
            "question": sample.question,
            "images": [file_digest(path) for path in sample.paths],
            "prompt": PROMPT_VERSION,
            "model": model,
        }
    )


def training_row(sample: Sample, label: str) -> dict[str, Any]:
    """The sample as the published training file has it."""
    markers = f"{IMAGE_MARKER}\n" * len(sample.images)
    return sample.kept | {
        "image": list(sample.images),
        "conversations": [
            {"from": "human", "value": markers + sample.question},
            {"from": "gpt", "value": label},
        ],
    }
