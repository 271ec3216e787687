"""JSON files: read so that every error names the file, the field and a remedy; written whole."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from mis_jax.parsing import parse_json
from mis_jax.storage.files import refuse_lfs_pointer, replace_text, write_text

REQUIRED = object()
MOST = 2**31 - 1  # of any whole number, which arrays and files count with
_LARGEST = 1e30  # of any number; float32 ends at 3.4e38


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; ValueError when it is missing, broken or not an object."""
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; a checkpoint folder must hold it") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); give a file") from None
    except ValueError as error:  # no JSON, no UTF-8
        refuse_lfs_pointer(path)
        raise ValueError(f"{path}: not valid JSON ({error}); download the file again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds no JSON object; download the file again")
    return content


def write_json(path: Path, value: Any) -> None:
    """Write a JSON document into a folder that is not in place yet."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_document(path: Path, remedy: str) -> Any:
    """A JSON document of any kind; ValueError names the file and what to do about it."""
    try:
        return parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; {remedy}") from None
    except (OSError, ValueError) as error:
        refuse_lfs_pointer(path)
        raise ValueError(f"{path} cannot be read as JSON ({error}); {remedy}") from error


def replace_json(path: Path, value: Any) -> None:
    """Replace a JSON document, whose folder is made; ValueError for a number that JSON lacks."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    replace_text(path, text + "\n")


@dataclass(frozen=True)
class Fields:
    """One JSON object of a file. A field that is null counts as left out, as in transformers."""

    path: Path
    values: dict[str, Any]
    prefix: str = ""  # of field names in errors, such as "vision_config."

    def refuse(self, name: str, supported: str) -> NoReturn:
        """Raise ValueError: this field's value is not supported."""
        raise ValueError(
            f"{self.path}: field '{self.prefix}{name}' is {self.values.get(name)!r:.100}; "
            f"supported: {supported}"
        )

    def get(self, name: str, default: Any = REQUIRED) -> Any:
        """The value as it is; ValueError when a field without a default is left out."""
        value = self.values.get(name)
        if value is not None:
            return value
        if default is REQUIRED:
            raise ValueError(
                f"{self.path}: field '{self.prefix}{name}' is missing; "
                "take the complete file of the published checkpoint"
            )
        return default

    def section(self, name: str, default: Any = REQUIRED) -> "Fields":
        """A nested object."""
        value = self.get(name, default)
        if not isinstance(value, dict):
            self.refuse(name, "a JSON object")
        return Fields(self.path, value, f"{self.prefix}{name}.")

    def count(self, name: str, default: Any = REQUIRED, *, most: int = MOST) -> int:
        """A whole number above zero."""
        value = self.get(name, default)
        if not _is_number(value) or value != int(value) or value <= 0:
            self.refuse(name, "a whole number above zero")
        if value > most:
            self.refuse(name, f"at most {most}")
        return int(value)

    def whole(self, name: str, default: Any = REQUIRED) -> int:
        """A whole number, of either sign."""
        value = self.get(name, default)
        if not _is_number(value) or value != int(value) or abs(value) > MOST:
            self.refuse(name, f"a whole number up to {MOST}")
        return int(value)

    def number(self, name: str, default: Any = REQUIRED) -> float:
        """A number above zero."""
        value = self.get(name, default)
        if not _is_number(value) or not 0 < value <= _LARGEST:
            self.refuse(name, f"a number above zero, up to {_LARGEST:g}")
        return float(value)

    def flag(self, name: str, default: Any = REQUIRED) -> bool:
        """True or false."""
        value = self.get(name, default)
        if not isinstance(value, bool):
            self.refuse(name, "true or false")
        return value

    def one_of(self, name: str, supported: Sequence[Any], default: Any = REQUIRED) -> Any:
        """One of a few values."""
        value = self.get(name, default)
        if value not in supported:
            self.refuse(name, ", ".join(map(repr, supported)))
        return value

    def text(self, name: str, default: Any = REQUIRED) -> Any:
        """A string (or the default)."""
        value = self.get(name, default)
        if value is not default and not isinstance(value, str):
            self.refuse(name, "a string")
        return value


def token_number(text: str) -> int | None:
    """The id that a key such as "151667" is; None for any other text."""
    return int(text) if text.isdecimal() and len(text) <= len(str(MOST)) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
