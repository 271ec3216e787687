"""InternVL's meta json: a file that names jsonl sets and says how each one is used.

Source: `build_datasets` in OpenGVLab/InternVL,
`internvl_chat/internvl/train/internvl_chat_finetune.py`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mis_jax.parsing import parse_json
from mis_jax.storage.files import read_text

_MANY = 10**9  # samples
_MOST_COPIES = 10_000  # rows of all copies are held
_KEYS = ("root", "annotation", "data_augment", "repeat_time", "length", "max_dynamic_patch")


@dataclass(frozen=True)
class MetaSet:
    """One set of a meta file.

    Attributes:
        name: its key in the file.
        annotation: its jsonl.
        root: the folder its images are relative to.
        repeat: above 1, so many copies of the set; below, that part of it, from the start.
        length: its samples according to the file, None where it says nothing.
        max_tiles: `max_dynamic_patch`, None where it says nothing.
        augment: `data_augment`, None where it says nothing.
    """

    name: str
    annotation: Path
    root: Path
    repeat: float = 1
    length: int | None = None
    max_tiles: int | None = None
    augment: bool | None = None

    def taken(self, count: int) -> int:
        """How many of `count` samples are used, all copies together; upstream rounds down too."""
        return int(count * self.repeat)


def read_meta(path: Path) -> list[MetaSet]:
    """The sets of a meta file, in its order.

    Relative paths are of the working directory, as upstream has them, or else of the file's folder.

    Raises:
        ValueError: a file that is missing or not such a file, or a wrong field; file, set and field
            are named.
    """
    try:
        content = parse_json(read_text(path, "utf-8-sig"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; check the source's path") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); give a file") from None
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error}); repair the file") from None
    if not isinstance(content, dict) or not content:
        raise ValueError(
            f"{path}: holds {content!r:.40}; expected an object of sets, each with its 'annotation'"
        )
    sets = []
    for name, fields in content.items():
        try:
            sets.append(_set(name, fields, path.parent))
        except ValueError as error:
            raise ValueError(f"{path}, set '{name}': {error}") from None
    return sets


def _set(name: str, fields: Any, folder: Path) -> MetaSet:
    if not isinstance(fields, dict):
        raise ValueError(f"is {fields!r:.60}; give an object with 'annotation'")
    if unknown := [key for key in fields if key not in _KEYS]:
        names = ", ".join(f"'{key}'" for key in unknown)
        raise ValueError(f"unknown field {names}; known are {', '.join(_KEYS)}")
    annotation = _text(fields, "annotation")
    if annotation is None:
        raise ValueError("field 'annotation' is missing; name the set's .jsonl file")
    if not annotation.endswith(".jsonl"):
        raise ValueError(
            f"field 'annotation' is '{annotation}'; name a .jsonl file, "
            "or make a JSON list a source of kind sharegpt"
        )
    root = _text(fields, "root")
    where = _found(annotation, folder)
    augment = fields.get("data_augment")
    if augment is not None and not isinstance(augment, bool):
        raise ValueError(f"field 'data_augment' is {augment!r:.60}; give true or false")
    return MetaSet(
        name=name,
        annotation=where,
        root=where.parent if root is None else _found(root, folder),
        repeat=_repeat(fields.get("repeat_time", 1)),
        length=_whole(fields, "length", 0),
        max_tiles=_whole(fields, "max_dynamic_patch", 1),
        augment=augment,
    )


def _found(written: str, folder: Path) -> Path:
    path = Path(written)
    return path if path.is_absolute() or path.exists() else folder / path


def _text(fields: dict[str, Any], name: str) -> str | None:
    value = fields.get(name)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"field '{name}' is {value!r:.60}; give a path")
    return value


def _whole(fields: dict[str, Any], name: str, least: int) -> int | None:
    value = fields.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= _MANY:
        raise ValueError(
            f"field '{name}' is {value!r:.60}; give a whole number from {least} to {_MANY}"
        )
    return value


def _repeat(value: Any) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    # Written so that a value that is no number is refused too.
    if not number or not 0 < value <= _MOST_COPIES or (value > 1 and value != value // 1):
        raise ValueError(
            f"field 'repeat_time' is {value!r:.60}; give a whole number of copies "
            f"up to {_MOST_COPIES}, or a part between 0 and 1"
        )
    return value
